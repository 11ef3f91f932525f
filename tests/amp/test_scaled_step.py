# SPDX-License-Identifier: Apache-2.0
"""GradScaler.step: what a skipped step leaves alone, several and other optimizers, exceptions."""

import copy
import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mpkernels as mpk
from tests.amp.scaling import give_grads, iteration
from tests.optimizers import OURS, everything, parameters
from tests.steps import BAD_VALUES, raw


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


def test_gradients_that_a_hook_makes_under_torchs_scaler():
    """torch's scaler saw none and gives the sum of no found_inf, an int."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = mpk.optim.SGD([p], lr=1.0), torch.amp.GradScaler("cpu")
    optimizer.register_step_pre_hook(lambda *_: setattr(p, "grad", torch.full((3,), 4.0)))
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    optimizer.step()  # torch leaves what it gave
    assert p.tolist() == [-7.0] * 3


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


@pytest.mark.parametrize("has_guards", [True, False])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_scaled_steps_in_and_out_of_inference_mode(backend, has_guards, monkeypatch):
    """What one step has made the next may write again: not a tensor of inference mode."""
    monkeypatch.setenv("MPKERNELS_BACKEND", backend)
    if not has_guards:  # a torch whose guards do not look at the mode: the plan of a step stays
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer, scaler = mpk.optim.SGD([parameter], lr=1.0), mpk.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.ones(3)
    optimizer.step()  # which reads nothing: the first that does is one of inference mode
    for t, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad, torch.no_grad]):
        parameter.grad = torch.full((3,), 4.0 if t != 2 else torch.inf)
        with mode():
            scaler.step(optimizer)
        assert (scaler.overflow_report(optimizer) == "") == (t != 2)
        scaler.update(4.0)
    assert parameter.tolist() == [-5.0] * 3


def test_found_inf_of_a_scaler_stays_when_another_steps_the_optimizer():
    params, scalers = parameters(torch.float32), [mpk.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    optimizer = mpk.optim.AdamW(params)
    for t, (scaler, bad) in enumerate(zip(scalers * 2, [False, False, True, False], strict=True)):
        give_grads(params, scaler)
        if bad:
            params[0].grad.fill_(torch.inf)
        scaler.step(optimizer)
        if t == 1:
            for each in scalers:
                each.update()
    for scaler in scalers:
        scaler.update()
    assert [scaler.get_scale() for scaler in scalers] == [2.0, 4.0]


def test_update_counts_a_step_before_an_optimizer_that_was_only_asked_for():
    params, scaler = parameters(torch.float32), mpk.GradScaler("cpu", init_scale=4.0)
    optimizer, other = mpk.optim.AdamW(params), mpk.optim.AdamW(parameters(torch.float32))
    give_grads(params, scaler)
    scaler.step(optimizer)
    scaler._found_inf_per_device(other)  # torch's, which makes it a state
    scaler.update()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_step_leaves_the_grad_mode(mode):
    params, scaler = parameters(torch.float32), mpk.GradScaler("cpu", init_scale=4.0)
    optimizer = mpk.optim.AdamW(params)
    give_grads(params, scaler)
    with mode():
        before = torch.is_grad_enabled()
        scaler.step(optimizer)
        assert torch.is_grad_enabled() == before
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert torch.is_grad_enabled() == before
