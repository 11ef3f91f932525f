# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, compiled by the C++ compiler against tests/emulator, as operators on CPU tensors.

`library()` builds build/host/<name>/<name>.so where a source is newer: mpkernels_host has the step's kernels,
mpkernels_hopper those of sm_90a and the tests' own. `HostOps` replaces `native.ops`: it tells the emulator which memory the
call may touch, and runs the kernels that are registered for CUDA.
"""

import ctypes
import fcntl
import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from mpkernels.runtime import native
from tests.paths import ROOT
from tests.steps import leaves

BUILD = ROOT / "build/host"
OPS = ("adamw_", "grad_stats_", "lion_", "sgd_", "update_scale_")
EMULATOR = ("csrc/common/python.cpp", *(f"tests/emulator/{name}" for name in ("fibers.cpp", "sm90.cpp", "on_device.cpp")))
FOLDERS = ("grad_stats", "optimizer_update", "update_scale")
STEP = ("csrc/ops.cpp", *(f"csrc/{folder}/cuda.cu" for folder in FOLDERS), "tests/emulator/wrong_kernels.cu")
HOPPER = (
    "csrc/ops.cpp",
    "csrc/common/tensor_map.cu",
    "csrc/linear_act/sm90/launch.cu",
    "tests/emulator/sm90_kernels.cu",
    "tests/device/probes.cu",
)
SOURCES = {"mpkernels_host": STEP + EMULATOR, "mpkernels_hopper": HOPPER + EMULATOR}
# -ffp-contract=off as nvcc's -fmad=false.
FLAGS = "-std=c++17 -O2 -g0 -fPIC -fvisibility=default -ffp-contract=off -U_FORTIFY_SOURCE"
TABLES = {
    "adamw_": (7, 1),
    "sgd_": (5, 1),
    "lion_": (5, 1),
    "grad_stats_": (1, 0),
}  # how many lists a call begins with, and which is grads
ITEMSIZES = {5: 2, 6: 4, 7: 8, 15: 2}  # by c10::ScalarType

native.why_not()  # which sets `native.ops`, before a test replaces it


class Counts(ctypes.Structure):
    """What kernels did: launches; by csrc/common/vector.cuh accesses of memory and bytes; by TMA bytes. Attributes set."""

    _names = ("launches", "accesses", "loaded", "stored", "tma_loaded", "tma_stored", "attributes")
    _fields_ = [(name, ctypes.c_int64) for name in _names]


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None if importlib.util.find_spec("ninja") else "ninja is not installed in this Python"


@functools.cache
def library(name: str = "mpkernels_host") -> ctypes.CDLL:
    """The library, built and loaded."""
    build = BUILD / name
    build.mkdir(parents=True, exist_ok=True)
    path = build / f"{name}.so"
    with open(build / "lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (build / "build.ninja").write_text(_ninja(name, path))
        built = subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(built.stdout)
    return ctypes.CDLL(str(path))


def run(function: str, *arguments, name: str = "mpkernels_host") -> str:
    """Call a test's own function of the library, a tensor by its address: the error of its launch, or an empty string."""
    called = getattr(library(name), function)
    called.restype = ctypes.c_char_p
    return called(*(ctypes.c_void_p(a.data_ptr()) if torch.is_tensor(a) else a for a in arguments)).decode()


@functools.cache
def module(name: str):
    """The native ops of the library."""
    library(name)
    return native.load(BUILD / name / f"{name}.so")


def _ninja(name: str, path: Path) -> str:
    includes = [ROOT / "tests/emulator", ROOT / "csrc"]
    system = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    includes = " ".join(f"-I{i}" for i in includes) + "".join(f" -isystem {i}" for i in system)
    libraries = f"-L{cpp_extension.TORCH_LIB_PATH} -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10"
    defines = f"-DTORCH_EXTENSION_NAME={name} -DMPK_EMULATOR -DTORCH_TARGET_VERSION=0x020b000000000000"
    lines = [
        "rule compile",
        f"  command = g++ {FLAGS} {defines} {includes} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared -Wl,-Bsymbolic $in {libraries} -o $out",
    ]
    objects = []
    for source in (ROOT / s for s in SOURCES[name]):
        objects.append(f"{source.parent.name}_{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    return "\n".join([*lines, f"build {path}: link {' '.join(objects)}", ""])


def memory_of(lists: tuple[torch.Tensor, ...], grads: int) -> dict[int, tuple[int, bool]]:
    """By address the bytes of what tables name (ops/common/layout.py) and whether they may be written: not so grads."""
    rows = [(row, i != grads) for i, table in enumerate(lists) for row in table.t().tolist()]
    return {address: (numel * ITEMSIZES[dtype], written) for (numel, dtype, address), written in rows if numel}


def set_memory(
    tensors: list[torch.Tensor], read_only: list[torch.Tensor], name: str = "mpkernels_host", listed: dict | None = None
) -> None:
    """Make the elements of these tensors, from the first to the last, the device's memory, and what is `listed`."""
    memory = {}
    for written, some in ((False, read_only), (True, tensors)):
        for tensor in filter(torch.Tensor.numel, some):
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            memory[tensor.data_ptr()] = ((last + 1) * tensor.element_size(), written)
    memory |= listed or {}
    begins = (ctypes.c_size_t * len(memory))(*memory)
    sizes = (ctypes.c_int64 * len(memory))(*(size for size, _ in memory.values()))
    writable = (ctypes.c_bool * len(memory))(*(written for _, written in memory.values()))
    library(name).host_set_memory(begins, sizes, writable, ctypes.c_int64(len(memory)))


def take_counts(name: str = "mpkernels_host") -> Counts:
    """The counts since the last call."""
    counts = Counts()
    library(name).host_take_counts(ctypes.byref(counts))
    return counts


@dataclass
class HostOps:
    """The native ops, by a library of the emulator. host_tensors: those of a call that are not on the device.

    Of the others a call may write those that its schema says, and read the rest.
    """

    host_tensors: tuple[torch.Tensor, ...] = ()
    library: str = "mpkernels_host"

    def __getattr__(self, name: str):
        op, schema = getattr(module(self.library), name), torch._C.parse_schema(native.schemas()[name])
        is_written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]

        def call(*args):
            lists, grads = TABLES.get(name, (0, 0))
            tensors = {True: [], False: []}
            for arg, written in list(zip(args, is_written))[lists:]:  # the last arguments may have defaults
                tensors[written] += [t for t in leaves([arg]) if not any(t is h for h in self.host_tensors)]
            set_memory(tensors[True], tensors[False], self.library, memory_of(args[:lists], grads))
            return op(*args)

        return call
