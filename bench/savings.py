# SPDX-License-Identifier: Apache-2.0
"""docs/savings.md: what 16 bits save on the tasks of examples/apps, from the rows of `make apps OUT=bench/results`."""

import functools
import math
import statistics
from collections.abc import Callable

from bench.machines import MACHINES
from bench.rows import RESULTS, read
from bench.tables import markdown

FP32 = "torch fp32"
CLAIMED = 0.70  # of fp32's: what "30 to 50 % less" means at least
FASTER = 0.95  # of fp32's time: a recipe counts as faster whose 80th percentile is below
LISTED = ",\n  "  # in a bullet, a line each
TASKS = {  # by the name of their rows: what is done, and the file in examples/apps
    "digits": ("image classification", "digits"),
    "detection": ("detection", "detection"),
    "generation": ("generation", "generation"),
    "gpt": ("language model", "gpt"),
    "languages": ("text classification", "languages"),
    "letters": ("translation", "letters"),
    "factorization_sgd": ("factorization by SGD", "factorization"),
    "factorization_als": ("factorization by ALS", "factorization"),
    "factorization_nmf": ("factorization, NMF", "factorization"),
    "recommender": ("deep recommender", "recommender"),
    "cartpole": ("reinforcement learning", "cartpole"),
}

HEAD = """<!-- Written by python -m bench.report: change that, not this. -->

# What 16 bits save

Models for eleven tasks, ten on real data and one on a simulated pole, each trained in fp32, by torch's recipes and converted,
from the same weights on the same batches: `make apps` (`QUICK=1` for one seed). Small models, so that all of it runs in
minutes, in short files in `examples/apps`, to read beside a model of one's own."""

CLAIMS = """## What is claimed, and what is here

"30 to 50 % less memory and time" is what is often said of 16 bits. Micikevicius et al. 2018 (arXiv 1710.03740) claim nearly 2x
less memory for activations, and less time on processors with units for 16 bits. Of fp32's, over the seeds:"""

CHART = "![Time and memory kept for backward, of fp32's, for every task](plots/savings.svg)"

METHOD = """## How to read the tables

- **metric**: mean of {seeds} seeds on data that was not trained on. **change**: mean difference from fp32's with the same seed,
  above 0 better, in units of the spread of fp32's own seeds. Within 1 either way it is chance.
- **time**: CPU time of a step over that of fp32. Recipes take their steps in alternation, five at a time; the ratio is the
  median over these, and the range from the 20th to the 80th percentile is given where it is wider than 10 %. The machine was
  shared (load {load}): ratios hold, milliseconds hardly.
- **kept**: bytes that a batch keeps from forward to backward, each storage once, without parameters and their casts, counted by
  `torch.autograd.graph.saved_tensors_hooks`. In ALS and NMF: the matrix and its factors.
- **peak**: the most that the allocator had given out at once, parameters, gradients and optimizer included, in the first two
  steps. Those are fp32 but under `float16` and `bfloat16`: where they outweigh the activations, little is saved.
- **torch autocast** is with torch's fused AdamW, and for fp16 with its GradScaler. On a CPU that computes fp16 in software it
  takes five steps for the sake of its time."""


def rows() -> list[dict]:
    return read(RESULTS / "apps.jsonl")


def by_task(found: list[dict]) -> dict[str, list[dict]]:
    """{task: its rows}, fp32's first, in the order of TASKS."""
    return {task: of for task in TASKS if (of := [row for row in found if row["case"] == f"apps/{task}"])}


def page(found: list[dict]) -> str:
    tasks = by_task(found)
    one = found[0]
    seeds = max(len(row["scores"]) for row in found)
    loads = sorted(row["load"] for row in found)
    where = f"Measured on {place(found)}, {one['threads']} thread."
    method = METHOD.format(seeds=seeds, load=f"{loads[0]:.0f} to {loads[-1]:.0f}")
    if missing := [words for task, (words, _) in TASKS.items() if task not in tasks]:
        where += f"\nNot measured yet: {', '.join(missing)}."
    parts = [HEAD, where, CLAIMS, summary(tasks), conclusion(tasks), CHART, method]
    for task, of in tasks.items():
        title, file = TASKS[task]
        parts += [f"## {title[0].upper()}{title[1:]}", f"`examples/apps/{file}.py`; {fp32_sentence(of[0])}", table(of)]
    return "\n\n".join(parts) + "\n"


def fp32_sentence(fp32: dict) -> str:
    spread = max(fp32["scores"]) - min(fp32["scores"])
    steps = fp32["steps"] // len(fp32["scores"])
    return (
        f"{fp32['metric']}, {'more' if fp32['higher_is_better'] else 'less'} is better.\nfp32: {steps} steps of"
        f" {fp32['ms_per_step']:.3g} ms a seed, spread {spread:.2g}, kept {fp32['activation_bytes'] / 2**20:.2g} MiB,"
        f" peak {fp32['peak_bytes'] / 2**20:.3g} MiB."
    )


def table(of: list[dict]) -> str:
    """A line per recipe of one task."""
    lines = [
        [row["implementation"], score(row), change_cell(row, of[0]), time(row), *sizes(row, of[0]), str(row["skipped_steps"])]
        for row in of
    ]
    return markdown(["recipe", of[0]["metric"], "change", "time", "kept", "peak", "skipped steps"], lines)


def score(row: dict) -> str:
    return f"{statistics.mean(row['scores']):.4g}" if row["scores"] else ""


def change(row: dict, fp32: dict) -> float:
    """Mean difference from fp32 with the same seed, more is better, in spreads of fp32's seeds."""
    sign, spread = 1 if row["higher_is_better"] else -1, max(fp32["scores"]) - min(fp32["scores"])
    difference = sign * statistics.mean(a - b for a, b in zip(row["scores"], fp32["scores"], strict=True))
    return difference / spread if spread else math.copysign(math.inf, difference) if difference else 0.0


def change_cell(row: dict, fp32: dict) -> str:
    return f"{round(change(row, fp32), 2) + 0.0:+.2f}" if row["scores"] and row is not fp32 else ""


def time(row: dict) -> str:
    wide = row["ratio_p80"] - row["ratio_p20"] > 0.1 * row["ratio"]
    return f"{row['ratio']:.2f}" + (f" ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})" if wide else "")


def sizes(row: dict, fp32: dict) -> list[str]:
    return [f"{row[key] / fp32[key]:.2f}" for key in ("activation_bytes", "peak_bytes")]


def ours_in_16_bits(of: list[dict]) -> list[dict]:
    return [row for row in of if not row["implementation"].startswith("torch") and "8" not in row["implementation"]]


def leanest(of: list[dict]) -> dict:
    """Of ours in 16 bits the one that keeps least; of equals the fastest."""
    return min(ours_in_16_bits(of), key=lambda row: (row["activation_bytes"], row["ratio"]))


def summary(tasks: dict[str, list[dict]]) -> str:
    """A line per task: the leanest of ours beside torch's autocast."""
    lines = []
    for task, of in tasks.items():
        fp32, ours = of[0], leanest(of)
        autocast = next((row for row in of if row["implementation"] == "torch autocast bf16"), None)
        theirs = [time(autocast), *sizes(autocast, fp32)] if autocast else [""] * 3
        lines.append([TASKS[task][0], ours["implementation"], change_cell(ours, fp32), time(ours), *sizes(ours, fp32), *theirs])
    header = ["task", "ours in 16 bits that keeps least", "change", "time", "kept", "peak"]
    header += ["torch autocast bf16: time", "kept", "peak"]
    return markdown(header, [["claimed", "", "0", "0.5 to 0.7", "0.5 to 0.7", "0.5 to 0.7", "", "", ""], *lines])


def conclusion(tasks: dict[str, list[dict]]) -> str:
    """What holds of the claim, counted from the rows."""
    best = {task: leanest(of) for task, of in tasks.items()}
    kept = [task for task, row in best.items() if row["activation_bytes"] <= CLAIMED * tasks[task][0]["activation_bytes"]]
    faster = [
        f"{TASKS[t][0]} ({r['implementation']})"
        for t, of in tasks.items()
        for r in ours_in_16_bits(of)
        if r["ratio_p80"] <= FASTER
    ]
    worse = [
        f"{TASKS[t][0]} ({r['implementation']}: {change(r, of[0]):+.2f})"
        for t, of in tasks.items()
        for r in ours_in_16_bits(of)
        if change(r, of[0]) < -1
    ]
    of_all = [r["ratio"] for of in tasks.values() for r in ours_in_16_bits(of)]
    return "\n".join(
        [
            f"- **Memory for backward**: 30 % less, or more than that, in {len(kept)} of {len(tasks)}.",
            "- **Time**: this CPU has no instructions for 16-bit products. They cost what fp32's cost, and casts come on top:"
            f"\n  {min(of_all):.2f} to {max(of_all):.2f} of fp32's. By 5 % or more faster in four of five moments:"
            f" {LISTED.join(faster) or 'none'}.",
            f"- **Quality**: worse than fp32 by more than its spread: {LISTED.join(worse) or 'none'}.",
        ]
    )


def chart(axes, chosen: list[dict], where: str) -> None:
    """Of every task, time and memory kept for backward of ours that keeps least and of autocast, over fp32's."""
    tasks, height = list(dict.fromkeys(row["case"] for row in chosen)), 0.2
    bars = [(ours, key) for ours in (True, False) for key in ("bytes", "ratio")]
    colors = {(True, "bytes"): "C0", (True, "ratio"): "lightblue", (False, "bytes"): "C7", (False, "ratio"): "lightgray"}
    for i, (ours, key) in enumerate(bars):
        of = [row for row in chosen if row["implementation"].startswith("torch") != ours]
        places = [tasks.index(row["case"]) + (i - 1.5) * height for row in of]
        who, what = "ours" if ours else "torch autocast bf16", "kept for backward" if key == "bytes" else "time"
        drawn = axes.barh(places, [row[key] for row in of], height, color=colors[ours, key], label=f"{what}, {who}")
        axes.bar_label(drawn, [f"{row[key]:.2f}" for row in of], padding=2, fontsize=6)
    axes.figure.set_size_inches(7, 1 + 0.7 * len(tasks))
    label(axes, [TASKS[task.removeprefix("apps/")][0] for task in tasks], where)


def label(axes, labels: list[str], where: str) -> None:
    """Bars, a row of them for each label from the top down, as parts of what fp32 takes."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="of fp32's; shorter is better")
    axes.set_title(f"A training step on {where}", fontsize=9)
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def charts(found: list[dict]) -> dict[str, tuple[list[dict], Callable]]:
    """{file: (its rows, how to draw it)}, as plots.charts."""
    chosen = []
    for of in by_task(found).values():
        for row in (leanest(of), *(row for row in of if row["implementation"] == "torch autocast bf16")):
            kept = row["activation_bytes"] / of[0]["activation_bytes"]
            chosen.append({key: row[key] for key in ("case", "implementation", "ratio")} | {"bytes": kept})
    return {"savings.svg": (chosen, functools.partial(chart, chosen=chosen, where=place(found)))}


def place(found: list[dict]) -> str:
    """Machine, torch and date."""
    row, names = found[0], {machine.device: machine.name for machine in MACHINES.values()}
    return f"{names.get(row['device'], row['device'])}, torch {row['torch']}, {row['date']}"


def same_bits(found: list[dict]) -> str:
    """For docs/rl.md: of cart-pole, what sampling and training have in common under each recipe, and what that costs."""
    of = by_task(found).get("cartpole")
    if of is None:
        return "Not measured yet."
    lines = [[row["implementation"], time(row), row["note"]] for row in of]
    return markdown(["recipe", "time of a step, of fp32's", "a policy after training"], lines)
