# SPDX-License-Identifier: Apache-2.0
"""Tuned tables: which implementation was the fastest for a GEMM on a device, and Triton's tile, as mpkernels/tune.py found.

A table is a JSON file, {"machine": ..., "entries": {"fprop 4096 4096 1024 ...": {"backend": ..., "tile": ..., ...}}}: one of
a known GPU in mpkernels/tuned/, one of this machine in the user's cache, which goes first.
"""

import contextlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from mpkernels.runtime import cache
from mpkernels.runtime.resolve import BACKENDS

ROLES = ("fprop", "dgrad", "wgrad", "backward")
LARGEST_TILE = 1 << 16  # of the constants of a tile

PACKAGED = Path(__file__).parents[1] / "tuned"

_OPERANDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _OPERANDS}

GemmKey = tuple  # (role, M rounded up to a power of 2, N, K, activation, *dtypes)


class Entry(NamedTuple):
    """The winner. tile: the constants of a Triton tile as (name, value) pairs, or None."""

    backend: str
    tile: tuple[tuple[str, int], ...] | None


tables: dict[torch.device, dict[GemmKey, Entry]] = {}  # that were read


def gemm_key(role: str, M: int, N: int, K: int, activation: int, *dtypes: torch.dtype) -> GemmKey:
    """What a table is asked by; M is that of the layer, whatever the role: "fprop", "dgrad", "wgrad" or "backward"."""
    return (role, 1 << max(M - 1, 0).bit_length(), N, K, activation, *dtypes)


def load(device: torch.device) -> dict[GemmKey, Entry]:
    """The table of `device`; read at the first question, empty where there is none."""
    table = tables.get(device)
    if table is None:
        table = tables[device] = {
            _key(name): Entry(entry["backend"], None if entry.get("tile") is None else tuple(entry["tile"].items()))
            for name, entry in entries(device).items()
        }
    return table


def entries(device: torch.device) -> dict[str, dict]:
    """What the files say of `device`, as they say it; nothing of a GPU that is not there, as a FakeTensor's."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return {}
    packaged, own = packaged_file(device), own_file(device)
    return _entries(packaged, cache.read(packaged)) | _entries(own, _of_this_machine(own, device))


def _entries(path: Path, found: dict) -> dict[str, dict]:
    """The well-formed entries of a file; the others count as absent, and one warning says so."""
    listed = found.get("entries", {})
    if not isinstance(listed, dict):
        cache.warn_ignored(path, "its entries are no JSON object")
        return {}
    good = {name: entry for name, entry in listed.items() if _is_well_formed(name, entry)}
    if len(good) < len(listed):
        example = next(name for name in listed if name not in good)
        cache.warn_ignored(path, f"{len(listed) - len(good)} of its entries are not as the tuner writes them ({example!a:.80})")
    return good


def _is_well_formed(name: str, entry) -> bool:
    """Whether an entry is one that the tuner writes: what is read of it later cannot fail."""
    return (
        _key(name) is not None
        and isinstance(entry, dict)
        and entry.get("backend") in BACKENDS
        and _is_tile(entry.get("tile"))
        and _is_time(entry.get("us", 0.0))
        and isinstance(entry.get("lost", {}), dict)
        and all(isinstance(reason, str) for reason in entry.get("lost", {}).values())
    )


def _is_tile(tile) -> bool:
    """Whether these are constants of a kernel; that they are a tile of this one the kernel's plan sees to."""
    return tile is None or (
        isinstance(tile, dict)
        and all(name.isidentifier() and isinstance(value, int) and 0 <= value <= LARGEST_TILE for name, value in tile.items())
    )


def _is_time(us) -> bool:
    return isinstance(us, int | float) and 0 <= us < math.inf


def _key(name: str) -> GemmKey | None:
    """The key that stands in a file as `name`, or None."""
    role, *rest = name.split(" ")
    sizes, dtypes = rest[:4], rest[4:]
    if role not in ROLES or len(sizes) < 4 or not all(re.fullmatch("0|[1-9][0-9]{0,18}", size) for size in sizes):
        return None
    return (role, *map(int, sizes), *map(_DTYPES.get, dtypes)) if set(dtypes) <= _DTYPES.keys() else None


def name(device: torch.device) -> str:
    """The model, as tables are named after it."""
    return cache.machine(device)["name"]


def packaged_file(device: torch.device) -> Path:
    return PACKAGED / f"{_slug(device)}.json"


def own_file(device: torch.device) -> Path:
    return cache.folder() / f"tuned-{_slug(device)}.json"


def _of_this_machine(path: Path, device: torch.device) -> dict:
    """The table in a file, if driver and versions still are those that it was made with."""
    found = cache.read(path)
    return found if found.get("machine") == cache.machine(device) else {}


def _slug(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name(device).lower()).strip("-")


def save(path: Path, device: torch.device, entries: dict[str, dict]) -> bool:
    """Add entries to the table in `path`, or begin it anew where it is another machine's; whether that worked."""
    tables.pop(device, None)
    kept = _entries(path, _of_this_machine(path, device))
    return cache.update(path, {"machine": cache.machine(device), "entries": kept | entries})


@contextlib.contextmanager
def override(device: torch.device, table: dict[GemmKey, Entry]):
    """The table of `device` is `table` inside: the tuner's way to a candidate."""
    before = load(device)
    tables[device] = table
    try:
        yield
    finally:
        tables[device] = before


def key_to_str(key: GemmKey) -> str:
    """A key as it stands in a file."""
    return " ".join(str(part).removeprefix("torch.") for part in key)
