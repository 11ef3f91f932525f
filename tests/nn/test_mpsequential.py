# SPDX-License-Identifier: Apache-2.0
"""A converted nn.Sequential: whatever a model does with its children, it gets what the plain nn.Sequential gives."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch import fx, nn
from torch.distributed.fsdp import fully_shard

import mpkernels as mpk
from mpkernels import functional
from mpkernels.nn import MPSequential
from mpkernels.ops.linear_act import Activation
from tests import bounds
from tests.linear_act_cases import same_bits
from tests.ranks import run_ranks
from tests.steps import raw


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def data(rows=5, columns=6) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """(activation, dtype of the output) of each call of the op."""
    found, run = [], functional._linear_act

    def record(*args, **kwargs):
        found.append((kwargs["activation"].name.lower(), kwargs["out_dtype"]))
        return run(*args, **kwargs)

    monkeypatch.setattr(functional, "_linear_act", record)
    return found


def results(function, model, x) -> list[torch.Tensor]:
    """Output, gradients of x and of the parameters, of a loss that weighs outputs differently."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = function(x)
    (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def check_as_plain(program, make=mlp, x=None) -> None:
    """`program(model)` is what to call; on the converted model it gives what it gives on the plain one, gradients too."""
    plain, model = make(), mpk.convert(make(), "float32")
    x = data() if x is None else x
    expected, got = (results(program(m), m, x) for m in (plain, model))
    assert len(expected) == len(got)
    for a, b in zip(got, expected, strict=True):
        bounds.check_rearranged(a, b)


# ----- what it is ----------------------------------------------------------------------


def test_mpsequential_prints_and_has_the_children_of_before():
    model, plain = mpk.convert(mlp()), mlp()
    assert type(model) is MPSequential
    assert str(model).splitlines()[0] == str(plain).splitlines()[0] == "Sequential("
    assert str(model[1]) == "ReLU()"
    assert dict(model.named_modules()).keys() == dict(plain.named_modules()).keys()
    assert [m.activation for m in model[0::2]] == [None] * 3


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "float16"])
def test_mpsequential_gives_the_bits_of_its_children(policy, joined):
    """But for the biases: of inner layers the gradients that are summed are narrow, or not rounded yet."""
    model = mpk.convert(mlp(), policy)
    x = data().to(next(model.parameters()).dtype)
    got, expected = (results(f, model, x) for f in (model, lambda x: nn.Sequential.forward(model, x)))
    names = ["out", "x", *dict(model.named_parameters())]
    for name, a, b in zip(names, got, expected, strict=True):
        if name in ("0.bias", "2.bias"):
            bounds.check_bias_summed_unrounded(a, b, 5, model[0].policy.compute_dtype)
        else:
            assert same_bits(a, b), name


def test_mpsequential_runs_linear_and_relu_as_one_call(calls):
    mpk.convert(mlp())(data())
    assert calls == [("relu", torch.float16), ("relu", torch.float16), ("none", torch.float32)]


def test_mpsequential_only_where_it_may_matter():
    tanh = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    own = nn.Sequential(mpk.MPLinear(6, 6), nn.ReLU())

    class Sub(nn.Sequential):
        pass

    model = nn.ModuleList([mlp(), tanh, nn.Sequential(nn.Linear(6, 6)), Sub(nn.Linear(6, 6), nn.ReLU()), own])
    mpk.convert(model, exclude="4")
    assert [type(m) for m in model] == [MPSequential, nn.Sequential, nn.Sequential, Sub, nn.Sequential]
    mpk.revert(model)
    assert [type(m) for m in model] == [nn.Sequential] * 3 + [Sub, nn.Sequential]


def test_mpsequential_sees_a_child_that_a_hook_replaces():
    """In the forward that the hook runs in, as nn.Sequential does."""

    def program(model):
        handle = model[0].register_forward_hook(lambda *_: model.__setitem__(3, nn.Tanh()))
        return lambda x: (model(x), handle.remove())[0]

    got, expected = (results(program(m), m, data()) for m in (mpk.convert(mlp(), "float32"), mlp()))
    for a, b in zip(got, expected, strict=True):
        bounds.check_rearranged(a, b)


def test_mpsequential_says_of_a_child_that_is_none_what_torch_says():
    for model in (mlp(), mpk.convert(mlp())):
        model.register_module("1", None)
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            model(data())


@pytest.mark.parametrize("lone", [False, True], ids=["in a Sequential", "alone"])
def test_mpsequential_makes_a_parametrized_weight_once_a_call(lone):
    """spectral_norm takes a step of its power iteration at each look at the weight."""
    looks = []

    class Counted(nn.Module):
        def forward(self, weight):
            looks.append(1)
            return weight / (1 + len(looks))

    def run(model):
        looks.clear()
        nn.utils.parametrize.register_parametrization(model[2], "weight", Counted())
        return results(model[2] if lone else model, model, data(columns=8 if lone else 6))

    plain, counts = run(mlp()), len(looks)
    for policy in ("float32", "mixed_float32"):
        got = run(mpk.convert(mlp(), policy))
        assert len(looks) == counts
        for a, b in zip(got, plain, strict=True):
            bounds.check_rearranged(a, b)
    with mpk.cached_weights(mpk.convert(mlp(), "mixed_float16")) as model:
        nn.utils.parametrize.register_parametrization(model[2], "weight", Counted())
        looks.clear()
        model(data())
        assert len(looks) == 1


# ----- what a model does with the children ----------------------------------------------------------------------


def _children_called(model):
    def forward(x):
        first = model[0](x)
        hidden = model[2](model[1](first)) + first
        return model[4](model[3](hidden))

    return forward


def _named(model):
    def forward(x):
        for name, child in model.named_children():
            x = child(x) * (2 if name in "02" else 1)
        return x

    return forward


def _sliced(model):
    return lambda x: model[3:](model[:1](x) - model[1:3](model[:1](x)))


def _after(change):
    def program(model):
        new = change(model)
        return model if new is None else new

    return program


def _double(module, args, out):
    return out * 2


def _halve(module, args):
    return (args[0] / 2,)


def _ones() -> nn.Linear:
    linear = nn.Linear(8, 4)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Scaled(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 3


def _set(module, name, value):
    setattr(module, name, value)


def _replace_class(model):
    model[1].__class__ = Scaled


PROGRAMS = {
    "children called": _children_called,
    "named_children": _named,
    "slices": _sliced,
    "iterated": lambda m: lambda x: [x := child(x) for child in m][-1],
    "forward hook on linear": _after(lambda m: m[0].register_forward_hook(_double) and None),
    "forward hook on relu": _after(lambda m: m[1].register_forward_hook(_double) and None),
    "pre-hook on relu": _after(lambda m: m[1].register_forward_pre_hook(lambda mod, args: (args[0] + 1,)) and None),
    "pre-hook on the next linear": _after(lambda m: m[2].register_forward_pre_hook(_halve) and None),
    "backward hook": _after(lambda m: m[1].register_full_backward_hook(lambda mod, i, o: (i[0] * 3,)) and None),
    "backward pre-hook": _after(lambda m: m[0].register_full_backward_pre_hook(lambda mod, o: (o[0] * 3,)) and None),
    "relu replaced": _after(lambda m: m.__setitem__(1, nn.Tanh())),
    "relu deleted": _after(lambda m: m.__delitem__(1)),
    "relu popped": _after(lambda m: m.pop(3) and None),
    "linear replaced": _after(lambda m: m.__setitem__(4, _ones())),
    "inserted": _after(lambda m: m.insert(1, nn.Tanh()) and None),
    "appended": _after(lambda m: m.append(nn.ReLU())),
    "extended": _after(lambda m: m.extend([nn.ReLU(), nn.Tanh()])),
    "added": _after(lambda m: m + nn.Sequential(nn.ReLU())),
    "added in place": _after(lambda m: m.__iadd__(nn.Sequential(nn.ReLU()))),
    "multiplied": lambda m: lambda x: (m[2:4] * 2)(m[0](x)),
    "forward set on relu": _after(lambda m: _set(m[1], "forward", lambda x: x.abs())),
    "forward set on linear": _after(lambda m: _set(m[0], "forward", lambda x: nn.functional.linear(x, m[0].weight))),
    "class of relu": _after(_replace_class),
    "relu inplace later": _after(lambda m: _set(m[1], "inplace", True)),
    "relu is an identity by type": _after(lambda m: m.__setitem__(1, nn.Identity())),
    "compiled child": _after(lambda m: m[1].compile(backend="eager")),
    "forward by keyword": lambda m: lambda x: m(input=x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_mpsequential_as_plain(name, joined):
    check_as_plain(PROGRAMS[name])


@pytest.mark.parametrize("inplace", [False, True])
def test_mpsequential_of_shared_children(inplace, joined):
    def make():
        torch.manual_seed(0)
        relu, linear = nn.ReLU(inplace), nn.Linear(6, 6)
        return nn.Sequential(nn.Linear(6, 6), relu, linear, relu, linear, nn.Identity(), linear)

    check_as_plain(lambda m: m, make)
    check_as_plain(lambda m: lambda x: m[3](m(x)) + m[2](x), make)


@pytest.mark.parametrize("activation", ["gelu", "relu", "relu2"])
def test_mpsequential_of_linears_with_an_activation(activation, joined):
    """The user's own: a ReLU after it is another one."""
    own = nn.Sequential(nn.Linear(6, 6), mpk.MPLinear(6, 6, activation=activation), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    model = mpk.convert(own, "float64").double()
    assert type(model) is MPSequential
    one_by_one = lambda x: nn.Sequential.forward(model, x)
    for a, b in zip(*(results(f, model, data().double()) for f in (model, one_by_one)), strict=True):
        bounds.check_rearranged(a, b)


def test_mpsequential_around_a_model_that_reads_inside(joined):
    """The form of the report: a forward that takes the preactivation, of an nn.Sequential and of one inside another."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.l = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
            self.outer = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 6), nn.ReLU())

        def forward(self, x):
            pre = self.l[0](x)
            x = self.l[2](self.l[1](pre)) + pre
            return self.outer[0][0](x) + self.outer(x) + self.outer[1:](x)

    check_as_plain(lambda m: m, Net)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "mixed_float16,output=float32"])
def test_mpsequential_with_a_new_head(policy):
    """It is fp32 and is given fp32, whatever is replaced by it; what it replaces had 16 bits where it was not seen."""
    for index in (0, 2, 4):
        model = mpk.convert(mlp(), policy)
        old = model[index]
        model[index] = nn.Linear(old.in_features, old.out_features)
        assert model(data()).dtype == torch.float32
        model[index] = nn.Sequential(nn.LayerNorm(old.in_features), nn.Linear(old.in_features, old.out_features))
        assert model(data()).dtype == torch.float32


def _random_child(rng, relu):
    kind = rng.choice(["linear", "linear", "linear", "relu", "relu", "shared relu", "inplace", "identity", "tanh", "own"])
    made = {
        "linear": lambda: nn.Linear(6, 6), "relu": nn.ReLU, "shared relu": lambda: relu, "inplace": lambda: nn.ReLU(True),
        "identity": nn.Identity, "tanh": nn.Tanh, "own": Scaled,
    }  # fmt: skip
    return made[kind]()


def _random_model(seed):
    rng, relu = random.Random(seed), nn.ReLU()
    torch.manual_seed(seed)
    model = nn.Sequential(*(_random_child(rng, relu) for _ in range(rng.randint(2, 7))), nn.Linear(6, 6))
    return model


def _random_change(rng, model, dtype):
    torch.manual_seed(rng.randrange(99))
    i, child = rng.randrange(len(model)), rng.choice([nn.ReLU, nn.Identity, nn.Tanh, lambda: nn.Linear(6, 6)])()
    child.to(dtype)
    change = rng.randrange(9)
    if change == 0:
        model[i].register_forward_hook(_double)
    elif change == 1:
        model[i].register_forward_pre_hook(_halve)
    elif change == 2:
        model[i].register_full_backward_hook(lambda m, inputs, outputs: (inputs[0] * 2,))
    elif change == 3:
        model[i] = child
    elif change == 4 and len(model) > 2:
        del model[i]
    elif change == 5:
        model.insert(i, child)
    elif change == 6:
        model[i].forward = lambda x: x.sin()
    elif change == 7:
        model.append(model[i])
    return model


def _random_call(rng, model):
    cut, way = rng.randrange(len(model) + 1), rng.randrange(4)
    if way == 0:
        return model
    if way == 1:
        return lambda x: model[cut:](model[:cut](x).clone())
    if way == 2:
        return lambda x: model(x) + [x := child(x.clone()) for child in model[:cut]][-1] if cut else model(x)
    return lambda x: nn.Sequential(*model)(x) + model(x)


def _outcomes(seed, policy, dtype) -> list:
    """Of four random calls, each after another random change; None of one that writes in place what autograd needs."""
    rng, model, found = random.Random(seed), _random_model(seed).to(dtype), []
    if policy is not None:
        mpk.convert(model, policy)
    for _ in range(4):
        _random_change(rng, model, dtype)
        call = _random_call(rng, model)
        try:
            found.append(results(lambda x, call=call: call(x.clone()), model, data(4).to(dtype)))
        except RuntimeError as error:
            if "inplace" not in str(error) and "in-place" not in str(error):
                raise
            found.append(None)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_mpsequential_random_programs(seed, joined):
    """In fp64, where no sum that is done in another order changes the sign of what a ReLU is given; and which dtypes."""
    plain = _outcomes(seed, None, torch.float64)
    for expected, got in zip(plain, _outcomes(seed, "float64", torch.float64), strict=True):
        for a, b in zip(got or (), expected or (), strict=expected is not None):
            bounds.check_rearranged(a, b)
    for expected, got in zip(plain, _outcomes(seed, "mixed_float16", torch.float32), strict=True):
        assert expected is None or {t.dtype for t in got} == {torch.float32}


# ----- who sees what is between ----------------------------------------------------------------------


LOOKS = {
    "linear": lambda m, seen: m[0].register_forward_hook(lambda mod, args, out: seen.append(out)),
    "relu": lambda m, seen: m[1].register_forward_hook(lambda mod, args, out: seen.append(out)),
    "pre": lambda m, seen: m[1].register_forward_pre_hook(lambda mod, args: seen.append(args[0])),
    "next": lambda m, seen: m[2].register_forward_pre_hook(lambda mod, args: seen.append(args[0])),
    "backward": lambda m, seen: m[0].register_full_backward_hook(lambda mod, i, o: seen.append(o[0])),
    "partial": lambda m, seen: m[0].register_forward_hook(_Appends(seen)),
    "all modules": lambda m, seen: nn.modules.module.register_module_forward_hook(
        lambda mod, args, out: seen.append(out) if mod is m[0] else None
    ),
}


class _Appends:
    __module__ = None

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, module, args, out):
        self.seen.append(out)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_mpsequential_shows_hooks_what_they_ask_for(look, when, calls):
    """Whenever it is put on: in the wide dtype. The other pair is not held up, and without the hook nor is this one."""
    model, seen = mlp(), []
    if when == "after":
        mpk.convert(model)
    handle = LOOKS[look](model, seen)
    if when == "before":
        mpk.convert(model)
    model(data().requires_grad_()).sum().backward()
    assert [t.dtype for t in seen] == [torch.float32]
    handle.remove()
    first, second = calls[:2]
    assert first == ("relu" if look == "next" else "none", torch.float32)
    assert second == (("none", torch.float32) if look in ("all modules", "next") else ("relu", torch.float16))
    calls.clear()
    model(data())
    assert calls[0] == ("relu", torch.float16)


@pytest.mark.parametrize("child", range(5))
def test_mpsequential_children_alone_are_as_the_policy_says(child):
    model = mpk.convert(mlp())
    x = data(columns=8 if child else 6)
    assert model[child](x).dtype == torch.float32
    assert {str(m.policy) for m in model[0::2]} == {"mixed_float16"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_mpsequential_result_has_the_dtype_of_the_layers_one_by_one(dtype, autocast):
    """A policy that follows its input follows the container's, not what was narrowed inside."""
    for policy in ("mixed_float16", "mixed_bfloat16", {"*": "mixed_float16", "2": "mixed_bfloat16"}, {"[02]": "mixed_float16"},
                   {"*": "mixed_float16", "2": "mixed_float16,output=bfloat16"}):  # fmt: skip
        model = mpk.convert(mlp(), policy)
        if isinstance(policy, dict) and "*" not in policy:
            model[4] = nn.Identity()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            x = data().to(dtype)
            assert model(x).dtype == nn.Sequential.forward(model, x).dtype


def test_mpsequential_narrows_for_linears_alone(calls):
    """Past a ReLU that it fuses and an Identity, not past a Dropout or another module, nor for another compute dtype."""
    wide, narrow = torch.float32, torch.float16
    for between, expected in (
        ([nn.ReLU()], narrow), ([nn.Identity()], narrow), ([nn.ReLU(), nn.Identity()], narrow), ([], narrow),
        ([nn.ReLU(), nn.Dropout(0.0)], wide), ([nn.Tanh()], wide), ([nn.Flatten()], wide), ([nn.ReLU(), nn.ReLU()], wide),
    ):  # fmt: skip
        model = mpk.convert(nn.Sequential(nn.Linear(6, 6), *between, nn.Linear(6, 2), nn.ReLU()))
        calls.clear()
        model(data())
        assert [dtype for _, dtype in calls] == [expected, wide]
    for policy in ({"*": "mixed_float16", "2": "mixed_bfloat16"}, "mixed_float16,output=float32", {"[04]": "mixed_float16"}):
        calls.clear()
        mpk.convert(mlp(), policy)(data())
        assert {dtype for _, dtype in calls} == {wide}


# ----- with the rest of torch ----------------------------------------------------------------------


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "renew", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved], ids=["copy", "pickle", "save"]
)
def test_mpsequential_copies(renew, calls):
    model = mpk.convert(mlp())
    twin = renew(model)
    assert type(twin) is type(model[:2]) is MPSequential
    assert same_bits(twin(data()).detach(), model(data()).detach())
    assert calls[:3] == calls[3:]
    assert [type(m) for m in mpk.revert(twin)] == [type(m) for m in mlp()]
    assert type(twin) is nn.Sequential


def test_mpsequential_compiles_and_exports():
    model, x = mpk.convert(mlp(), "mixed_float16"), data()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, expected = results(compiled, model, x), results(model, model, x)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
    handle = model[1].register_forward_hook(_double)
    assert same_bits(compiled(x).detach(), model(x).detach())
    handle.remove()
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert same_bits(program.module()(x).detach(), model(x).detach())
        assert not any("relu" in str(node.target) for node in program.graph.nodes), "the op has it"


def test_mpsequential_calls_modules_as_they_are_called_now(monkeypatch, calls):
    """Tools put a __call__ of their own on nn.Module, to see or to change what every module gives."""
    names, call = [], nn.Module.__call__

    def doubled(module, *args):
        names.append(type(module).__name__)
        return call(module, *args) * 2

    expected = data()
    for child in mlp():
        expected = child(expected) * 2
    model = mpk.convert(mlp(), "float32")
    monkeypatch.setattr(nn.Module, "__call__", doubled)
    bounds.check_rearranged(model(data()), expected * 2)
    assert names == ["MPSequential", "MPLinear", "ReLU", "MPLinear", "ReLU", "MPLinear"]
    assert [name for name, _ in calls] == ["none"] * 3


def test_mpsequential_calls_children_that_are_compiled(calls):
    """A compiled call of a child is a call of its own. torch runs that of an nn.ReLU as it is."""
    model = mpk.convert(mlp())
    model[1].compile(backend="eager")
    model(data())
    assert calls == [("none", torch.float32), ("relu", torch.float16), ("none", torch.float32)]


def test_mpsequential_is_traced():
    """By fx, whose proxies are called child by child where it can follow them, and by jit."""
    model, x = mpk.convert(mlp(), "float32"), data()

    class Leaves(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, mpk.MPLinear) or super().is_leaf_module(module, name)

    graph = Leaves().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == list("01234")
    assert same_bits(fx.GraphModule(model, graph)(x).detach(), model(x).detach())
    with torch.no_grad():
        assert same_bits(torch.jit.trace(model, x)(x), model(x))


def test_mpsequential_of_what_is_no_plain_tensor(calls):
    """A subclass with functions of its own sees each of them."""

    class Watched(torch.Tensor):
        pass

    model = mpk.convert(mlp(), "float32")
    out = model(data().as_subclass(Watched))
    assert isinstance(out, Watched)
    assert {name for name, _ in calls} == {"none"}


def sharded(rank):
    """FSDP2's hooks and classes are no observers: what it gathers is fused, narrowed and right."""
    plain, model = mlp(), mpk.convert(mlp(), "mixed_float16")
    for module in (model[0], model[2], model):
        fully_shard(module, mp_policy=mpk.Policy.parse("mixed_float16").to_fsdp())
    assert str(model).splitlines()[0] == f"FSDP{type(plain).__name__}("
    found, run = [], functional._linear_act

    def record(*args, **kwargs):
        found.append((kwargs["activation"], kwargs["out_dtype"]))
        return run(*args, **kwargs)

    functional._linear_act = record
    got = model(data())
    assert found == [(Activation.RELU, torch.float16)] * 2 + [(Activation.NONE, got.dtype)]
    assert raw([got]) == raw([nn.Sequential.forward(model, data().to(got.dtype))])


def test_mpsequential_under_fsdp2():
    run_ranks(2, sharded)
