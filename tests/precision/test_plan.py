# SPDX-License-Identifier: Apache-2.0
"""plan: each category against the same tracker on real steps, and against bytes that are counted by hand; bad inputs."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mpkernels as mpk
from mpkernels.precision import Plan, PlanRow
from mpkernels.precision.plan import POLICIES
from tests.precision.measured import OPTIMIZERS, OURS, STEPS, of_real_steps

WITHIN = 0.01  # of what real steps show
mlp, rows = STEPS["mlp"]


def check(row, make_model, make_batch):
    found = of_real_steps(make_model, make_batch, row.batch_size, row.policy, row.optimizer)
    for name, size in found.items():
        planned = getattr(row, name)
        assert abs(planned - size) <= WITHIN * size, f"{row}: {name} is {size}"


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "torch"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_plan_is_what_real_steps_show(policy, optimizer):
    """The batch in the middle is interpolated."""
    optimizers = {optimizer: OPTIMIZERS[optimizer]}
    for row in mpk.plan(*STEPS["mlp"], policies=[policy], optimizers=optimizers, batch_sizes=(8, 24, 64)).rows:
        check(row, *STEPS["mlp"])


@pytest.mark.parametrize("policy, optimizer", [("mixed_float16", "AdamW"), ("bfloat16", "SGD"), ("float32", "torch")])
def test_plan_of_a_transformer(policy, optimizer):
    (row,) = mpk.plan(
        *STEPS["gpt2"], policies=[policy], optimizers={optimizer: OPTIMIZERS[optimizer]}, batch_sizes=[16]
    ).rows  # fmt: skip
    check(row, *STEPS["gpt2"])


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "bfloat16"])
def test_plan_of_frozen_layers(policy):
    def frozen():
        model = mlp()
        model[0].requires_grad_(False)
        return model

    (row,) = mpk.plan(frozen, rows, policies=[policy], batch_sizes=[64]).rows
    check(row, frozen, rows)
    (whole,) = mpk.plan(mlp, rows, policies=[policy], batch_sizes=[64]).rows
    assert row.parameters == whole.parameters
    assert whole.gradients - row.gradients == (96 * 192 + 192) * (4 if policy != "bfloat16" else 2)


@pytest.mark.sweep
@pytest.mark.parametrize("case", STEPS)
def test_plan_of_every_combination(case):
    """Of 8 sentences the lists of addresses, which a fake tensor has not, are 1 % of the temporaries: 160 bytes a parameter."""
    for row in mpk.plan(*STEPS[case], policies=POLICIES, optimizers=OURS, batch_sizes=(16, 24, 64)).rows:
        check(row, *STEPS[case])


def test_plan_of_a_model_that_reads_what_was_there_before():
    """A tensor that is no parameter nor buffer, as a table in a module's globals."""
    table = torch.ones(8)

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * table

    (row,) = mpk.plan(lambda: Scaled(4, 8), lambda n: torch.ones(n, 4), policies=["float32"], batch_sizes=(2,)).rows
    assert row.parameters == 4 * (8 * 4 + 8)


def test_plan_interpolates_between_two_runs():
    """Every size between the smallest and the largest is what a run of it alone says, and so is the largest that fits."""
    plan = mpk.plan(mlp, rows, memory=4e6, policies=["mixed_bfloat16"], batch_sizes=(2, 500, 2000))
    for row in plan.rows:
        alone = mpk.plan(mlp, rows, memory=4e6, policies=["mixed_bfloat16"], batch_sizes=(row.batch_size,))
        assert alone.rows == (row,)
    ((combination, largest),) = plan.largest_batch.items()
    assert combination == ("mixed_bfloat16", "AdamW")
    edge = mpk.plan(mlp, rows, memory=4e6, policies=["mixed_bfloat16"], batch_sizes=(largest, largest + 1))
    assert [row.fits for row in edge.rows] == [True, False]


def test_plan_chooses_the_largest_batch_and_then_the_first_policy():
    def best(*fits):
        combinations = [("float32", 8), ("float32", 64), ("float16", 8), ("float16", 64)]
        rows = [PlanRow(p, "AdamW", n, 1, 1, 1, 1, 1, 1, 6, f, 1) for (p, n), f in zip(combinations, fits, strict=True)]
        plan = Plan(tuple(rows), None if None in fits else 10, {})
        assert plan.policy == plan.best.policy
        return plan.best.policy, plan.best.batch_size

    assert best(None, None, None, None) == ("float32", 64)
    assert best(True, True, True, True) == ("float32", 64)
    assert best(True, False, True, True) == ("float16", 64)
    assert best(True, False, True, False) == ("float32", 8)
    assert best(False, False, True, False) == ("float16", 8)


def test_plan_prints_a_table():
    text = str(mpk.plan(mlp, rows, memory=4e6, policies=["float32"], batch_sizes=(8, 2000)))
    lines = text.splitlines()
    assert lines[0].split() == [
        "policy", "optimizer", "batch", "parameters", "gradients", "states", "copies", "activations", "temporaries", "peak",
        "operations", "fits",
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[1:3]] == ["yes", "no"]
    assert lines[3].startswith("largest batch in 3.8 MiB: ")
    assert lines[4] == "policy: float32"


@pytest.mark.parametrize("case", ["mlp", "gpt2"])
def test_plan_counts_the_operations(case):
    """As torch counts those of a real step; the batch in the middle is interpolated."""
    make_model, make_batch = STEPS[case]
    for row in mpk.plan(make_model, make_batch, policies=["mixed_bfloat16"], batch_sizes=(2, 5, 8)).rows:
        model, batch = mpk.convert(make_model(), "mixed_bfloat16"), make_batch(row.batch_size)
        with FlopCounterMode(display=False) as counter:
            (model(**batch).loss if isinstance(batch, dict) else model(batch).sum()).backward()
        assert row.flops == counter.get_total_flops() > 0


def test_plan_says_what_comes_nearest():
    plan = mpk.plan(mlp, rows, memory=1e5, policies=["float32", "bfloat16"], optimizers=["AdamW", "SGD"], batch_sizes=(4, 8))
    row = min(plan.rows, key=lambda row: row.peak)
    said = f"nothing fits 97.7 KiB: {row.policy} with {row.optimizer} and batch 4 comes nearest, with "
    assert str(plan).splitlines()[-1].startswith(said)
    with pytest.raises(ValueError, match=said):
        _ = plan.policy


def test_plan_allocates_nothing_and_leaves_random_numbers():
    """128 GiB of parameters."""

    def huge():
        torch.manual_seed(1)
        return nn.Sequential(*(nn.Linear(2**16, 2**16) for _ in range(8)))

    before = torch.get_rng_state()
    (row,) = mpk.plan(huge, lambda n: torch.randn(n, 2**16), policies=["mixed_float16"], batch_sizes=[1]).rows
    assert row.parameters == 8 * 4 * (2**32 + 2**16)
    assert row.copies == 8 * 2 * 2**32
    assert torch.equal(torch.get_rng_state(), before)


def test_plan_counts_a_tied_weight_once():
    def tied():
        model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96))
        model[2].weight = model[0].weight
        return model

    for policy, size in (("mixed_float16", 4), ("float16", 2)):
        (row,) = mpk.plan(tied, rows, policies=[policy], batch_sizes=[4]).rows
        assert row.parameters == size * (96 * 96 + 2 * 96)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"policies": ["mixed_fp16"]}, ValueError, "did you mean 'mixed_float16'"),
        ({"policies": []}, ValueError, "policies must not be empty"),
        ({"optimizers": ["Muon"]}, ValueError, "unknown optimizer 'Muon': one of AdamW, Adam, Lion, SGD"),
        ({"optimizers": {"mine": 1}}, ValueError, "functions of the parameters"),
        ({"batch_sizes": (0, 4)}, ValueError, "batch_sizes must be natural numbers"),
        ({"memory": -1}, ValueError, "memory must be a positive number"),
        ({"memory": "16GB"}, ValueError, "memory must be a positive number"),
        ({"make_model": mlp()}, ValueError, "0.weight was there before|make_model must return"),
        ({"make_model": lambda: 3}, TypeError, "make_model must return a torch.nn.Module, got int"),
        (
            {"make_model": lambda: nn.Linear(4, 4, device="meta")},
            RuntimeError,
            "weight is on meta: make the model on the device",
        ),
        ({"make_model": nn.Identity}, ValueError, "the model has no parameters"),
        (
            {"make_model": lambda: nn.Linear(96, 8, dtype=torch.float16)},
            ValueError,
            "float32 stores float32, and the model is made in float16: make it in float32",
        ),
        ({"make_batch": 3}, TypeError, "make_batch must be a function, got int"),
        ({"make_model": nn.Linear(96, 8)}, TypeError, "make_model must be a function, got Linear"),
        ({"make_model": lambda: nn.LazyLinear(8)}, ValueError, "makes a lazy layer, which no FakeTensor can be: give it its"),
        (
            {"make_model": lambda: mlp().half()},
            ValueError,
            "make_model casts or moves the model, which torch cannot do",
        ),
        ({"batch_sizes": 4}, TypeError, "batch_sizes must be several, as a list, got 4"),
        ({"policies": None}, TypeError, "policies must be several, as a list, got None"),
        ({"optimizers": 5}, TypeError, "optimizers must be several, as a list, got 5"),
        ({"memory": math.inf}, ValueError, "memory must be a positive number"),
    ],
)
def test_plan_of_bad_input(change, error, message):
    if isinstance(model := change.get("make_model"), nn.Sequential):
        change = {"make_model": lambda: model}
    arguments = {"make_model": mlp, "make_batch": rows, "policies": ["float32"], "batch_sizes": [4], **change}
    with pytest.raises(error, match=message):
        mpk.plan(**arguments)


def test_plan_of_a_model_that_returns_no_gradient():
    class Counts(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    with pytest.raises(ValueError, match="the model returns no tensor that has a gradient"):
        mpk.plan(lambda: Counts(96, 8), rows, policies=["float32"], batch_sizes=[4])


def test_plan_of_a_compiled_model_is_that_of_the_model():
    plan = lambda make: mpk.plan(make, rows, policies=["mixed_float16"], batch_sizes=[4])
    assert plan(lambda: torch.compile(mlp())).rows == plan(mlp).rows


class Reads(nn.Module):
    """A recurrent layer and a linear on what it returns."""

    def __init__(self, cls):
        super().__init__()
        self.recurrent, self.head = cls(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


@pytest.mark.parametrize("cls, is_counted", [(nn.LSTM, False), (nn.GRU, True), (nn.RNN, True)])
def test_plan_says_that_the_memory_of_an_lstm_is_not_counted(cls, is_counted):
    """oneDNN's workspace, which a fake tensor shows as empty."""
    for memory in (None, 1e3, 1e9):
        sizes = {"policies": ["float32"], "batch_sizes": (2, 4), "memory": memory}
        plan = mpk.plan(lambda: Reads(cls), lambda n: torch.randn(n, 5, 8), **sizes)
        said = "not counted: what an nn.LSTM on a CPU keeps for backward inside oneDNN"
        assert [note.startswith(said) for note in plan.notes] == [True] * (not is_counted)
        assert (said in str(plan)) == (not is_counted)


class OfValues(nn.Linear):
    """Its sizes or branches depend on the data."""

    def __init__(self, ask):
        super().__init__(96, 8)
        self.ask = ask

    def forward(self, x):
        self.ask(x)
        return super().forward(x)


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x[x > 0]], ids=["item", "mask"])
def test_plan_says_that_it_has_no_values(ask):
    with pytest.raises(RuntimeError, match=r"plan: the model or the batch needs the values of a tensor, for aten\.\w+"):
        mpk.plan(lambda: OfValues(ask), rows, policies=["float32"], batch_sizes=[4])
