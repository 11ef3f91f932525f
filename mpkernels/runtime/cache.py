# SPDX-License-Identifier: Apache-2.0
"""What is remembered between processes: JSON files in the user's cache. Reading and writing never raise.

They decide which kernels run: a file or folder that another user owns, or could write to, is neither read nor trusted.
What cannot be read, trusted or understood counts as absent, and one warning per process says so.
"""

import contextlib
import functools
import json
import os
import platform
import stat
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

import torch

LARGEST = 4 << 20  # bytes of a file that is read

# Windows has none of these: there the checks of links, owner and mode are left out.
_OPEN = functools.reduce(
    lambda flags, name: flags | getattr(os, name, 0),
    ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"),
    os.O_RDONLY,
)

_warned: set[str] = set()


def folder() -> Path:
    """$XDG_CACHE_HOME/mpkernels, by default ~/.cache/mpkernels."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~"), ".cache")) / "mpkernels"


def warn_once(message: str) -> None:
    """Warn, once per process. Never raises, whatever the filters are: no call fails for a file."""
    if message not in _warned:
        _warned.add(message)
        with contextlib.suppress(Warning):
            warnings.warn(message, stacklevel=2)


def warn_ignored(path: Path, reason: str) -> None:
    """Say that `path`, or something in it, counts as absent."""
    warn_once(f"mpkernels ignores {path}: {reason}. Remove it: it is made anew where it is needed.")


def untrusted_reason() -> str | None:
    """Why nothing in the folder is trusted, or None."""
    if not folder().is_absolute():
        return "there is no home folder; set XDG_CACHE_HOME"
    try:
        link, target = folder().lstat(), folder().stat()
    except OSError:
        return None  # not there yet
    return _foreign_reason(
        str(folder()), f"chmod 700 {folder()}", link, target, remedy=": set XDG_CACHE_HOME to a folder of your own"
    )


def _foreign_reason(what: str, fix: str, *found: os.stat_result, remedy: str = "") -> str | None:
    """Whether another user has or could have written `what`; `remedy` and `fix` say what to do about either."""
    if not hasattr(os, "geteuid"):
        return None
    if {one.st_uid for one in found} != {os.geteuid()}:
        return f"{what} belongs to another user{remedy}"
    if found[-1].st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{what} can be written by others: {fix}"
    return None


def _is_own(path: Path) -> bool:
    """Whether `path` is in the folder; what is not came with the package, and is trusted as the code is."""
    return path.parent == folder()


class _Ignored(Exception):
    """A file is there and is not to be read; the reason."""


def _bytes(path: Path) -> bytes | None:
    """What is in a file, None where there is none; _Ignored where it is not to be read."""
    own = _is_own(path)
    try:
        # A FIFO must not block, nor a link lead elsewhere; what is asked about is what was opened.
        descriptor = os.open(path, _OPEN if own else _OPEN & ~getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        if not os.path.lexists(path):
            return None
        raise _Ignored("it is a symbolic link" if path.is_symlink() else f"it does not open ({error.strerror})") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _Ignored("it is not a regular file")
        if found.st_size > LARGEST:
            raise _Ignored(f"it is larger than {LARGEST} bytes")
        if own and (reason := _foreign_reason("it", f"chmod 600 {path}", found)) is not None:
            raise _Ignored(reason)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(LARGEST)
    except OSError as error:
        raise _Ignored(f"it cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


def read(path: Path) -> dict:
    """The object in a JSON file; {} where there is no file, or nothing that can be read, trusted and parsed."""
    if _is_own(path) and (reason := untrusted_reason()) is not None:
        warn_once(f"mpkernels ignores its cache: {reason}")
        return {}
    try:
        content = _bytes(path)
        found = {} if content is None else json.loads(content)
    except _Ignored as reason:
        warn_ignored(path, str(reason))
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        warn_ignored(path, "it holds no JSON object")
        return {}
    return found


def update(path: Path, entries: dict) -> bool:
    """Add `entries` to the object in a JSON file, whole or not at all; whether that worked."""
    if _is_own(path) and untrusted_reason() is not None:
        return False
    tmp_path = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_own(path) and untrusted_reason() is not None:  # another user was faster
            return False
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            tmp_path = Path(file.name)
            file.write(json.dumps(read(path) | entries, indent=1, sort_keys=True) + "\n")
        os.replace(tmp_path, path)
    except OSError:
        return False
    finally:
        if tmp_path is not None:
            tmp_path.unlink(missing_ok=True)
    return True


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """Model, architecture, driver, versions and size: what a verdict or a time of `device` holds for.

    A slice of a GPU (MIG) has its own name, multiprocessors and memory.
    """
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    versions = {"torch": torch.__version__, "triton": triton, "cuda": str(torch.version.cuda)}
    if device.type != "cuda":
        return {"name": device.type, "architecture": platform.machine(), "driver": "none"} | versions
    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm{properties.major}{properties.minor}"
    size = {"multiprocessors": str(properties.multi_processor_count), "memory": f"{properties.total_memory >> 20} MB"}
    return {"name": properties.name, "architecture": architecture, "driver": _driver()} | versions | size


def _driver() -> str:
    """Version of NVIDIA's driver, or of the CUDA that it offers where it does not tell; of ROCm there."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return f"CUDA {torch._C._cuda_getDriverVersion()}"
