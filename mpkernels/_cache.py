# SPDX-License-Identifier: Apache-2.0
"""What is remembered between processes: JSON files in the user's cache. Reading and writing never raise.

They decide which kernels run: a folder that somebody else owns, or could write to, is neither read nor written.
"""

import functools
import json
import os
import platform
import stat
import tempfile
from importlib import metadata
from pathlib import Path

import torch


def folder() -> Path:
    """$XDG_CACHE_HOME/mpkernels, by default ~/.cache/mpkernels."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~"), ".cache")) / "mpkernels"


def refusal() -> str | None:
    """Why nothing in the folder is trusted, or None."""
    try:
        link, target = folder().lstat(), folder().stat()
    except OSError:
        return None  # not there yet
    if {link.st_uid, target.st_uid} != {os.geteuid()}:
        return f"{folder()} belongs to another user"
    if target.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder()} can be written by others: chmod 700 {folder()}"
    return None


def _is_trusted(path: Path) -> bool:
    """What is not in the folder came with the package, as the code did."""
    return path.parent != folder() or refusal() is None


def read(path: Path) -> dict:
    """The object in a JSON file; {} where there is no file, or nothing that can be read and trusted."""
    try:
        found = json.loads(path.read_text()) if _is_trusted(path) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def update(path: Path, entries: dict) -> bool:
    """Add `entries` to the object in a JSON file, whole or not at all; whether that worked."""
    room = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_trusted(path):
            return False
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            room = file.name
            file.write(json.dumps(read(path) | entries, indent=1, sort_keys=True) + "\n")
        os.replace(room, path)
    except OSError:
        if room is not None and os.path.exists(room):
            os.unlink(room)
        return False
    return True


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """Model, architecture, driver and versions: what a verdict or a time of `device` holds for."""
    versions = {"torch": torch.__version__}
    try:
        versions["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        versions["triton"] = "none"
    if device.type != "cuda":
        return {"name": device.type, "architecture": platform.machine(), "driver": "none"} | versions
    properties = torch.cuda.get_device_properties(device)
    architecture = f"sm{properties.major}{properties.minor}"
    return {"name": properties.name, "architecture": architecture, "driver": _driver()} | versions


def _driver() -> str:
    """Version of NVIDIA's driver, or of the CUDA that it offers where it does not tell."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return f"CUDA {torch._C._cuda_getDriverVersion()}"
