# SPDX-License-Identifier: Apache-2.0
"""Layers under torch.compile: one graph for every batch size, forward and backward, with the bits of eager; checkpointing."""

import contextlib

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import mpkernels as mpk
from tests import bounds
from tests.levels import each_once
from tests.linear_act_cases import same_bits

BATCHES = range(2, 12)  # torch makes a graph of its own for 0 and for 1


def model_of(policy) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 4))
    if policy is not None:
        return mpk.convert(model, policy)
    return nn.Sequential(mpk.MPLinear.from_linear(model[0], "relu"), mpk.MPLinear.from_linear(model[2]))


def results(function, params, x) -> list[torch.Tensor]:
    """The output and the gradients of the parameters and of x."""
    x = x.clone().requires_grad_()
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *params])]


@pytest.fixture
def dynamo():
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


POLICIES = (None, "mixed_float16", "mixed_bfloat16,output=bfloat16", "float16")


@pytest.mark.parametrize("policy, autocast", each_once(POLICIES, (None, torch.bfloat16, torch.float16)))
def test_one_graph_for_ten_batch_sizes(policy, autocast, dynamo):
    model = model_of(policy)
    params = list(model.parameters())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch in BATCHES:
        x = torch.randn(batch, 8, dtype=params[0].dtype)
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            got, expected = results(compiled, params, x), results(model, params, x)
        assert all(a.dtype == b.dtype and same_bits(a, b) for a, b in zip(got, expected, strict=True))
    assert counter.frame_count == 1


def test_one_graph_for_training_with_our_optimizer(dynamo):
    """The optimizer's compute copies do not make it two: the compiled model casts, with the same bits."""
    models = [model_of("mixed_float16") for _ in range(2)]
    optimizers = [mpk.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    counter = CompileCounterWithBackend("aot_eager")
    runs = [torch.compile(models[0], fullgraph=True, dynamic=True, backend=counter), models[1]]
    for batch in BATCHES:
        x = torch.randn(batch, 8)
        for run, optimizer in zip(runs, optimizers, strict=True):
            run(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert counter.frame_count == 1
    assert all(same_bits(*pair) for pair in zip(*(m.state_dict().values() for m in models), strict=True))


@pytest.mark.sweep
@pytest.mark.parametrize("policy", [None, "mixed_float16", "float16"])
def test_inductor_compiles_the_same(policy, dynamo):
    """The op stands in inductor's code as it is: one graph and the bits of eager there too."""
    model = model_of(policy)
    params = list(model.parameters())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in BATCHES:
        x = torch.randn(batch, 8, dtype=params[0].dtype)
        got, expected = results(compiled, params, x), results(model, params, x)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("policy", [None, "mixed_float16", "float16"])
def test_checkpointing_gives_the_same_bits(policy, use_reentrant):
    model = model_of(policy)
    params = list(model.parameters())
    x = torch.randn(5, 8, dtype=params[0].dtype)
    whole = results(model, params, x)
    for parameter in params:
        parameter.grad = None
    x.requires_grad_()
    out = checkpoint(model, x, use_reentrant=use_reentrant)
    out.float().square().sum().backward()  # reentrant checkpointing refuses autograd.grad
    again = [out.detach(), x.grad, *(p.grad for p in params)]
    assert all(same_bits(a, b) for a, b in zip(again, whole, strict=True))


def test_checkpointing_with_the_optimizers_copies():
    """The copy that the recomputed forward reads is the one that the first read: the step comes after both."""
    models = [model_of("mixed_float16") for _ in range(2)]
    optimizers = [mpk.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for _ in range(3):
        x = torch.randn(5, 8)
        models[0](x).square().sum().backward()
        checkpoint(models[1], x, use_reentrant=False).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(same_bits(*pair) for pair in zip(*(m.state_dict().values() for m in models), strict=True))


# ----- forward mode ----------------------------------------------------------------------


def op_itself(layer):
    weight = layer.weight.detach()
    return lambda x: torch.ops.mpkernels.linear_act(x, weight, None, None, 0, torch.float32, torch.float32, 0)[0]


WAYS = {
    "layer": lambda layer, x: layer,
    "op": lambda layer, x: op_itself(layer),
    "compiled": lambda layer, x: torch.compile(layer, backend="aot_eager"),
    "exported": lambda layer, x: torch.export.export(layer, (x,)).module(),
}


@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_raises(way):
    """Never a tangent of 0, which is what torch.library's autograd would give."""
    x = torch.randn(3, 8)
    function = WAYS[way](mpk.MPLinear(8, 4), x)
    function(x)
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(function, (x,), (x,))
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jacfwd(function)(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        function(torch.autograd.forward_ad.make_dual(x, x))


def test_forward_mode_of_the_backward_op_raises():
    weight, grad_out = torch.randn(4, 8), torch.randn(3, 4)
    options = (None, None, 0, torch.float32, torch.float32, torch.float32, torch.float32, [True, False, False])
    function = lambda g: torch.ops.mpkernels.linear_act_backward(g, None, weight, *options)[0]
    with pytest.raises(NotImplementedError, match="linear_act_backward: forward mode"):
        torch.func.jvp(function, (grad_out,), (grad_out,))


def test_compiled_forward_mode_is_torchs():
    """Inside of a compiled function the op stands in ATen below a transform: the tangent is right, never 0."""
    layer, x = mpk.MPLinear(8, 4), torch.randn(3, 8)
    tangent = torch.compile(lambda x: torch.func.jvp(layer, (x,), (x,))[1], backend="aot_eager")(x)
    bounds.check_rearranged(tangent.detach(), torch.nn.functional.linear(x, layer.weight).detach())
