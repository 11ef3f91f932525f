# SPDX-License-Identifier: Apache-2.0
"""Tables of one machine's rows, in Markdown: what docs/benchmarks is made of."""

from collections.abc import Iterable

from bench import targets
from bench.implementation import OURS

EVERY_OP = ("linear_act", "mlp", "step", "training", "overhead", "quantize", "float8")


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def by_case(rows: list[dict], *ops: str, prefix: str = "") -> dict[str, dict[str, dict]]:
    """{case: {implementation: row}}, of every op where none is named."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if (not ops or row["op"] in ops) and row["case"].startswith(prefix):
            found.setdefault(row["case"], {})[row["implementation"]] = row
    return found


def implementations_of(cases: dict[str, dict[str, dict]]) -> list[str]:
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
    return f"{text} ± {row['uncertainty']:.0%}" if targets.doubtful(row) else text


def ratios(rows: list[dict], *ops: str, prefix: str = "") -> str:
    """A line per case: our time, its share of the roofline, and our time over each baseline's."""
    cases = by_case(rows, *ops, prefix=prefix)
    others = [name for name in implementations_of(cases) if name != OURS]
    lines = []
    for case, found in cases.items():
        subject = found[OURS]
        share = subject["share_of_roofline"]
        cells = [ratio_of(found[name]) if name in found else "" for name in others]
        lines.append([case.removeprefix(prefix), time_of(subject["us_p50"]), f"{share:.0%}" if share else "", *cells])
    return markdown(["case", "ours", "% of roofline", *others], lines)


def numerics(rows: list[dict]) -> str:
    """The worst of every implementation over all cases of an op and dtype."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["op"] in ("linear_act", "step") and row.get("error_to_best") is not None:
            groups.setdefault(("/".join(row["case"].split("/")[:3]), row["implementation"]), []).append(row)
    lines = [
        [
            group, name, f"{max(r['error_to_best'] for r in found):.4g}",
            f"{min(r['correctly_rounded'] for r in found):.2%}",
        ]
        for (group, name), found in groups.items()
    ]  # fmt: skip
    return markdown(["cases", "implementation", "error, of the least possible", "correctly rounded"], lines)


def parameters(row: dict) -> int:
    """Of a step."""
    return int(float(row["case"].rsplit("/", 1)[1].split("in")[0]))


def stream_bytes(row: dict) -> float:
    """What a step takes per parameter, in bytes of a plain stream."""
    return row["us_p50"] * row["limits"]["gb_s"] * 1e3 / parameters(row)


def bytes_per_parameter(rows: list[dict]) -> str:
    """Counted, and what the time is worth at the rate of a plain stream."""
    cases = by_case(rows, "step", prefix="step/float16/plain/")
    lines = []
    for case, found in cases.items():
        for name, row in found.items():
            worth = with_doubt(f"{stream_bytes(row):.0f}", row)
            lines.append([case, name, str(row["bytes_per_parameter"] or "not counted"), worth])
    return markdown(["case", "recipe", "bytes per parameter, counted", "its time in bytes of a plain stream"], lines)


def training(rows: list[dict]) -> str:
    lines = [
        [
            case.removeprefix("training/"), name, time_of(r["us_p50"]), ratio_of(r),
            f"{r['peak_bytes'] / 2**20:.1f}", f"{r['first_loss']:.4f}", f"{r['last_loss']:.4f} after {r['steps']}",
        ]
        for case, found in by_case(rows, "training").items()
        for name, r in found.items()
    ]  # fmt: skip
    return markdown(["model", "recipe", "step", "ours / this", "peak MiB", "first loss", "last loss"], lines)


def overhead(rows: list[dict]) -> str:
    lines = [
        [case.removeprefix("overhead/"), name, time_of(r["us_p50"]), ratio_of(r)]
        for case, found in by_case(rows, "overhead").items()
        for name, r in found.items()
    ]
    return markdown(["call", "implementation", "time", "ours / this"], lines)


def taken(rows: list[dict]) -> tuple[str, str]:
    """Where and when, in two lines."""
    r, loads = rows[-1], [row["load"] for row in rows]
    dates, commits = sorted({row["date"] for row in rows}), sorted({row["commit"] for row in rows})
    return (
        f"`{r['device']}`,",
        f"{r['clock']}, torch {r['torch']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}, "
        f"load {min(loads):.1f} to {max(loads):.1f}.",
    )


def outcomes(rows: list[dict]) -> str:
    """The worst case of each target."""
    found = by_case(rows, *EVERY_OP)
    device = "cuda" if rows[-1]["clock"] == "GPU events" else "cpu"
    return markdown(["what", "against", "wanted", "worst", "case", ""], targets.lines(device, found))


def limits(rows: list[dict]) -> str:
    found = rows[-1]["limits"]
    lines = [["memory", f"{found['gb_s']:.3g} GB/s (copy: {found['copy_gb_s']:.3g})"]]
    lines += [[f"GEMM, {dtype} operands", f"{rate:.3g} TFLOP/s"] for dtype, rate in found["tflop_s"].items()]
    return markdown(["roof", "measured"], lines)


def left_out(rows: list[dict]) -> str:
    """Which baselines were not run, where first, and why."""
    reasons: dict[str, tuple[str, str]] = {}
    for row in rows:
        for name, reason in row.get("left_out", {}).items():
            reasons.setdefault(name, (row["case"], reason))
    if not reasons:
        return "None."
    return markdown(["baseline", "first in", "because"], [[name, *why] for name, why in reasons.items()])


def is_met(row: dict) -> bool:
    """Whether a row of bench/precision.py reaches its goal."""
    return row["value"] >= row["goal"] if row["at_least"] else row["value"] <= row["goal"]


def goals(rows: list[dict]) -> str:
    """What was measured beside its goal."""
    lines = []
    for row in rows:
        goal = f"{'>=' if row['at_least'] else '<='} {row['goal']:g}"
        lines.append([row["what"], goal, f"{row['value']:.3g}" + ("" if is_met(row) else ", missed"), f"{row['cases']:,}"])
    return markdown(["what", "wanted", "measured", "cases"], lines)
