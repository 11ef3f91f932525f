# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the step, compiled by the C++ compiler against tests/host, as operators on CPU tensors.

`library()` builds build/host/mpkernels_host.so where a source is newer. `HostOps` stands in for `torch.ops.mpkernels_C`: it
tells the stand-in which memory the call may touch, and runs the kernels that are registered for CUDA.
"""

import ctypes
import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from steps import leaves
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/host"
OPS = ("adamw_", "grad_stats_", "sgd_", "update_scale_")
SOURCES = ("csrc/ops.cpp", *(f"csrc/{op.rstrip('_')}/cuda.cu" for op in OPS))
STAND_IN = ("fibers.cpp", "on_device.cpp", "wrong_kernels.cu")
# -ffp-contract=off as nvcc's -fmad=false. mpkernels_C=mpkernels_host: the same file may not register an op twice.
FLAGS = "-std=c++17 -O2 -g0 -fPIC -fvisibility=default -ffp-contract=off -U_FORTIFY_SOURCE -Dmpkernels_C=mpkernels_host"


class Counts(ctypes.Structure):
    """What kernels did: launches, and by csrc/common/vector.cuh accesses of memory and bytes."""

    _fields_ = [(name, ctypes.c_int64) for name in ("launches", "accesses", "loaded", "stored")]


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None if importlib.util.find_spec("ninja") else "ninja is not installed in this Python"


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built and loaded; its operators are torch.ops.mpkernels_host."""
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "mpkernels_host.so"
    with open(BUILD / "lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "build.ninja").write_text(_ninja(path))
        built = subprocess.run([sys.executable, "-m", "ninja", "-C", str(BUILD)], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(built.stdout)
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.host_run_kernel.restype = ctypes.c_char_p
    return loaded


def _ninja(path: Path) -> str:
    includes = [ROOT / "tests/host", ROOT / "csrc"]
    includes = " ".join(f"-I{i}" for i in includes) + "".join(f" -isystem {i}" for i in cpp_extension.include_paths())
    libraries = f"-L{cpp_extension.TORCH_LIB_PATH} -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10"
    lines = [
        "rule compile",
        f"  command = g++ {FLAGS} {includes} -DTORCH_TARGET_VERSION=0x020b000000000000 -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared $in {libraries} -o $out",
    ]
    objects = []
    for source in [*(ROOT / s for s in SOURCES), *(ROOT / "tests/host" / s for s in STAND_IN)]:
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    return "\n".join([*lines, f"build {path}: link {' '.join(objects)}", ""])


def set_memory(tensors: list[torch.Tensor], read_only: list[torch.Tensor]) -> None:
    """Make the elements of these tensors, from the first to the last, the device's memory."""
    memory = {}
    for written, some in ((True, tensors), (False, read_only)):
        for tensor in filter(torch.Tensor.numel, some):
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            memory[tensor.data_ptr()] = ((last + 1) * tensor.element_size(), written)
    begins = (ctypes.c_size_t * len(memory))(*memory)
    sizes = (ctypes.c_int64 * len(memory))(*(size for size, _ in memory.values()))
    writable = (ctypes.c_bool * len(memory))(*(written for _, written in memory.values()))
    library().host_set_memory(begins, sizes, writable, ctypes.c_int64(len(memory)))


def take_counts() -> Counts:
    """The counts since the last call."""
    counts = Counts()
    library().host_take_counts(ctypes.byref(counts))
    return counts


@dataclass
class HostOps:
    """The operators of mpkernels_C, on the stand-in. host_tensors: those of a call that are not on the device."""

    host_tensors: tuple[torch.Tensor, ...] = ()

    def __getattr__(self, name: str):
        library()
        op = getattr(torch.ops.mpkernels_host, name).default
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

        def call(*args):
            on_device = [t for t in leaves(args) if not any(t is h for h in self.host_tensors)]
            grads = args[0] if name == "grad_stats_" else args[1] if name in ("adamw_", "sgd_") else []
            written = {id(t) for t in on_device} - {id(g) for g in grads}
            set_memory([t for t in on_device if id(t) in written], [t for t in on_device if id(t) not in written])
            return op.redispatch(cuda, *args)

        return call
