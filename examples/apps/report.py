# SPDX-License-Identifier: Apache-2.0
"""How the results of examples/apps are shown: a table, a picture, and rows of JSON with machine, versions and date."""

import datetime
import json
import os
import platform
import statistics
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANELS = {"ratio": "time of a step", "activation_bytes": "memory kept for backward", "peak_bytes": "peak memory"}
OURS, THEIRS = "C0", "C7"
MOST = 3.5  # of fp32: longer bars are cut, and their number stands at the end


def environment(device: torch.device) -> dict[str, object]:
    """What a result depends on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu(),
        "clock": "wall time" if device.type == "cuda" else "CPU time",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def head(task, recipe: str, scores: list[float]) -> dict[str, object]:
    """What a row begins with."""
    return {
        "case": f"apps/{task.name}",
        "implementation": recipe,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "scores": scores,
        **environment(task.device),
    }


def cpu() -> str:
    """Vendor's name, family and model: the name alone does not say which generation."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict(reversed([map(str.strip, line.split(":", 1)) for line in lines if ":" in line]))
    return f"{fields.get('model name', platform.processor())} family {fields.get('cpu family')} model {fields.get('model')}"


def is_ours(row: dict) -> bool:
    return not row["implementation"].startswith("torch")


def spread(row: dict) -> float:
    """Of the metric over the seeds."""
    return max(row["scores"]) - min(row["scores"])


def difference(row: dict, fp32: dict) -> float:
    """Of the metric from fp32's with the same seeds, on average; more is better."""
    sign = 1 if row["higher_is_better"] else -1
    return sign * statistics.mean(a - b for a, b in zip(row["scores"], fp32["scores"], strict=True)) + 0.0  # no minus zero


def table(rows: list[dict]) -> str:
    """A line per recipe; what is measured in bytes also over fp32's."""
    fp32 = rows[0]
    widths = (46, max(12, len(fp32["metric"]) + 2), 9, 9, 7, 10, 7, 10, 7, 9)
    cells = [("recipe", fp32["metric"], "change", "ms/step", "ratio", "kept MiB", "ratio", "peak MiB", "ratio", "skipped")]
    for row in rows:
        score = [f"{statistics.mean(row['scores']):.4f}", f"{difference(row, fp32):+.4f}"] if row["scores"] else ["-", "-"]
        sizes = [f"{x:.2f}" for key in ("activation_bytes", "peak_bytes") for x in (row[key] / 2**20, row[key] / fp32[key])]
        time = [f"{row['ms_per_step']:.2f}", f"{row['ratio']:.2f}"]
        cells.append((row["implementation"], *score, *time, *sizes, str(row["skipped_steps"])))
    lines = [
        f"{line[0]:{widths[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True)) for line in cells
    ]
    notes = [f"{row['implementation']}: {row['note']}" for row in rows if row["note"]]
    heading = f"{fp32['case'].removeprefix('apps/')}, on {fp32['device']}; spread of fp32 over the seeds: {spread(fp32):.3g}"
    return "\n".join([heading, *lines, *notes])


def write(out: Path, rows: list[dict]) -> None:
    """Into out/apps.jsonl, in place of older rows of the same task; and a picture beside it."""
    out.mkdir(parents=True, exist_ok=True)
    path, case = out / "apps.jsonl", rows[0]["case"]
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [row for row in old if row["case"] != case]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept + rows))
    picture(rows, out / f"{case.replace('/', '_')}.png")


def picture(rows: list[dict], path: Path) -> None:
    """Time and memory over those of fp32, a bar per recipe."""
    figure = Figure(figsize=(11, 0.4 * len(rows) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    names = [row["implementation"] for row in rows]
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        values = [row[key] / rows[0][key] for row in rows]
        shown = [min(value, MOST) for value in values]
        bars = axes.barh(names, shown, color=[OURS if is_ours(row) else THEIRS for row in rows])
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=f"{title}\n(fp32 = 1, shorter is better)", xlim=(0, max(shown) * 1.2))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    where = f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['date']}"
    figure.suptitle(f"{rows[0]['case'].removeprefix('apps/')}: mpkernels in blue, torch in gray; {where}", fontsize=10)
    figure.savefig(path, dpi=110)
