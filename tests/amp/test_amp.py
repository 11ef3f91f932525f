# SPDX-License-Identifier: Apache-2.0
"""Tests of GradScaler: torch's sequences and errors, what a skipped step leaves alone, clipping, reports, checkpoints."""

import copy
import io
import math
import pickle
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpkernels as mpk
from tests import bounds
from tests.steps import BAD_VALUES, compute_copies, raw

OURS = {"AdamW": mpk.optim.AdamW, "Adam": mpk.optim.Adam, "SGD": lambda p, **o: mpk.optim.SGD(p, momentum=0.9, **o)}


def parameters(*dtypes, n=5) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for dtype in dtypes]


def give_grads(params, scaler, size=1.0, poison=None):
    """What backward of a scaled loss leaves: gradients times the scale."""
    scaler.scale(torch.zeros(()))
    for parameter in params:
        parameter.grad = torch.full_like(parameter, size * scaler.get_scale())
    if poison is not None:
        params[-1].grad[-1] = poison


def iteration(params, optimizer, scaler, poison=None, size=1.0):
    give_grads(params, scaler, size, poison)
    scaler.step(optimizer)
    scaler.update()


def everything(optimizer) -> list[bytes]:
    """Bytes of parameters, masters, moments, step counts and compute copies."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in params for _, t in sorted(optimizer.state[p].items())]
    return raw([*params, *states, *compute_copies(optimizer)])


# ----- the scale ----------------------------------------------------------------------

PATTERNS = ("." * 30, "x" * 30, "..x" * 10, "x....." * 5, "xx..x." * 5)


@pytest.mark.filterwarnings("ignore:the last 20 steps")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "options", [{}, {"growth_interval": 3}, {"init_scale": 8.0, "growth_factor": 1.5, "backoff_factor": 0.375}]
)
def test_scaler_sequence_is_that_of_torch(pattern, options):
    ours, theirs = mpk.GradScaler(**options), torch.amp.GradScaler("cpu", **options)
    for scaler, make in ((ours, mpk.optim.SGD), (theirs, torch.optim.SGD)):
        scaler.scales, scaler.params = [], parameters(torch.float32)
        scaler.optimizer = make(scaler.params, lr=0.1)
    for event in pattern:
        for scaler in (ours, theirs):
            iteration(scaler.params, scaler.optimizer, scaler, math.inf if event == "x" else None)
            scaler.scales.append((scaler.get_scale(), scaler._get_growth_tracker()))
    assert ours.scales == theirs.scales


def test_scaler_default_sequence_grows_after_2000_steps():
    scaler, params = mpk.GradScaler(), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.0)
    give_grads(params, scaler)
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 1990})
    for i in range(10):
        assert scaler.get_scale() == 2.0**16, i
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**17


@pytest.mark.filterwarnings("ignore:the last 20 steps")
def test_scaler_bounds_hold_in_a_storm_and_after_it():
    scaler, params = mpk.GradScaler(growth_interval=1, min_scale=2.0**-3, max_scale=2.0**20), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    for _ in range(40):
        iteration(params, optimizer, scaler, math.nan)
    assert scaler.get_scale() == 2.0**-3
    assert (scaler.skipped_steps.item(), scaler.skipped_in_a_row.item(), scaler.last_step_skipped.item()) == (40, 40, True)
    before = params[0].detach().clone()
    for _ in range(40):
        iteration(params, optimizer, scaler)
    assert scaler.get_scale() == 2.0**20
    assert (scaler.skipped_steps.item(), scaler.skipped_in_a_row.item(), scaler.last_step_skipped.item()) == (40, 0, False)
    assert not torch.equal(before, params[0])


def test_scaler_default_bounds():
    scaler, params = mpk.GradScaler(init_scale=2.0**-124), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    for _ in range(5):
        iteration(params, optimizer, scaler, math.inf)
    assert scaler.get_scale() == 2.0**-126
    scaler.update(2.0**127)
    scaler.set_growth_interval(1)
    for _ in range(3):
        give_grads(params, scaler, size=2.0**-127)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**127


def test_scaler_hysteresis():
    scaler, params = mpk.GradScaler(hysteresis=3, growth_interval=2, init_scale=64.0), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    scales = []
    for event in "xx.xx..xxx":
        iteration(params, optimizer, scaler, math.inf if event == "x" else None)
        scales.append(scaler.get_scale())
    # Two overflows pass, the third and fourth back off; two good steps grow and refill; again the third backs off.
    assert scales == [64, 64, 64, 32, 16, 16, 32, 32, 32, 16]


def test_scaler_growth_step_is_unscaled_with_the_scale_of_its_gradients():
    scaler, params = mpk.GradScaler(growth_interval=1, init_scale=4.0), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=1.0)
    start = params[0].detach().clone()
    for t in range(1, 5):
        iteration(params, optimizer, scaler)
        assert scaler.get_scale() == 4.0 * 2**t
    expected = start
    for _ in range(4):
        expected = expected - 1.0
    assert torch.equal(params[0], expected)


def test_scaler_update_with_a_new_scale():
    scaler = mpk.GradScaler()
    scaler.scale(torch.zeros(()))
    scaler.update(8.0)
    assert scaler.get_scale() == 8
    scaler.update(torch.tensor(32.0))
    assert scaler.get_scale() == 32
    scaler.update(64)
    assert scaler.get_scale() == 64
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="new_scale must be between"):
            scaler.update(bad)
    with pytest.raises(AssertionError, match="1-element"):
        scaler.update(torch.ones(2))
    assert scaler.get_scale() == 64


@pytest.mark.parametrize("new_scale", [8.0, torch.tensor(8.0)], ids=str)
def test_scaler_update_with_a_new_scale_counts(new_scale):
    """Of the last step no more than whether it was taken; scale, growth and hysteresis are left to what set the scale."""
    params, scaler = parameters(torch.float32), mpk.GradScaler(hysteresis=2)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    iteration(params, optimizer, scaler)
    for poison, skipped in ((math.inf, 1), (math.inf, 2), (None, 0)):
        give_grads(params, scaler, poison=poison)
        scaler.step(optimizer)
        scaler.update(new_scale)
        assert scaler.skipped_in_a_row == skipped
        assert scaler.state_dict() == {
            **torch.amp.GradScaler("cpu", init_scale=8.0).state_dict(),
            "_growth_tracker": 1,
            "hysteresis_tracker": 2,
            "skipped": [2 if skipped == 0 else skipped, skipped],
        }


# ----- scale() ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**20, 8.0, 2.0**-10])
@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: [t], lambda t: (torch.zeros(()), t), lambda t: [[torch.zeros(())], (t,)]]
)
def test_scale_refuses_float16(wrap, scale):
    """Whatever the scale is, for the same reason: it is the gradient of the loss, and changes."""
    scaler = mpk.GradScaler(init_scale=scale)
    message = rf"^loss is float16: .* the scale itself \({scale:.9g} at first\), .* compute the loss in float32"
    with pytest.raises(ValueError, match=message):
        scaler.scale(wrap(torch.ones((), dtype=torch.float16)))
    assert scaler._scale is None, "nothing may have happened"
    disabled = mpk.GradScaler(enabled=False)
    assert disabled.scale(wrap(torch.ones((), dtype=torch.float16))) is not None


def test_scale_refuses_float16_from_a_generator():
    losses = mpk.GradScaler().scale(torch.ones((), dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert next(losses) == 2.0**16
    with pytest.raises(ValueError, match="loss is float16"):
        next(losses)


def test_scale_values_and_containers():
    scaler = mpk.GradScaler(init_scale=4.0)
    assert scaler.scale(torch.ones((), dtype=torch.bfloat16)).item() == 4
    result = scaler.scale([torch.ones(2), (torch.ones(()), torch.ones((), dtype=torch.float64))])
    assert [type(result), type(result[1])] == [list, tuple]
    assert [result[0].tolist(), result[1][0].item(), result[1][1].item()] == [[4, 4], 4, 4]
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable"):
        scaler.scale(1.0)


def test_scale_is_placed_where_the_first_loss_is():
    scaler = mpk.GradScaler()
    scaler.scale(torch.ones((), device="meta"))
    assert scaler._scale.device.type == scaler._growth_tracker.device.type == "meta"
    scaler = mpk.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    assert scaler._scale.device.type == scaler.skipped_steps.device.type == "cpu"


# ----- construction ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        *(({"init_scale": v}, f"init_scale .*got {v}") for v in (0.0, -1.0, math.nan, math.inf)),
        *(({"min_scale": v}, f"min_scale .*got {v}") for v in (0.0, -1.0, math.nan, math.inf, 1e-300)),
        *(({"max_scale": v}, f"max_scale .*got {v}") for v in (0.0, -1.0, math.nan, math.inf)),
        *(({"growth_factor": v}, f"growth_factor .*got {v}") for v in (1.0, 0.5, math.nan, math.inf)),
        *(({"backoff_factor": v}, f"backoff_factor .*got {v}") for v in (0.0, 1.0, -0.5, math.nan)),
        *(({"growth_interval": v}, f"growth_interval .*got {v}") for v in (0, -1, 2.5, True, 2**63)),
        *(({"hysteresis": v}, f"hysteresis .*got {v}") for v in (0, -1, 1.5, True, 2**31)),
        *(
            ({name: "8"}, f"{name} must be")
            for name in ("init_scale", "min_scale", "max_scale", "growth_factor", "growth_interval")
        ),
        ({"init_scale": 1.0, "min_scale": 2.0}, "init_scale must be between min_scale 2.0"),
        ({"init_scale": 8.0, "max_scale": 4.0}, "max_scale 4.0, got 8.0"),
    ],
)
def test_scaler_construction_errors(options, message):
    with pytest.raises(ValueError, match=message):
        mpk.GradScaler(**options)


def test_scaler_takes_numpy_numbers():
    scaler = mpk.GradScaler(
        init_scale=np.float32(8), growth_factor=np.float64(4), backoff_factor=np.float32(0.25), growth_interval=np.int64(2),
        min_scale=np.float64(0.5), max_scale=np.int64(512), hysteresis=np.int32(1),
    )  # fmt: skip
    params = parameters(torch.float32)
    optimizer, scales = mpk.optim.SGD(params, lr=0.0), []
    for event in "..x....":
        iteration(params, optimizer, scaler, math.inf if event == "x" else None)
        scales.append(scaler.get_scale())
    assert scales == [8, 32, 8, 8, 32, 32, 128]
    scaler.update(np.float32(16))
    assert scaler.get_scale() == 16
    scaler.set_growth_interval(np.int64(3))
    scaler.set_growth_factor(np.float32(2))
    scaler.set_backoff_factor(np.float32(0.5))
    assert (scaler.get_growth_interval(), scaler.get_growth_factor(), scaler.get_backoff_factor()) == (3, 2.0, 0.5)


@pytest.mark.parametrize(
    "name, bad", [("growth_interval", 0), ("growth_interval", 2**63), ("growth_factor", 1.0), ("backoff_factor", 1)]
)
def test_scaler_setters_refuse_what_construction_refuses(name, bad):
    scaler = mpk.GradScaler()
    with pytest.raises(ValueError, match=f"{name} must be"):
        getattr(scaler, f"set_{name}")(bad)
    assert getattr(scaler, f"get_{name}")() == getattr(mpk.GradScaler(), f"get_{name}")()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_scaler_on_an_absent_device():
    with pytest.raises(RuntimeError, match="GradScaler: device cuda is not there"):
        mpk.GradScaler("cuda")
    assert not mpk.GradScaler("cuda", enabled=False).is_enabled()


# ----- the step ----------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("poison", BAD_VALUES)
def test_inf_leaves_state_bitwise(name, poison):
    """16-bit parameters with masters, fp32, fp64 and a layer with a compute copy; the bad value is in the last tensor."""
    layer = mpk.MPLinear(3, 3, policy="mixed_float16")
    layer(torch.ones(1, 3))
    params = [*layer.parameters(), *parameters(torch.float16, torch.bfloat16, torch.float64, torch.float32)]
    optimizer, scaler = OURS[name](params, lr=0.1), mpk.GradScaler(init_scale=8.0)
    iteration(params, optimizer, scaler)
    before = everything(optimizer)
    for _ in range(3):
        iteration(params, optimizer, scaler, poison)
        assert everything(optimizer) == before
    assert scaler.get_scale() == 1
    iteration(params, optimizer, scaler)
    assert everything(optimizer) != before
    assert {state["step"].item() for state in optimizer.state.values()} == {2}, "steps count what was taken"


@pytest.mark.parametrize("scale", [0.0, -8.0, math.nan, math.inf])
@pytest.mark.parametrize("unscale", [False, True])
def test_bad_scale_is_an_overflow(scale, unscale):
    params, scaler = parameters(torch.float16, torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.AdamW(params, lr=0.1)
    give_grads(params, scaler, size=2.0**-16)
    before = raw(params)
    scaler._scale.fill_(scale)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert raw(params) == before
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_overflow_that_unscaling_makes():
    """Finite in fp32, not once it is divided by a scale below 1."""
    params, scaler = parameters(torch.float32), mpk.GradScaler(init_scale=2.0**-20)
    optimizer = mpk.optim.SGD(params, lr=0.1)
    scaler.scale(torch.zeros(()))
    params[0].grad = torch.full_like(params[0], 1e38)
    before = raw(params)
    scaler.step(optimizer)
    assert raw(params) == before
    assert scaler.overflow_report(optimizer).endswith("every gradient is finite, but not once it is unscaled")


@pytest.mark.parametrize("name", OURS)
def test_scaled_steps_are_unscaled_steps_bitwise(name):
    """A scale that is a power of two changes nothing; two skipped steps between change nothing."""
    results = []
    for scale in (None, 2.0**16, 2.0**-3):
        params = parameters(torch.float16, torch.bfloat16, torch.float32, torch.float64)
        optimizer = OURS[name](params, lr=0.1)
        scaler = mpk.GradScaler(enabled=scale is not None, init_scale=scale or 1.0, backoff_factor=0.5)
        for t, poison in enumerate((None, math.inf, None, math.nan, None)):
            if poison is not None and scale is None:
                continue
            for p in params:
                p.grad_dtype, p.grad = None, None
                p.grad = torch.full(p.shape, (t + 1) * 0.125 * scaler.get_scale())
            if poison is not None:
                params[0].grad[0] = poison
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
        results.append(everything(optimizer))
    assert results[0] == results[1] == results[2]


def test_gradients_stay_scaled_unless_write_grads():
    for write_grads, poison, expected in ((False, None, 8.0), (True, None, 1.0), (True, math.inf, 8.0)):
        params, scaler = parameters(torch.float32, torch.float16), mpk.GradScaler(init_scale=8.0)
        optimizer = mpk.optim.AdamW(params, write_grads=write_grads)
        iteration(params, optimizer, scaler, poison)
        assert params[0].grad.tolist() == [expected] * 5
        assert params[1].grad[:4].tolist() == [expected] * 4
        assert params[1].grad.dtype == torch.float16


def test_write_grads_leaves_what_torch_fused_leaves():
    left = []
    for make in (lambda p: mpk.optim.AdamW(p, write_grads=True), lambda p: torch.optim.AdamW(p, fused=True)):
        params, scaler = parameters(torch.float32), mpk.GradScaler()
        iteration(params, make(params), scaler, size=0.3)
        left.append(params[0].grad)
    assert torch.equal(*left)


class _NarrowFactors(TorchDispatchMode):
    """A factor of no dimensions is rounded to the dtype of what it multiplies, as CUDA does; the CPU computes in fp32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mul_.Tensor, torch.ops.aten.mul.Tensor) and args[0].dim() and not args[1].dim():
            args = args[0], args[1].to(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_write_grads_of_a_scale_whose_reciprocal_is_no_fp16(dtype):
    params, scaler = parameters(dtype), mpk.GradScaler(init_scale=2.0**26)
    optimizer = mpk.optim.SGD(params, lr=1.0, write_grads=True)
    give_grads(params, scaler, size=2.0**-16)
    with _NarrowFactors():
        scaler.step(optimizer)
    assert params[0].grad.tolist() == [2.0**-16] * 5


def test_two_optimizers_one_scaler():
    first, second, scaler = parameters(torch.float32), parameters(torch.float16), mpk.GradScaler(init_scale=64.0)
    good, bad = mpk.optim.AdamW(first, lr=0.1), mpk.optim.SGD(second, lr=0.1)
    before = raw(first), raw(second)
    give_grads(first, scaler)
    give_grads(second, scaler, poison=math.inf)
    for optimizer in (good, bad):
        scaler.step(optimizer)
    scaler.update()
    assert raw(first) != before[0]
    assert raw(second) == before[1]
    assert scaler.get_scale() == 32, "one backoff"
    assert scaler.skipped_steps == 1
    assert scaler.overflow_report(good) == ""
    assert scaler.overflow_report(bad).startswith("step 1 skipped at scale 64: ")


def test_accumulation_with_inf_in_the_first_micro_batch():
    layer = mpk.MPLinear(3, 2, policy="mixed_float16")
    optimizer, scaler = mpk.optim.AdamW(layer.parameters(), lr=0.1), mpk.GradScaler()
    before = raw(layer.parameters())
    for x in (torch.full((2, 3), 1e30), torch.ones(2, 3), torch.ones(2, 3)):
        scaler.scale(layer(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert raw(layer.parameters()) == before
    assert scaler.get_scale() == 2.0**15
    optimizer.zero_grad()
    for _ in range(2):
        scaler.scale(layer(torch.ones(2, 3)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert raw(layer.parameters()) != before


def test_no_gradients_at_all():
    params, scaler = parameters(torch.float32), mpk.GradScaler(growth_interval=1)
    optimizer = mpk.optim.AdamW(params)
    scaler.scale(torch.zeros(()))
    before = raw(params)
    for prepare in (lambda _: None, scaler.unscale_, lambda o: scaler.clip_grad_norm_(o, 1.0)):
        prepare(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert raw(params) == before
    assert scaler.get_scale() == 2.0**16
    assert scaler.overflow_report(optimizer) == ""


def test_no_gradients_at_all_under_torchs_scaler():
    params, scaler = parameters(torch.float32), torch.amp.GradScaler("cpu")
    optimizer = mpk.optim.AdamW(params)
    scaler.scale(torch.zeros(()))
    before = raw(params)
    scaler.step(optimizer)
    assert raw(params) == before


def test_disabled_scaler():
    params, twins = parameters(torch.float32), parameters(torch.float32)
    scaler, optimizer, plain = mpk.GradScaler(enabled=False), mpk.optim.SGD(params, lr=0.1), mpk.optim.SGD(twins, lr=0.1)
    loss = torch.ones((), dtype=torch.float16)
    assert scaler.scale(loss) is loss
    for group in (params, twins):
        group[0].grad = torch.ones(5)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    assert raw(params) == raw(twins)
    assert (scaler.get_scale(), scaler.state_dict()) == (1.0, {})
    scaler.load_state_dict({})
    norm = scaler.clip_grad_norm_(optimizer, 0.5)
    assert norm.item() == math.sqrt(5)
    assert optimizer.step() is None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    ],
    ids=["sgd", "adamw", "fused_adamw", "fused_sgd"],
)
def test_other_optimizers_are_stepped_as_by_torch(make):
    results = []
    for scaler in (mpk.GradScaler(growth_interval=2), torch.amp.GradScaler("cpu", growth_interval=2)):
        params = parameters(torch.float32, torch.float64)
        optimizer = make(params)
        for poison in (None, math.inf, None, None, math.nan, None):
            iteration(params, optimizer, scaler, poison, size=0.3)
        clipped = getattr(scaler, "clip_grad_norm_", None)
        give_grads(params, scaler)
        if clipped:
            norm = clipped(optimizer, 0.5)
        else:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
        results.append((raw(params), raw([p.grad for p in params]), scaler.get_scale(), norm))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", OURS)
def test_our_optimizers_under_torchs_scaler(name):
    results = []
    for scaler in (mpk.GradScaler(growth_interval=2), torch.amp.GradScaler("cpu", growth_interval=2)):
        params = parameters(torch.float16, torch.float32, torch.float64)
        optimizer = OURS[name](params, lr=0.1, max_norm=0.7)
        for poison in (None, math.inf, None, None, math.nan, None):
            iteration(params, optimizer, scaler, poison, size=0.25)
        results.append((everything(optimizer), scaler.get_scale()))
    assert results[0] == results[1]


def test_writes_are_seen_by_autograd():
    """A weight or a scale that a graph has saved: backward after the step or the update is an error, not another gradient."""
    for dtype in (torch.float16, torch.float32):
        params, scaler = parameters(dtype), mpk.GradScaler(init_scale=8.0)
        optimizer = mpk.optim.AdamW(params, lr=0.1)
        for _ in range(3):  # the first is prepared anew, the others are not
            give_grads(params, scaler)
            of_weight, of_scale = params[0].square().sum(), scaler.scale(params[0].float().sum())
            scaler.step(optimizer)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                of_weight.backward()
            scaler.update()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                of_scale.backward()


def test_an_optimizer_of_ours_beside_one_of_torchs():
    """One scale for both, one backoff, and each is stepped or skipped as if it were alone."""
    for poisoned in (None, 0, 1):
        first, second, scaler = parameters(torch.float16), parameters(torch.float32), mpk.GradScaler(init_scale=64.0)
        optimizers = mpk.optim.AdamW(first, lr=0.1), torch.optim.AdamW(second, lr=0.1)
        before = [raw(first), raw(second)]
        for i, params in enumerate((first, second)):
            give_grads(params, scaler, poison=math.inf if poisoned == i else None)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert [raw(first) == before[0], raw(second) == before[1]] == [poisoned == 0, poisoned == 1]
        assert (scaler.get_scale(), scaler.skipped_steps.item()) == ((64, 0) if poisoned is None else (32, 1))


class _Delegate:
    """A wrapper that hands out the attributes of the optimizer in it."""

    def __init__(self, optimizer):
        self.inner = optimizer

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def step(self):
        self.inner.step()


@pytest.mark.parametrize(
    "make", [mpk.optim.AdamW, lambda p, **o: torch.optim.AdamW(p, fused=True, **o)], ids=["ours", "torchs"]
)
def test_wrapped_optimizers_step_on_unscaled_gradients(make):
    """Attributes that the scaler sets on a wrapper do not reach the optimizer in it."""
    results = []
    for wrap in (lambda o: o, _Delegate):
        params, scaler = parameters(torch.float32), mpk.GradScaler(init_scale=2.0**10)
        optimizer = wrap(make(params, lr=0.1, eps=1.0))
        for poison in (None, math.inf, None):
            iteration(params, optimizer, scaler, poison, size=0.5)
        results.append((raw(params), scaler.get_scale()))
    assert results[0] == results[1]


def test_wrapped_optimizer_of_float16_says_what_to_do():
    params, scaler = parameters(torch.float16), mpk.GradScaler()
    give_grads(params, scaler, size=2.0**-16)
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients.*step an optimizer of mpkernels.optim itself"):
        scaler.step(_Delegate(mpk.optim.AdamW(params)))


def test_accelerates_optimizer_steps_as_ours():
    optimizers = pytest.importorskip("accelerate.optimizer")
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    results = []
    for way in ("ours", "inside", "outside"):
        params, scaler = parameters(torch.float32), mpk.GradScaler(init_scale=2.0**10)
        optimizer = mpk.optim.AdamW(params, lr=0.1, eps=1.0)
        wrapped = optimizers.AcceleratedOptimizer(optimizer, scaler=scaler if way == "inside" else None)
        for poison in (None, math.inf, None):
            give_grads(params, scaler, 0.5, poison)
            if way == "inside":
                wrapped.step()
            else:
                scaler.step(optimizer if way == "ours" else wrapped)
                scaler.update()
        results.append((raw(params), scaler.get_scale(), scaler.skipped_steps.item()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, fused=True), torch.optim.SGD, mpk.optim.AdamW], ids=["fused", "sgd", "ours"]
)
@pytest.mark.parametrize("unscale", [False, True])
def test_step_after_an_exception_is_that_step(make, unscale):
    """The scale is taken once, ours or torch's optimizer; and without the step, the scaler can be copied and goes on."""
    results = []
    for fails in (False, True):
        params, scaler = parameters(torch.float32), mpk.GradScaler(init_scale=2.0**10)
        optimizer = make(params)
        give_grads(params, scaler, 0.5)
        if unscale:
            scaler.unscale_(optimizer)
        if fails:
            handle = optimizer.register_step_pre_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                scaler.step(optimizer)
            handle.remove()
            assert not hasattr(optimizer, "found_inf")
            if not unscale and make is mpk.optim.AdamW:
                copy.deepcopy(scaler)
        scaler.step(optimizer)
        scaler.update()
        results.append((raw(params), scaler.state_dict()))
    assert results[0] == results[1]


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, fused=True), torch.optim.SGD], ids=["fused", "sgd"])
def test_preset_scalars_of_another_optimizer_outlive_an_exception(make):
    params, scaler = parameters(torch.float32), mpk.GradScaler(init_scale=2.0**10)
    optimizer = make(params)
    give_grads(params, scaler)
    optimizer.grad_scale, optimizer.found_inf = preset = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.register_step_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scaler.step(optimizer)
    assert (optimizer.grad_scale, optimizer.found_inf) == preset
    del optimizer.grad_scale, optimizer.found_inf
    with pytest.raises(ZeroDivisionError):
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SGD, mpk.optim.SGD])
@pytest.mark.parametrize("by_name", [False, True])
def test_closures_are_refused_with_what_to_do(make, by_name):
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer, closure = make(params, lr=0.1), lambda: pytest.fail("nothing may happen")
    give_grads(params, scaler)
    before = raw(params)
    with pytest.raises(
        RuntimeError, match=r"Closure use is not currently supported.*by optimizer.step.closure. without a scaler"
    ):
        scaler.step(optimizer, **{"closure": closure}) if by_name else scaler.step(optimizer, closure)
    assert raw(params) == before
    scaler.step(mpk.optim.SGD(params, lr=0.1), None)  # accelerate passes it


def test_update_twice_says_what_to_do():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    iteration(params, mpk.optim.AdamW(params), scaler)
    with pytest.raises(AssertionError, match=r"No inf checks .* prior to update: call step\(\) of an optimizer first"):
        scaler.update()


def test_norm_of_unscaled_gradients_without_clipping():
    """What to log while `.grad` is scaled."""
    results = []
    for norm in (False, True):
        params, scaler = parameters(torch.float32, torch.float16), mpk.GradScaler()
        optimizer = mpk.optim.AdamW(params, lr=0.1)
        give_grads(params, scaler, size=2.0**-4)
        if norm:
            got = scaler.clip_grad_norm_(optimizer, math.inf)
            assert got.item() == optimizer.grad_norm.item() == math.sqrt(10) / 16
        scaler.step(optimizer)
        results.append(raw(params))
    assert results[0] == results[1]


# ----- many skipped steps in a row ----------------------------------------------------------------------


def warned(events: str, scaler=None, after_each=lambda i: None) -> list[int]:
    """At which of these updates ("x" is an overflow) the scaler warned of many skips."""
    scaler, params, found = scaler or mpk.GradScaler(), parameters(torch.float32), []
    optimizer = mpk.optim.SGD(params, lr=0.0)
    for i, event in enumerate(events, 1):
        give_grads(params, scaler, poison=math.inf if event == "x" else None)
        scaler.step(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler.update()
        assert all("steps were skipped" in str(one.message) and one.filename == __file__ for one in caught)
        found += [i] * len(caught)
        after_each(i)
    return found


@pytest.mark.parametrize(
    "events, expected",
    [
        ("x" * 19 + ".", []), ("x" * 20, [20]), ("x" * 100, [20]), ("x" * 19 + "." + "x" * 19, []), ("." * 7 + "x" * 30, [27]),
        ("x" * 25 + "." + "x" * 25, [20, 46]), ("x" * 20 + "." + "x" * 20 + "." + "x" * 20, [20, 41, 62]), ("x." * 50, []),
        ("." * 19 + "x" * 45, [39]), ("x" * 45 + "." * 3 + "x" * 20, [20, 68]),
    ],
)  # fmt: skip
def test_many_skips_in_a_row_are_told_once_per_run(events, expected):
    assert warned(events) == expected


def test_many_skips_name_the_scale_and_what_to_look_at():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.SGD(params, lr=0.0)
    for _ in range(19):
        iteration(params, optimizer, scaler, math.nan)
    give_grads(params, scaler, poison=math.nan)
    scaler.step(optimizer)
    with pytest.warns(UserWarning, match=r"last 20 steps were skipped.*loss scale is 0\.0625 now.*the data has.*overflow_rep"):
        scaler.update()


def test_many_skips_after_a_checkpoint_or_a_copy():
    scaler = mpk.GradScaler()
    assert warned("x" * 25, scaler) == [20]
    assert warned("x" * 15, copy.deepcopy(scaler)) == []
    fresh = mpk.GradScaler()
    fresh.load_state_dict(scaler.state_dict())
    assert warned("x" * 25, fresh) == [20], "the run goes on"


def test_many_skips_where_warnings_are_errors():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.SGD(params, lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            iteration(params, optimizer, scaler, math.inf)
        with pytest.raises(UserWarning, match="were skipped"):
            iteration(params, optimizer, scaler, math.inf)
        iteration(params, optimizer, scaler)
    assert scaler.skipped_in_a_row == 0


@pytest.mark.parametrize("late", [1, 3, 50])
def test_many_skips_are_read_when_the_copy_is_there(monkeypatch, late):
    """As on a GPU: nothing waits, and what is read is of the update at which it was copied."""
    from mpkernels.amp import skip_watch

    now, copies, capturing = [0], [], range(16, 22)

    class Event:
        def __init__(self, values):
            self.ready = now[0] + late

        def query(self):
            assert now[0] not in capturing
            return now[0] >= self.ready

    class Skipped(torch.Tensor):
        is_cuda, is_cpu = True, False

    def copy_to_host(values):
        copies.append(now[0])
        return values.as_subclass(torch.Tensor).clone(), Event(values)

    monkeypatch.setattr(skip_watch, "copy_to_host", copy_to_host)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0] in capturing)
    watch, found = skip_watch.SkipWatch(), []
    for i in range(1, 121):
        now[0] = i
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch.after_update(torch.tensor([i, i]).as_subclass(Skipped), torch.ones(()))
        found += [i] * len(caught)
    assert found == [22 + late]
    assert len(copies) <= 120 / 20


def test_no_value_is_read_on_the_host(monkeypatch):
    """The op is replaced by one that reads nothing; what is left is ours: no value of a tensor may be asked for."""
    params, scaler = parameters(torch.float16, torch.float32), mpk.GradScaler(init_scale=8.0)
    optimizer = mpk.optim.AdamW(params, lr=0.1)
    iteration(params, optimizer, scaler)
    give_grads(params, scaler, poison=math.inf)

    def refuse(*args):
        raise AssertionError("a step waits for the device")

    with monkeypatch.context() as patch:
        patch.setattr(mpk.optim.AdamW, "_op", mock.Mock())
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        scaler.step(optimizer)
        scaler.update()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.skipped_steps is not None
    assert scaler.skipped_steps == 3


# ----- unscale_ and clipping ----------------------------------------------------------------------


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


# ----- torch's state machine ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [mpk.optim.AdamW, torch.optim.AdamW])
def test_state_machine_errors_are_torchs(make):
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = make(params)
    for call in (scaler.unscale_, scaler.step):
        with pytest.raises(AssertionError, match="_scale is None"):
            call(optimizer)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.update()
    give_grads(params, scaler)
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last update"):
        scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.step(optimizer)


def test_step_inside_backward():
    params, scaler = parameters(torch.float32, torch.float32), mpk.GradScaler(init_scale=8.0)
    optimizer = mpk.optim.AdamW(params)
    handle = params[0].register_post_accumulate_grad_hook(lambda _: scaler.step(optimizer))
    before = raw(params)
    loss = scaler.scale(sum(p.sum() for p in params))
    with pytest.raises(RuntimeError, match="inside backward"):
        loss.backward(retain_graph=True)
    assert raw(params) == before
    handle.remove()
    optimizer.zero_grad()
    loss.backward()
    scaler.step(optimizer)
    assert raw(params) != before


def test_fp16_gradients_of_other_optimizers_stay_an_error():
    params, scaler = parameters(torch.float16), mpk.GradScaler()
    give_grads(params, scaler, size=2.0**-16)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(torch.optim.SGD(params, lr=0.1))


def test_step_that_raises_can_be_taken_again():
    params, scaler = parameters(torch.float32, torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.AdamW(params)
    give_grads(params, scaler)
    good, params[1].grad = params[1].grad, torch.ones(5).to_sparse()
    before = raw(params)
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(optimizer)
    assert raw(params) == before
    assert not hasattr(optimizer, "grad_scale")
    params[1].grad = good
    scaler.step(optimizer)
    scaler.update()
    assert raw(params) != before


def test_lr_scheduler_does_not_warn():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.AdamW(params, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            iteration(params, optimizer, scaler)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25


# ----- the report ----------------------------------------------------------------------


def test_overflow_report_with_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters()), mpk.GradScaler()
    iteration(list(model.parameters()), optimizer, scaler)
    assert scaler.overflow_report(optimizer) == ""
    give_grads(list(model.parameters()), scaler, size=2.0)
    model[0].weight.grad[0] = torch.tensor([math.inf, -math.inf, math.nan])
    model[1].bias.grad[1] = math.nan
    scaler.step(optimizer)
    scaler.update()
    assert scaler.overflow_report(optimizer) == (
        "step 2 skipped at scale 65536: 1.bias has 1 non-finite of 2, amax 131072 of the finite ones\n"
        "step 2 skipped at scale 65536: 0.weight has 3 non-finite of 12, amax 131072 of the finite ones"
    )
    iteration(list(model.parameters()), optimizer, scaler)
    assert scaler.overflow_report(optimizer) == ""


def test_overflow_report_without_names():
    params, scaler = parameters(torch.float32, torch.float16), mpk.GradScaler(init_scale=2.0**21)
    optimizer = mpk.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}])
    scaler.scale(torch.zeros(()))
    params[1].grad = torch.full((5,), -math.inf, dtype=torch.float16)
    params[1].grad[3] = -2.0
    scaler.step(optimizer)
    assert scaler.overflow_report(optimizer) == (
        "step 1 skipped at scale 2097152: parameter 1 (5,) has 4 non-finite of 5, amax 2 of the finite ones"
    )


SEARCH = (
    ": this began in the forward, the loss or the data, unless the scale is far too large: check that the inputs and the loss "
    "are finite; mpkernels.find_nonfinite(model, step) names the first module that is not"
)


def overflown(model, scaler, poison=None) -> str:
    """The report after one step of a model of 4 classes; `poison` gets the input and the output, and returns the output."""
    generator = torch.Generator().manual_seed(0)
    optimizer = mpk.optim.AdamW(model.named_parameters())
    x, y = torch.randn(16, 8, generator=generator), torch.arange(16) % 4
    if poison == "data":
        x[3, 5] = math.nan
    loss = nn.functional.cross_entropy(model(x).float(), y)
    scaler.scale(loss * math.inf if poison == "loss" else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.overflow_report(optimizer)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize("poison", ["data", "loss", "middle"])
def test_overflow_report_of_what_began_in_forward_is_one_line(act, poison):
    torch.manual_seed(0)
    middle = (nn.Linear(16, 16), nn.LayerNorm(16), act(), nn.Linear(16, 16), act())
    model = nn.Sequential(nn.Linear(8, 16), act(), *middle, nn.Linear(16, 4))
    mpk.convert(model, "mixed_float16")
    if poison == "middle":
        model[3].register_forward_hook(lambda module, args, out: torch.where(torch.arange(16) == 5, math.nan, out))
    report = overflown(model, mpk.GradScaler(), poison)
    assert report.startswith("step 1 skipped at scale 65536: 7.bias has 4 non-finite of 4, no finite element, and ")
    assert report.endswith(f" other gradients have inf or NaN too{SEARCH}")
    assert "\n" not in report


def test_overflow_report_of_nan_in_the_data_under_a_linear_loss_is_one_line():
    """Gradients of biases are finite there: what comes from above is, and only inputs are NaN."""
    torch.manual_seed(0)
    model = mpk.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), "mixed_float16")
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters()), mpk.GradScaler(init_scale=8.0)
    scaler.scale(model(torch.full((4, 8), math.nan)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.overflow_report(optimizer) == (
        "step 1 skipped at scale 8: 2.weight has 64 non-finite of 64, no finite element, and 1 of 3 other gradients have "
        f"inf or NaN too{SEARCH}"
    )


def test_overflow_report_of_what_began_in_backward_goes_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), math.nan))
    model[0].weight.register_hook(lambda grad: torch.full_like(grad, math.inf))
    lines = overflown(model, mpk.GradScaler()).split("\n")
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["2.weight", "0.weight"]
    assert "has 16 non-finite of 256, amax " in lines[0]
    assert lines[1].endswith("0.weight has 128 non-finite of 128, no finite element")


def test_overflow_report_of_a_model_with_one_gradient():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.AdamW(params)
    give_grads(params, scaler, size=math.nan)
    scaler.step(optimizer)
    scaler.update()
    found = "step 1 skipped at scale 65536: parameter 0 (5,) has 5 non-finite of 5, no finite element"
    assert scaler.overflow_report(optimizer) == found + SEARCH


def test_overflow_report_of_another_optimizer_says_what_to_do():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    for make, name in ((torch.optim.AdamW, "AdamW"), (torch.optim.SGD, "SGD"), (torch.optim.RAdam, "RAdam")):
        instead = "AdamW" if name == "RAdam" else name
        message = f"needs an optimizer of mpkernels.optim, .* got torch.optim.{name}: train with mpkernels.optim.{instead}$"
        with pytest.raises(TypeError, match=message):
            scaler.overflow_report(make(params))
    with pytest.raises(TypeError, match=r"got \S*test_amp.Lion: train with mpkernels.optim.Lion$"):  # of lion-pytorch, say
        scaler.overflow_report(type("Lion", (), {})())
    wrapper = type("Wrapper", (), {})()
    wrapper.optimizer = mpk.optim.AdamW(params)
    with pytest.raises(TypeError, match=r"got \S*test_amp.Wrapper: pass the one inside it, its \.optimizer$"):
        scaler.overflow_report(wrapper)


def test_overflow_report_without_a_scaler():
    params = parameters(torch.bfloat16)
    optimizer = mpk.optim.AdamW(params, skip_nonfinite=True)
    params[0].grad = torch.full_like(params[0], math.nan)
    before = raw(params)
    optimizer.step()
    assert raw(params) == before
    report = mpk.GradScaler(enabled=False).overflow_report(optimizer)
    assert report.startswith("step 1 skipped at scale none: parameter 0 (5,) has 5 non-finite of 5, no finite element")


# ----- checkpoints ----------------------------------------------------------------------


def worn_scaler() -> mpk.GradScaler:
    """A scaler with something in every entry of its state."""
    scaler, params = mpk.GradScaler(hysteresis=3, growth_interval=50, init_scale=2.0**10), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.0)
    for event in "xxxx..x..":
        iteration(params, optimizer, scaler, math.inf if event == "x" else None)
    return scaler


WORN = {
    "scale": 2.0**7, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 50, "_growth_tracker": 2,
    "hysteresis_tracker": 0, "skipped": [5, 0],
}  # fmt: skip


def test_state_dict_ours_to_ours():
    scaler = worn_scaler()
    assert scaler.state_dict() == WORN
    file = io.BytesIO()
    torch.save(scaler.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for fresh in (mpk.GradScaler(hysteresis=3), worn_scaler()):
        fresh.load_state_dict(loaded)
        assert fresh.state_dict() == WORN
        fresh.scale(torch.zeros(()))
        assert fresh.state_dict() == WORN


@pytest.mark.parametrize("renew", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_copies_of_the_scaler(renew):
    twin = renew(worn_scaler())
    assert twin.state_dict() == WORN
    assert twin.scale(torch.ones(())) == WORN["scale"]
    assert twin.state_dict() == WORN


def test_state_dict_both_ways_with_torchs():
    theirs = torch.amp.GradScaler("cpu")
    theirs.load_state_dict(worn_scaler().state_dict())
    assert theirs.state_dict() == {key: value for key, value in WORN.items() if key not in ("hysteresis_tracker", "skipped")}
    ours = worn_scaler()
    ours.load_state_dict(torch.amp.GradScaler("cpu", init_scale=4.0).state_dict())
    assert ours.state_dict() == torch.amp.GradScaler("cpu", init_scale=4.0).state_dict() | {
        "hysteresis_tracker": 3, "skipped": [0, 0],
    }  # fmt: skip


NO_COUNTS = (-1, 1.5, math.nan, "1", True, 2**31, [1], np.float64(1), np.bool_(1), torch.ones((), dtype=torch.int64))
NO_SKIPS = (*(count for count in NO_COUNTS if count != 2**31), 2**63)
NO_NUMBERS = ("1", True, [1.0], 10**400, 1j, torch.ones(()), np.ones(1), np.nan)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": 0.0}, "scale must be between"),
        ({"scale": math.nan}, "scale must be between"),
        ({"growth_factor": 1.0}, "growth_factor must be greater than 1"),
        ({"backoff_factor": 2.0}, "backoff_factor must be between 0 and 1"),
        ({"growth_interval": 0}, "growth_interval must be an int"),
        ({"growth_factor": None}, "state_dict lacks growth_factor"),
        ({"scale": "1"}, "scale must be a number, got '1'"),
        ({"backoff_factor": "1"}, "backoff_factor must be a number, got '1'$"),
        ({"backoff_factor": torch.tensor(0.5)}, r"backoff_factor must be a number, got tensor\(0.5000\): take its .item\(\)$"),
        *(({"_growth_tracker": v}, "_growth_tracker must be a count") for v in NO_COUNTS),
        *(({"hysteresis_tracker": v}, "hysteresis_tracker must be a count") for v in NO_COUNTS),
        *(({"growth_interval": v}, "growth_interval must be an int") for v in NO_SKIPS),
        *(({"skipped": v}, "skipped must be two counts") for v in ([1], [1, 2, 3], "ab", 3, torch.zeros(2), np.zeros(2), {})),
        *(({"skipped": pair}, "skipped must be a count") for v in NO_SKIPS for pair in ([v, 0], [0, v])),
        *(({"scale": v}, "scale must be") for v in NO_NUMBERS),
        *(({"growth_factor": v}, "growth_factor must be") for v in (*NO_NUMBERS, math.inf)),
        *(({"backoff_factor": v}, "backoff_factor must be") for v in NO_NUMBERS),
    ],
)
def test_bad_state_dict_loads_nothing(change, message):
    scaler = worn_scaler()
    bad = {key: value for key, value in (WORN | {"scale": 2.0} | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        scaler.load_state_dict(bad)
    assert scaler.state_dict() == WORN
    with pytest.raises(RuntimeError, match="The source state dict is empty"):
        scaler.load_state_dict({})
    with pytest.raises(TypeError, match="state_dict must be what a scaler's"):
        scaler.load_state_dict([1])


def test_state_dict_of_the_largest_counts():
    largest = {
        "_growth_tracker": 2**31 - 1,
        "hysteresis_tracker": 2**31 - 1,
        "skipped": [2**63 - 1, 7],
        "growth_interval": 2**63 - 1,
    }
    scaler = worn_scaler()
    scaler.load_state_dict(WORN | largest)
    assert scaler.state_dict() == WORN | largest


def test_state_dict_of_numpy_numbers():
    numpys = {
        "scale": np.float32(64), "growth_factor": np.float64(4), "backoff_factor": np.float32(0.25),
        "growth_interval": np.int64(7), "_growth_tracker": np.int32(1), "hysteresis_tracker": np.uint8(2),
        "skipped": (np.int64(5), np.int64(1)),
    }  # fmt: skip
    scaler = worn_scaler()
    scaler.load_state_dict(numpys)
    expected = {name: value for name, value in numpys.items() if name != "skipped"} | {"skipped": [5, 1]}
    assert scaler.state_dict() == expected
    assert {type(value) for value in scaler.state_dict().values()} == {float, int, list}
    params = parameters(torch.float32)
    iteration(params, mpk.optim.SGD(params, lr=0.0), scaler, math.inf)


def test_state_dict_is_not_the_scalers_own():
    given = WORN | {"skipped": [5, 1]}
    scaler = mpk.GradScaler()
    scaler.load_state_dict(given)
    given["skipped"][0] = 99
    scaler.state_dict()["skipped"][0] = 98
    assert scaler.skipped_steps == 5
