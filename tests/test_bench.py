# SPDX-License-Identifier: Apache-2.0
"""The benchmark's cases: their names, and that what they would time is right."""

import importlib

import pytest
import torch

from bench.__main__ import check
from bench.cases import CASES, LinearAct, Overhead, Step, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = (
    *(
        LinearAct(direction, 37, 100, 29, dtype)
        for direction in ("forward", "backward", "both")
        for dtype in ("float16", "bfloat16")
    ),
    *(Step(30_000, 3, grads, kind) for grads in ("float16", "float32") for kind in ("clip", "skipped")),
)


def test_bench_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert select("cpu", glob=names[0]) == [CASES[0]]
    assert all(case.quick for case in select("cpu", quick=True))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_bench_checks_what_it_times(case):
    """Every contender agrees with fp64, as in a run."""
    module = importlib.import_module(f"bench.{case.op}")
    contenders = {name: c for name, c in module.contenders(case, DEVICE).items() if "compile" not in name}
    assert len(check(contenders)) >= 2
    for contender in contenders.values():
        contender.run()


def test_bench_refuses_what_is_wrong(monkeypatch):
    """A result that is off by two roundings is not timed."""
    from bench import linear_act

    right = linear_act.ours
    monkeypatch.setattr(linear_act, "ours", lambda *args: right(*args) * 1.002)
    with pytest.raises(AssertionError, match="mpkernels: out"):
        check(linear_act.contenders(LinearAct("forward", 37, 100, 29), DEVICE))


def test_bench_overhead_cases_have_a_peer():
    for case in CASES:
        if isinstance(case, Overhead) and case.what != "first_step":
            assert len(importlib.import_module("bench.overhead").contenders(case, DEVICE)) >= 2
