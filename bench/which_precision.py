# SPDX-License-Identifier: Apache-2.0
"""A training step under each policy, with and without torch.autocast: the measured table of docs/which-precision.md.

python -m bench.which_precision --out bench/results/which_precision.jsonl

Recipes take their steps in alternation, so that ratios hold on a machine that others use too. CPU time, one thread.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import rows, savings
from bench.tables import markdown
from bench.training import by_torch, ours, peak_bytes

CPU = torch.device("cpu")
ROUNDS = 12  # steps of each recipe
FEW_ROUNDS = 2  # of those that multiply fp16 in software
FP32, AUTOCAST, BOTH = "torch fp32", "torch autocast bf16", "mixed_bfloat16 in autocast"
RECIPES = {
    FP32: (by_torch, (None,), {}),
    AUTOCAST: (by_torch, (torch.bfloat16,), {}),
    "mixed_bfloat16": (ours, ("mixed_bfloat16",), {}),
    BOTH: (ours, ("mixed_bfloat16",), dict(autocast=True)),
    "bfloat16": (ours, ("bfloat16",), {}),
    "mixed_float16": (ours, ("mixed_float16",), {}),
    "mixed_float16 in autocast": (ours, ("mixed_float16",), dict(autocast=True)),
}
SOFTWARE = "mixed_float16 in autocast"
MODELS = {
    "mlp": "MLP 784-1024-1024-1024-10, batch 256",
    "cnn": "CNN, 3 convolutions and 2 linears, batch 128",
    "gpt2_tiny": "GPT, 4 layers of width 256, 8 x 64 tokens",
}


def measure(model: str) -> list[dict]:
    """A row per recipe."""
    makes = {name: functools.partial(how, model, CPU, *given, **options) for name, (how, given, options) in RECIPES.items()}
    steps = {name: make() for name, make in makes.items()}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(ROUNDS):
        for name in (n for n in steps if n != SOFTWARE or i < FEW_ROUNDS):
            start = time.process_time()
            loss = steps[name]()
            seconds[name].append(time.process_time() - start)
            losses[name].append(loss.item())
    return [
        {
            "case": f"which_precision/{model}",
            "implementation": name,
            "ms_p50": statistics.median(taken[1:]) * 1e3,
            "ratio": statistics.median(a / b for a, b in zip(taken[1:], seconds[FP32][1:])),
            "peak_bytes": peak_bytes(functools.partial(two_steps, makes[name]), CPU),
            "loss_distance": statistics.mean(abs(a - b) / b for a, b in zip(losses[name], losses[FP32])),
            "rounds": len(taken),
        }
        for name, taken in seconds.items()
    ]


def two_steps(make) -> None:
    step = make()
    step()
    step()


def table(found: list[dict]) -> str:
    """A line per model and recipe; time and peak also over those of fp32."""
    lines = []
    for model, words in MODELS.items():
        of = {row["implementation"]: row for row in found if row["case"] == f"which_precision/{model}"}
        for name, row in of.items():
            peak = f"{row['peak_bytes'] / 2**20:.1f} MiB ({row['peak_bytes'] / of[FP32]['peak_bytes']:.2f})"
            distance = "" if name == FP32 else f"{row['loss_distance']:.0e}"
            lines.append([words, name, f"{row['ms_p50']:.3g} ms ({row['ratio']:.2f})", peak, distance])
            words = ""
    header = ["model", "recipe", "time of a step", "peak memory", "distance of the loss from fp32's"]
    return markdown(header, lines)


def chart(axes, chosen: list[dict], where: str) -> None:
    """Time and peak memory of a training step over fp32's, for fp32, autocast and ours."""
    labels, height = [], 0.26
    for place, (model, key) in enumerate((m, k) for m in MODELS for k in ("ratio", "bytes")):
        of = {row["implementation"]: row for row in chosen if row["case"] == f"which_precision/{model}"}
        labels.append(f"{MODELS[model].split(',')[0].split()[0]}, {'time' if key == 'ratio' else 'peak memory'}")
        for i, (name, color) in enumerate(((FP32, "C7"), (AUTOCAST, "lightgray"), (BOTH, "C0"))):
            value = of[name][key] / of[FP32][key]
            label = (f"ours, {name}" if name == BOTH else name) if place == 0 else None
            bar = axes.barh(place + (i - 1) * height, value, height, color=color, label=label)
            axes.bar_label(bar, [f"{value:.2f}"], padding=3, fontsize=8)
    savings.label(axes, labels, where)


def charts(found: list[dict]) -> dict[str, tuple[list[dict], Callable]]:
    """{file: (its rows, how to draw it)}, as plots.charts."""
    of = [row for row in found if row["implementation"] in (FP32, AUTOCAST, BOTH)]
    chosen = [{key: row[key] for key in ("case", "implementation", "ratio")} | {"bytes": row["peak_bytes"]} for row in of]
    return {"training_step.svg": (chosen, functools.partial(chart, chosen=chosen, where=savings.place(found)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--out", type=Path, help="file of rows that these are merged into")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for model in arguments.models or MODELS:
        found = [row | rows.environment(CPU) for row in measure(model)]
        print(table(found), flush=True)
        if arguments.out:
            rows.merge(arguments.out, found)


if __name__ == "__main__":
    main()
