# SPDX-License-Identifier: Apache-2.0
"""Whether an implementation agrees with the fp64 reference on this GPU model, driver and version, and the memory of it.

The check is run once, a fraction of a second, before `auto` uses an implementation; its verdict stands in the user's cache.
"""

import functools
import importlib
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from mpkernels import _cache, _native

FILE = "self_checks.json"
PREFIX, LONGEST = "self-check: ", 500  # of a verdict that is a sentence

_verdicts: dict[tuple[str, str, torch.device], str | None] = {}  # of this process: None, or what was wrong


class NotNow(Exception):
    """A check is due and cannot run: a graph is being captured, or something watches the ops."""


def verdict(package: str, backend: str, device: torch.device, check: Callable[[], str | None], busy: bool) -> str | None:
    """None where the check of `backend` passed, else what was wrong. `busy`: raise NotNow rather than run it."""
    key = (package, backend, device)
    if key in _verdicts:
        return _verdicts[key]
    place, path = _place(*key), _cache.folder() / FILE
    remembered = _cache.read(path)
    if place in remembered:
        if _is_verdict(remembered[place]):
            _verdicts[key] = remembered[place]
            return _verdicts[key]
        _cache.warn_ignored(path, "what it says of this machine is no verdict")
    if busy:
        raise NotNow
    try:
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            wrong = check()
    except Exception as error:  # whatever a kernel raises that does not compile; it may the next time: not remembered
        _verdicts[key] = _sentence(f"{type(error).__name__}: {error}")
        return _verdicts[key]
    _verdicts[key] = None if wrong is None else _sentence(wrong)
    _cache.update(path, {place: _verdicts[key]})
    return _verdicts[key]


def _sentence(wrong: str) -> str:
    """The first line, as it may stand in a file and in an error."""
    return "".join(c if c.isprintable() else "?" for c in f"{PREFIX}{wrong}".splitlines()[0][:LONGEST])


def _is_verdict(remembered) -> bool:
    """Whether this is what `verdict` writes: None, or one short sentence."""
    if not isinstance(remembered, str):
        return remembered is None
    return remembered.startswith(PREFIX) and remembered.isprintable() and len(remembered) <= LONGEST


def failure(package: str, backend: str, device: torch.device) -> str | None:
    """What a check found wrong in this process; None where none was asked for, or none failed."""
    return _verdicts.get((package, backend, device))


def _place(package: str, backend: str, device: torch.device) -> str:
    """What a verdict holds for: machine, versions, and the code itself."""
    machine = ", ".join(f"{name} {value}" for name, value in _cache.machine(device).items())
    return f"{package.rpartition('.')[2]}, {backend}, {machine}, code {_code(package, backend):08x}"


@functools.cache
def _code(package: str, backend: str) -> int:
    """Checksum of the op's folder, and for `native` of the library."""
    files = sorted(Path(importlib.import_module(package).__file__).parent.glob("*.py"))
    files += [_native.LIBRARY] if backend == "native" and _native.LIBRARY.exists() else []
    return functools.reduce(lambda sum, path: zlib.crc32(path.read_bytes(), sum), files, 0)
