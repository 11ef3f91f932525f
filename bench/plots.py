# SPDX-License-Identifier: Apache-2.0
"""The charts of README and docs/benchmarks, as SVG, from rows alone; each has a digest of the rows it was drawn from."""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable

from bench.figures import IN_CHART, Cases, times
from bench.implementation import OURS
from bench.machines import MACHINES
from bench.tables import by_case, parameters, stream_bytes

PEERS_OVER_K = ("oneDNN on fp32 copies", "MKL on fp32 copies", "torch float16", "torch bfloat16", "torch.compile default")
OVER_K = {"cpu": (256, 1024), "cuda": (4096, 4096)}  # M, N
SIZE = {"cpu": "1e7", "cuda": "1e8"}  # parameters
SHOWN_STEPS = (OURS, "classical fp16 recipe", "fp32 parameters", "Apex's passes", "torch.compile")
KEYS = ("case", "implementation", "us_p50", "ratio", "bytes_per_parameter", "tflop_s", "gb_s", "bytes", "flops", "limits")


def drawn(charts: dict[str, tuple[list[dict], Callable]]) -> Iterable[tuple[str, str]]:
    """(file, SVG) of each, with a digest of its rows."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "mpkernels", "svg.fonttype": "none", "font.family": "sans-serif"}
    from matplotlib import pyplot

    for file, (chosen, plot) in charts.items():
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        plot(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": digest(chosen)})
        pyplot.close(figure)
        yield file, "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def charts(rows: dict[str, list[dict]]) -> dict[str, tuple[list[dict], Callable]]:
    """{file: (its rows, how to draw it)} of every chart that has rows; rows by the page of their machine."""
    found = {
        f"{page}_{name}.svg": (chosen, functools.partial(PLOTS[name][1], rows=chosen))
        for page, of_page in rows.items()
        for name, chosen in chosen_rows(of_page, MACHINES[page].kind).items()
    }
    of_cpus = {MACHINES[page].name: of_page for page, of_page in rows.items() if MACHINES[page].kind == "cpu"}
    cases = {name: by_case(of_page) for name, of_page in of_cpus.items()}
    for name, (select, plot) in README_PLOTS.items():
        if chosen := [row for of_page in of_cpus.values() for row in of_page if select(row)]:
            found[f"{name}.svg"] = (chosen, functools.partial(plot, cases=cases))
    return found


def chosen_rows(rows: list[dict], device: str) -> dict[str, list[dict]]:
    """{plot: its rows} of one machine, where there are any."""
    chosen = {name: [row for row in rows if select(row, device)] for name, (select, _) in PLOTS.items()}
    return {name: found for name, found in chosen.items() if found}


def digest(rows: list[dict]) -> str:
    """What a plot was drawn from."""
    values = [[row.get(key) for key in KEYS] for row in rows]
    return "rows " + hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


# ----- of one machine ---------------------------------------------------------------


def roofline(axes, rows):
    """Rate over intensity, beside the limits of fp16 operands: on a CPU they are multiplied in fp32."""
    limits = rows[-1]["limits"]
    peak, stream = limits["tflop_s"]["float16"], limits["gb_s"]
    intensities = [2.0**i for i in range(-2, 12)]
    axes.loglog(intensities, [min(peak, x * stream / 1e3) for x in intensities], "k-", label="limit")
    for direction in ("forward", "backward", "both"):
        of = [row for row in rows if f"/{direction}/" in row["case"]]
        axes.loglog([r["flops"] / r["bytes"] for r in of], [r["tflop_s"] for r in of], "o", label=direction)
    axes.set(xlabel="operations per byte, counted", ylabel="TFLOP/s", title="linear_act, fp16: roofline")
    axes.legend()


def ratio_over_k(axes, rows):
    M, _, N = _dimensions(rows[0])
    for peer in PEERS_OVER_K:
        of = sorted((_dimensions(row)[1], row["ratio"]) for row in rows if row["implementation"] == peer)
        if of:
            axes.plot([k for k, _ in of], [ratio for _, ratio in of], "o-", label=peer)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xscale="log", yscale="log", xlabel=f"K (M={M}, N={N})", ylabel="our time / theirs", title="forward, fp16: over K")
    axes.legend()


def bytes_per_parameter(axes, rows):
    count = parameters(rows[0])
    names = [row["implementation"] for row in rows]
    axes.barh(names, list(map(stream_bytes, rows)), color="lightgray", label="time, in bytes of a plain stream")
    axes.barh(names, [row["bytes_per_parameter"] for row in rows], height=0.4, label="counted (0: not counted)")
    axes.invert_yaxis()
    axes.set(xlabel="bytes per parameter", title=f"AdamW step, {count:.0e} fp16 parameters in 300 tensors")
    axes.legend()


def step_over_parameters(axes, rows):
    _lines(axes, rows, parameters, "parameters, in 300 tensors")


def step_over_tensors(axes, rows):
    _lines(axes, rows, tensors, f"tensors, of together {parameters(rows[0]):.0e} parameters")


def _lines(axes, rows, of: Callable[[dict], int], label: str):
    for name in SHOWN_STEPS:
        points = sorted((of(row), row["us_p50"] / parameters(row) * 1e3) for row in rows if row["implementation"] == name)
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ns per parameter", title="AdamW step, fp16 gradients")
    axes.legend()


def tensors(row: dict) -> int:
    return int(row["case"].rsplit("in", 1)[1])


def _dimensions(row: dict) -> list[int]:
    return [int(n) for n in row["case"].rsplit("/", 1)[1].split("x")]


def _of_k(row: dict, device: str) -> bool:
    if not row["case"].startswith("linear_act/forward/float16/"):
        return False
    M, _, N = _dimensions(row)
    return OVER_K[device] == (M, N)


def _step_of(row: dict) -> bool:
    return row["case"].startswith("step/float16/plain/")


PLOTS: dict[str, tuple[Callable[[dict, str], bool], Callable]] = {
    "roofline": (lambda r, _: r["op"] == "linear_act" and "/float16/" in r["case"] and r["implementation"] == OURS, roofline),
    "ratio_over_k": (_of_k, ratio_over_k),
    "bytes_per_parameter": (lambda r, device: r["case"] == f"step/float16/plain/{SIZE[device]}in300", bytes_per_parameter),
    "step_over_parameters": (lambda r, _: _step_of(r) and tensors(r) == 300, step_over_parameters),
    "step_over_tensors": (lambda r, device: _step_of(r) and f"/{SIZE[device]}in" in r["case"], step_over_tensors),
}


# ----- of all machines, for README ---------------------------------------------------------------


def bytes_moved(axes, cases: dict[str, Cases]):
    """Counted bytes per parameter of the recipes for a step, without and with clipping: the same on every machine."""
    plain, clip = (next(iter(cases.values()))[case] for case in STEP_CASES)
    counted = {name: row["bytes_per_parameter"] for name, row in plain.items() if name == OURS or not name.startswith(OURS)}
    names = sorted(filter(counted.get, counted), key=lambda name: (counted[name], name != OURS))  # 0: not counted
    clipped = [clip[name]["bytes_per_parameter"] if name in clip else 0 for name in names]
    axes.barh(names, clipped, color="lightgray", label="with clipping, where counted")
    bars = axes.barh(
        names, [counted[name] for name in names], height=0.5, color=["C0" if name == OURS else "C7" for name in names]
    )
    axes.bar_label(bars, padding=4)
    axes.invert_yaxis()
    axes.set(title="AdamW step: bytes moved per parameter, fp16 gradients")
    axes.legend(loc="upper right", frameon=False)
    _bare(axes)


def speed(axes, cases: dict[str, Cases]):
    """How much faster than a baseline, on a logarithmic axis from 1, a bar for each machine."""
    height = 0.8 / len(cases)
    for i, (machine, of) in enumerate(cases.items()):
        found = [(place, comparison.on(of)) for place, comparison in enumerate(IN_CHART)]
        known = [(place + (i + 0.5) * height - 0.4, row) for place, row in found if row]
        bars = axes.barh(
            [y for y, _ in known],
            [1 / row["ratio"] - 1 for _, row in known],
            height,
            left=1,
            label=machine,
            color=f"C{i}",
        )
        axes.bar_label(bars, [times(row) for _, row in known], padding=4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=(0.5, 64), title="x faster than the baseline (below 1x: slower)")
    axes.set_yticks(range(len(IN_CHART)), [f"{c.what}\nagainst {c.baseline}" for c in IN_CHART], fontsize=8)
    axes.set_xticks((0.5, 1, 2, 4, 8, 16, 32), ("0.5x", "1x", "2x", "4x", "8x", "16x", "32x"))
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.legend(loc="upper right", frameon=False)
    _bare(axes)


def _bare(axes):
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


STEP_CASES = tuple(f"step/float16/{kind}/{SIZE['cpu']}in300" for kind in ("plain", "clip"))
_IN_CHART = {(c.case, name) for c in IN_CHART for name in (c.subject, c.baseline)}

README_PLOTS: dict[str, tuple[Callable[[dict], bool], Callable]] = {
    "bytes": (lambda row: row["case"] in STEP_CASES, bytes_moved),
    "speed": (lambda row: (row["case"], row["implementation"]) in _IN_CHART, speed),
}
