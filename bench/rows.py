# SPDX-License-Identifier: Apache-2.0
"""Result rows: one JSON line per case and contender, with the machine, the versions, the commit and the date."""

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import mpkernels


def main(description: str, make_rows: Callable[..., Iterable[dict]], **options: int) -> None:
    """Command line of a benchmark: one thread, `options` as integer flags; rows are printed, and appended to --out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="a .jsonl file to append the rows to")
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    values = vars(parser.parse_args())
    out = values.pop("out")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stamp = environment()
    for row in make_rows(**values):
        line = json.dumps(row | stamp)
        print(line, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(line + "\n")


def environment() -> dict[str, object]:
    """What a result depends on."""
    return {
        "clock": "process time, 1 thread",
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mpkernels": mpkernels.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
    }


def cpu() -> str:
    """Vendor's name, family and model: the name alone does not tell one generation from the next."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(reversed([map(str.strip, line.split(":", 1)) for line in lines if ":" in line]))
    return f"{fields.get('model name', platform.processor())} family {fields.get('cpu family')} model {fields.get('model')}"


def git(*arguments: str) -> str:
    """What git says of this checkout, or nothing."""
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()
