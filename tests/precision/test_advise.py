# SPDX-License-Identifier: Apache-2.0
"""advise: planted layers get the right verdict."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpkernels as mpk
from mpkernels.precision import verdict
from tests.precision.test_find_nonfinite import Scale

X = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
Y = torch.randint(6, (24,), generator=torch.Generator().manual_seed(1))
FP32, BF16, FP16 = "float32", "mixed_bfloat16", "mixed_float16"


class Net(nn.Module):
    """Three linears, with `before` and `after` around what the middle one is given and returns."""

    def __init__(self, before=1.0, after=1.0, backward=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.planted, self.last = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 6)
        self.before, self.after = Scale(before), Scale(after, backward)

    def forward(self, x):
        return self.last(self.after(self.planted(self.before(F.gelu(self.first(x))))))


def step(model):
    return F.cross_entropy(model(X), Y)


def advise(model, step=step, **options):
    return mpk.advise(model, step, loss_budget=options.pop("loss_budget", 1e9), **options)


def wrong(advice, policy):
    """(layer, tensor) of each that leaves its range under `policy`."""
    found = {}
    for row in advice.rows:
        if policy in row.policies and (reason := verdict.problem(row.policies[policy], advice.loss_scale)) is not None:
            found[row.name] = reason
    return found


# ----- planted layers ----------------------------------------------------------------------


def test_advise_finds_nothing_wrong():
    advice = advise(Net())
    assert not wrong(advice, FP16)
    assert advice.policy == dict.fromkeys(("first", "planted", "last"), FP16)  # as narrow as bf16, and more exact
    assert advice.why("planted").startswith("planted: mixed_float16: adds ")


def test_advise_of_forward_overflow():
    advice = advise(Net(before=1e5, after=1e-5))
    assert set(wrong(advice, FP16)) == {"planted"}
    assert not wrong(advice, BF16)
    amax = advice["planted"].policies[FP16].range["x"].amax
    assert advice.why("planted").startswith(
        f"planted: not mixed_float16: x reaches {amax:.3g} in forward, float16 ends at 65504; mixed_bfloat16: adds "
    )
    assert advice.policy == {"first": FP16, "planted": BF16, "last": FP16}
    assert advice["planted"].policies[FP16].range["x"].margin_bits == pytest.approx(math.log2(65504 / amax))


def test_advise_of_an_output_that_overflows():
    """What it reads and its weight fit; the sum does not."""
    model = Net(after=1e-5, backward=1e-5)
    with torch.no_grad():
        model.planted.weight *= 2e5 / model.planted(F.gelu(model.first(X))).abs().max()
    advice = advise(model, loss_scale=1.0)
    assert [(name, r.split()[0]) for name, r in wrong(advice, FP16).items()] == [("planted", "out")]
    amax = model.planted(F.gelu(model.first(X))).abs().max()
    assert f"out reaches {amax:.3g} in forward, float16 ends at 65504" in advice.why("planted", FP16)


def test_advise_of_overflow_in_backward_only():
    advice = advise(Net(backward=1e4))
    found = wrong(advice, FP16)
    assert list(found) == ["first", "planted"]  # what comes before it in forward has its gradient too
    assert found["planted"].startswith("grad_out reaches ")
    safe = advice["planted"].policies[FP16].max_loss_scale
    assert (
        f"in backward at loss scale 65536, float16 ends at 65504; a loss scale of {safe:g} is safe for it" in found["planted"]
    )
    assert safe < 65536
    assert not wrong(advise(Net(backward=1e4), loss_scale=safe), FP16).get("planted")
    assert wrong(advise(Net(backward=1e4), loss_scale=2 * safe), FP16)["planted"]


@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_advise_of_small_gradients(loss_scale):
    """1e-9: 0 in fp16 without a scale; bf16 holds them, and fp16 with one."""
    advice = advise(Net(), lambda model: 1e-7 * step(model), loss_scale=loss_scale)
    assert not wrong(advice, BF16)
    if loss_scale == 1:
        reason = wrong(advice, FP16)["planted"]
        assert reason.startswith("grad_out loses ")
        assert "% of its norm to 0 in backward at loss scale 1 (amax " in reason
        assert "float16 begins at 5.96e-08; its gradients stay in range up to a loss scale of " in reason
        assert set(advice.policy.values()) == {BF16}
    else:
        assert not wrong(advice, FP16)


@pytest.mark.parametrize("where", ["channel", "token"])
def test_advise_of_one_outlier(where):
    """One column or one row of what the layer reads."""

    class Outlier(Net):
        def forward(self, x):
            h = F.gelu(self.first(x))
            factor = torch.ones_like(h)
            factor[(slice(None), 3) if where == "channel" else 5] = 1e6
            return self.last(torch.tanh(self.planted(h * factor)))

    advice = advise(Outlier(), loss_scale=1.0)
    assert list(wrong(advice, FP16)) == ["planted"]
    found = advice["planted"].policies[FP16].range["x"]
    assert found.overflows == (Outlier().first(X).shape[0] if where == "channel" else 32) - _fitting(where)
    assert advice.policy["planted"] == BF16


def _fitting(where):
    h = F.gelu(Net().first(X)) * 1e6
    return int(((h[:, 3] if where == "channel" else h[5]).abs() < 65520).sum())


def test_advise_of_cancellation():
    """Large terms whose sum is small: in range, and wrong in 16 bits; the noise says so, and the budget decides."""

    class Cancels(Net):
        def forward(self, x):
            h = F.gelu(self.first(x)) + 300
            return self.last(self.planted(h))

    model = Cancels()
    with torch.no_grad():
        model.planted.weight -= model.planted.weight.mean(1, keepdim=True)
    advice = mpk.advise(model, step)
    assert not wrong(advice, BF16)
    noise = {p: row.noise for p, row in advice["planted"].policies.items()}
    assert noise[BF16] > advice.loss_budget > 100 * noise[FP32]
    assert advice.policy["planted"] == FP32
    assert f"of {advice.loss_budget:.1e} for all layers" in advice.why("planted")
    assert "not mixed_bfloat16: adds " in advice.why("planted")
    added = sum(row.policies[row.policy].noise for row in advice.rows)
    assert str(advice).endswith(f"what the policies add to it: {added:.1e}, of a budget of {advice.loss_budget:.1e}")
    assert advise(model).policy["planted"] == FP16


def test_advise_of_a_dead_layer():
    class Dead(Net):
        def forward(self, x):
            return self.last(torch.relu(self.planted(F.gelu(self.first(x))) - 1e3))

    advice = advise(Dead())
    row = advice["planted"].policies[FP16]
    assert (row.range["grad_out"].amax, row.noise, row.loss_change) == (0.0, 0.0, 0.0)
    assert row.max_loss_scale is None
    assert advice.policy["planted"] == FP16  # as narrow as bf16, and its out is more exact


@pytest.mark.parametrize("policies", [(FP32, BF16, FP16), (FP16, BF16, FP32)])
@pytest.mark.parametrize("size, expected", [(1.0, FP16), (1e5, BF16)])
def test_advise_of_a_frozen_layer_by_its_forward(policies, size, expected):
    """No gradient comes to it: of what is as cheap and in range, the least error of out; it holds nothing but parameters."""
    model = Net()
    model.first.requires_grad_(False)
    advice = advise(model, lambda model: F.cross_entropy(model(size * X), Y), policies=policies, loss_scale=1.0)
    assert advice.policy["first"] == expected
    found = advice["first"].policies
    assert found[FP32].error["out"] < found[expected].error["out"] <= found[BF16].error["out"]
    assert {row.bytes for row in found.values()} == {4 * (16 * 32 + 32)}
    assert all(row.noise is None and row.error.keys() == {"out"} for row in found.values())
    assert advice.why("first").endswith(": no gradient came to it, so that what it adds to the loss is unknown")


def test_advise_of_nan_in_the_data():
    x = X.clone()
    x[3, 2] = torch.nan
    advice = advise(Net(), lambda model: F.cross_entropy(model(x), Y))
    assert math.isnan(advice.loss)
    assert advice.why("first").endswith(
        "float32, the widest, does not mend it: x has NaN in forward, which no format mends"
    )  # fmt: skip
    assert advice.policy["first"] == FP32
    last = str(advice).splitlines()[-1]
    assert last.startswith("loss nan: the data, or what the model makes of it in its own dtype, is not finite")
    assert last.endswith("mpk.find_nonfinite(model, step) says where it begins")


def test_advise_of_a_tied_weight():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(32, 24)
            self.again.weight = self.planted.weight

        def forward(self, x):
            h = F.gelu(self.first(x))
            return self.last(self.planted(h) + 1e-5 * self.again(1e5 * h))

    advice = advise(Tied(), loss_scale=1.0)
    assert list(wrong(advice, FP16)) == ["again"]
    assert advice.policy == {"first": FP16, "planted": BF16, "again": BF16, "last": FP16}


def test_advise_of_a_layer_that_is_used_twice():
    class Twice(Net):
        def forward(self, x):
            h = F.gelu(self.first(x))
            return self.last(self.planted(h) + 1e-5 * self.planted(1e5 * h))

    once, twice = advise(Net(), loss_scale=1.0)["planted"].policies, advise(Twice(), loss_scale=1.0)
    assert list(wrong(twice, FP16)) == ["planted"]
    both = twice["planted"].policies[BF16]
    assert both.range["x"].amax == pytest.approx(1e5 * once[BF16].range["x"].amax)
    assert both.range["x"].min_nonzero == once[BF16].range["x"].min_nonzero
    assert both.bytes - once[BF16].bytes == 24 * 32 * 2  # saved for backward, once more


@pytest.mark.parametrize("run", [step, torch.autocast("cpu", torch.bfloat16)(step)], ids=["", "autocast"])
def test_advise_of_arguments_by_name(run):
    class ByName(Net):
        def forward(self, x):
            return self.last(input=self.after(x=self.planted(input=self.before(x=F.gelu(self.first(input=x))))))

    assert advise(ByName(), run).to_json() == advise(Net(), run).to_json()


def test_advise_of_jagged_rows():
    """Each row as it lies in one matrix."""
    loss = lambda model, x: model(x).square()
    model, x = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 6)), [X[:5], X[5:]]
    jagged = advise(model, lambda model: loss(model, torch.nested.nested_tensor(x, layout=torch.jagged)).values().mean())
    assert jagged.to_json() == advise(model, lambda model: loss(model, X).mean()).to_json()


class Checkpointed(Net):
    """`planted`, called twice, is run by `run`."""

    def __init__(self, run):
        super().__init__()
        self.planted, self.last, self.run = nn.Linear(32, 32), nn.Linear(32, 6), run

    def forward(self, x):
        return self.last(self.run(nn.Sequential(self.planted, nn.GELU(), self.planted, self.after), F.gelu(self.first(x))))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_advise_counts_checkpointed_layers_once(use_reentrant):
    found = [
        advise(Checkpointed(run)).to_json()
        for run in (lambda module, x: module(x), partial(checkpoint, use_reentrant=use_reentrant))
    ]
    assert found[0] == found[1]


def test_advise_of_a_layer_that_is_never_called():
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(4, 4)

    advice = advise(Unused())
    assert "unused" not in advice.policy
    assert advice.why("unused") == "unused: was not called in this step: nothing was measured"
    assert "unused: was not called" in str(advice)


def test_advise_of_a_compiled_model_is_what_convert_takes():
    """Names are those of the model that was compiled, in every report, and convert takes them."""
    model = torch.compile(Net(before=1e5, after=1e-5), backend="eager")
    advice = advise(model)
    assert advice.policy == {"first": FP16, "planted": BF16, "last": FP16}
    mpk.convert(model, advice.policy, min_size=0)
    converted = {row.name: str(row.policy) for row in mpk.convert_report(model)}
    assert converted == advice.policy
    with mpk.watch(model) as watch:
        step(model).backward()
        assert [layer.name for layer in watch.report().layers] == list(advice.policy)


def test_advise_of_what_is_no_linear():
    """An MPMLP itself, and a module of the user's that has the name of transformers' linear."""

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return x * self.scale

    model = nn.Sequential(Conv1D(), mpk.MPMLP([16, 32, 6]))
    advice = advise(model)
    assert advice.policy.keys() == {"1.0", "1.2"}
    assert advice.why("0") == "0: Conv1D is not converted"
    with mpk.watch(model) as watch:
        step(model).backward()
        assert [layer.name for layer in watch.report().layers] == ["1.0", "1.2"]


def test_advise_thresholds_decide(monkeypatch):
    """Flipped, the verdicts flip: the tests above look at them."""
    model = Net()
    assert not wrong(advise(model), FP16)
    monkeypatch.setattr(verdict, "MOST_NORM_LOST", 0.0)
    assert wrong(advise(model), FP16)
    monkeypatch.setattr(verdict, "MOST_NORM_LOST", 1.1)
    assert not wrong(advise(model, lambda model: 1e-7 * step(model), loss_scale=1.0), FP16)
