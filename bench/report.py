# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and docs/performance.md and the plots from bench/results: python -m bench.report.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; nothing there is written by hand.
tests/bench/test_bench.py fails when a table is not what the rows say, or when a plot was drawn from other rows.
A ratio known to no better than 10 % is shown with its uncertainty.
"""

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import bars, plots
from bench.contender import OURS
from bench.rows import RESULTS, read

ROOT = RESULTS.parent.parent
DOCUMENTS = ("README.md", "docs/performance.md")
FILES = {  # of a case that several of them have, the last one's rows are shown: bench/device.sh writes one per forced backend
    "cpu": ("cpu",),
    "intel": ("cpu-intel",),
    "cuda": ("cuda", "cuda-triton", "cuda-step", "cuda-native"),
}
PLOTTED = ("cpu", "cuda")
HOW_TO_READ = (
    "Medians of ratios taken within a round, or a quotient of two: below 1, mpkernels is faster; ± where known less well "
    "than to 10 %."
)

# README's table: what, the case, whose time, and whom it is compared with.
KEY_FIGURES = (
    ("forward with ReLU, fp16, M=512 K=1024 N=4096", "linear_act/forward/float16/512x1024x4096", OURS, (
        "torch float16", "MKL on fp32 copies", "oneDNN on fp32 copies, ReLU fused",
    )),
    ("forward with ReLU, bf16, M=256 K=1024 N=1024", "linear_act/forward/bfloat16/256x1024x1024", OURS, (
        "torch bfloat16", "MKL on fp32 copies",
    )),
    ("backward, fp16, M=256 K=1024 N=1024", "linear_act/backward/float16/256x1024x1024", OURS, (
        "torch float16", "MKL on fp32 copies", "oneDNN on fp32 copies",
    )),
    ("AdamW step with scaler, 50e6 fp16 parameters in 300 tensors", "step/float16/plain/5e7in300", OURS, (
        "classical fp16 recipe", "fp32 parameters", "Apex's passes",
    )),
    ("training step, 784-1024-1024-1024-10, batch 256, mixed_float16", "training/mlp", OURS, (
        "torch autocast fp16", "torch fp16 model, fp32 masters", "torch fp32",
    )),
    ("the same, mixed_bfloat16", "training/mlp", f"{OURS} mixed_bfloat16", ("torch autocast bf16", "torch fp32")),
)  # fmt: skip


def main() -> int:
    rows = current_rows()
    for path, text in documents(rows):
        path.write_text(text)
    for device in rows.keys() & PLOTTED:
        for path, text in plots.draw(rows[device], ROOT / "docs" / "plots", device):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return 0


def current_rows(folder: Path = RESULTS) -> dict[str, list[dict]]:
    """{"cpu": rows, ...}, of the files that are in bench/results; the rows of a case are of one file."""
    found = {}
    for device, names in FILES.items():
        cases = {}
        for path in (folder / f"{name}.jsonl" for name in names):
            of_file: dict[str, list[dict]] = {}
            for row in read(path) if path.exists() else ():
                of_file.setdefault(row["case"], []).append(row)
            cases |= of_file
        if cases:
            found[device] = [row for rows in cases.values() for row in rows]
    return found


def documents(rows: dict[str, list[dict]]) -> Iterable[tuple[Path, str]]:
    """(path, the text it should have)."""
    for name in DOCUMENTS:
        path = ROOT / name
        yield path, filled(path.read_text(), rows)


def filled(text: str, rows: dict[str, list[dict]]) -> str:
    """The text with every table made anew; KeyError for a marker that names no table."""

    def table(match: re.Match) -> str:
        name, devices = match[1].split(" on ")
        found = [rows[device] for device in devices.split(" and ") if device in rows]
        body = TABLES[name](*found) if found else "No rows yet."
        return f"<!-- bench:{match[1]} -->\n\n{body}\n\n<!-- /bench:{match[1]} -->"

    return re.sub(r"<!-- bench:([a-z_ +]+) -->.*?<!-- /bench:\1 -->", table, text, flags=re.S)


# ----- tables ---------------------------------------------------------------


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def by_case(rows: list[dict], *ops: str, prefix: str = "") -> dict[str, dict[str, dict]]:
    """{case: {contender: row}}."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["op"] in ops and row["case"].startswith(prefix):
            found.setdefault(row["case"], {})[row["contender"]] = row
    return found


def contenders_of(cases: dict[str, dict[str, dict]]) -> list[str]:
    return list(dict.fromkeys(name for case in cases.values() for name in case))


def time_of(us: float) -> str:
    """Three digits with a unit."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"


def ratio_of(row: dict) -> str:
    return with_doubt(f"{row['ratio']:.3g}", row)


def with_doubt(text: str, row: dict) -> str:
    return f"{text} ± {row['uncertainty']:.0%}" if bars.doubtful(row) else text


def between(subject: dict, peer: dict) -> dict:
    """The subject's time over the peer's, both of which were taken in rounds with the case's first contender."""
    uncertainty = math.hypot(subject["uncertainty"], peer["uncertainty"])
    return {"ratio": peer["ratio"] / subject["ratio"], "uncertainty": uncertainty}


def key_figures(*machines: list[dict]) -> str:
    """A column of ratios per machine; peers that none of them has are left out."""
    cases = [by_case(rows, "linear_act", "step", "training") for rows in machines]

    def cell(of: dict[str, dict[str, dict]], case: str, subject: str, peer: str) -> str:
        return ratio_of(between(of[case][subject], of[case][peer])) if peer in of[case] else ""

    lines = [
        [what, peer, *(cell(of, case, subject, peer) for of in cases)]
        for what, case, subject, peers in KEY_FIGURES
        for peer in peers
        if any(peer in of[case] for of in cases)
    ]
    header = ["mpkernels", "compared with", *(f"on {rows[-1]['device']}" for rows in machines)]
    places = [taken(rows) for rows in machines]
    return "\n\n".join([markdown(header, lines), "\n".join(places) + f" {HOW_TO_READ}"])


def everything(rows: list[dict]) -> str:
    """All tables that have something in them, and the plots."""
    titles = [name for name, (ops, _) in OF_OPS.items() if any(row["op"] in ops for row in rows)]
    tables = [f"### {name[0].upper()}{name[1:]}\n\n{OF_OPS[name][1](rows)}" for name in titles]
    device = device_of(rows)
    pictures = [
        f"![{name.replace('_', ' ')}](plots/{plots.file_name(name, device)})" for name in plots.chosen_rows(rows, device)
    ]
    return "\n\n".join([*tables, "\n".join(pictures)])


def device_of(rows: list[dict]) -> str:
    return "cuda" if rows[-1]["clock"] == "GPU events" else "cpu"


def taken(rows: list[dict]) -> str:
    """Where and when, in a line."""
    r, loads = rows[-1], [row["load"] for row in rows]
    dates, commits = sorted({row["date"] for row in rows}), sorted({row["commit"] for row in rows})
    return (
        f"{r['device']}, {r['clock']}, torch {r['torch']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, "
        f"commit {', '.join(commits)}, load {min(loads):.1f} to {max(loads):.1f}."
    )


def ratios(rows: list[dict], *ops: str, prefix: str = "") -> str:
    """A line per case: our time, its share of the limit, and its ratio to everyone else's."""
    cases = by_case(rows, *ops, prefix=prefix)
    others = [name for name in contenders_of(cases) if name != OURS]
    lines = []
    for case, found in cases.items():
        subject = found[OURS]
        share = subject["share_of_limit"]
        cells = [ratio_of(found[name]) if name in found else "" for name in others]
        lines.append([case.removeprefix(prefix), time_of(subject["us_p50"]), f"{share:.0%}" if share else "", *cells])
    return markdown(["case", "ours", "of the limit", *others], lines)


def numerics(rows: list[dict]) -> str:
    """The worst of every contender over all cases of an op and dtype."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["op"] in ("linear_act", "step") and row.get("error_to_best") is not None:
            groups.setdefault(("/".join(row["case"].split("/")[:3]), row["contender"]), []).append(row)
    lines = [
        [
            group, name, f"{max(r['error_to_best'] for r in found):.4g}",
            f"{min(r['correctly_rounded'] for r in found):.2%}",
        ]
        for (group, name), found in groups.items()
    ]  # fmt: skip
    return markdown(["cases", "contender", "error, of the least possible", "correctly rounded"], lines)


def bytes_per_parameter(rows: list[dict]) -> str:
    """Counted, and what the time is worth at the rate of a plain stream."""
    cases = by_case(rows, "step", prefix="step/float16/plain/")
    lines = []
    for case, found in cases.items():
        count = int(float(case.rsplit("/", 1)[1].split("in")[0]))
        for name, row in found.items():
            worth = row["us_p50"] * row["limits"]["gb_s"] * 1e3 / count
            lines.append([case, name, str(row["bytes_per_parameter"] or "not counted"), with_doubt(f"{worth:.0f}", row)])
    return markdown(["case", "contender", "bytes per parameter, counted", "its time in bytes of a plain stream"], lines)


def training(rows: list[dict]) -> str:
    lines = [
        [
            case.removeprefix("training/"), name, time_of(r["us_p50"]), ratio_of(r),
            f"{r['peak_bytes'] / 2**20:.1f}", f"{r['first_loss']:.4f}", f"{r['last_loss']:.4f} after {r['steps']}",
        ]
        for case, found in by_case(rows, "training").items()
        for name, r in found.items()
    ]  # fmt: skip
    return markdown(["model", "contender", "step", "ours / this", "peak MiB", "first loss", "last loss"], lines)


def overhead(rows: list[dict]) -> str:
    lines = [
        [case.removeprefix("overhead/"), name, time_of(r["us_p50"]), ratio_of(r)]
        for case, found in by_case(rows, "overhead").items()
        for name, r in found.items()
    ]
    return markdown(["call", "contender", "time", "ours / this"], lines)


def kept(rows: list[dict]) -> str:
    """What is promised, and whether it is so."""
    found = by_case(rows, "linear_act", "step", "training", "overhead")
    return markdown(["what", "against", "wanted", "worst", "case", ""], bars.lines(device_of(rows), found))


def left_out(rows: list[dict]) -> str:
    """Who did not compete, where first, and why."""
    reasons: dict[str, tuple[str, str]] = {}
    for row in rows:
        for name, reason in row.get("left_out", {}).items():
            reasons.setdefault(name, (row["case"], reason))
    if not reasons:
        return "Nobody."
    return markdown(["contender", "first in", "because"], [[name, *why] for name, why in reasons.items()])


def limits(rows: list[dict]) -> str:
    found = rows[-1]["limits"]
    lines = [["memory", f"{found['gb_s']:.3g} GB/s (copy: {found['copy_gb_s']:.3g})"]]
    lines += [[f"GEMM, {dtype} operands", f"{rate:.3g} TFLOP/s"] for dtype, rate in found["tflop_s"].items()]
    return markdown(["limit", "measured"], lines) + f"\n\n{taken(rows)} {HOW_TO_READ}"


_EVERY_OP = ("linear_act", "mlp", "step", "training", "overhead")
OF_OPS = {  # name: (the ops it shows, how)
    "bars": (_EVERY_OP, kept),
    "limits": (_EVERY_OP, limits),
    "forward": (("linear_act",), lambda rows: ratios(rows, "linear_act", prefix="linear_act/forward/")),
    "backward": (("linear_act",), lambda rows: ratios(rows, "linear_act", prefix="linear_act/backward/")),
    "forward+backward": (("linear_act",), lambda rows: ratios(rows, "linear_act", prefix="linear_act/both/")),
    "mlp": (("mlp",), lambda rows: ratios(rows, "mlp")),
    "step": (("step",), lambda rows: ratios(rows, "step")),
    "bytes": (("step",), bytes_per_parameter),
    "training": (("training",), training),
    "overhead": (("overhead",), overhead),
    "numerics": (("linear_act", "step"), numerics),
    "left out": (_EVERY_OP, left_out),
}
TABLES = {name: table for name, (_, table) in OF_OPS.items()} | {"key figures": key_figures, "everything": everything}

if __name__ == "__main__":
    sys.exit(main())
