# SPDX-License-Identifier: Apache-2.0
"""torch's tools that look into a model see MPLinear as they see nn.Linear: torch.fx, __torch_function__, the FLOP counter."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import mpkernels as mpk
from mpkernels import functional
from mpkernels.nn import MPMLP, MPLinear
from mpkernels.ops import linear_act as ops
from mpkernels.runtime import resolve
from tests import bounds
from tests.linear_act_cases import same_bits, saving_masks

POLICIES = [None, "float32", "mixed_float16", "mixed_bfloat16,grad=bfloat16,batch_invariant", "bfloat16"]
by_policy = pytest.mark.parametrize("policy", POLICIES)


class Mixed(nn.Module):
    """Layers and the function side by side, with torch's own ops between."""

    def __init__(self, policy):
        super().__init__()
        torch.manual_seed(0)
        self.body = mpk.convert(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU()), policy or "float32")
        self.mlp = MPMLP([8, 7, 6], policy=policy)
        self.head = MPLinear(6, 4, bias=False, activation="silu", policy=policy)
        self.policy = policy

    def forward(self, x):
        hidden = self.body(x)
        z = self.head(self.mlp(hidden.to(self.mlp[0].weight.dtype)))
        return functional.linear_act(z, self.head.weight.t(), None, activation="relu", policy=self.policy) + 1


def one_by_one(model):
    """As torch.fx sees it: a hook on all modules has every child called alone, what lies between them as wide as x."""

    def function(x):
        with torch.nn.modules.module.register_module_forward_hook(lambda *args: None):
            return model(x)

    function.parameters = model.parameters
    return function


def results(model, x):
    out = model(x)
    return [out, *torch.autograd.grad(out.double().sum(), list(model.parameters()))]


# ----- torch.fx ---------------------------------------------------------------


@by_policy
def test_fx_traces_and_the_graph_gives_the_same_bits(policy, generator):
    """Traced, traced again, copied, pickled; under another autocast, too, which a graph must not have burnt in."""
    model, x = Mixed(policy), torch.randn(3, 5, generator=generator)
    x = x.to(model.body[0].weight.dtype)
    dtypes = [p.grad_dtype for p in model.parameters()]
    traced = fx.symbolic_trace(model)
    assert {n.target for n in traced.graph.nodes if n.op == "call_function"} >= {functional.linear_act}
    traced.graph.lint()
    others = [traced, fx.symbolic_trace(traced), copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))]
    for other in others:  # torch drops it where a parameter is copied
        for p, dtype in zip(other.parameters(), dtypes, strict=True):
            p.grad_dtype = dtype
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected = results(one_by_one(model), x)
            for other in others:
                assert all(map(same_bits, results(other, x), expected))


def test_fx_trace_is_saved_and_loaded(generator):
    model, x, file = Mixed("mixed_float16"), torch.randn(3, 5, generator=generator), io.BytesIO()
    torch.save(fx.symbolic_trace(model), file)
    file.seek(0)
    assert same_bits(torch.load(file, weights_only=False)(x), model(x))


def test_fx_trace_follows_the_weights(generator):
    """The copy that a layer keeps of its weight does not end up in the graph."""
    model, x = MPLinear(5, 4, policy="mixed_float16"), torch.randn(3, 5, generator=generator)
    optimizer = mpk.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    with mpk.cached_weights(model):
        traced = fx.symbolic_trace(model)
    with torch.no_grad():
        model.weight.mul_(2)
    assert same_bits(traced(x), model(x))


def test_fx_trace_of_a_conv1d(generator):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = mpk.convert(nn.Sequential(conv1d(4, 5)), "mixed_float16")
    x = torch.randn(3, 5, generator=generator)
    assert same_bits(fx.symbolic_trace(model)(x), model(x))


# ----- __torch_function__ ---------------------------------------------------------------


class Logged(torch.Tensor):
    """A subclass that writes down what it is given to."""

    calls: list = []  # noqa: RUF012 - what the class has seen

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Log(TorchFunctionMode):
    """A mode that does the same."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@by_policy
@pytest.mark.parametrize("wrapped", ["x", "weight"])
def test_subclasses_see_one_call(policy, wrapped, generator):
    layer = MPLinear(5, 4, activation="relu", policy=policy)
    x = torch.randn(3, 5, generator=generator).to(layer.weight.dtype)
    expected, weight = layer(x), layer.weight.detach()
    Logged.calls.clear()
    if wrapped == "x":
        out = layer(x.as_subclass(Logged))
    else:
        out = functional.linear_act(x, weight.as_subclass(Logged), layer.bias, "relu", policy)
    assert type(out) is Logged
    assert Logged.calls.count(functional.linear_act) == 1
    assert not [call for call in Logged.calls if "mpkernels::" in str(call)]
    assert same_bits(out.detach().as_subclass(torch.Tensor), expected.detach())


def test_a_class_that_knows_nothing_of_it_says_so():
    class Refusing:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return NotImplemented

    with pytest.raises(TypeError, match=r"mpkernels\.functional\.linear_act"):
        functional.linear_act(Refusing(), torch.ones(3, 4))


@by_policy
def test_modes_see_one_call(policy, generator):
    layer = MPLinear(5, 4, policy=policy)
    x = torch.randn(3, 5, generator=generator).to(layer.weight.dtype)
    expected = results(layer, x)
    with Log() as log:
        out = layer(x)
    assert log.calls.count(functional.linear_act) == 1
    assert all(map(same_bits, [out, *torch.autograd.grad(out.double().sum(), list(layer.parameters()))], expected))


def test_modes_are_given_the_copy_of_the_weight(generator):
    """As without a mode: with the optimizer's copy a weight is not cast at each call."""
    layer, x = MPLinear(5, 4, policy="mixed_float16"), torch.randn(3, 5, generator=generator)
    optimizer = mpk.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(x).sum().backward()
        optimizer.step()

    class Given(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is functional.linear_act:
                copies.append((kwargs or {}).get("weight_copy"))
            return func(*args, **(kwargs or {}))

    copies = []
    with Given():
        layer(x)
    assert [c.dtype for c in copies] == [torch.float16]


@pytest.mark.parametrize("seen", [False, True], ids=["default device", "mode"])
def test_a_mode_sees_what_lies_between_layers(seen, monkeypatch, generator):
    """What a mode returns is what goes on: no layer does the backward of the one below past it. A default device may."""
    monkeypatch.setattr(ops.forward_op, "_chosen", saving_masks())

    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is functional.linear_act else out

    joined = []
    run = ops.backward_op.execute
    monkeypatch.setattr(ops.backward_op, "execute", lambda call, kernel: joined.append(call.is_fused) or run(call, kernel))
    model, x = MPMLP([5, 8, 4], policy="float32"), torch.randn(3, 5, generator=generator)
    with Doubled() if seen else torch.device("cpu"):
        out = model(x)
    grads = torch.autograd.grad(out.sum(), list(model.parameters()))
    assert joined == [not seen, False]
    factor = 2 if seen else 1
    hidden = factor * torch.relu(nn.functional.linear(x, model[0].weight, model[0].bias))
    plain = factor * nn.functional.linear(hidden, model[2].weight, model[2].bias)
    for grad, expected in zip(grads, torch.autograd.grad(plain.sum(), list(model.parameters())), strict=True):
        bounds.check_rearranged(grad, expected)


# ----- the FLOP counter ---------------------------------------------------------------


def counted(model, x) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        out = model(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


@by_policy
@pytest.mark.parametrize("lead", [(3,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_flops_are_those_of_nn_linear(policy, lead, grad):
    layer, plain = MPLinear(5, 4, activation="gelu", policy=policy), nn.Linear(5, 4)
    x = torch.ones(*lead, 5, requires_grad=grad)
    expected = counted(plain, x)
    assert counted(layer, x.detach().to(layer.weight.dtype).requires_grad_(grad)) == expected
    assert bool(expected[0]) == (lead != (0,))


def test_flops_of_frozen_compiled_and_converted(generator):
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    plain[0].weight.requires_grad_(False)
    ours = mpk.convert(copy.deepcopy(plain), "mixed_float16")
    x = torch.randn(3, 5, generator=generator)
    expected = counted(plain, x)
    assert counted(ours, x) == expected
    torch.compiler.reset()
    assert counted(torch.compile(ours, backend="aot_eager"), x) == expected
    with FlopCounterMode(display=False) as counter:
        torch.ops.mpkernels.linear_act_backward(
            grad_out=torch.ones(3, 4), x=x, weight=torch.ones(4, 5), weight_copy=None, saved=None, activation=0,
            compute_dtype=torch.float32, grad_x_dtype=torch.float32, grad_weight_dtype=torch.float32,
            grad_bias_dtype=torch.float32, output_mask=[True, True, False],
        )  # fmt: skip
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("order", ["counter first", "package first"])
def test_flops_are_registered_in_either_order(order):
    """And the package does not itself import what imports Triton."""
    lines = ["from torch.utils.flop_counter import flop_registry", "import mpkernels"]
    if order == "package first":
        lines = [lines[1], "import sys; assert 'torch.utils.flop_counter' not in sys.modules", lines[0]]
    script = "\n".join(["import torch", *lines, "print(torch.ops.mpkernels.linear_act in flop_registry)"])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "True\n", result.stderr


# ----- torch.jit ---------------------------------------------------------------


@by_policy
def test_jit_trace_has_the_op_and_its_gradients(policy, generator):
    model = MPMLP([5, 8, 4], policy=policy)
    x, other = (torch.randn(n, 5, generator=generator).to(model[0].weight.dtype) for n in (3, 7))
    optimizer = mpk.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    traced = torch.jit.trace(model, (x,))
    with torch.no_grad():  # which a copy of the weight kept in the graph would not see
        for p in model.parameters():
            p.mul_(2)
    assert str(traced.inlined_graph).count("mpkernels::linear_act(") == 2
    assert all(map(same_bits, results(traced, other), results(model, other)))
    with torch.no_grad():
        assert same_bits(torch.jit.trace(model, (x,))(other), model(other))


@pytest.mark.parametrize("masks", [False, True], ids=["output", "mask"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16,saved=float8_e4m3fn", "mixed_float8"])
@pytest.mark.parametrize("with_grad", [False, True])
def test_jit_trace_stands_its_own_check(policy, masks, with_grad, monkeypatch, generator):
    """Which traces once more without gradients; the graph of a trace without them can be trained, too, but in eight bits."""
    if masks:
        monkeypatch.setattr(ops.forward_op, "_chosen", saving_masks())
    model = nn.Sequential(MPMLP([5, 8, 4], policy=policy), MPLinear(4, 3, activation="gelu", policy=policy))
    x, other = (torch.randn(n, 5, generator=generator) for n in (3, 7))
    with torch.set_grad_enabled(with_grad):
        traced = torch.jit.trace(model, (x,))
    assert same_bits(traced(other).detach(), model(other).detach())
    if policy != "mixed_float8":
        traced, eager = results(traced, other), results(model, other)
        assert all(map(same_bits, traced[-2:], eager[-2:]))
        assert masks or all(map(same_bits, traced, eager))  # with masks eager fuses the backward of two layers


# ----- jagged nested tensors ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "compiled"), [*((policy, False) for policy in POLICIES), ("float32", True), ("mixed_float16", True)]
)
@pytest.mark.filterwarnings("ignore")  # torch calls nested tensors a prototype
def test_jagged_tensors_are_those_of_their_rows(policy, compiled, generator):
    layer = MPLinear(5, 4, activation="relu", policy=policy)
    parts = [torch.randn(n, 5, generator=generator).to(layer.weight.dtype) for n in (2, 3, 1)]
    torch.compiler.reset()
    function = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    nested, dense = (f(parts).requires_grad_() for f in (nested_of, torch.cat))
    out, expected = function(nested), layer(dense)
    assert out.layout == torch.jagged
    assert out.shape == (*nested.shape[:2], 4)  # the same ragged size: what follows can add the two
    assert same_bits(out.values().detach(), expected.detach())
    parameters = list(layer.parameters())
    grads = torch.autograd.grad((out + out).values().sum(), [nested, *parameters])
    wanted = torch.autograd.grad((expected + expected).sum(), [dense, *parameters])
    assert all(map(same_bits, [grads[0].values(), *grads[1:]], wanted))


def nested_of(parts):
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.filterwarnings("ignore")
def test_other_nested_tensors_are_refused():
    layer, parts = MPLinear(5, 4, policy="float32"), [torch.ones(2, 5), torch.ones(3, 5)]
    with pytest.raises(RuntimeError, match=r"got nested; a nested x may have layout=torch\.jagged"):
        layer(torch.nested.nested_tensor(parts))
    with pytest.raises(RuntimeError, match="must be ragged in dimension 1, got 2: transpose it back"):
        layer(nested_of(parts).transpose(1, 2))


# ----- converted models ---------------------------------------------------------------


@by_policy
def test_modes_change_nothing_in_a_converted_model(policy, generator):
    """Values and dtypes of what comes out, where inside of the model outputs are narrow."""
    model, x = Mixed(policy), torch.randn(3, 5, generator=generator)
    x = x.to(model.body[0].weight.dtype)
    expected = results(model, x)
    with Log() as log:
        out = model(x)
    grads = torch.autograd.grad(out.double().sum(), list(model.parameters()))
    assert all(map(same_bits, [out, *grads], expected))
    assert log.calls.count(functional.linear_act) == 6


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_torch_profiler_names_ops_and_backends(backend, monkeypatch):
    """Once each, though no dispatcher sees them; and nothing is looked up where none is in use."""
    if any(resolve.ops[op].why_not(backend, torch.device("cpu"), torch.float32) for op in ("adamw_", "grad_stats_")):
        pytest.skip(f"{backend} is not here")
    monkeypatch.setenv("MPKERNELS_BACKEND", backend)
    model = MPLinear(4, 3, policy="mixed_float16")
    optimizer, scaler = mpk.optim.AdamW(model.parameters()), mpk.GradScaler("cpu")

    def step():
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    with torch.profiler.profile() as profile:
        step()
    names = [event.key for event in profile.key_averages() if event.key.startswith("mpkernels::")]
    ops = ("linear_act", "linear_act_backward", "grad_stats_", "adamw_", "update_scale_")
    assert sorted(names) == sorted(f"mpkernels::{op} ({backend})" for op in ops)
    assert all(event.count == 1 for event in profile.key_averages() if event.key in names)
