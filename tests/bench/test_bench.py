# SPDX-License-Identifier: Apache-2.0
"""The benchmark's cases: their names, and that what they would time is right."""

import importlib
import json
import shutil
import subprocess

import pytest
import torch

from bench import bars, compare, plots, report, rows, step
from bench.__main__ import check
from bench.cases import CASES, LinearAct, Mlp, Step, select
from bench.contender import OURS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = (
    *(
        LinearAct(direction, 37, 100, 29, dtype)
        for direction in ("forward", "backward", "both")
        for dtype in ("float16", "bfloat16")
    ),
    Mlp(8, 32),
    *(Step(30_000, 3, grads, kind) for grads in ("float16", "float32") for kind in ("clip", "skipped")),
)


NAMED = {bar.against for promises in bars.BARS.values() for bar in promises} | {"mpkernels", step.PLAIN_STEP, step.PLAIN_READ}


def found(**ratios: float) -> dict[str, dict]:
    """Rows by contender."""
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
    """Every contender agrees with fp64, as in a run."""
    module = importlib.import_module(f"bench.{case.op}")
    contenders = {name: c for name, c in module.contenders(case, DEVICE).items() if "compile" not in name}
    numerics, _, wrong = check(contenders)
    assert len(numerics) >= 2
    assert not wrong
    for contender in contenders.values():
        contender.run()


def test_bench_refuses_what_is_wrong(monkeypatch):
    """A result that is off by two roundings is not timed."""
    from bench import linear_act

    right = linear_act.ours
    monkeypatch.setattr(linear_act, "ours", lambda *args: right(*args) * 1.002)
    assert check(linear_act.contenders(LinearAct("forward", 37, 100, 29), DEVICE))[2]["mpkernels"].startswith("out")


def test_bench_checks_what_statistics_are_compared_with():
    """The read in place of them is there, and the step still right."""
    case, made = Step(30_000, 3), {}
    for name, make in ((OURS, step.ours), (step.PLAIN_READ, step.plain_read)):
        contender = step.contender(case, DEVICE, make, 30, name, made)
        assert contender.check()["error_to_best"] < 2
        contender.run()
    ours, plain = (recipe.optimizer.state[recipe.params[2]] for recipe in made.values())
    assert all(ours[name].data_ptr() == plain[name].data_ptr() for name in ("master", "exp_avg", "exp_avg_sq"))
    assert (ours["step"], plain["step"]) == (2, 3), "each counts on by itself"


def test_bench_has_the_cases_of_every_promise():
    """No promise waits for a case that does not exist, and `--quick` says something of each."""
    for device, promises in bars.BARS.items():
        every, quick = ([case.name for case in select(device, quick=only)] for only in (False, True))
        for bar in promises:
            for name in bar.cases:
                assert any(case.startswith(name) if name.endswith("/") else case == name for case in every), (bar.what, name)
            assert bar.line({name: found(**dict.fromkeys(NAMED, 1)) for name in quick})[-1] != "not measured", bar.what


# ----- what is shown ---------------------------------------------------------------


def test_bench_compares_two_contenders_by_their_ratios_to_a_third():
    """Ours takes 2, the one 4, the other 1: the one takes 4 times as long as the other."""
    one, other = {"ratio": 2 / 4, "uncertainty": 0.03}, {"ratio": 2 / 1, "uncertainty": 0.04}
    assert report.between(one, other) == {"ratio": 4.0, "uncertainty": pytest.approx(0.05)}


@pytest.mark.parametrize(
    "path, text", list(report.documents(report.current_rows())), ids=lambda value: getattr(value, "name", "")
)
def test_bench_tables_are_what_the_rows_say(path, text):
    assert "<!-- bench:" in text
    assert path.read_text() == text, f"{path.name}: run python -m bench.report"


def test_bench_a_table_without_its_row_fails():
    rows = [row for row in report.current_rows()["cpu"] if row["case"] != report.KEY_FIGURES[0][1]]
    with pytest.raises(KeyError, match="linear_act/forward"):
        report.filled((report.ROOT / "README.md").read_text(), {"cpu": rows})


def test_bench_everything_has_every_table():
    rows = report.current_rows()["cpu"]
    text = report.everything(rows)
    assert all(table(rows) in text for _, table in report.OF_OPS.values())
    assert "### Step" not in report.everything([row for row in rows if row["op"] != "step"])


@pytest.mark.parametrize(
    "name, digest",
    [
        item
        for device, rows in report.current_rows().items()
        if device in report.PLOTTED
        for item in plots.expected_digests(rows, device).items()
    ],
)
def test_bench_plots_are_drawn_from_the_rows(name, digest):
    assert digest in (report.ROOT / "docs" / "plots" / name).read_text(), "run python -m bench.report"


def test_bench_plots_rows_of_a_gpu(tmp_path):
    """Rows with the names of `--quick` on a GPU are enough for every plot, and for every table."""
    rows = []
    for case in select("cuda", quick=True):
        like = next(row for row in report.current_rows()["cpu"] if row["op"] == case.op and row["contender"] == "mpkernels")
        for name in NAMED | {"torch float16"}:
            rows.append(like | {"case": case.name, "contender": name, "clock": "GPU events", "peak_bytes": 1, "gb_s": 1.0})
    drawn = [path.name for path, text in plots.draw(rows, tmp_path, "cuda") if "<svg" in text]
    assert drawn == [f"cuda_{name}.svg" for name in plots.PLOTS]
    text = report.filled("<!-- bench:everything on cuda --><!-- /bench:everything on cuda -->", {"cuda": rows})
    assert all(f"plots/{name}" in text for name in drawn)
    assert "not measured" not in text


def test_bench_every_plot_of_a_cpu_has_rows():
    """docs/performance.md shows them all."""
    assert list(plots.expected_digests(report.current_rows()["cpu"])) == [f"{name}.svg" for name in plots.PLOTS]


def test_bench_shows_what_device_sh_wrote(tmp_path):
    """A file per forced backend, or some of them; of a case in two files the rows of one, and no plot without rows."""
    like = report.current_rows()["cpu"][0] | {"clock": "GPU events"}

    def write(name: str, op: str, case: str, **more) -> None:
        rows.merge(tmp_path / name, [like | {"op": op, "case": case, "contender": "mpkernels"} | more])

    write("cuda.jsonl", "overhead", "overhead/forward")
    found = report.current_rows(tmp_path)
    assert list(found) == ["cuda"]
    assert list(plots.draw(found["cuda"], tmp_path, "cuda")) == []
    assert "### Overhead" in report.everything(found["cuda"])
    write("cuda-step.jsonl", "step", "step/float16/plain/1e8in300", bytes_per_parameter=30)
    for backend in ("native", "triton"):
        write(f"cuda-{backend}.jsonl", "linear_act", "linear_act/forward/float16/4096x1024x4096", backends=backend)
    found = report.current_rows(tmp_path)["cuda"]
    assert [row.get("backends") for row in found if row["op"] == "linear_act"] == ["native"]
    assert {row["op"] for row in found} == {"overhead", "step", "linear_act"}
    drawn = [path.name for path, _ in plots.draw(found, tmp_path, "cuda")]
    assert "cuda_roofline.svg" in drawn
    assert all(f"plots/{name}" in report.everything(found) for name in drawn)


def test_bench_bar_names_the_worst_case():
    bar = bars.Bar("forward", "theirs", ("forward/", "one"), 1.10, bars.time_over("theirs"))
    rows = {
        "forward/a": found(mpkernels=1, theirs=1.2),
        "forward/b": found(mpkernels=1, theirs=1.0),
        "backward": found(theirs=9),
    }
    assert bar.line(rows) == ["forward", "theirs", "<= 1.1", "1.2", "forward/a", "missed in 1 of 2"]
    del rows["forward/a"]
    assert bar.line(rows)[3:] == ["1", "forward/b", "met"]
    assert bar.line({"forward/b": found(mpkernels=1)})[3:] == ["", "", "not measured"]


def test_bench_bar_takes_the_fastest_of_ours():
    """A kernel that is not chosen by itself yet counts: its ratio is ours over its own."""
    rows = {"a": found(mpkernels=1, mpkernels_native=2.0, theirs=1.5)}
    assert bars.Bar("step", "theirs", ("a",), 0.8, bars.time_over("theirs")).line(rows)[3:] == ["0.75", "a", "met"]
    assert bars.time_over_best(found(mpkernels=1, mpkernels_float16=1.25, torch=0.5, torch_compiled=1.0)) == 0.8


def test_bench_bar_at_least():
    bar = bars.Bar("bytes", "a copy", ("a",), 0.9, lambda rows: rows["mpkernels"]["ratio"], at_least=True)
    assert bar.line({"a": found(mpkernels=0.89)})[3:] == ["0.89", "a", "missed in 1 of 1"]
    assert bar.line({"a": found(mpkernels=0.91)})[3:] == ["0.91", "a", "met"]
    both = bars.Bar("bytes", "a copy", ("a", "b"), 0.9, lambda rows: rows["mpkernels"]["ratio"], at_least=True)
    assert both.line({"a": found(mpkernels=0.95), "b": found(mpkernels=0.5)})[3:] == ["0.5", "b", "missed in 1 of 2"]


def test_bench_bar_leaves_out_what_is_in_doubt():
    """A hiccup of theirs meets no promise, one of ours misses none."""
    bar = bars.Bar("step", "theirs", ("a", "b", "c"), 0.6, bars.time_over("theirs"))
    rows = {name: found(mpkernels=1, theirs=ratio) for name, ratio in (("a", 0.06), ("b", 0.5), ("c", 9))}
    for name in ("a", "c"):
        rows[name]["theirs"]["uncertainty"] = 4.6
    assert bar.line(rows)[3:] == ["0.5", "b", "met, 2 in doubt"]
    rows["b"]["theirs"]["ratio"] = 0.7
    assert bar.line(rows)[3:] == ["0.7", "b", "missed in 1 of 1, 2 in doubt"]
    del rows["b"]
    assert bar.line(rows)[3:] == ["", "", "in doubt"]


def test_bench_tables_show_what_is_in_doubt():
    row = next(row for row in report.current_rows()["cpu"] if row["case"] == "step/float16/plain/5e7in1")
    rows = [
        row | {"contender": "mpkernels"},
        row | {"contender": "theirs", "ratio": 0.0637, "uncertainty": 4.58, "us_p50": 1e6},
    ]
    assert report.ratios(rows, "step").endswith("| 0.0637 ± 458% |")
    assert report.bytes_per_parameter(rows).endswith(" ± 458% |")
    rows[1]["uncertainty"] = 0.1
    assert report.ratios(rows, "step").endswith("| 0.0637 |")


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
            json.dumps({"case": "a", "contender": str(i), "ratio": ratio, "uncertainty": 0.2 if i == in_doubt else 0.02}) + "\n"
            for i, ratio in enumerate(ratios)
        ]
        (tmp_path / name).write_text("".join(lines))
        return str(tmp_path / name)

    first = write("a", [0.5] * 11 + [3], in_doubt=10)
    for off, status in ((1, 0), (2, 1)):
        monkeypatch.setattr("sys.argv", ["compare", first, write("b", [0.56] * off + [0.54] * (10 - off) + [7])])
        assert compare.main() == status
        assert f"{10 - off} of 10 ratios agree within 10%; 1 are in doubt" in capsys.readouterr().out
