# SPDX-License-Identifier: Apache-2.0
"""The process that proves implementations one after another; what it finds goes to a file and, a line each, to its output.

Its parent is mpkernels/prove.py. A kernel may end this process or never return: "started" is written before each.
"""

import json
import os
import time
from pathlib import Path

import torch

import mpkernels.ops  # noqa: F401 - the ops are defined there
from mpkernels.runtime import cache, proof
from mpkernels.runtime.proof import Verdict
from mpkernels.runtime.resolve import parts
from mpkernels.testing import checks

MOST_MEMORY = 1 << 30  # bytes that a proof may take of a GPU
MOST_MEMORY_FULL = 24 << 30  # with offsets beyond 2^31


def main(device: str, todo: list[list[str]], paths: list[str], full: bool) -> None:
    """Prove each [part of an op's cases, backend] of `todo` on `device`."""
    device = torch.device(device)
    reason = _not_now(device, full)
    for part, backend in todo:
        prove_one(part, backend, device, [Path(path) for path in paths], full, reason)


def prove_one(part: str, backend: str, device: torch.device, paths: list[Path], full: bool, not_now: str | None = None) -> None:
    key = proof.key(part, parts()[part].package, backend, device)
    more = {"op": part, "backend": backend, "device": cache.machine(device)["name"]}

    def say(verdict: Verdict, keep: bool = True) -> None:
        kept = [proof.record(path, key, verdict, **more) for path in paths] if keep else [True]
        line = {"key": key, "kept": all(kept)} | more | verdict._asdict()
        print(json.dumps(line), flush=True)

    if not_now is not None:  # what was found another time stands
        say(Verdict("not now", proof.sentence(not_now)), keep=False)
        return
    say(Verdict("started"))
    verdict = _found(part, backend, device, full)
    say(verdict._replace(note=proof.sentence(verdict.note), date=time.strftime("%Y-%m-%d")))
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:  # an error that sticks: nothing that follows in this process would be told from it
            os._exit(3)


def _found(part: str, backend: str, device: torch.device, full: bool) -> Verdict:
    try:
        wrong = checks.wrong(parts()[part], backend, device, part, few=device.type != "cuda", full=full)
        return Verdict("wrong", wrong) if wrong is not None else Verdict("right", speeds=_speeds(part, backend, device))
    except torch.OutOfMemoryError as error:
        return Verdict("not now", f"{error}")
    except Exception as error:  # whatever a kernel raises that does not compile or run here
        return Verdict("crashed", f"{type(error).__name__}: {error}")


def _speeds(part: str, backend: str, device: torch.device) -> dict[str, float]:
    try:
        return checks.race(parts()[part], backend, device, part)
    except torch.OutOfMemoryError:  # of eager, say: what is right stays right
        return {}


def _not_now(device: torch.device, full: bool) -> str | None:
    """Why this GPU is not to be had at the moment, or None; memory is capped."""
    if device.type != "cuda":
        return None
    most = MOST_MEMORY_FULL if full else MOST_MEMORY
    try:
        free, total = torch.cuda.mem_get_info(device)
        if free < most:
            return f"needs {most >> 20} MB of memory, {free >> 20} are free"
        torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0), device)
    except RuntimeError as error:  # exclusive to another process, or no memory for a context
        return f"the GPU cannot be used: {error}"
    return None
