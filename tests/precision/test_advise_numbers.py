# SPDX-License-Identifier: Apache-2.0
"""advise: what it predicts is what is measured, bounds hold, budgets choose, bad inputs."""

import copy
import itertools
import json
import math
import pickle
import random
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpkernels as mpk
from mpkernels.ops.linear_act import Activation
from mpkernels.precision import choose
from mpkernels.precision.choose import Option
from mpkernels.precision.exact import Exact
from mpkernels.precision.ranges import RangeCounter
from mpkernels.runtime import tuned_table
from tests import models
from tests.precision import measured

X, Y = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 6


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 6))


def step(model):
    return F.cross_entropy(model(X), Y)


# ----- numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("plain_mlp", torch.float32),
        ("norm_block", torch.float64),
        *(
            pytest.param(n, d, marks=pytest.mark.sweep)
            for n in ("vit", "bert_gelu", "gpt2")
            for d in (torch.float32, torch.float64)
        ),
    ],
)
def test_advise_predicts_the_change_of_the_loss(name, dtype):
    correlation, within = measured.agreement(list(measured.loss_changes(name, 48, dtype)))
    assert correlation >= 0.95
    assert within >= 0.85


@pytest.mark.parametrize("layers", [150, pytest.param(10_000, marks=pytest.mark.sweep)])
def test_advise_bound_holds(layers):
    largest = {}
    for policy, activation, ratio in measured.bound_ratios(0, layers):
        assert ratio is None or ratio <= 1, (policy, activation, ratio)
        largest[policy, activation] = max(largest.get((policy, activation), 0.0), ratio or 0.0)
    assert len(largest) == len(measured.OF_BOUND) * len(measured.ACTIVATIONS)
    assert min(largest.values()) > 0.05, "a bound that nothing comes near says nothing"


def test_advise_bound_is_of_one_rounding():
    """The same output, rounded once more to the format's neighbour, is beyond it."""
    linear, x = mpk.MPLinear(64, 32, activation="gelu"), torch.randn(16, 64)
    policy = mpk.Policy.parse("float32,output=bfloat16")
    exact = Exact(linear.weight.detach(), linear.bias.detach(), Activation.GELU, set())
    exact.run(x, None)
    out = exact.out.to(torch.bfloat16)
    ratio = lambda out: exact.bound_ratio(policy, out.dtype, out.double() - exact.out)
    assert 0.9 < ratio(out) <= 1
    assert ratio(torch.nextafter(out, torch.full_like(out, torch.inf))) > 1


def test_advise_judges_gradients_that_backward_computes():
    """None of data, none of a frozen weight."""
    model = mlp()
    model[4].weight.requires_grad_(False)
    advice = mpk.advise(model, step)
    for layer, there, absent in (("0", "grad_weight", "grad_x"), ("4", "grad_x", "grad_weight")):
        row = advice[layer].policies["mixed_float16"]
        assert there in row.error.keys() & row.range.keys()
        assert absent not in row.error.keys() | row.range.keys()


def test_advise_errors_are_those_of_fp64():
    """Against products that are written out; and blocks of rows change nothing."""
    torch.manual_seed(0)
    linear, x, grad = nn.Linear(40, 24), torch.randn(33, 40), torch.randn(33, 24)
    (row,) = measured.rows_of(linear, x, grad, ["mixed_bfloat16"])
    out = F.linear(*(t.detach().double() for t in (x, linear.weight, linear.bias)))
    mine = mpk.convert(copy.deepcopy(linear), "mixed_bfloat16")
    inputs = x.clone().requires_grad_()
    got = mine(inputs)
    got.backward(grad)
    exact = {"out": out, "grad_x": grad.double() @ linear.weight.double(), "grad_weight": grad.double().t() @ x.double()}
    for name, t in {"out": got, "grad_x": inputs.grad, "grad_weight": mine.weight.grad}.items():
        assert row.error[name] == pytest.approx(float((t.double() - exact[name]).norm() / exact[name].norm()), rel=1e-3)
    terms = grad.double() * (got.detach().double() - out)
    assert row.loss_change == pytest.approx(float(terms.sum()))
    assert row.noise == pytest.approx(float(terms.norm()))
    assert row.range["grad_x"].amax == pytest.approx(64 * float(exact["grad_x"].abs().max()))


def test_advise_counts_by_block(monkeypatch):
    whole = mpk.advise(mlp().eval(), step)
    monkeypatch.setattr("mpkernels.precision.layer.BLOCK", 100)
    parts = mpk.advise(mlp().eval(), step)
    for a, b in zip(whole.rows, parts.rows, strict=True):
        for policy, tensor in itertools.product(a.policies, ("x", "grad_out")):
            assert a.policies[policy].range[tensor] == b.policies[policy].range[tensor]
        if a.note == "":
            a, b = (row.policies["mixed_bfloat16"] for row in (a, b))
            assert a.loss_change == pytest.approx(b.loss_change, rel=1e-2)  # fp32's own depends on the order of a sum


# ----- choice ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["milp", "greedy"])
def test_advise_chooses_the_cheapest_within_budgets(way, monkeypatch):
    if way == "greedy":
        monkeypatch.setitem(sys.modules, "scipy", None)
    else:
        pytest.importorskip("scipy")
    rng, best_cost, found_cost = random.Random(1), 0.0, 0.0
    for _ in range(60):
        items = [[Option(rng.randint(1, 9), rng.random(), rng.randint(1, 9)) for _ in range(3)] for _ in range(5)]
        noise, memory = rng.uniform(0.5, 3.5), rng.choice([math.inf, rng.uniform(10, 30)])
        every = [picks for picks in itertools.product(range(3), repeat=5) if choose._within(items, picks, noise, memory)]
        found = choose.choose(items, noise, memory)
        if found is None:
            assert not every or way == "greedy"
            continue
        assert tuple(found) in every
        best = min(choose.total(items, picks, "cost") for picks in every)
        best_cost, found_cost = best_cost + best, found_cost + choose.total(items, found, "cost")
        assert way == "greedy" or choose.total(items, found, "cost") == best
    assert found_cost <= 1.1 * best_cost


@pytest.mark.parametrize("way", ["milp", "greedy"])
def test_advise_chooses_the_first_of_what_is_as_good(way, monkeypatch):
    if way == "greedy":
        monkeypatch.setitem(sys.modules, "scipy", None)
    alike, other = [Option(1, 0, 8)] * 3, [Option(1, 5, 8), Option(2, 1, 8), Option(2, 1, 8)]
    assert choose.choose([alike, other, alike], 2, math.inf) == [0, 1, 0]
    assert choose.choose([alike], 2, math.inf) == [0]


def test_advise_chooses_by_small_numbers():
    """Noise is a part of a loss: steps far below 1 count."""
    items = [[Option(1, 3e-6, 8), Option(2, 1e-6, 8)], [Option(1, 2e-6, 8), Option(4, 1e-6, 8)]]
    assert choose._greedy(items, [0, 0], 4e-6, math.inf) == [1, 0]


def test_advise_of_budgets_that_nothing_meets():
    with pytest.raises(ValueError, match=r"in range adds less than .* to the loss, and loss_budget is 1e-30"):
        mpk.advise(mlp(), step, loss_budget=1e-30)
    with pytest.raises(ValueError, match=r"no choice that stays in range needs less than [\d.]+ .?i?B, and memory is 100 B"):
        mpk.advise(mlp(), step, memory=100)


def test_advise_under_a_budget_of_memory():
    """Of a layer with few rows the copy costs more than 16-bit saved tensors win."""

    def step(model):
        return F.cross_entropy(model(X[:4]), Y[:4])

    free = mpk.advise(mlp(), step, loss_budget=1e9)
    held = {p: sum(free[name].policies[p].bytes for name in free.policy) for p in ("float32", "mixed_bfloat16")}
    assert set(free.policy.values()) == {"mixed_float16"}
    assert held["float32"] < held["mixed_bfloat16"]
    assert set(mpk.advise(mlp(), step, loss_budget=1e9, memory=held["float32"]).policy.values()) == {"float32"}


def test_advise_takes_times_from_the_tuned_table(monkeypatch):
    """Those of every layer and policy decide; where one is missing, none does, and the others are still shown."""
    policies = ["float32", "mixed_float16"]
    half, full = torch.float16, torch.float32
    entries = {}
    for N, K in ((32, 16), (6, 32)):
        for compute, us in ((full, 3.0), (half, 4.0)):
            for role, dtypes in (("fprop", (full,)), ("backward", (full, full))):
                key = tuned_table.gemm_key(role, len(X), N, K, 0, compute, full, *dtypes)
                entries[tuned_table.key_to_str(key)] = {"backend": "native", "tile": None, "us": us}
    monkeypatch.setattr(tuned_table, "entries", lambda device: entries)
    timed = mpk.advise(mlp(), step, policies=policies, loss_budget=1e9)
    assert timed["0"].policies["float32"].seconds == pytest.approx(6e-6)
    assert timed["4"].policies["mixed_float16"].seconds == pytest.approx(8e-6)
    assert set(timed.policy.values()) == {"float32"}
    kept = mpk.advise(mlp(), step, policies=["float32", "mixed_float16,saved=float8_e4m3fn"], loss_budget=1e9)
    assert kept["0"].policies["mixed_float16,saved=float8_e4m3fn"].seconds is None  # no table has the time that keeping takes
    entries.pop(next(iter(entries)))
    partly = mpk.advise(mlp(), step, policies=policies, loss_budget=1e9)
    assert partly["0"].policies["float32"].seconds is None
    assert partly["0"].policies["mixed_float16"].seconds == pytest.approx(8e-6)
    assert set(partly.policy.values()) == {"mixed_float16"}


def test_advise_of_a_model_in_fp64():
    """A loss scale that is safe for it may be more than a number in fp64."""
    model = mlp().double()
    advice = mpk.advise(model, lambda model: 1e-9 * F.cross_entropy(model(X.double()), Y), policies=["float64", "mixed_float8"])
    assert advice["0"].policies["float64"].max_loss_scale == 2.0**1023


def test_advise_of_16_bit_parameters():
    """They do not go with mixed ones in one model."""
    advice = mpk.advise(mlp(), step, policies=["float32", "mixed_float16", "float16"], loss_budget=1e9)
    mpk.convert(mlp(), advice.policy)


# ----- the model ----------------------------------------------------------------------


def test_advise_does_not_depend_on_policies_and_autocast():
    plain = mpk.advise(mlp(), step)

    def under_autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return step(model)

    for model, a_step in ((mpk.convert(mlp(), "mixed_bfloat16"), step), (mlp(), under_autocast)):
        advice = mpk.advise(model, a_step)
        assert advice.policy == plain.policy
        for name in plain.policy:
            ranges = (a[name].policies["float32"].range["x"].amax for a in (advice, plain))
            assert next(ranges) == pytest.approx(next(ranges), rel=1e-2)


def test_advise_of_what_is_not_converted():
    advice = mpk.advise(models.CASES["encoder"].model(), lambda m: models.loss(m, *models.sentences(8)))
    row = advice["encoder.layers.0.self_attn"]
    assert row.policy is None
    assert row.policies["mixed_float16"].range["out"].amax > 0
    assert advice["encoder.layers.0.linear1"].policy is not None
    assert advice.why("embed") == "embed: Embedding is not converted"


def test_advise_of_a_transformer():
    """Its Conv1D have their weight transposed."""
    advice = mpk.advise(models.CASES["gpt2"].model(), lambda m: models.loss(m, *models.text(8)))
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "lm_head"} <= set(advice.policy)
    mpk.convert(models.CASES["gpt2"].model(), advice.policy)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("rows, width", [(0, 8), (24, 0)])
def test_advise_of_calls_without_elements(rows, width):
    """An expert to which no token goes, and a layer without features."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.rest = nn.Linear(16, width), nn.Linear(width, 6), nn.Linear(16, 6)

        def forward(self, x):
            return F.pad(self.down(self.up(x[:rows])), (0, 0, 0, len(x) - rows)) + self.rest(x)

    advice = mpk.advise(Routed(), step)
    assert advice.policy.keys() == {"up", "down", "rest"}
    assert advice["up"].policies["mixed_float16"].noise == 0


def test_advise_of_a_step_with_two_forwards():
    twice = mpk.advise(mlp().eval(), lambda model: step(model) + step(model))
    once = mpk.advise(mlp().eval(), step)
    for name in once.policy:
        a, b = twice[name].policies["mixed_bfloat16"], once[name].policies["mixed_bfloat16"]
        assert a.loss_change == pytest.approx(2 * b.loss_change)


# ----- what it says ----------------------------------------------------------------------


def test_advice_prints(tmp_path):
    advice = mpk.advise(mlp(), step)
    lines = str(advice).splitlines()
    assert lines[0].split() == ["layer", "policy", "float32", "mixed_bfloat16", "mixed_float16"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "4"]
    assert lines[-1].startswith("loss ")
    found = json.loads(advice.to_json())
    assert found["rows"][0]["policies"]["mixed_float16"]["range"]["x"]["format"] == "float16"
    advice.to_html(tmp_path / "advice.html")
    text = (tmp_path / "advice.html").read_text()
    svg = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    assert len([e for e in svg.iter() if e.tag.endswith("title")]) == 5 + 3 + 6  # the first has no grad_x
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_advice_picture_names_what_leaves_its_format(tmp_path):
    model = mlp()
    with torch.no_grad():
        model[0].weight *= 1e6
    mpk.advise(model, step, loss_budget=1e9).to_html(tmp_path / "advice.html")
    text = (tmp_path / "advice.html").read_text()
    assert "weight beyond float16<" in text
    assert "grad_out beyond" not in text


def test_advice_says_why():
    advice = mpk.advise(mlp(), step)
    said = advice.why("0", "mixed_float16")
    assert said.startswith("0: mixed_float16: stays in range (")
    assert "float16 ends at 65504); adds " in said
    with pytest.raises(KeyError, match="there are 0, 1, 4"):
        advice.why("fc")
    with pytest.raises(KeyError, match="float64 was not judged"):
        advice.why("0", "float64")
    assert mpk.convert(mlp(), advice.policy)[0].policy is not None
    assert mpk.advise(nn.Linear(16, 6), step).why("").startswith("the model: mixed_float16: adds ")


def test_advice_is_copied_and_pickled():
    advice = mpk.advise(mlp(), step)
    assert advice == copy.deepcopy(advice) == pickle.loads(pickle.dumps(advice))
    with pytest.raises(TypeError, match="does not support item assignment"):
        copy.deepcopy(advice)["0"].policies["float32"].error["out"] = 0.0


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"model": nn.ReLU()}, ValueError, "the model has no linear that can be converted"),
        ({"model": nn.Linear(16, 6).half()}, ValueError, "stored in torch.float16, with nothing wider to compare"),
        ({"policies": ["fp8"]}, ValueError, "unknown policy 'fp8'"),
        ({"policies": []}, ValueError, "policies must not be empty"),
        ({"policies": ["mixed_float32"]}, ValueError, "mixed_float32 has wider parameters than the model"),
        ({"policies": 5}, TypeError, "advise: policies must be several, as a list, got 5"),
        ({"loss_scale": True}, ValueError, "loss_scale must be a positive number, got True"),
        ({"loss_scale": math.inf}, ValueError, "loss_scale must be a positive number, got inf"),
        ({"loss_scale": 0}, ValueError, "loss_scale must be a positive number, got 0"),
        ({"loss_budget": -1}, ValueError, "loss_budget must be a positive number, got -1"),
        ({"memory": "1GB"}, ValueError, "memory must be a positive number, got '1GB'"),
    ],
)
def test_advise_of_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        mpk.advise(**{"model": nn.Linear(16, 6), "step": step} | change)


def test_range_keeps_a_nan():
    """Whatever blocks come after it."""
    counter = RangeCounter([(torch.float16, None)])
    for block in ([1.0, 2.0], [torch.nan], [3.0]):
        counter.add(torch.tensor(block, dtype=torch.float64))
    assert math.isnan(counter.range(torch.float16).amax)


# ----- rows that stand for all ----------------------------------------------------------------------


def test_advise_of_a_sample_is_near_that_of_all_rows(monkeypatch):
    """As on a GPU. Ranges are of all rows; what is summed over them is estimated, the largest row counted once."""
    torch.manual_seed(0)
    linear, x, grad = mpk.MPLinear(32, 24, activation="gelu"), torch.randn(6000, 32), torch.randn(6000, 24)
    x[4321] *= 1e4
    grad[4321] *= 1e-4
    rows, counted = {}, []
    run = Exact.run
    monkeypatch.setattr(
        Exact, "run", lambda self, x, grad: counted.append(len(x) * (self.wide.dtype == torch.float64)) or run(self, x, grad)
    )
    for is_sampled in (False, True):
        monkeypatch.setattr("mpkernels.precision.layer.is_sampled_on", lambda device, is_sampled=is_sampled: is_sampled)
        counted.clear()
        rows[is_sampled] = measured.rows_of(linear, x, grad, ["mixed_float16", "mixed_bfloat16", "mixed_float8_hybrid"])
        assert sum(counted) == (256 if is_sampled else 6000)
    for all_rows, sample in zip(rows[False], rows[True], strict=True):
        for name, found in all_rows.range.items():
            assert sample.range[name].overflows == found.overflows
            assert sample.range[name].amax == pytest.approx(found.amax, rel=1e-5)
        assert sample.noise == pytest.approx(all_rows.noise, rel=0.2)
        for name, error in all_rows.error.items():
            assert sample.error[name] == pytest.approx(error, rel=0.5 if name == "grad_weight" else 0.2)
        assert sample.bytes == all_rows.bytes
