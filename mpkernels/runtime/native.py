# SPDX-License-Identifier: Apache-2.0
"""Load the compiled library if there is one, else remember why not."""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"
BUILD = "run pip install --no-build-isolation ."

# Of the native ops, where the package is used in place: a library that was built from others is not used.
SCHEMAS = Path(__file__).parents[2] / "csrc" / "ops.cpp"

ops: Any = None  # the library's module once `why_not()` is None: a function for each op, its arguments by position


@functools.cache
def why_not() -> str | None:
    """None once the library is loaded, else one sentence."""
    global ops
    if not LIBRARY.exists():
        return f"not built; {BUILD}"
    try:
        loaded = load(LIBRARY)
    except ImportError as error:
        return f"{LIBRARY.name} does not load: {error}"
    differs = _first_difference(loaded) if SCHEMAS.exists() else None
    if differs is not None:
        return f"{LIBRARY.name} was built from other sources: its {differs} is not that of {SCHEMAS.name}; {BUILD}"
    ops = loaded
    return None


def load(library: Path) -> Any:
    """Its module. Raises ImportError."""
    spec = importlib.util.spec_from_file_location(library.name.split(".")[0], library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def schemas() -> dict[str, str]:
    """The native ops of the sources, by name."""
    return {s.split("(")[0]: s for s in re.findall(r'^    "(.+)",$', SCHEMAS.read_text(), flags=re.MULTILINE)}


def _first_difference(loaded: Any) -> str | None:
    """The name of the first of the sources' ops that the library does not have, or not with these arguments."""
    has = getattr(loaded, "schemas", ())
    return next((name for name, schema in schemas().items() if schema not in has), None)


@functools.cache
def cuda_why_not(device: torch.device) -> str | None:
    """None where the library's CUDA kernels run on `device`, else one sentence. Where they do, they are loaded."""
    reason = why_not()
    if reason is not None:
        return reason
    if torch.version.hip is not None:
        return f"needs an NVIDIA GPU, this torch is built for ROCm {torch.version.hip}"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not hasattr(ops, "cuda_versions"):
        return f"{LIBRARY.name} was built without nvcc"
    reason = _old_driver(*ops.cuda_versions())  # before torch is asked for a GPU, which raises where there is no driver
    return reason or _old_gpu(torch.cuda.get_device_capability(device)) or _load_kernels(device)


def _load_kernels(device: torch.device) -> str | None:
    """Load every kernel of the library on `device`, since a first launch may be inside a capture, which cannot load one."""
    try:
        ops.load_kernels(torch.cuda.current_device() if device.index is None else device.index)
    except RuntimeError as error:
        return f"its kernels do not load: {error}"
    return None


def _old_driver(runtime: int, driver: int) -> str | None:
    """Versions as CUDA counts them, 13000 for 13.0; a driver of 0 is none. A runtime runs on a driver of its generation."""
    if driver // 1000 >= runtime // 1000:
        return None
    got = f"one for CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "none"
    return f"needs a driver for CUDA {runtime // 1000}.0, got {got}"


def _old_gpu(capability: tuple[int, int]) -> str | None:
    return "needs sm75, got sm{}{}".format(*capability) if capability < (7, 5) else None
