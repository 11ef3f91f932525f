# SPDX-License-Identifier: Apache-2.0
"""Tuned tables: which implementation was the fastest for a GEMM on a device, and Triton's tile, as mpkernels/tune.py found.

A table is a JSON file, {"machine": ..., "entries": {"fprop 4096 4096 1024 ...": {"backend": ..., "tile": ..., ...}}}: one of
a known GPU in mpkernels/tuned/, one of this machine in the user's cache, which goes first.
"""

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

import torch

from mpkernels import _cache

PACKAGED = Path(__file__).with_name("tuned")

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}

Problem = tuple  # (role, M rounded up to a power of 2, N, K, activation, *dtypes)


class Entry(NamedTuple):
    """The winner. tile: the constants of a Triton tile as (name, value) pairs, or None."""

    backend: str
    tile: tuple[tuple[str, int], ...] | None


_tables: dict[torch.device, dict[Problem, Entry]] = {}


def problem(role: str, M: int, N: int, K: int, activation: int, *dtypes: torch.dtype) -> Problem:
    """What a table is asked by; M is that of the layer, whatever the role: "fprop", "dgrad", "wgrad" or "backward"."""
    return (role, 1 << max(M - 1, 0).bit_length(), N, K, activation, *dtypes)


def of(device: torch.device) -> dict[Problem, Entry]:
    """The table of `device`; read at the first question, empty where there is none."""
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = parse(entries(device))
    return table


def entries(device: torch.device) -> dict[str, dict]:
    """What the files say of `device`, as they say it."""
    return _entries(_cache.read(packaged_file(device))) | _entries(_own(device))


def _entries(found: dict) -> dict:
    listed = found.get("entries")
    return listed if isinstance(listed, dict) else {}


def name(device: torch.device) -> str:
    """The model, as tables are named after it."""
    return _cache.machine(device)["name"]


def packaged_file(device: torch.device) -> Path:
    return PACKAGED / f"{_slug(device)}.json"


def own_file(device: torch.device) -> Path:
    return _cache.folder() / f"tuned-{_slug(device)}.json"


def _own(device: torch.device) -> dict:
    """The table in the user's cache, if driver and versions still are those that it was made with."""
    found = _cache.read(own_file(device))
    return found if found.get("machine") == _cache.machine(device) else {}


def _slug(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name(device).lower()).strip("-")


def save(path: Path, device: torch.device, entries: dict[str, dict]) -> bool:
    """Add entries to the table in `path`, or begin it anew where it is another machine's; whether that worked."""
    found = _cache.read(path)
    machine = _cache.machine(device)
    kept = _entries(found) if found.get("machine") == machine else {}
    _tables.pop(device, None)
    return _cache.update(path, {"machine": machine, "entries": kept | entries})


@contextlib.contextmanager
def using(device: torch.device, table: dict[Problem, Entry]):
    """The table of `device` is `table` inside: the tuner's way to a candidate."""
    before = of(device)
    _tables[device] = table
    try:
        yield
    finally:
        _tables[device] = before


def written(problem: Problem) -> str:
    """A problem as it stands in a file."""
    return " ".join(str(part).removeprefix("torch.") for part in problem)


def parse(entries: dict[str, dict]) -> dict[Problem, Entry]:
    """A table from what files say; what is not well formed is left out."""
    table = {}
    for name, entry in entries.items():
        try:
            role, *sizes = name.split()
            key = (role, *map(int, sizes[:4]), *(_DTYPES[dtype] for dtype in sizes[4:]))
            tile = None if entry.get("tile") is None else tuple((str(n), int(v)) for n, v in entry["tile"].items())
            table[key] = Entry(str(entry["backend"]), tile)
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return table
