# SPDX-License-Identifier: Apache-2.0
"""Tests of compute copies: which layers have one, when it holds, and that no layer ever reads a stale one."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.runtime import compute_copy
from tests.steps import compute_copies


def layer_and_optimizer(policy="mixed_float16", make=mpk.optim.AdamW):
    """A layer whose optimizer has stepped once, and so keeps a copy."""
    layer = mpk.MPLinear(6, 5, policy=policy)
    optimizer = make(layer.parameters(), lr=0.1)
    train(layer, optimizer)
    return layer, optimizer


def train(layer, optimizer):
    optimizer.zero_grad()
    layer(torch.ones(3, 6)).sum().backward()
    optimizer.step()


def copy_of(layer) -> torch.Tensor | None:
    """What a training forward would read in place of the weight."""
    return layer._weight_copy(layer.weight)


def check_fresh(layer):
    """Forward and gradient are those of a layer that has only the weight."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plain = mpk.MPLinear.from_linear(layer, policy=layer.policy).eval()
    expected, got = plain(x), layer(x)
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (got, expected)))


@pytest.mark.parametrize("make", [mpk.optim.AdamW, mpk.optim.SGD])
def test_no_copy_of_a_weight_that_has_a_master(make):
    """The op writes one copy of a master, here the fp32 weight: another would stay as it was."""
    layer, optimizer = layer_and_optimizer(make=functools.partial(make, master_dtype=torch.float64))
    for _ in range(3):
        check_fresh(layer)
        train(layer, optimizer)
    assert copy_of(layer) is None


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "mixed_float32", "param=float64,compute=float16"])
def test_copy_is_the_weight_rounded_once(policy):
    torch.manual_seed(0)
    layer, optimizer = layer_and_optimizer(policy)
    for _ in range(3):
        train(layer, optimizer)
        copied = compute_copy.for_layer(layer, layer.weight, layer.policy.compute_dtype)
        assert copied.is_fresh()
        assert copied.tensor.dtype == layer.policy.compute_dtype
        dtype = copied.tensor.dtype
        expected = layer.weight.detach().numpy().astype(_numpy(dtype)) if dtype != torch.bfloat16 else None
        assert torch.equal(copied.tensor, layer.weight.bfloat16() if expected is None else torch.from_numpy(expected))
        check_fresh(layer)


def _numpy(dtype):
    return str(dtype).removeprefix("torch.")


def test_copy_after_a_foreign_write_is_rounded_once():
    layer, _ = layer_and_optimizer("param=float64,compute=float16")
    between = 1 + 2.0**-11 + 2.0**-40  # above a tie of fp16 by what fp32 cannot hold: two roundings give 1
    with torch.no_grad():
        layer.weight.fill_(between)
    assert (copy_of(layer) == 1 + 2.0**-10).all()


def test_no_copy_before_an_optimizer_steps():
    layer = mpk.MPLinear(6, 5, policy="mixed_float16")
    layer(torch.ones(3, 6)).sum().backward()
    assert copy_of(layer) is None
    torch.optim.AdamW(layer.parameters()).step()
    assert copy_of(layer) is None
    optimizer = mpk.optim.AdamW(layer.parameters())
    assert copy_of(layer) is None
    optimizer.step()
    assert copy_of(layer) is not None


@pytest.mark.parametrize("policy", [None, "float32", "float16"])
def test_no_copy_where_storage_and_arithmetic_agree(policy):
    layer = mpk.MPLinear(6, 5, policy=policy)
    optimizer = mpk.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(3, 6, dtype=layer.weight.dtype)).sum().backward()
    optimizer.step()
    assert copy_of(layer) is None
    assert layer not in compute_copy._requests


def test_no_copy_in_evaluation_and_for_a_frozen_weight():
    layer, optimizer = layer_and_optimizer()
    with torch.no_grad():
        assert copy_of(layer) is None
    assert copy_of(layer.eval()) is None
    assert copy_of(layer.train()) is not None
    frozen = mpk.MPLinear(6, 5, policy="mixed_float16").requires_grad_(False)
    frozen(torch.ones(3, 6))
    assert frozen not in compute_copy._requests
    assert optimizer.state


def clamp(layer):
    with torch.no_grad():
        layer.weight.clamp_(-0.05, 0.05)


def swap(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.full_like(layer.weight, 0.3))


def load(layer):
    layer.load_state_dict({name: torch.full_like(value, 0.7) for name, value in layer.state_dict().items()})


def replace_storage(layer):
    layer.weight.data = torch.full_like(layer.weight, 0.2)


@pytest.mark.parametrize("write", [clamp, swap, load, replace_storage])
def test_copy_follows_visible_writes(write):
    layer, optimizer = layer_and_optimizer()
    write(layer)
    assert torch.equal(copy_of(layer), layer.weight.half())
    check_fresh(layer)
    train(layer, optimizer)
    check_fresh(layer)


def test_copy_is_made_anew_once_per_write(monkeypatch):
    layer, optimizer = layer_and_optimizer()
    write, written = compute_copy.ComputeCopy.write, []
    monkeypatch.setattr(compute_copy.ComputeCopy, "write", lambda *args: written.append(1) or write(*args))
    clamp(layer)
    for _ in range(3):
        layer(torch.ones(2, 6))
    assert len(written) == 1
    train(layer, optimizer)
    layer(torch.ones(2, 6))
    assert len(written) == 1, "the optimizer's own pass writes the copy"


@pytest.mark.parametrize("skipped_first", [True, False])
def test_copy_is_right_after_a_skipped_step(skipped_first):
    """The op writes nothing in a skipped step, so the copy must hold before it: at its first step and after a write."""
    layer = mpk.MPLinear(6, 5, policy="mixed_float16")
    optimizer = mpk.optim.AdamW(layer.parameters(), lr=0.1, skip_nonfinite=True)
    if not skipped_first:
        train(layer, optimizer)
    layer(torch.ones(3, 6)).sum().backward()
    layer.weight.grad[0, 0] = float("inf")
    clamp(layer)
    optimizer.step()
    assert torch.equal(copy_of(layer), layer.weight.half())
    check_fresh(layer)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: WritesThroughData(p, {}),
    ],
    ids=["fused_adamw", "fused_sgd", "foreach", "data"],
)
def test_copy_follows_other_optimizers(make):
    layer, ours = layer_and_optimizer()
    theirs = make(layer.parameters())
    for _ in range(2):
        before = layer.weight.detach().clone()
        train(layer, theirs)
        assert not torch.equal(before, layer.weight)
        check_fresh(layer)
    train(layer, ours)
    check_fresh(layer)


class WritesThroughData(torch.optim.Optimizer):
    """As many optimizers outside torch do: no version counter moves."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad.data, alpha=0.1)


def test_copy_after_hidden_writes_and_refresh():
    layer, _ = layer_and_optimizer()
    layer.weight.data.fill_(0.5)
    assert not torch.equal(copy_of(layer), layer.weight.half()), "a write through .data is hidden: the docs say so"
    mpk.refresh_(layer)
    check_fresh(layer)


def test_copy_after_hidden_writes_and_sync_masters():
    layer, optimizer = layer_and_optimizer()
    layer.weight.data.fill_(0.5)
    optimizer.sync_masters_()
    check_fresh(layer)


def test_copy_dies_with_its_optimizer():
    """Its memory too, and without the garbage collector."""
    layer, optimizer = layer_and_optimizer()
    tensor = weakref.ref(copy_of(layer))
    assert tensor() is not None
    gc.disable()
    try:
        del optimizer
        assert tensor() is None
    finally:
        gc.enable()
    assert copy_of(layer) is None
    check_fresh(layer)
    train(layer, again := mpk.optim.SGD(layer.parameters(), lr=0.1))
    assert copy_of(layer) is not None
    assert again.state


def test_copy_dies_with_its_layer():
    layer, optimizer = layer_and_optimizer()
    count, weight = len(compute_copy._requests), layer.weight
    del layer
    gc.collect()
    assert len(compute_copy._requests) < count
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def to_double(layer):
    return layer.double()


def to_half(layer):
    return layer.half()


@pytest.mark.parametrize("convert", [to_double, to_half])
@pytest.mark.parametrize("after", ["forward", "backward", "step", "clip"])
def test_no_weak_reference_keeps_a_parameter_from_being_swapped(convert, after):
    """torch refuses to swap a tensor that has a weak reference; so do parameters, their gradients too."""
    layer = mpk.MPLinear(6, 5, policy="mixed_float16")
    optimizer, scaler = mpk.optim.AdamW(layer.parameters(), lr=0.1), mpk.GradScaler(init_scale=8.0)
    for _ in range(2 if after == "step" else 1):
        out = layer(torch.ones(3, 6)).sum()
        if after != "forward":
            scaler.scale(out).backward()
        if after == "step":
            scaler.step(optimizer)
            scaler.update()
        if after == "clip":
            scaler.clip_grad_norm_(optimizer, 1.0)
        del out  # its graph keeps the parameters, which torch refuses as well
    weight, before = layer.weight, layer.weight.detach().clone()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        convert(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer.weight is weight
    assert torch.equal(weight, before.to(weight.dtype))
    assert layer(torch.ones(3, 6, dtype=weight.dtype)).isfinite().all()


def test_copy_is_not_kept_of_memory_that_processes_share():
    """What another process writes moves no version here."""
    layer, optimizer = layer_and_optimizer()
    shared = mpk.MPLinear(6, 5, policy="mixed_float16").share_memory()
    other = mpk.optim.SGD(shared.parameters(), lr=0.1)
    layer.share_memory()
    for one, its in ((layer, optimizer), (shared, other)):
        for _ in range(2):
            train(one, its)
            assert copy_of(one) is None
        one.weight.detach().numpy().fill(0.5)  # as from another process
        check_fresh(one)


def test_copy_of_a_deepcopied_model():
    layer, optimizer = layer_and_optimizer()
    twin = copy.deepcopy(layer)
    twin(torch.ones(2, 6))
    assert copy_of(twin) is None
    train(layer, optimizer)
    check_fresh(twin)
    check_fresh(layer)


def test_copy_of_a_tied_weight():
    first, second = mpk.MPLinear(6, 6, policy="mixed_float16"), mpk.MPLinear(6, 6, policy="mixed_float16")
    other = mpk.MPLinear(6, 6, policy="mixed_bfloat16")
    second.weight = other.weight = first.weight
    model = nn.Sequential(first, second, other)
    optimizer = mpk.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        train(model, optimizer)
        assert copy_of(first) is copy_of(second)
        assert copy_of(other) is None, "one weight has one copy; the layer of another compute dtype casts"
        check_fresh(first)
        check_fresh(other)


def test_copy_of_a_replaced_parameter():
    layer, optimizer = layer_and_optimizer()
    layer.weight = nn.Parameter(torch.randn(5, 6))
    assert copy_of(layer) is None
    check_fresh(layer)
    train(layer, optimizer)
    check_fresh(layer)


def test_copy_with_two_optimizers_of_ours():
    layer, first = layer_and_optimizer()
    second = mpk.optim.SGD(layer.parameters(), lr=0.1)
    for optimizer in (second, first, first, second):
        train(layer, optimizer)
        check_fresh(layer)


def test_copy_survives_a_change_of_shape():
    layer, optimizer = layer_and_optimizer()
    layer.weight.data = torch.randn(7, 6)
    layer.bias = None
    check_fresh(layer)
    layer.weight.grad = torch.ones(7, 6)
    with pytest.raises(RuntimeError, match="changed shape since its state was made"):
        optimizer.step()


def test_copy_goes_when_convert_is_undone():
    model = mpk.convert(nn.Sequential(nn.Linear(6, 6)), "mixed_float16")
    optimizer = mpk.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    mpk.convert(model, "mixed_bfloat16")
    for _ in range(2):
        train(model, optimizer)
    assert copy_of(model[0]).dtype == torch.bfloat16
    mpk.revert(model)
    train(model, optimizer)
    assert model[0] not in compute_copy._requests
    assert not compute_copies(optimizer)


def test_copy_saved_for_backward_is_not_overwritten_silently():
    layer, optimizer = layer_and_optimizer()
    version = copy_of(layer)._version
    x = torch.ones(2, 6, requires_grad=True)
    out = layer(x)
    train(layer, optimizer)
    assert copy_of(layer)._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_keeps_the_copy_alone():
    """What forward multiplied with; of a layer that casts, the weight."""
    layer, optimizer = layer_and_optimizer()
    x, kept = torch.randn(2, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (got,) = torch.autograd.grad(layer(x).sum(), x)
    assert [t.dtype for t in kept if t.shape == layer.weight.shape] == [torch.float16]
    del optimizer, kept[:]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
    assert [t.dtype for t in kept if t.shape == layer.weight.shape] == [torch.float32]
    assert torch.equal(got, expected)


def test_refresh_and_cached_weights_want_a_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 3"):
        mpk.refresh_(3)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 3"), mpk.cached_weights(3):
        pass
