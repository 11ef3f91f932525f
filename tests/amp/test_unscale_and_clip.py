# SPDX-License-Identifier: Apache-2.0
"""GradScaler.unscale_ and clip_grad_norm_, against torch in fp64."""

import math
import weakref

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests import bounds
from tests.amp.scaling import give_grads, iteration
from tests.optimizers import everything, parameters
from tests.steps import raw


def fp64_clipped(params, scale, max_norm) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What torch's clip_grad_norm_ makes of the gradients in fp64, and the norm."""
    twins = [nn.Parameter(p.detach().double()) for p in params]
    for twin, parameter in zip(twins, params, strict=True):
        twin.grad = parameter.grad.double() / scale
    norm = torch.nn.utils.clip_grad_norm_(twins, max_norm)
    return [twin.grad for twin in twins], norm


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
@pytest.mark.parametrize("way", ["max_norm", "scaler", "unscale", "torch"])
def test_clip_matches_torch_in_fp64(way, max_norm, generator):
    """SGD with lr 1 shows the clipped gradient; by four ways to ask for it, the same."""
    params = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (7, 100)]
    scaler = mpk.GradScaler(init_scale=1024.0)
    optimizer = mpk.optim.SGD(params, lr=1.0, max_norm=max_norm if way in ("max_norm", "unscale") else None)
    scaler.scale(torch.zeros(()))
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 1024
    expected, norm = fp64_clipped(params, 1024.0, max_norm)
    got = None
    if way == "scaler":
        got = scaler.clip_grad_norm_(optimizer, max_norm)
    if way in ("unscale", "torch"):
        scaler.unscale_(optimizer)
    if way == "torch":
        got = torch.nn.utils.clip_grad_norm_(params, max_norm)
    scaler.step(optimizer)
    scaler.update()
    bounds.check_norm((optimizer.grad_norm if got is None else got).item(), norm.item(), 107)
    for parameter, grad in zip(params, expected, strict=True):
        bounds.check_trajectory(-parameter.detach().numpy()[None], grad.numpy()[None], None)


def test_unscale_makes_16_bit_gradients_fp32():
    params, scaler = parameters(torch.float16, torch.bfloat16, torch.float32, torch.float64), mpk.GradScaler()
    optimizer = mpk.optim.AdamW(params, lr=0.1)
    give_grads(params, scaler, size=0.0)
    params[0].grad = torch.full_like(params[0], 2.0**-20)  # 2^-36 once unscaled: fp16 has nothing there
    scaler.unscale_(optimizer)
    assert [p.grad.dtype for p in params] == [torch.float32] * 3 + [torch.float64]
    assert params[0].grad.tolist() == [2.0**-36] * 5
    assert params[0].grad_dtype is None
    before = raw([p.grad for p in params])
    scaler.step(optimizer)
    scaler.update()
    assert raw([p.grad for p in params]) == before, "not unscaled twice"
    optimizer.zero_grad()
    (params[0] * 2).sum().backward()
    assert params[0].grad.dtype == torch.float16


def test_unscale_then_no_step_then_next_step():
    """An iteration may be left out: the next one's 16-bit gradients are read as such, not as the fp32 ones of unscale_."""
    trajectories = []
    for left_out in (False, True):
        params, scaler = parameters(torch.float16, torch.bfloat16, n=2000), mpk.GradScaler(init_scale=8.0)
        optimizer = mpk.optim.SGD(params, lr=0.1)
        iteration(params, optimizer, scaler)
        if left_out:
            give_grads(params, scaler, size=3.0)
            scaler.unscale_(optimizer)
            scaler.update()
        optimizer.zero_grad()
        iteration(params, optimizer, scaler, size=2.0)
        trajectories.append(everything(optimizer))
    assert trajectories[0] == trajectories[1]


def test_unscale_then_inf_is_not_checked_again():
    """As torch: found_inf is that of unscale_; what the user makes of the gradients afterwards is theirs."""
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.SGD(params, lr=0.1)
    give_grads(params, scaler)
    scaler.unscale_(optimizer)
    params[0].grad.fill_(math.inf)
    scaler.step(optimizer)
    assert params[0].isinf().all()


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_unscale_then_skip_is_reported(max_norm):
    model = nn.Linear(2, 2)
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters(), max_norm=max_norm), mpk.GradScaler()
    give_grads(list(model.parameters()), scaler, poison=math.inf)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.overflow_report(optimizer) == (
        "step 1 skipped at scale 65536: bias has 1 non-finite of 2, amax 65536 of the finite ones"
    ), "as they were read, scaled"


def test_clip_grad_norm_reads_a_preset_grad_scale():
    params, scaler = [nn.Parameter(torch.zeros(4))], mpk.GradScaler(init_scale=8.0)
    optimizer = mpk.optim.SGD(params, lr=1.0)
    for clip in (False, True):
        give_grads(params, scaler, size=2.0)
        optimizer.grad_scale = torch.tensor(2.0)
        with torch.no_grad():
            params[0].zero_()
        norm = scaler.clip_grad_norm_(optimizer, 100.0) if clip else None
        scaler.step(optimizer)
        scaler.update()
        assert params[0].tolist() == [-1.0] * 4, "gradients are divided by scale times grad_scale"
        assert norm is None or norm.item() == 2.0
        assert not hasattr(optimizer, "grad_scale")


def test_preset_grad_scale_after_unscale():
    params, scaler = [nn.Parameter(torch.zeros(4))], mpk.GradScaler(init_scale=8.0)
    optimizer = mpk.optim.SGD(params, lr=1.0)
    give_grads(params, scaler, size=2.0)
    scaler.unscale_(optimizer)
    optimizer.grad_scale = torch.tensor(4.0)
    scaler.step(optimizer)
    assert params[0].tolist() == [-0.5] * 4


def clipping(**options) -> tuple[list[nn.Parameter], mpk.optim.SGD, mpk.GradScaler]:
    """Zeros whose gradients of 1 have a norm of 4, which SGD with lr 1 subtracts."""
    params = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (4, 12)]
    scaler = mpk.GradScaler(init_scale=8.0)
    give_grads(params, scaler)
    return params, mpk.optim.SGD(params, lr=1.0, **options), scaler


@pytest.mark.parametrize("poison", [None, math.inf])
def test_clip_goes_with_its_gradients(poison):
    """Gradients may be taken away, as by `zero_grad` of the optimizer; those of the next backward are read, and not clipped."""
    params, optimizer, scaler = clipping()
    scaler.clip_grad_norm_(optimizer, 1.0)
    give_grads(params, scaler, size=2.0, poison=poison)
    scaler.step(optimizer)
    scaler.update()
    assert [p[0].item() for p in params] == ([-2.0, -2.0] if poison is None else [0.0, 0.0])
    assert scaler.last_step_skipped == (poison is not None)


def _write(params):
    params[0].grad.mul_(2)


def _replace_one(params):
    params[1].grad = torch.full_like(params[1], 16.0)


def _take_one_away(params):
    params[1].grad = None


@pytest.mark.parametrize("change", [_write, _replace_one, _take_one_away])
def test_clip_reads_again_what_changed(change):
    """The norm is of the gradients that the step finds, as long as one of those is among them for which it was asked."""
    params, optimizer, scaler = clipping()
    scaler.clip_grad_norm_(optimizer, 1.0)
    change(params)
    present = [p for p in params if p.grad is not None]
    expected, norm = fp64_clipped(present, 8.0, 1.0)
    scaler.step(optimizer)
    bounds.check_norm(optimizer.grad_norm.item(), norm.item(), 16)
    for parameter, grad in zip(present, expected, strict=True):
        bounds.check_trajectory(-parameter.detach().numpy()[None], grad.numpy()[None], None)


def test_clip_then_an_inf_is_found():
    params, optimizer, scaler = clipping()
    scaler.clip_grad_norm_(optimizer, 1.0)
    params[1].grad[3] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.last_step_skipped
    assert not any(p.any() for p in params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_clip_then_unscale(dtype):
    """The clip stays with what unscale_ makes of the gradients."""
    results = []
    for unscale in (False, True):
        params, scaler = parameters(dtype, n=50), mpk.GradScaler(init_scale=8.0)
        optimizer = mpk.optim.SGD(params, lr=1.0)
        give_grads(params, scaler)
        scaler.clip_grad_norm_(optimizer, 0.5)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        results.append(raw(params))
    assert results[0] == results[1]


@pytest.mark.parametrize("norms", [(0.5, 0.1), (0.1, 0.5), (0.1, math.inf)])
@pytest.mark.parametrize("change", [False, True])
def test_clip_after_clip_does_not_undo_it(norms, change):
    """As of torch's, whose second finds what the first has left."""
    results = []
    for some in (norms, [min(norms)]):
        params, optimizer, scaler = clipping()
        for max_norm in some:
            scaler.clip_grad_norm_(optimizer, max_norm)
            if change:
                params[0].grad.mul_(1.0)  # the gradients are read again
        scaler.step(optimizer)
        results.append(raw(params))
    assert results[0] == results[1]


def test_clip_reads_once(monkeypatch):
    params, optimizer, scaler = clipping()
    scaler.clip_grad_norm_(optimizer, 1.0)
    monkeypatch.setattr(optimizer._reader, "read", None)
    scaler.step(optimizer)
    assert all(p.all() for p in params)


def test_clip_grad_norm_errors():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    with pytest.raises(ValueError, match=r"it was made with max_norm=1\.0"):
        scaler.clip_grad_norm_(mpk.optim.AdamW(params, max_norm=1.0), 1.0)
    optimizer = mpk.optim.AdamW(params)
    with pytest.raises(AssertionError, match="Attempted clip_grad_norm_ but _scale is None"):
        scaler.clip_grad_norm_(optimizer, 1.0)
    give_grads(params, scaler)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"Invalid max_norm: {bad}"):
            scaler.clip_grad_norm_(optimizer, bad)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="being called after step"):
        scaler.clip_grad_norm_(optimizer, 1.0)


@pytest.mark.parametrize("enabled", [True, False])
def test_scaler_says_that_it_wants_an_optimizer(enabled):
    """torch.nn.utils.clip_grad_norm_ takes parameters."""
    params, scaler = parameters(torch.float32), mpk.GradScaler(enabled=enabled)
    give_grads(params, scaler)
    for given, said in ((params, "list"), (iter(params), "list_iterator"), (None, "NoneType")):
        for name, call in {
            "clip_grad_norm_": lambda given: scaler.clip_grad_norm_(given, 1.0),
            "step": scaler.step,
            "unscale_": scaler.unscale_,
        }.items():
            with pytest.raises(TypeError, match=rf"{name}: optimizer must be an optimizer.*, got {said}"):
                call(given)


def test_unscale_keeps_no_gradients_of_parameters_that_come_and_go():
    params, scaler = parameters(torch.float32, torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.AdamW(params)
    for present in (params, params[:1], params):
        optimizer.zero_grad()
        give_grads(present, scaler)
        scaler.unscale_(optimizer)
        kept = weakref.ref(present[0].grad)
        scaler.update()
    optimizer.zero_grad()
    assert kept() is None
