# SPDX-License-Identifier: Apache-2.0
"""The benchmark's cases: their names, and that what they would time is right."""

import importlib

import pytest
import torch

from bench import plots, report
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


# ----- what is shown ---------------------------------------------------------------


@pytest.mark.parametrize("path, text", report.documents(report.current_rows()), ids=lambda value: getattr(value, "name", ""))
def test_bench_tables_are_what_the_rows_say(path, text):
    assert "<!-- bench:" in text
    assert path.read_text() == text, f"{path.name}: run python -m bench.report"


def test_bench_a_table_without_its_row_fails():
    rows = [row for row in report.current_rows()["cpu"] if row["case"] != report.KEY_FIGURES[0][1]]
    with pytest.raises(KeyError, match="linear_act/forward"):
        report.filled((report.ROOT / "README.md").read_text(), {"cpu": rows})


@pytest.mark.parametrize("name, digest", plots.expected_digests(report.current_rows()["cpu"]).items())
def test_bench_plots_are_drawn_from_the_rows(name, digest):
    assert digest in (report.ROOT / "docs" / "plots" / f"{name}.svg").read_text(), "run python -m bench.report"


def test_bench_a_plot_without_its_rows_fails():
    with pytest.raises(ValueError, match=r"roofline.svg: there are no rows"):
        plots.expected_digests([row for row in report.current_rows()["cpu"] if row["op"] != "linear_act"])
