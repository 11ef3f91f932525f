# SPDX-License-Identifier: Apache-2.0
"""watch: magnitudes of every linear without a host sync, the first layer of an overflow by name, and nothing left behind."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mpkernels as mpk
from mpkernels.precision import taps
from mpkernels.precision.watch import _OnHost
from mpkernels.runtime import native
from tests.precision.test_find_nonfinite import Scale
from tests.ranks import run_ranks

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def model_with(middle=None, policy="mixed_float16"):
    """Linears 0, 3 and 5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), middle or Scale(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return model if policy is None else mpk.convert(model, policy)


def parts(model, **options):
    return mpk.optim.SGD(model.named_parameters(), lr=0.01, **options), mpk.GradScaler(init_scale=1024.0)


def train(model, optimizer, scaler, x=X):
    scaler.scale(model(x).float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def by_hand(model, x=X, scale=1024.0, fused=False):
    """out and grad_x of each linear, from hooks of its own on a copy of the model. fused: out is that of the ReLU."""
    model, found = copy.deepcopy(model), {}

    def enter(name):
        def hook(module, args):
            view = args[0].view_as(args[0])
            if view.requires_grad:
                view.register_hook(lambda grad: found[name].__setitem__(1, amax(grad)))
            return view

        return hook

    def leave(name, activation):
        return lambda module, args, out: found.__setitem__(name, [amax(activation(out)), None])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(enter(name))
            module.register_forward_hook(leave(name, torch.relu if fused and name != "5" else torch.abs))
    (model(x).float().square().mean() * scale).backward()
    return found


def amax(values):
    return values.detach().abs().max().item()


def seen(watch):
    return {layer.name: [layer.out, layer.grad_x] for layer in watch.report().layers}


def assert_close(found, expected, rel):
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert [v is None for v in found[name]] == [v is None for v in values]
        assert [v for v in found[name] if v] == pytest.approx([v for v in values if v], rel=rel)


def hooks_of(model):
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return hooks + [m._observer for m in model.modules() if getattr(m, "_observer", None) is not None]


# ----- magnitudes ---------------------------------------------------------------


def test_watch_of_nn_linear_matches_hooks():
    model = model_with(policy=None)
    expected = by_hand(model)
    optimizer, scaler = parts(model)
    with mpk.watch(model, optimizer, scaler) as watch:
        train(model, optimizer, scaler)
        assert_close(seen(watch), expected, 1e-6)
        assert expected["0"][1] is None


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_watch_changes_no_bit_of_a_converted_model(policy):
    """The sequence still runs its layers fused, and grad_x is what the fused backward hands on."""
    plain, watched = model_with(policy=policy), model_with(policy=policy)
    expected = by_hand(watched, fused=True)
    watch = mpk.watch(watched)
    for model in (plain, watched):
        model(X).float().square().mean().mul(1024).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert_close(seen(watch), expected, 0.03)
    watch.close()


class Forbidden(TorchDispatchMode):
    """Raises where a value of a tensor is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func)
        assert "is_nonzero" not in str(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_watch_does_not_wait(policy, monkeypatch):
    model = model_with(policy=policy)
    optimizer, scaler = parts(model)
    with mpk.watch(model, optimizer, scaler) as watch:
        scale = scaler.scale(torch.ones(()))
        with Forbidden():
            model(X).float().square().mean().backward()
            watch._end_step(scale)
        for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, None)
        model(X).float().square().mean().backward()
        watch._end_step(scale)
        monkeypatch.undo()
        assert watch.report().step == 2
        assert all(layer.out > 0 for layer in watch.report().layers)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_watch_lets_inf_and_nan_through(value, policy):
    model = model_with(Scale(value), policy)
    with mpk.watch(model) as watch:
        model(X).float().sum().backward()
        out = {layer.name: layer.out for layer in watch.report().layers}
    assert math.isfinite(out["0"])
    assert not math.isfinite(out["3"])
    assert not math.isfinite(out["5"])


def test_watch_counts_accumulation_repeated_calls_and_tied_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model = mpk.convert(Twice(), "mixed_float16")
    optimizer, scaler = parts(model)
    outs = []
    model.a.register_forward_hook(lambda module, args, out: outs.append(amax(out)))
    with mpk.watch(model, optimizer, scaler) as watch:
        scaler.scale(model(X * 3).square().mean()).backward()
        train(model, optimizer, scaler)
        layers = {layer.name: layer for layer in watch.report().layers}
    assert len(outs) == 4
    assert layers["a"].out == max(outs)
    assert layers["b"].grad_x > 0
    assert (layers["never"].out, layers["never"].grad_x, layers["never"].room) == (None, None, None)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_watch_of_checkpointed_layers(use_reentrant, policy):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2))
    if policy is not None:
        mpk.convert(blocks, policy)
    x = X.clone().requires_grad_()

    def run(apply):
        with mpk.watch(blocks) as watch:
            y = x
            for block in blocks:
                y = apply(block, y)
            y.float().square().mean().backward()
            return seen(watch), watch._current_order()

    again = lambda block, y: checkpoint(block, y, use_reentrant=use_reentrant)
    assert run(again) == run(lambda block, y: block(y))


@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
def test_watch_in_autocast(policy):
    model = model_with(policy=policy)
    with mpk.watch(model) as watch, torch.autocast("cpu", torch.float16):
        model(X)
        narrow = watch.report().layers
    end = torch.finfo(torch.float16 if policy is None else torch.bfloat16).max
    assert [layer.room for layer in narrow] == pytest.approx([math.log2(end / layer.out) for layer in narrow])
    with mpk.watch(model) as watch, torch.autocast("cpu", torch.bfloat16):
        model(X).float().square().mean().backward()
        layers = watch.report().layers
    assert all(layer.out > 0 for layer in layers)
    assert [layer.grad_x is None for layer in layers] == [True, False, False]


def test_watch_of_multihead_attention():
    model = mpk.convert(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), "mixed_float16")
    with mpk.watch(model) as watch:
        model(X.view(2, 3, 8).requires_grad_()).square().mean().backward()
        layers = {layer.name: layer for layer in watch.report().layers}
    assert list(layers) == ["self_attn", "linear1", "linear2"]
    assert "without calling it" in layers["self_attn"].note
    assert all(layer.out > 0 and layer.grad_x > 0 for layer in layers.values())


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_watch_of_jagged_rows(policy):
    """Of nn.Linear without grad_x."""
    model = nn.Sequential(nn.Linear(8, 4))
    if policy is not None:
        mpk.convert(model, policy)
    x = torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged, requires_grad=True)
    with mpk.watch(model) as watch:
        model(x).values().sum().backward()
        (layer,) = watch.report().layers
    assert layer.out == pytest.approx(amax(model(X)), rel=1e-6)
    assert (layer.grad_x is None) == (policy is None)


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_watch_of_an_input_by_name(policy):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            return self.linear(input=x)

    model = Named() if policy is None else mpk.convert(Named(), policy)
    with mpk.watch(model) as watch:
        model(x=X.clone().requires_grad_()).float().sum().backward()
        (layer,) = watch.report().layers
    assert layer.grad_x == pytest.approx(amax(model.linear.weight.sum(0)), rel=1e-3)


def test_watch_passes_over_sparse_data():
    model = nn.Sequential(nn.Linear(8, 4))
    with mpk.watch(model) as watch:
        model(X.to_sparse()).sum().backward()
        assert watch.report().ok
        assert watch.report().layers[0].out > 0


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_watch_leaves_out_evaluation_transforms_and_questions(policy):
    model = model_with(nn.Identity(), policy)
    with mpk.watch(model) as watch:
        model.eval()
        with torch.no_grad():
            model(X)
        torch.func.vmap(model)(X)
        torch.func.grad(lambda x: model(x).sum())(X)
        bad = lambda model: model(X * math.inf).sum()
        for asks in (mpk.find_nonfinite, mpk.advise):
            asks(model.train(), bad)
        mpk.check_batch_invariant(model, X)
        report = watch.report()
        assert report.ok
        assert all(layer.out is None for layer in report.layers)


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_watch_compiles(policy):
    model = model_with(policy=policy)
    if policy is not None:
        mpk.convert(model, policy, min_size=0)
    with mpk.watch(model) as watch:
        model(X).float().square().mean().backward()
        eager, order = seen(watch), watch._current_order()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with mpk.watch(compiled, optimizer) as watch:
        for _ in range(2):
            compiled(X).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_close(seen(watch), eager, 0.05)
            assert watch._order == order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["eager", "traced", "native"])
def test_watch_raises_a_cell(how, dtype):
    """To the largest magnitude, in one table of fp32 and one of fp64; NaN and inf stay there."""
    if how == "native" and native.why_not() is not None:
        pytest.skip(native.why_not())
    raise_ = {"eager": taps._raise, "traced": taps._raise_traced}.get(how) or taps.raise_native()
    x = torch.randn(300, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    infinite, minus, nan = (x.index_put((torch.tensor(7), torch.tensor(9)), torch.tensor(v, dtype=dtype))
                            for v in (math.inf, -math.inf, math.nan))  # fmt: skip
    for wide in (torch.float32, torch.float64):
        table = torch.full((2, taps.COLUMNS), taps.NOTHING, dtype=wide)
        cell = table[1, 2]

        def raised(values, raise_=raise_, table=table, cell=cell, **options):
            raise_(table, 1, 2, values, **options)
            return cell.item()

        assert raised(x[:0]) == taps.NOTHING
        assert raised(torch.zeros(2, dtype=dtype)) == 0
        assert raised(-x[:1].abs()) == x[:1].abs().max().to(wide)
        assert raised(x.t().requires_grad_()) == x.abs().max().to(wide)
        assert raised(x[::2, 1::3]) == x.abs().max().to(wide)
        assert raised(minus, ignores_minus_inf=True) <= x.abs().max()
        assert raised(minus) == math.inf
        assert raised(x) == math.inf
        assert math.isnan(raised(nan))
        assert math.isnan(raised(infinite))
        table.fill_(taps.NOTHING)
        assert raised(infinite, ignores_minus_inf=True) == math.inf
        assert math.isnan(raised(nan, ignores_minus_inf=True))
        assert (table != taps.NOTHING).sum() == 1


@pytest.mark.parametrize("is_native", [True, False])
def test_watch_ends_a_step(is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(taps, "is_native", lambda table: False)
    elif native.why_not() is not None:
        pytest.skip(native.why_not())
    for dtype in (torch.float32, torch.float64):
        table, last = torch.arange(10, dtype=dtype).view(2, 5), torch.zeros(2, 5, dtype=dtype)
        expected = table.clone()
        end_step = taps.end_step_of(table)
        end_step(table, last, None)
        assert torch.equal(last, expected)
        assert (table == taps.NOTHING).all()
        end_step(table, last, torch.tensor(1024.0))
        assert last[0].tolist() == [taps.NOTHING, 1024.0, *[taps.NOTHING] * 3]


def test_watch_without_the_library_is_the_same(monkeypatch):
    found = []
    for _ in range(2):
        model = model_with()
        x = torch.cat([X, torch.full((1, 8), -math.inf)])
        with mpk.watch(model) as watch:
            model(x)
            model(X).float().square().mean().backward()
            found.append(watch._table.nan_to_num(nan=-2.0))
        monkeypatch.setattr(taps, "is_native", lambda table: False)
    assert torch.equal(*found)


# ----- the first layer by name ---------------------------------------------------------------


def test_watch_names_the_first_in_forward():
    model = model_with(Scale(2e5))
    optimizer, scaler = parts(model)
    with mpk.watch(model, optimizer, scaler) as watch:
        train(model, optimizer, scaler)
        report = watch.report()
        assert (report.ok, report.module, report.direction) == (False, "3", "forward")
        lines = scaler.overflow_report(optimizer).splitlines()
        assert lines[0] == "step 1 skipped at scale 1024: first in forward: 3 (out has NaN)"
        assert "5.bias" in lines[1]
        assert "find_nonfinite" not in lines[1]  # it is found
    assert "first in" not in scaler.overflow_report(optimizer)


def test_watch_names_the_first_in_backward():
    """Backward reaches 3 before 0: what Scale hands back is too large for the linear before it, whose input has a gradient."""
    torch.manual_seed(0)
    model = mpk.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), Scale(backward=1e9), nn.Linear(8, 4)))
    optimizer, scaler = parts(model)
    with mpk.watch(model, optimizer, scaler) as watch:
        scaler.scale(model(X).float().square().mean()).backward()
        scaler.step(optimizer)
        before = scaler.overflow_report(optimizer)
        scaler.update()
        assert scaler.overflow_report(optimizer) == before
        report = watch.report()
    assert (report.module, report.direction) == ("2", "backward")
    first = before.splitlines()[0]
    assert first.startswith("step 1 skipped at scale 1024: first in backward: 2 (grad_x ")
    assert first.endswith(f"; its output was fine (amax {report.amax:.3g})")
    assert report.amax == {layer.name: layer.out for layer in report.layers}["2"]


def test_watch_names_the_data():
    model = model_with()
    optimizer, scaler = parts(model)
    x = X.clone()
    x[0, 0] = math.nan
    with mpk.watch(model, optimizer, scaler) as watch:
        train(model, optimizer, scaler, x)
        assert "first" not in scaler.overflow_report(optimizer).splitlines()[0]
        assert "in the data: what the model was given has NaN" in scaler.overflow_report(optimizer)
        assert watch.report().direction == "data"
        train(model, optimizer, scaler)
        assert watch.report()
        assert scaler.overflow_report(optimizer) == ""


def test_watch_passes_over_data_in_eight_bits():
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, out: out.float())
    with mpk.watch(model) as watch:
        model(torch.ones(2, 4).to(torch.float8_e4m3fn))
        assert watch.report().layers[0].out > 0


def test_watch_says_where_every_linear_is_finite():
    """Of a gradient that only a weight has."""
    model = mpk.convert(nn.Sequential(nn.Linear(8, 4)), "mixed_float16,grad=float16")
    optimizer, scaler = parts(model)
    with mpk.watch(model, optimizer, scaler):
        scaler.scale(model(X * 1000).float().square().sum()).backward()
        scaler.step(optimizer)
        assert "out and grad_x of every linear are finite" in scaler.overflow_report(optimizer)


# ----- steps, state and the end ---------------------------------------------------------------


def test_watch_steps_by_the_optimizer_without_a_scaler():
    model = model_with(policy="mixed_bfloat16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for scaler in (None, mpk.GradScaler(enabled=False)):
        with mpk.watch(model, optimizer, scaler) as watch:
            for step in range(2):
                assert watch.report().step == step
                model(X).float().square().mean().backward()
                optimizer.step()
        optimizer.step()


def test_watch_report_is_a_table():
    model = model_with()
    optimizer, scaler = parts(model)
    with mpk.watch(model, optimizer, scaler) as watch:
        assert "so far: every out and gradient is finite" in str(watch.report())
        train(model, optimizer, scaler)
        lines = str(watch.report()).splitlines()
    assert lines[0] == "step 1 at loss scale 1024: every out and gradient is finite"
    assert lines[1].split() == ["layer", "policy", "out", "grad_x", "room"]
    assert [line.split()[:2] for line in lines[2:]] == [[name, "mixed_float16"] for name in "035"]
    assert lines[2].split()[3] == "-"


@pytest.mark.parametrize("policy, out, room", [("mixed_float16", 65504.0 / 8, 3.0), ("float64", 2.0**-10, 1034)])
def test_watch_room_is_that_of_the_format(policy, out, room):
    """How often over a small number in float64 is from the end is no float."""
    model = mpk.MPLinear(2, 2, bias=False, policy=policy)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    with mpk.watch(model) as watch:
        model(torch.full((1, 2), out, dtype=model.weight.dtype))
        (layer,) = watch.report().layers
    assert layer.room == pytest.approx(room)


class Returns(nn.Linear):
    """A linear that returns what `change` makes of its output."""

    change = None

    def forward(self, x, mask=None):
        return self.change(super().forward(x))


def _watch_collectives(rank, world):
    from torch.distributed import _functional_collectives as collectives
    from torch.distributed import group

    model = Returns(8, 4)
    model.change = lambda out: collectives.all_reduce(out, "sum", group.WORLD)
    with torch.no_grad(), mpk.watch(model) as watch:
        out = model(collectives.all_reduce(X.clone(), "sum", group.WORLD))
        assert type(out) is not torch.Tensor
        assert watch.report().layers[0].out == amax(out)
        assert watch._table[0, taps.DATA] == amax(X)


def test_watch_waits_for_a_collective_under_way():
    """Its tensor has no memory of its own."""
    run_ranks(1, _watch_collectives, 1)


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_watch_does_not_look_at_fake_tensors(policy):
    model = model_with(policy=policy)
    with mpk.watch(model) as watch:
        model(X).float().sum().backward()
        seen = str(watch.report())
        model.zero_grad()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(2 * X)).float().sum().backward()
        assert str(watch.report()) == seen


@pytest.mark.parametrize(("sign", "amax_of_data"), [(1, 0.0), (-1, math.inf)])
def test_watch_sees_the_sign_of_a_mask_that_is_lazily_negated(sign, amax_of_data):
    """-inf is that of attention masks, inf is not."""
    model = Returns(2, 2)
    model.change = lambda out: out
    with mpk.watch(model) as watch:
        model(torch.zeros(2), torch._neg_view(torch.full((2,), sign * math.inf)))
        assert watch._table[0, taps.DATA] == amax_of_data
        assert ("in the data" in str(watch.report())) == (amax_of_data == math.inf)  # though no layer has read it


def test_watch_does_not_look_at_what_has_8_bits():
    """Of which torch has no maximum."""
    model = Returns(8, 4)
    model.change = lambda out: out.to(torch.float8_e4m3fn)
    with mpk.watch(model) as watch:
        model(X)
        assert watch.report().layers[0].out is None


def test_watch_keeps_tables_of_float64_in_float64():
    with mpk.watch(nn.Linear(2, 2, dtype=torch.float64)) as watch:
        watch._table[1, taps.OUT] = 1e300
        watch._pending.append(_OnHost(watch._table))
        (pending,) = watch.state_dict()["pending"]
        assert torch.equal(pending, watch._table)
