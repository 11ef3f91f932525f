# SPDX-License-Identifier: Apache-2.0
"""Check and time every case: python -m bench [--quick] [--op step ...] [--case 'linear_act/*'] [--out rows.jsonl].

On the GPU there is, else on the CPU. What computes a wrong result is not timed, and the exit status is then 1.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from bench import limits, rows, timing
from bench.cases import CASES, Case, select
from bench.implementation import OURS
from bench.measure import measure, measure_alone, prepare

SECONDS = {True: 1.0, False: 6.0}  # of timing per case, quick or not
TIMES_LONGER = {"step": 2}  # or the rounds of the large ones would be few
PROGRESS_WEIGHT = {"training": 8, "step": 5}  # a case of these takes longer


def main() -> int:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = arguments.threads or (1 if device.type == "cpu" else os.cpu_count())
    prepare(threads)
    clock = timing.Clock(device, threads)
    chosen = select(device.type, arguments.op, arguments.case, arguments.quick)
    out = arguments.out / f"{device.type}.jsonl" if arguments.out and arguments.out.is_dir() else arguments.out
    if not chosen:
        print(f"no case is called {arguments.case}", file=sys.stderr)
        return 2
    if arguments.missing and out and out.exists():
        commit = rows.git("rev-parse", "--short", "HEAD")
        there = {row["case"] for row in rows.read(out) if row["commit"] == commit}
        chosen = [case for case in chosen if case.name not in there]
    if not chosen:
        print("every case has its rows")
        return 0
    limit = limits.measure(device, clock)
    stamp = {"clock": clock.name, **rows.environment(device), "limits": limit}
    found, wrong, seconds = [], {}, SECONDS[arguments.quick]
    with tqdm(total=sum(weight(case) for case in chosen), disable=arguments.json or None, leave=False, file=sys.stderr) as bar:
        for case in chosen:
            bar.set_postfix_str(case.name)
            how = measure_alone if case.op == "overhead" else measure
            try:
                measured, errors = how(case, device, clock, limit, seconds * TIMES_LONGER.get(case.op, 1))
            except Exception as error:  # the other cases are still worth their time
                measured, errors = [], {OURS: f"{type(error).__name__}: {error}"}
            timing.release_memory()
            state = stamp | rows.machine(device)
            new = [row | state for row in measured]
            wrong |= {f"{case.name}: {name}": error for name, error in errors.items()}
            found += new
            if arguments.json:
                for row in new:
                    print(json.dumps(row), flush=True)
            if out and new:
                rows.merge(out, new)
            bar.update(weight(case))
    if not arguments.json:
        print(heading(stamp))
        print(table(found))
        for line in left_out(found):
            print(line)
    for name, error in wrong.items():
        print(f"WRONG, not timed: {name}: {error}", file=sys.stderr)
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", choices=sorted({case.op for case in CASES}), help="more than once for several")
    parser.add_argument("--case", default="*", help="a name or a glob: 'linear_act/forward/*', 'training/mlp'")
    parser.add_argument("--quick", action="store_true", help="the cases of the README's tables, in less than ten minutes")
    parser.add_argument("--missing", action="store_true", help="leave out the cases that --out has rows of, of this commit")
    parser.add_argument("--threads", type=int, help="on a CPU 1, the default: process time; more: wall time")
    parser.add_argument("--json", action="store_true", help="print rows instead of a table")
    parser.add_argument("--out", type=Path, help="a file, or a folder for cpu.jsonl or cuda.jsonl; same cases are replaced")
    return parser.parse_args()


def weight(case: Case) -> int:
    return PROGRESS_WEIGHT.get(case.op, 1)


# ----- what is printed ---------------------------------------------------------------


def heading(stamp: dict) -> str:
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in stamp["limits"]["tflop_s"].items())
    return (
        f"{stamp['device']}, {stamp['clock']}, torch {stamp['torch']}, load {os.getloadavg()[0]:.1f}\n"
        f"limits: {stamp['limits']['gb_s']:.3g} GB/s, {rates}\n"
        "ratio: the first implementation's time / this one's, median within a round; below 1 the first is faster"
    )


def table(found: list[dict]) -> str:
    lines, last = [], None
    for r in found:
        if r["case"] != last:
            lines.append(
                f"\n{r['case']:58} {'us p50':>10} {'p20..p80':>19} {'ratio':>6} {'limit':>6} {'/best':>8} {'rounded':>8}"
            )
            last = r["case"]
        spread = f"{r['us_p20']:.0f}..{r['us_p80']:.0f}"
        cells = [number(r.get(key), form) for key, form in COLUMNS.items()]
        lines.append(f"  {r['implementation']:56} {r['us_p50']:10.1f} {spread:>19} {r['ratio']:6.3f} {' '.join(cells)}")
    return "\n".join(lines)


def left_out(found: list[dict]) -> list[str]:
    """A line for each implementation that was not there, with the first of its reasons."""
    reasons: dict[str, str] = {}
    for r in found:
        reasons = r.get("left_out", {}) | reasons
    return [f"left out: {name}: {reason}" for name, reason in reasons.items()]


COLUMNS = {"share_of_roofline": "6.0%", "error_to_best": "8.4g", "correctly_rounded": "8.2%"}


def number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else " " * int(form.split(".")[0])


if __name__ == "__main__":
    sys.exit(main())
