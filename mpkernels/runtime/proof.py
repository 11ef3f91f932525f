# SPDX-License-Identifier: Apache-2.0
"""Verdicts: which implementations were right on this GPU, as mpkernels/prove.py found, and how fast beside eager.

A file of verdicts is a JSON object, {"linear_act, native, name NVIDIA H200, ...": {"state": "right", ...}}; its keys name op,
implementation, GPU, driver, versions and the checksum of the code, so that nothing holds for what has changed since. One lies
in the user's cache, another one may be named by MPKERNELS_VERDICTS. They are read once per process and device, at the first
question, and hold until it ends: a switch in the middle would break replicas, CUDA graphs and compiled code.
"""

import functools
import importlib
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from mpkernels.runtime import cache, native

FILE = "verdicts.json"
PREFERENCE = ("native", "triton", "eager")  # among the right ones; times do not order them: noise must not choose bits
SLOWER = 1.03  # times eager's time, in most sizes: what the race leaves out
STATES = ("right", "wrong", "crashed", "started", "not now")
LONGEST = 500  # characters of a note


class SelfCheckDeferred(Exception):
    """Verdicts are to be read, and a graph is being captured or something else than eager execution goes on."""


class Verdict(NamedTuple):
    """state: one of STATES; "started" without an end is a crash. speeds: times eager's, by size."""

    state: str
    note: str = ""
    speeds: dict[str, float] = {}  # noqa: RUF012 - of a NamedTuple, and it is only read
    date: str = ""

    @property
    def right(self) -> bool:
        return self.state == "right"

    @property
    def slow(self) -> bool:
        """More than 3 % slower than eager in a majority of sizes."""
        return 2 * sum(speed * SLOWER < 1 for speed in self.speeds.values()) > len(self.speeds)

    def __str__(self) -> str:
        if self.state == "started":
            return "crashed: it was begun and did not end"
        return self.state + (f": {self.note}" if self.note else "")


_read: dict[torch.device, dict[str, Verdict]] = {}  # of this process
agreed: dict[torch.device, dict[str, dict[str, bool]]] = {}  # op -> implementation -> whether slow, of all ranks; {}: eager


def own_file() -> Path:
    return cache.folder() / FILE


def indexed(device: torch.device) -> torch.device:
    """`device` with its index."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_read(device: torch.device) -> bool:
    return device in _read


def of(device: torch.device, file: str | None = None) -> dict[str, Verdict]:
    """All verdicts there are, of `device` and others, by their keys; `file` goes before the user's cache."""
    if device not in _read:
        if file and not Path(file).exists():
            cache.warn_once(f"mpkernels: MPKERNELS_VERDICTS={file}: there is no such file")
        _read[device] = load(own_file()) | (load(Path(file)) if file else {})
    return _read[device]


def load(path: Path) -> dict[str, Verdict]:
    """The well-formed verdicts of a file; the others count as absent, and one warning says so."""
    found = cache.read(path)
    good = {key: verdict for key, value in found.items() if (verdict := _parsed(value)) is not None}
    if len(good) < len(found):
        count = len(found) - len(good)
        cache.warn_ignored(path, f"{count} of its verdicts are not as `python -m mpkernels prove` writes them")
    return good


def _parsed(value) -> Verdict | None:
    if not isinstance(value, dict):
        return None
    state, note, speeds, date = (value.get(name, default) for name, default in zip(Verdict._fields, ("", "", {}, "")))
    texts = isinstance(note, str) and isinstance(date, str) and len(note) <= LONGEST and (note + date).isascii()
    times = isinstance(speeds, dict) and all(isinstance(s, int | float) and 0 < s < math.inf for s in speeds.values())
    if state not in STATES or not texts or not (note + date).isprintable() or not times:
        return None
    return Verdict(state, note, speeds, date)


def record(path: Path, key: str, verdict: Verdict, **more: str) -> bool:
    """Write one verdict; whether that worked."""
    return cache.update(path, {key: verdict._asdict() | {"note": sentence(verdict.note)} | more})


def sentence(text: str) -> str:
    """The first line, as it may stand in a file and in an error."""
    return "".join(c if " " <= c <= "~" else "?" for c in text.strip().split("\n")[0][:LONGEST])


@functools.cache
def key(name: str, package: str, backend: str, device: torch.device) -> str:
    """What a verdict holds for: op, implementation, machine, versions, and the code itself."""
    values = ", ".join(f"{what} {value}" for what, value in cache.machine(device).items())
    return f"{name}, {backend}, {values}, code {_code(package, backend):08x}"


@functools.cache
def _code(package: str, backend: str) -> int:
    """Checksum of the sources that every op shares and of the op's own, and for `native` of the library.

    And of the cases: a verdict says nothing of those that came after it.
    """
    folder = Path(importlib.import_module(package).__file__).parent
    folders = (folder, folder.parent / "common", Path(__file__).parents[1] / "testing")
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    files += [native.LIBRARY] if backend == "native" and native.LIBRARY.exists() else []
    return functools.reduce(lambda sum, path: zlib.crc32(path.read_bytes(), sum), files, 0)
