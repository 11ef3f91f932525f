# SPDX-License-Identifier: Apache-2.0
"""Tests of MPMLP: its layers one by one, and joined, which no backend of a CPU does of itself (`joined` makes it)."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpkernels as mpk
from mpkernels import functional
from mpkernels.ops import linear_act as ops
from tests import bounds
from tests.linear_act_cases import same_bits
from tests.nn.test_mpsequential import results

POLICIES = (None, "float64", "float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "mixed_float16,grad=float16")
SIZES = (12, 33, 40, 9)


@pytest.fixture
def moved(monkeypatch):
    """The shapes of the bias gradients that come from the next layer, one for each link that was used."""
    found = []
    execute = ops.backward_op.execute

    def record(call, kernel):
        *grads, grad_prev_bias = execute(call, kernel)
        found.extend([] if grad_prev_bias is None else [grad_prev_bias.shape[0]])
        return *grads, grad_prev_bias

    monkeypatch.setattr(ops.backward_op, "execute", record)
    return found


def made(policy="mixed_float16", **options):
    torch.manual_seed(0)
    return mpk.MPMLP(SIZES, policy=policy, **options)


def inputs(model, rows=17):
    return torch.randn(rows, SIZES[0], generator=torch.Generator().manual_seed(1)).to(model[0].weight.dtype).requires_grad_()


def one_by_one(model):
    return lambda x: nn.Sequential.forward(model, x)


def check_equal(got, expected, model) -> None:
    """Bit for bit, but for the biases of inner layers: the next layer sums them before they are rounded."""
    names = ["out", "x", *dict(model.named_parameters())]
    inner = [f"{i}.bias" for i, module in enumerate(model) if isinstance(module, mpk.MPLinear)][:-1]
    for name, a, b in zip(names, got, expected, strict=True):
        assert a.dtype == b.dtype
        if name in inner:
            compute = model[0].policy.compute_dtype if model[0].policy else model[0].weight.dtype
            bounds.check_bias_summed_unrounded(a, b, 17, compute)
        else:
            assert same_bits(a, b), name


# ----- what it is ----------------------------------------------------------------------


def test_is_a_sequential_with_its_keys():
    model = made()
    plain = nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 40), nn.ReLU(), nn.Linear(40, 9))
    assert isinstance(model, nn.Sequential)
    assert [type(m) for m in model] == [mpk.MPLinear, nn.Identity] * 2 + [mpk.MPLinear]
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert [m.activation for m in model if isinstance(m, mpk.MPLinear)] == ["relu", "relu", None]


def test_options():
    model = mpk.MPMLP((4, 3, 2), bias=False, dtype=torch.float64, activation=None, output_activation="relu")
    assert list(model.state_dict()) == ["0.weight", "1.weight"]
    assert [m.activation for m in model[:2]] == [None, "relu"]
    assert model[0].weight.dtype == torch.float64
    assert mpk.MPMLP([4, 3], device="meta")[0].weight.device.type == "meta"
    with mpk.default_policy("bfloat16"):
        assert mpk.MPMLP([4, 3])[0].policy == mpk.Policy.parse("bfloat16")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_inner_activations_are_narrow(policy, monkeypatch):
    """The result has the dtype that came in, whatever it is between; a given output_dtype stays, and so do policies."""
    found, run = [], functional._linear_act
    monkeypatch.setattr(functional, "_linear_act", lambda *a, **k: found.append(k["out_dtype"]) or run(*a, **k))
    model, narrow = made(policy), mpk.Policy.parse(policy).compute_dtype
    for dtype in (torch.float32, torch.float64):
        assert model(torch.ones(2, 12, dtype=dtype)).dtype == dtype
        assert found == [narrow, narrow, dtype]
        found.clear()
    assert {str(layer.policy) for layer in model if isinstance(layer, mpk.MPLinear)} == {policy}
    given = mpk.MPMLP(SIZES, policy=f"{policy},output=float64")
    assert given(torch.ones(2, 12)).dtype == torch.float64
    assert found == [torch.float64] * 3


def test_from_sequential_shares_parameters():
    plain = nn.Sequential(nn.Identity(), nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 40), nn.Linear(40, 9), nn.ReLU()).eval()
    model = mpk.MPMLP.from_sequential(plain, "mixed_float16")
    assert type(model) is mpk.MPMLP
    assert not model.training
    assert all(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert [m.activation for m in model if isinstance(m, mpk.MPLinear)] == ["relu", None, "relu"]
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(5, 12)
    z = plain[:4](x)
    bounds.check_forward(model[:4](x).detach(), model[:3](x).detach(), plain[3].weight, plain[3].bias, 0, torch.float16)
    assert z.shape == (5, 40)


def test_from_sequential_keeps_policies_activations_and_what_stands_twice():
    relu, linear = nn.ReLU(), mpk.MPLinear(5, 5, activation="gelu", policy="mixed_bfloat16")
    model = mpk.MPMLP.from_sequential(nn.Sequential(nn.Linear(3, 5), relu, linear, nn.Linear(5, 5), relu, linear))
    layers = [module for module in model if isinstance(module, mpk.MPLinear)]
    assert [layer.activation for layer in layers] == ["relu", "gelu", "relu", "gelu"]
    assert [layer.policy and layer.policy.compute_dtype for layer in layers] == [None, torch.bfloat16] * 2
    assert layers[1].weight is layers[3].weight
    assert len(model) == 6


def hooked(module):
    module.register_forward_hook(lambda *args: None)
    return module


class Own(nn.Sequential):
    pass


@pytest.mark.parametrize(
    "modules",
    [
        lambda: nn.Sequential(mpk.MPLinear(2, 2, activation="gelu"), nn.ReLU()),
        lambda: nn.Sequential(hooked(nn.Linear(2, 2))),
        lambda: nn.Sequential(nn.Linear(2, 2), hooked(nn.ReLU())),
        lambda: hooked(nn.Sequential(nn.Linear(2, 2))),
        lambda: Own(nn.Linear(2, 2)),
    ],
)
def test_from_sequential_refuses_what_it_cannot_stand_for(modules):
    with pytest.raises(TypeError, match=r"MPMLP|MPLinear"):
        mpk.MPMLP.from_sequential(modules())


def test_adopt_is_in_place_and_can_be_undone():
    sequential = nn.Sequential(mpk.MPLinear(3, 4, activation="relu"), nn.Identity(), mpk.MPLinear(4, 2))
    model = mpk.MPMLP.adopt(sequential)
    assert model is sequential
    assert type(model) is mpk.MPMLP
    assert mpk.MPMLP.adopt(model) is model
    model.__class__ = nn.Sequential
    assert type(sequential) is nn.Sequential


def test_slices_are_mlps():
    model = made()
    assert type(model[:2]) is mpk.MPMLP
    assert model[:2][0] is model[0]
    assert list(model[2:].state_dict()) == ["2.weight", "2.bias", "4.weight", "4.bias"]
    model[1] = nn.Dropout()
    assert type(model[:2]) is mpk.MPMLP, "whatever has been put into it"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mpk.MPMLP([4]), ValueError, r"sizes must be two or more, the input's first, got \[4\]"),
        (lambda: mpk.MPMLP([]), ValueError, r"sizes must be two or more"),
        (lambda: mpk.MPMLP(4), TypeError, "sizes must be a sequence of int, got 4"),
        (lambda: mpk.MPMLP([4, 2.0]), TypeError, "out_features must be an int, got 2.0"),
        (lambda: mpk.MPMLP([4, -2]), ValueError, "out_features must not be negative, got -2"),
        (lambda: mpk.MPMLP([4, 2], activation="tanh"), ValueError, "activation must be"),
        (lambda: mpk.MPMLP([4, 2], output_activation="tanh"), ValueError, "activation must be"),
        (lambda: mpk.MPMLP([4, 2], policy="float8"), ValueError, "unknown policy 'float8'"),
        (lambda: mpk.MPMLP.adopt(nn.Sequential(nn.Linear(2, 2))), TypeError, "0 is a Linear, .*: from_sequential takes others"),
        (lambda: mpk.MPMLP.adopt(nn.ModuleList()), TypeError, "ModuleList is not nn.Sequential itself"),
        (lambda: mpk.MPMLP.from_sequential(nn.Sequential(nn.ReLU())), TypeError, "0 is a ReLU"),
        (
            lambda: mpk.MPMLP.from_sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout())),
            TypeError,
            "1 is a Dropout, .* mpk.convert takes any",
        ),
    ],
)
def test_bad_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ----- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("output_activation", [None, "relu"])
def test_equals_its_layers_one_by_one(policy, output_activation, joined):
    model = made(policy, output_activation=output_activation)
    x = inputs(model)
    got = results(model, model, x)
    check_equal(got, results(one_by_one(model), model, x), model)
    assert all(same_bits(a, b) for a, b in zip(got, results(model, model, x), strict=True)), "repeats differ"


@pytest.mark.parametrize("activation", ["relu2", "gelu", "gelu_tanh", "silu"])
def test_equals_its_layers_whatever_the_activation(activation, is_joined, moved):
    """Joined, an inner gradient is rounded once, after the slope; one by one, before it and after it."""
    model = made("float32", activation=activation)
    x = inputs(model)
    got = results(model, model, x)
    assert moved == [40, 33]
    for a, b in zip(got, results(one_by_one(model), model, x), strict=True):
        bounds.check_rearranged(a, b)


@pytest.mark.parametrize("options", [{"bias": False}, {"activation": None}], ids=str)
def test_equals_its_layers_without_bias_or_activation(options, joined):
    model = made(**options)
    x = inputs(model)
    check_equal(results(model, model, x), results(one_by_one(model), model, x), model)


@pytest.mark.usefixtures("is_joined")
def test_one_node_per_layer(moved):
    model = made()
    out = model(inputs(model))
    nodes = []
    node = out.grad_fn
    while node is not None:
        nodes.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    assert nodes == ["LinearActBackward"] * 3 + ["AccumulateGrad"]
    out.sum().backward()
    assert moved == [40, 33]


def test_nothing_moves_up_on_a_cpu(moved):
    model = made()
    model(inputs(model)).sum().backward()
    assert moved == []


@pytest.mark.usefixtures("is_joined")
def test_bias_gradients_are_ready_layer_by_layer():
    """DDP overlaps: the top layer's gradients are there before the bottom layer's node has run."""
    model, order = made(), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: order.append(name[0]))
    model(inputs(model)).sum().backward()
    assert order == sorted(order, reverse=True)


@pytest.mark.usefixtures("is_joined")
def test_layers_of_different_policies_are_not_joined(moved):
    model = made()
    model[0].adopt(model[0]._activation, mpk.Policy.parse("mixed_bfloat16"))
    model(inputs(model)).sum().backward()
    assert moved == [40]
    model[2].adopt(model[2]._activation, mpk.Policy.parse("mixed_float16,grad=float16"))
    model(inputs(model)).sum().backward()
    assert moved == [40]


@pytest.mark.usefixtures("is_joined")
def test_a_layer_used_twice(moved):
    shared = mpk.MPLinear(8, 8, activation="relu", policy="mixed_float16")
    model = mpk.MPMLP.adopt(nn.Sequential(shared, nn.Identity(), shared))
    x = torch.randn(5, 8)
    got = results(model, model, x)
    assert moved == [8]
    expected = results(one_by_one(model), model, x)
    assert same_bits(got[2], expected[2])
    bounds.check_bias_summed_unrounded(got[3], expected[3], 10, torch.float16)


@pytest.mark.usefixtures("is_joined")
def test_without_gradients(moved):
    model = made()
    x = inputs(model)
    with torch.no_grad():
        out = model(x)
    assert not out.requires_grad
    assert same_bits(out, model(x).detach())


# ----- who sees an inner activation ----------------------------------------------------------------------


def _second_loss(losses):
    def hook(module, args, out):
        losses.append(out.double().square().sum())

    return hook


WATCHERS = {
    "forward hook of the layer": (0, lambda m, losses: m.register_forward_hook(_second_loss(losses)), [40]),
    "forward hook of the identity": (1, lambda m, losses: m.register_forward_hook(_second_loss(losses)), [40]),
    "pre-hook of the identity": (1, lambda m, losses: m.register_forward_pre_hook(_pre_loss(losses)), [40]),
    "pre-hook of the next layer": (2, lambda m, losses: m.register_forward_pre_hook(_pre_loss(losses)), []),
    "backward hook": (2, lambda m, losses: m.register_full_backward_hook(lambda m, i, o: losses.append(i[0] * 0)), []),
    "backward pre-hook": (2, lambda m, losses: m.register_full_backward_pre_hook(lambda m, o: losses.append(o[0] * 0)), []),
    "forward of its own": (0, lambda m, losses: _wrap_forward(m, losses), [40]),
}


def _pre_loss(losses):
    return lambda module, args: losses.append(args[0].double().square().sum())


def _wrap_forward(module, losses):
    forward = module.forward

    def seen(*args):
        out = forward(*args)
        losses.append(out.double().square().sum())
        return out

    module.forward = seen


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.usefixtures("is_joined")
def test_a_second_loss_on_an_inner_activation(watcher, moved):
    """What can see an activation has its gradients right: that pair is not joined, the others are."""
    index, watch, expected = WATCHERS[watcher]
    grads = []
    for joined in (True, False):
        model, losses = made(), []
        watch(model[index], losses)
        x = inputs(model)
        out = (model if joined else one_by_one(model))(x)
        loss = out.double().sum() + sum(loss for loss in losses if loss.dim() == 0)
        moved.clear()
        loss.backward()
        assert losses
        assert moved == (expected if joined else [])
        grads.append([x.detach(), x.grad, *(p.grad for p in model.parameters())])
    check_equal(*grads, model)


@pytest.mark.usefixtures("is_joined")
def test_hooks_on_all_modules(moved):
    model, seen = made(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(out.dtype))
    try:
        model(inputs(model)).sum().backward()
    finally:
        handle.remove()
    assert len(seen) == 6
    assert moved == []


@pytest.mark.usefixtures("is_joined")
def test_another_module_between(moved):
    """Assigned by hand: the layers around it are not joined."""
    model = made()
    model[1] = nn.Dropout(0.0)
    model(inputs(model)).sum().backward()
    assert moved == [40]


# ----- with the rest of torch ----------------------------------------------------------------------


@pytest.mark.parametrize("renew", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(renew, joined):
    model = made()
    twin = renew(model)
    assert type(twin) is mpk.MPMLP
    x = inputs(model)
    assert all(same_bits(a, b) for a, b in zip(results(model, model, x), results(twin, twin, x), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_checkpointing(use_reentrant, joined):
    model = made()
    x = inputs(model)
    checkpointed = results(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), model, x)
    assert all(same_bits(a, b) for a, b in zip(checkpointed, results(model, model, x), strict=True))


def test_compiles(joined):
    """One graph, whatever the batch, with the bits of eager."""
    model = made()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (17, 3, 30):
        x = inputs(model, rows)
        got, expected = results(compiled, model, x), results(model, model, x)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_torch_func(joined):
    model = made()
    x = inputs(model).detach()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda p, x: torch.func.functional_call(model, p, (x,)).double().square().sum()
    grads = torch.func.grad(loss)(parameters, x)
    loss(dict(model.named_parameters()), x).backward()
    assert all(same_bits(grads[name], p.grad) for name, p in model.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert {name: grad.shape for name, grad in each.items()} == {n: (17, *p.shape) for n, p in parameters.items()}


@pytest.mark.usefixtures("is_joined")
def test_double_backward_is_refused():
    model = made("float64")
    x = inputs(model)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()
