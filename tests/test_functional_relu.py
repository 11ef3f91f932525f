# SPDX-License-Identifier: Apache-2.0
"""convert and torch.relu in a user's forward: fused where nobody else sees the value, and nothing else changes."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mpkernels as mpk
from mpkernels.nn.before_relu import MPLinearBeforeReLU
from tests import bounds
from tests.models import LoRA
from tests.steps import raw

ROOT = str(Path(__file__).parent.parent)
NOT_FUSED = 'relu in forward() not fused: use MPLinear(activation="relu")'


class Plain(nn.Module):
    """The MLP of every tutorial."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 40), nn.Linear(40, 2)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Inplace(Plain):
    def forward(self, x):
        x = self.fc1(x)
        x = F.relu(x, inplace=True)
        return self.fc2(x)


class Functional(Plain):
    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class Method(Plain):
    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class InplaceMethod(Plain):
    def forward(self, x):
        return self.fc2(self.fc1(x).relu_())


class InplaceFunction(Plain):
    def forward(self, x):
        return self.fc2(torch.relu_(self.fc1(x)))


SPELLINGS = pytest.mark.parametrize("cls", [Plain, Inplace, Functional, Method, InplaceMethod, InplaceFunction])


def make(cls=Plain, policy="mixed_float16"):
    torch.manual_seed(0)
    return mpk.convert(cls(), policy)


def fused(model) -> list[str]:
    """Names of the linears whose ReLU is fused; the report must agree."""
    names = [name for name, m in model.named_modules() if type(m) is MPLinearBeforeReLU]
    assert names == [row.name for row in mpk.convert_report(model) if row.activation == "relu"]
    return names


def by_module(model: Plain, policy: str) -> nn.Module:
    """The same layers with the ReLU as a module, which is fused as ever."""
    twin = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 2))
    for linear, source in ((twin[0], model.fc1), (twin[2], model.fc2)):
        linear.load_state_dict(source.state_dict())
    return mpk.convert(twin, policy)


def results(model, x) -> list[bytes]:
    """The bits of the output and of all gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.float().square().sum().backward()
    return raw([out, x.grad, *(p.grad for p in model.parameters())])


class CountReLUs(TorchDispatchMode):
    """How often ATen's ReLU, or its gradient, runs outside of our op."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.relu, torch.ops.aten.relu_, torch.ops.aten.threshold_backward)
        return func(*args, **(kwargs or {}))


def relus(model, x) -> int:
    with CountReLUs() as mode:
        model(x).float().sum().backward()
    return mode.count


# ----- the same bits, one pass less ----------------------------------------------------------------------


@SPELLINGS
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float16", "mixed_float16,output=float32"])
@pytest.mark.parametrize("special", [False, True], ids=["finite", "inf and NaN"])
def test_functional_relu_is_fused_with_the_bits_of_a_module(cls, policy, special, generator):
    model = make(cls, policy)
    assert fused(model) == ["fc1"]
    assert NOT_FUSED not in str(mpk.convert_report(model))
    x = torch.randn(33, 6, generator=generator).to(model.fc1.weight.dtype)
    assert relus(model, x) == 0
    with torch.no_grad():
        model.fc1.weight[3:5] = 0  # there the bias is the pre-activation
        model.fc1.bias[3:5] = torch.tensor([-0.0, 0.0])
    x[0] = 0
    if special:
        x[1, 0], x[2, 0] = torch.nan, torch.inf
    assert results(model, x) == results(by_module(model, policy), x)


def test_functional_relu_trains_with_the_optimizers_copies(generator):
    model = make()
    twin = by_module(model, "mixed_float16")
    optimizers = [mpk.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]
    for _ in range(3):  # from the second step on the layers read the optimizer's copy
        x = torch.randn(9, 6, generator=generator)
        assert results(model, x) == results(twin, x)
        for optimizer in optimizers:
            optimizer.step()
    assert model.fc1._weight_copy() is not None


def test_functional_relu_leaves_plain_tensors():
    """The class that marks the value is gone after the first call on it, whatever that is."""
    model, x = make(), torch.ones(2, 6)
    seen = []
    model.fc2.register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    model(x)
    out = model.fc1(x)  # outside of forward, what it returns has its ReLU, as where a module was fused
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out + 0, torch.relu(out))
    assert type(out) is torch.Tensor
    assert type(copy.copy(model.fc1(x))) is torch.Tensor
    assert torch.relu(input=model.fc1(x)).min() >= 0
    assert seen == [torch.Tensor]


# ----- where it is not ----------------------------------------------------------------------


class TwoReaders(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(torch.relu(hidden) + hidden)


class Returned(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(torch.relu(hidden)), hidden


class InplaceThenRead(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        hidden.relu_()
        return self.fc2(hidden)


class CalledTwice(Plain):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.fc2 = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc2(self.fc1(torch.relu(self.fc1(x))))


class OneBranch(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(torch.relu(hidden) if self.training else hidden)


class FlagInAFunction(Plain):
    def activate(self, hidden):
        return torch.relu(hidden) if self.training else hidden

    def forward(self, x):
        return self.fc2(self.activate(self.fc1(x)))


class Features(Plain):
    """A method beside forward that wants the value before the ReLU."""

    def features(self, x):
        return self.fc1(x)


class FeaturesByName(Plain):
    def features(self, x):
        return getattr(self, "fc1")(x)  # noqa: B009


class Sliced(Plain):
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)[:, :40]))


class Base(Plain):
    def forward(self, x):
        hidden = self.fc1(x)
        if self.training:
            return self.fc2(hidden)
        return self.fc2(torch.relu(hidden))


class CallsSuper(Base):
    def forward(self, x):
        return super().forward(x)


class OtherActivation(Plain):
    def forward(self, x):
        return self.fc2(F.relu6(self.fc1(x)))


class CallsInside(nn.Module):
    """A linear that another module owns."""

    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def forward(self, x):
        return self.inner.fc2(torch.relu(self.inner.fc1(x)))


class HelperElsewhere(Plain):
    """features has the value before the ReLU by way of what forward calls."""

    def before(self, x):
        return self.fc1(x)

    def features(self, x):
        return self.before(x)

    def forward(self, x):
        return self.fc2(torch.relu(self.before(x)))


class EveryChild(Plain):
    def linear(self, x):
        for child in self.children():
            x = child(x)
        return x


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Plain()

    def forward(self, x):
        return self.inner(x)


class FeaturesOfTheParent(Outer):
    def features(self, x):
        return self.inner.fc1(x)


class EveryModuleOfTheParent(Outer):
    def features(self, x):
        return dict(self.named_modules())["inner" + ".fc1"](x)


class ChosenByTheMode(Plain):
    def forward(self, x):
        return self.fc2({True: torch.relu, False: F.gelu}[self.training](self.fc1(x)))


class ChosenBefore(Plain):
    def forward(self, x):
        activate = {True: torch.relu, False: F.gelu}[self.training]
        return self.fc2(activate(self.fc1(x)))


@pytest.mark.parametrize("cls", [
    TwoReaders, Returned, InplaceThenRead, CalledTwice, OneBranch, FlagInAFunction, Features, FeaturesByName, Sliced,
    CallsSuper, OtherActivation, CallsInside, HelperElsewhere, EveryChild, FeaturesOfTheParent, EveryModuleOfTheParent,
    ChosenByTheMode, ChosenBefore,
])  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_functional_relu_is_not_fused_without_a_proof(cls, training):
    torch.manual_seed(0)
    plain = cls().train(training)
    model = mpk.convert(copy.deepcopy(plain), "float32")
    assert fused(model) == []
    x = torch.randn(5, 6)
    for mode in (False, True):
        got, expected = (m.train(mode)(x) for m in (model, plain))
        for out, twin in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
            bounds.check_rearranged(out, twin)
    noted = [row.name for row in mpk.convert_report(model) if row.note == NOT_FUSED]
    assert noted == [
        name for name in ("fc1", "inner.fc1") if cls in REPORTED and name in {r.name for r in mpk.convert_report(model)}
    ]


REPORTED = {  # where fx sees a ReLU
    TwoReaders, Returned, InplaceThenRead, CalledTwice, Features, FeaturesByName, CallsInside, HelperElsewhere, EveryChild,
    FeaturesOfTheParent, EveryModuleOfTheParent,
}  # fmt: skip


def test_functional_relu_is_fused_whatever_a_library_puts_into_module(monkeypatch):
    def smart_apply(self, function):  # as transformers does
        for child in self.children():
            child.smart_apply(function)

    monkeypatch.setattr(nn.Module, "smart_apply", smart_apply, raising=False)
    assert fused(make()) == ["fc1"]


class Kept(Plain):
    """The ReLU is in an attribute, and so may be another function tomorrow."""

    def __init__(self):
        super().__init__()
        self.act, self.acts, self.holder = F.relu, [F.relu], SimpleNamespace(act=F.relu)


class KeptAlone(Kept):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class KeptInAList(Kept):
    def forward(self, x):
        return self.fc2(self.acts[0](self.fc1(x)))


class KeptInALoop(Kept):
    def forward(self, x):
        x = self.fc1(x)
        for act in self.acts:
            x = act(x)
        return self.fc2(x)


class KeptInAnObject(Kept):
    def forward(self, x):
        return self.fc2(self.holder.act(self.fc1(x)))


class KeptByAChild(Plain):
    def __init__(self):
        super().__init__()
        self.child = Kept()

    def forward(self, x):
        return self.fc2(self.child.act(self.fc1(x)))


@pytest.mark.parametrize("cls", [KeptAlone, KeptInAList, KeptInALoop, KeptInAnObject, KeptByAChild])
def test_functional_relu_kept_in_an_attribute_is_not_fused(cls):
    assert fused(make(cls)) == []


class Leaves(Plain):
    """Its forward leaves something behind: in buffers, in lists, in tensors of no name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.log, self.seen = [], torch.zeros(())


class LeavesABuffer(Leaves):
    def forward(self, x):
        self.calls.add_(1)
        return self.fc2(torch.relu(self.fc1(x)))


class LeavesAList(Leaves):
    def forward(self, x):
        self.log.append(x)
        return self.fc2(torch.relu(self.fc1(x)))


class LeavesATensor(Leaves):
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x))) + self.seen.add_(1)


def test_functional_relu_is_looked_for_without_gpus_that_the_model_is_not_on(monkeypatch):
    forked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (forked.extend(devices), fork(devices))[1])
    assert fused(make()) == ["fc1"]
    assert forked == []


@pytest.mark.parametrize("cls, names", [(LeavesABuffer, ["fc1"]), (LeavesAList, []), (LeavesATensor, [])])
def test_functional_relu_is_looked_for_without_a_trace(cls, names):
    model = make(cls)
    assert fused(model) == names
    assert (model.calls.item(), model.calls._version, model.log, model.seen.item()) == (0, 0, [], 0)


@pytest.mark.parametrize("register", [
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook",
])  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_functional_relu_is_not_fused_where_a_hook_looks(register, when):
    """A hook made after the conversion too: it sees what it would without."""
    seen = {}

    def watch(model, kind):
        return getattr(model.fc1, register)(
            lambda module, *args: seen.update({kind: raw(args[-1] if type(args[-1]) is tuple else [args[-1]])})
        )

    torch.manual_seed(0)
    plain, x = Plain(), torch.randn(5, 6)
    model = copy.deepcopy(plain)
    watch(plain, "plain")
    if when == "before":
        watch(model, "converted")
    mpk.convert(model, "float32")
    assert fused(model) == ([] if when == "before" else ["fc1"])
    if when == "after":
        watch(model, "converted")
    for m in (plain, model):
        assert relus(m, x.clone().requires_grad_()) == 2
    assert seen["plain"] == seen["converted"]


def test_functional_relu_is_not_fused_under_a_hook_on_all_modules():
    model, x, seen = make(policy="float32"), torch.randn(5, 6), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append((type(out), out.clone())))
    model(x)
    handle.remove()
    assert seen[0][0] is torch.Tensor
    assert torch.equal(seen[0][1], F.linear(x, model.fc1.weight, model.fc1.bias))
    assert relus(model, x) == 0


def test_functional_relu_is_not_fused_in_a_shared_linear():
    model = Plain()
    model.probe = model.fc1  # whoever asks for it wants a linear
    assert fused(mpk.convert(model)) == []
    twice = nn.Sequential(nn.Linear(6, 6), Twin(), Twin())
    twice[2].fc1 = twice[1].fc1
    assert fused(mpk.convert(twice)) == ["1.fc2", "2.fc2"]


def test_functional_relu_of_the_users_own_layer_stays():
    model = Plain()
    model.fc1 = mpk.MPLinear(6, 40, policy="mixed_bfloat16")
    mpk.convert(model, "mixed_float16", exclude="fc1")
    assert fused(model) == []
    mpk.convert(model, "mixed_float16")
    assert fused(model) == ["fc1"]
    mpk.revert(model)
    assert (type(model.fc1), str(model.fc1.policy), model.fc1.activation) == (mpk.MPLinear, "mixed_bfloat16", None)
    model.fc1 = mpk.MPLinear(6, 40, activation="gelu")
    assert fused(mpk.convert(model)) == []


def test_functional_relu_after_an_adapter_is_of_the_sum(generator):
    torch.manual_seed(0)
    plain, x = Plain(), torch.randn(5, 6, generator=generator)
    plain.fc1 = LoRA(plain.fc1)
    model = mpk.convert(copy.deepcopy(plain), "float32")
    assert fused(model) == []
    fc1 = model.fc1
    assert torch.equal(model(x), model.fc2(torch.relu(fc1.base(x) + fc1.b(fc1.a(x)))))
    (mpk.convert(model, "mixed_float16"))(x).sum().backward()
    assert model.fc1.base.weight.grad is None
    assert model.fc1.a.weight.grad.count_nonzero() > 0


# ----- where the ReLU is ----------------------------------------------------------------------


class Twin(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.reset()

    def reset(self):
        nn.init.zeros_(self.fc1.bias)  # a method that reads no more than parameters

    def activated(self, x):
        return torch.relu(self.fc1(x))

    def forward(self, x):
        return torch.relu(self.fc2(self.activated(x)))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


def test_functional_relu_is_fused_in_nested_modules():
    shared = Twin()
    model = nn.Sequential(Twin(), nn.Sequential(Layers()), nn.Linear(2, 6), shared, shared)
    names = ["0.fc1", "0.fc2", "1.0.layers.0", "1.0.layers.1", "1.0.layers.2", "3.fc1", "3.fc2"]
    assert fused(mpk.convert(model, "float32")) == names
    x = torch.randn(5, 6)
    assert relus(model, x) == 0
    out = model(x)
    bounds.check_rearranged(out, mpk.revert(model)(x))


# ----- nothing else changes ----------------------------------------------------------------------


def everything(model) -> list:
    modules = [(name, type(m), sorted(vars(m)), list(m._modules), m.training) for name, m in model.named_modules()]
    return [modules, [(n, id(p), p.dtype, p.grad_dtype) for n, p in model.named_parameters()], raw(model.state_dict().values())]


@pytest.mark.parametrize("cls", [Plain, Twin, Layers])
def test_functional_relu_revert_is_exact(cls):
    model = cls()
    before = everything(model)
    mpk.convert(model, "mixed_float16,grad=float16")
    assert fused(model)
    assert type(model) is cls
    assert "forward" not in vars(model)
    assert everything(model)[2] == before[2]
    assert everything(mpk.revert(model)) == before


def test_functional_relu_convert_is_idempotent():
    once, twice = make(), mpk.convert(make(), "mixed_float16")
    assert str(mpk.convert_report(once)) == str(mpk.convert_report(twice))
    assert fused(twice) == ["fc1"]
    hooked = twice.fc1.register_forward_hook(lambda *args: None)
    assert fused(mpk.convert(twice)) == []
    hooked.remove()
    assert policies(mpk.convert(twice, "mixed_bfloat16")) == policies(make(policy="mixed_bfloat16"))


def policies(model) -> list[str]:
    return [f"{row.policy} {row.activation}" for row in mpk.convert_report(model)]


def test_functional_relu_is_copied_and_pickled(generator, tmp_path):
    model, file = make(), io.BytesIO()
    x = torch.randn(5, 6, generator=generator)
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), copy.copy(model), torch.load(file, weights_only=False)):
        assert fused(twin) == ["fc1"]
        assert results(twin, x) == results(model, x)
        assert relus(twin, x) == 0
    with torch.no_grad():
        clone = copy.deepcopy(model)
        clone.fc1.weight.zero_()
        assert not torch.equal(clone(x), model(x))


def test_functional_relu_is_loaded_in_another_process(tmp_path, monkeypatch):
    source = """
from torch import nn, relu
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 40), nn.Linear(40, 2)
    def forward(self, x):
        return self.fc2(relu(self.fc1(x)))
"""
    (tmp_path / "users_net.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    from users_net import Net

    model, x = make(Net), torch.ones(3, 6)
    assert fused(model) == ["fc1"]
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = """
import torch
torch.set_num_threads(1)
model, x, expected = torch.load("model.pt", weights_only=False)
assert torch.equal(model(x), expected)
print(type(model).__name__, type(model.fc1).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True
    )
    assert done.stdout == "Net MPLinearBeforeReLU\n", done.stderr


@SPELLINGS
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_functional_relu_compiles_in_one_graph(cls, backend, generator):
    model = make(cls)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 7, 64):
            x = torch.randn(rows, 6, generator=generator)
            assert results(compiled, x) == results(model, x)


def test_functional_relu_survives_a_graph_that_breaks(generator):
    class Breaks(Plain):
        def forward(self, x):
            hidden = self.fc1(x)
            torch._dynamo.graph_break()
            return self.fc2(torch.relu(hidden))

    torch.compiler.reset()
    model, x = make(), torch.randn(5, 6, generator=generator)
    model.__class__ = Breaks  # as fx, which is given the other, cannot trace it
    expected = results(model, x)
    assert results(torch.compile(model, backend="aot_eager"), x) == expected
    model.fc1.compile(backend="aot_eager")
    assert results(model, x) == expected


def test_functional_relu_is_exported():
    model, x = make().eval(), torch.randn(5, 6)
    for strict in (False, True):
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), model(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_functional_relu_checkpointed(use_reentrant, generator):
    model, x = make(), torch.randn(5, 6, generator=generator)
    assert results(lambda_module(model, use_reentrant), x) == results(model, x)


def lambda_module(model, use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=use_reentrant)

    return Checkpointed()


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, fully_shard])
def test_functional_relu_in_a_wrapper(wrap, generator):
    x = torch.randn(5, 6, generator=generator)
    expected = results(make(), x)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = make()
        wrapped = wrap(model)
        assert relus(wrapped, x) == 0
        model.zero_grad()
        out = wrapped(x)
        out.square().sum().backward()
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        assert raw([out, *grads]) == [expected[0], *expected[2:]]
    finally:
        torch.distributed.destroy_process_group()


def test_functional_relu_under_torch_func(generator):
    model, x = make(policy="float32"), torch.randn(4, 6, generator=generator)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, row):
        return torch.func.functional_call(model, params, (row,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        bounds.check_rearranged(grads[name].sum(0), parameter.grad)


def test_functional_relu_with_inputs_of_a_class_of_their_own(generator):
    class Named(torch.Tensor):
        pass

    model, x = make(), torch.randn(4, 6, generator=generator)
    assert torch.equal(model(x.as_subclass(Named)).as_subclass(torch.Tensor), model(x))
    assert type(model(x.as_subclass(Named))) is Named
