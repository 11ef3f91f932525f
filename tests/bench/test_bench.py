# SPDX-License-Identifier: Apache-2.0
"""The benchmark's cases: their names, and that what they would time is right."""

import importlib
import json
import shutil
import subprocess

import pytest
import torch

from bench import compare, figures, plots, report, rows, step, tables, targets
from bench.cases import CASES, Float8, LinearAct, Mlp, Quantize, Step, select
from bench.implementation import OURS
from bench.machines import MACHINES
from bench.measure import check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = (
    *(
        LinearAct(direction, 37, 100, 29, dtype)
        for direction in ("forward", "backward", "both")
        for dtype in ("float16", "bfloat16")
    ),
    Mlp(8, 32),
    Quantize(33, 70),
    *(Float8(direction, 37, 96, 32) for direction in ("forward", "both")),
    *(Step(30_000, 3, grads, kind) for grads in ("float16", "float32") for kind in ("clip", "skipped")),
    Step(30_000, 3, optimizer="lion"),
)


NAMED = {target.against for some in targets.TARGETS.values() for target in some} | {
    "mpkernels",
    step.PLAIN_STEP,
    step.PLAIN_READ,
}


def found(**ratios: float) -> dict[str, dict]:
    """Rows by implementation."""
    common = {"uncertainty": 0, "peak_bytes": 1, "gb_s": 1, "limits": {"copy_gb_s": 1}}
    return {name.replace("_", " "): {"ratio": r, "us_p50": 100 / r, **common} for name, r in ratios.items()}


def test_bench_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert select("cpu", glob=names[0]) == [CASES[0]]
    assert all("cpu" in case.quick for case in select("cpu", quick=True))
    assert all(set(case.quick) <= set(case.devices) for case in CASES)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_bench_checks_what_it_times(case):
    """Every implementation agrees with fp64, as in a run."""
    module = importlib.import_module(f"bench.{case.op}")
    implementations = {name: c for name, c in module.implementations(case, DEVICE).items() if "compile" not in name}
    numerics, _, wrong = check(implementations)
    assert len(numerics) >= 2
    assert not wrong
    for implementation in implementations.values():
        implementation.run()


def test_bench_refuses_what_is_wrong(monkeypatch):
    """A result that is off by two roundings is not timed."""
    from bench import linear_act

    right = linear_act.ours
    monkeypatch.setattr(linear_act, "ours", lambda *args: right(*args) * 1.002)
    assert check(linear_act.implementations(LinearAct("forward", 37, 100, 29), DEVICE))[2]["mpkernels"].startswith("out")


def test_bench_checks_what_statistics_are_compared_with():
    """The read in place of them is there, and the step still right."""
    case, made = Step(30_000, 3), {}
    for name, make in ((OURS, step.ours), (step.PLAIN_READ, step.plain_read)):
        implementation = step.implementation(case, DEVICE, make, 30, name, made)
        assert implementation.check()["error_to_best"] < 2
        implementation.run()
    ours, plain = (recipe.optimizer.state[recipe.params[2]] for recipe in made.values())
    assert all(ours[name].data_ptr() == plain[name].data_ptr() for name in ("master", "exp_avg", "exp_avg_sq"))
    assert (ours["step"], plain["step"]) == (2, 3), "each counts on by itself"


def test_bench_has_the_cases_of_every_target():
    """No target waits for a case that does not exist, and `--quick` says something of each."""
    for device, some in targets.TARGETS.items():
        every, quick = ([case.name for case in select(device, quick=only)] for only in (False, True))
        for target in some:
            for name in target.cases:
                assert any(case.startswith(name) if name.endswith("/") else case == name for case in every), (target.what, name)
            assert target.line({name: found(**dict.fromkeys(NAMED, 1)) for name in quick})[-1] != "not measured", target.what


# ----- what is shown ---------------------------------------------------------------


def test_bench_compares_two_implementations_by_their_ratios_to_a_third():
    """Ours takes 2, the one 4, the other 1: the one takes 4 times as long as the other."""
    one, other = {"ratio": 2 / 4, "uncertainty": 0.03}, {"ratio": 2 / 1, "uncertainty": 0.04}
    assert figures.between(one, other) == {"ratio": 4.0, "uncertainty": pytest.approx(0.05)}


@pytest.mark.parametrize(
    "path, text", list(report.documents(report.current_rows())), ids=lambda value: getattr(value, "name", "")
)
def test_bench_tables_are_what_the_rows_say(path, text):
    assert "<!-- bench:" in text or "<!-- Written by python -m bench.report" in text
    assert path.read_text() == text, f"{path.name}: run python -m bench.report"


def test_bench_a_page_per_machine():
    """Pages, and charts, of machines with rows alone; all rows of a page are of the machine that it names."""
    rows, docs = report.current_rows(), report.ROOT / "docs"
    assert {path.stem for path in (docs / "benchmarks").glob("*.md")} == rows.keys()
    assert {path.name for path in report.PLOTS.glob("*.svg")} == report.charts(rows).keys()
    for page, of_page in rows.items():
        assert {row["device"] for row in of_page} == {MACHINES[page].device}, page


def test_bench_a_table_without_its_row_fails():
    rows = {page: list(of_page) for page, of_page in report.current_rows().items()}
    rows["zen3"] = [row for row in rows["zen3"] if row["case"] != figures.KEY_FIGURES[0].case]
    with pytest.raises(KeyError, match="linear_act/forward"):
        report.filled((report.ROOT / "docs" / "performance.md").read_text(), rows)


def test_bench_key_figures_are_times_faster():
    """Ours takes 2 and the baseline 4: 2x; what no machine has is left out, what one lacks is empty."""
    comparison = figures.Comparison("a step", "a", OURS, "theirs")
    rows = {"theirs": {"ratio": 0.5, "uncertainty": 0.2}, OURS: {"ratio": 1.0, "uncertainty": 0.0}}
    assert comparison.faster({"a": rows}) == "2.0x ± 20%"
    assert comparison.faster({"a": {OURS: rows[OURS]}}) == ""
    assert [figures.times({"ratio": r}) for r in (1 / 27.6, 1 / 1.25, 1.07)] == ["28x", "1.2x", "0.93x"]
    of_page = [{"op": "step", "case": "a", "implementation": name, **row} for name, row in rows.items()]
    other = figures.Comparison("a step", "a", OURS, "absent")
    lines = report.compared([comparison, other], {"zen3": of_page, "intel": of_page[1:]}).splitlines()
    assert lines[2:] == ["| a step | theirs | 2.0x ± 20% |  |"]


def test_bench_peak_of_a_gpt_says_what_is_not_measured():
    """Of the machine that has most recipes; the one that waits for a row says so."""
    row = {"op": "training", "case": "training/gpt2_tiny", "peak_bytes": 3 * 2**20}
    fp32, autocast, outside, inside = ({**row, "implementation": name} for name in report.GPT_RECIPES)
    said = report.gpt_peak({"zen3": [fp32, outside], "intel": [fp32, autocast, outside]})
    assert said.endswith("fp32 3.0; torch.autocast 3.0;\nconverted, outside of it 3.0; converted, inside it not measured yet.")
    assert "not measured" not in report.gpt_peak({"zen3": [fp32, autocast, outside, inside]})
    assert report.memory({"zen3": [fp32], "intel": [autocast]}).splitlines()[2:] == [
        "| torch fp32 | 3.0 |  |",
        "| torch autocast bf16 |  | 3.0 |",
    ]


WITHOUT_ROWS = ("Eight bits",)  # of a CPU, so far


def test_bench_page_has_every_table():
    rows = report.current_rows()["zen3"]
    text = report.benchmarks("zen3", rows)
    sections = {title: table for title, (_, _, table) in report.SECTIONS.items() if title not in WITHOUT_ROWS}
    assert all(f"## {title}\n" in text and table(rows) in text for title, table in sections.items())
    assert not any(f"## {title}\n" in text for title in WITHOUT_ROWS)
    assert "## Optimizer step" not in report.benchmarks("zen3", [row for row in rows if row["op"] != "step"])


@pytest.mark.parametrize(
    "name, digest",
    [(file, plots.digest(chosen)) for file, (chosen, _) in report.charts(report.current_rows()).items()],
)
def test_bench_plots_are_drawn_from_the_rows(name, digest):
    assert digest in (report.PLOTS / name).read_text(), "run python -m bench.report"


def test_bench_plots_rows_of_a_gpu():
    """Rows with the names of `--quick` on a GPU are enough for every plot, and for every table."""
    rows = []
    for case in select("cuda", quick=True):
        op = "linear_act" if case.op == "float8" else case.op
        like = next(row for row in report.current_rows()["zen3"] if row["op"] == op and row["implementation"] == "mpkernels")
        like |= {"op": case.op}
        for name in NAMED | {"torch float16"}:
            rows.append(like | {"case": case.name, "implementation": name, "clock": "GPU events", "peak_bytes": 1, "gb_s": 1.0})
    drawn = [name for name, text in plots.drawn(plots.charts({"h200": rows})) if "<svg" in text]
    assert drawn == [f"h200_{name}.svg" for name in plots.PLOTS]
    text = report.benchmarks("h200", rows)
    assert all(f"plots/{name}" in text for name in drawn)
    assert "not measured" not in text


def test_bench_quick_rows_are_a_page_of_a_cpu():
    """Of every section but what has no rows of a CPU, every plot, and the tables of several machines."""
    quick, rows = {case.name for case in select("cpu", quick=True)}, report.current_rows()
    of_page = [row for row in rows["zen4"] if row["case"] in quick]
    text = report.benchmarks("icelake", of_page)
    assert all(f"## {title}\n" in text for title in report.SECTIONS if title not in WITHOUT_ROWS)
    assert list(plots.chosen_rows(of_page, "cpu")) == list(plots.PLOTS)
    filled = [report.filled((report.ROOT / name).read_text(), rows | {"icelake": of_page}) for name in report.DOCUMENTS]
    assert any(MACHINES["icelake"].name in document for document in filled)


def test_bench_every_plot_of_a_cpu_has_rows():
    for page, of_page in report.current_rows().items():
        assert list(plots.chosen_rows(of_page, MACHINES[page].kind)) == list(plots.PLOTS)


def test_bench_shows_what_device_sh_wrote(tmp_path):
    """A file per forced backend, or some of them; of a case in two files the rows of one, and no plot without rows."""
    like = report.current_rows()["zen3"][0] | {"clock": "GPU events"}

    def write(name: str, op: str, case: str, **more) -> None:
        rows.merge(tmp_path / name, [like | {"op": op, "case": case, "implementation": "mpkernels"} | more])

    write("cuda.jsonl", "overhead", "overhead/forward")
    found = report.current_rows(tmp_path)
    assert list(found) == ["h200"]
    assert plots.charts(found) == {}
    assert "## Per call" in report.benchmarks("h200", found["h200"])
    write("cuda-step.jsonl", "step", "step/float16/plain/1e8in300", bytes_per_parameter=30)
    for backend in ("native", "triton"):
        write(f"cuda-{backend}.jsonl", "linear_act", "linear_act/forward/float16/4096x1024x4096", backends=backend)
    found = report.current_rows(tmp_path)
    assert [row.get("backends") for row in found["h200"] if row["op"] == "linear_act"] == ["native"]
    assert {row["op"] for row in found["h200"]} == {"overhead", "step", "linear_act"}
    drawn = list(plots.charts(found))
    assert "h200_roofline.svg" in drawn
    assert all(f"plots/{name}" in report.benchmarks("h200", found["h200"]) for name in drawn)


def test_bench_target_names_the_worst_case():
    target = targets.Target("forward", "theirs", ("forward/", "one"), 1.10, targets.time_over("theirs"))
    rows = {
        "forward/a": found(mpkernels=1, theirs=1.2),
        "forward/b": found(mpkernels=1, theirs=1.0),
        "backward": found(theirs=9),
    }
    assert target.line(rows) == ["forward", "theirs", "<= 1.1", "1.2", "forward/a", "missed in 1 of 2"]
    del rows["forward/a"]
    assert target.line(rows)[3:] == ["1", "forward/b", "met"]
    assert target.line({"forward/b": found(mpkernels=1)})[3:] == ["", "", "not measured"]


def test_bench_target_takes_the_fastest_of_ours():
    """A kernel that is not chosen by itself yet counts: its ratio is ours over its own."""
    rows = {"a": found(mpkernels=1, mpkernels_native=2.0, theirs=1.5)}
    assert targets.Target("step", "theirs", ("a",), 0.8, targets.time_over("theirs")).line(rows)[3:] == ["0.75", "a", "met"]
    assert targets.time_over_best(found(mpkernels=1, mpkernels_float16=1.25, torch=0.5, torch_compiled=1.0)) == 0.8


def test_bench_target_at_least():
    target = targets.Target("bytes", "a copy", ("a",), 0.9, lambda rows: rows["mpkernels"]["ratio"], at_least=True)
    assert target.line({"a": found(mpkernels=0.89)})[3:] == ["0.89", "a", "missed in 1 of 1"]
    assert target.line({"a": found(mpkernels=0.91)})[3:] == ["0.91", "a", "met"]
    both = targets.Target("bytes", "a copy", ("a", "b"), 0.9, lambda rows: rows["mpkernels"]["ratio"], at_least=True)
    assert both.line({"a": found(mpkernels=0.95), "b": found(mpkernels=0.5)})[3:] == ["0.5", "b", "missed in 1 of 2"]


def test_bench_target_leaves_out_what_is_in_doubt():
    """A hiccup of theirs meets no target, one of ours misses none."""
    target = targets.Target("step", "theirs", ("a", "b", "c"), 0.6, targets.time_over("theirs"))
    rows = {name: found(mpkernels=1, theirs=ratio) for name, ratio in (("a", 0.06), ("b", 0.5), ("c", 9))}
    for name in ("a", "c"):
        rows[name]["theirs"]["uncertainty"] = 4.6
    assert target.line(rows)[3:] == ["0.5", "b", "met, 2 in doubt"]
    rows["b"]["theirs"]["ratio"] = 0.7
    assert target.line(rows)[3:] == ["0.7", "b", "missed in 1 of 1, 2 in doubt"]
    del rows["b"]
    assert target.line(rows)[3:] == ["", "", "in doubt"]


def test_bench_tables_show_what_is_in_doubt():
    row = next(row for row in report.current_rows()["zen3"] if row["case"] == "step/float16/plain/5e7in1")
    rows = [
        row | {"implementation": "mpkernels"},
        row | {"implementation": "theirs", "ratio": 0.0637, "uncertainty": 4.58, "us_p50": 1e6},
    ]
    assert tables.ratios(rows, "step").endswith("| 0.0637 ± 458% |")
    assert tables.bytes_per_parameter(rows).endswith(" ± 458% |")
    rows[1]["uncertainty"] = 0.1
    assert tables.ratios(rows, "step").endswith("| 0.0637 |")


def test_bench_make_leaves_the_committed_rows():
    """`make bench` writes where git does not look, unless it is told."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for given, out in (((), "bench/out"), (("OUT=bench/results",), "bench/results")):
        done = subprocess.run(
            ["make", "--no-print-directory", "-n", "bench", *given], cwd=report.ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.rstrip().endswith(f"--out {out}")
    assert "bench/out/" in (report.ROOT / ".gitignore").read_text().splitlines()


def test_bench_compare(tmp_path, monkeypatch, capsys):
    """Nine of ten ratios within 10 % pass, eight do not; rows of one run alone, or in doubt, do not count."""

    def write(name: str, ratios: list[float], in_doubt: int = -1) -> str:
        lines = [
            json.dumps({"case": "a", "implementation": str(i), "ratio": ratio, "uncertainty": 0.2 if i == in_doubt else 0.02})
            + "\n"
            for i, ratio in enumerate(ratios)
        ]
        (tmp_path / name).write_text("".join(lines))
        return str(tmp_path / name)

    first = write("a", [0.5] * 11 + [3], in_doubt=10)
    for off, status in ((1, 0), (2, 1)):
        monkeypatch.setattr("sys.argv", ["compare", first, write("b", [0.56] * off + [0.54] * (10 - off) + [7])])
        assert compare.main() == status
        assert f"{10 - off} of 10 ratios agree within 10%; 1 are in doubt" in capsys.readouterr().out
