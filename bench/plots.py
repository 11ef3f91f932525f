# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/performance.md, as SVG, from rows alone; each carries a digest of the rows it was drawn from."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.contender import OURS

PEERS_OVER_K = ("oneDNN on fp32 copies", "MKL on fp32 copies", "torch float16", "torch bfloat16", "torch.compile default")
OVER_K = {"cpu": (256, 1024), "cuda": (4096, 4096)}  # M, N
SIZE = {"cpu": "1e7", "cuda": "1e8"}  # parameters
SHOWN_STEPS = (OURS, "classical fp16 recipe", "fp32 parameters", "Apex's passes", "torch.compile")
KEYS = ("case", "contender", "us_p50", "ratio", "bytes_per_parameter", "tflop_s", "gb_s", "bytes", "flops", "limits")


def draw(rows: list[dict], folder: Path, device: str = "cpu") -> Iterable[tuple[Path, str]]:
    """(path, SVG) of every plot that has rows."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mpkernels"
    from matplotlib import pyplot

    for name, chosen in chosen_rows(rows, device).items():
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        PLOTS[name][1](axes, chosen)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": digest(chosen)})
        pyplot.close(figure)
        yield folder / file_name(name, device), "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def file_name(name: str, device: str) -> str:
    return f"{name}.svg" if device == "cpu" else f"{device}_{name}.svg"


def chosen_rows(rows: list[dict], device: str) -> dict[str, list[dict]]:
    """{plot: its rows}, where there are any."""
    chosen = {name: [row for row in rows if select(row, device)] for name, (select, _) in PLOTS.items()}
    return {name: found for name, found in chosen.items() if found}


def digest(rows: list[dict]) -> str:
    """What a plot was drawn from."""
    values = [[row.get(key) for key in KEYS] for row in rows]
    return "rows " + hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def expected_digests(rows: list[dict], device: str = "cpu") -> dict[str, str]:
    """{file: digest of its rows}."""
    return {file_name(name, device): digest(chosen) for name, chosen in chosen_rows(rows, device).items()}


# ----- the plots ---------------------------------------------------------------


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
        of = sorted((_dimensions(row)[1], row["ratio"]) for row in rows if row["contender"] == peer)
        if of:
            axes.plot([k for k, _ in of], [ratio for _, ratio in of], "o-", label=peer)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xscale="log", yscale="log", xlabel=f"K (M={M}, N={N})", ylabel="our time / theirs", title="forward, fp16: over K")
    axes.legend()


def bytes_per_parameter(axes, rows):
    count = parameters(rows[0])
    names = [row["contender"] for row in rows]
    worth = [row["us_p50"] * row["limits"]["gb_s"] * 1e3 / count for row in rows]
    axes.barh(names, worth, color="lightgray", label="time, in bytes of a plain stream")
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
        points = sorted((of(row), row["us_p50"] / parameters(row) * 1e3) for row in rows if row["contender"] == name)
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ns per parameter", title="AdamW step, fp16 gradients")
    axes.legend()


def parameters(row: dict) -> int:
    return int(float(row["case"].rsplit("/", 1)[1].split("in")[0]))


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
    "roofline": (lambda r, _: r["op"] == "linear_act" and "/float16/" in r["case"] and r["contender"] == OURS, roofline),
    "ratio_over_k": (_of_k, ratio_over_k),
    "bytes_per_parameter": (lambda r, device: r["case"] == f"step/float16/plain/{SIZE[device]}in300", bytes_per_parameter),
    "step_over_parameters": (lambda r, _: _step_of(r) and tensors(r) == 300, step_over_parameters),
    "step_over_tensors": (lambda r, device: _step_of(r) and f"/{SIZE[device]}in" in r["case"], step_over_tensors),
}
