# SPDX-License-Identifier: Apache-2.0
"""Record what the PTX wrappers of csrc/common/sm90.cuh do on a Hopper GPU, in tests/data/sm90_probes.npz.

    python tests/device/probes.py [--out FILE]      needs nvcc, a GPU of compute capability 9.0, torch; no network

tests/emulator/test_sm90_probes.py runs the same probes on the host emulator and compares the bits. Until that file exists, the
emulator rests on the PTX ISA alone.
"""

import argparse
import ctypes
import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/device/probes.cu", "csrc/common/tensor_map.cu")
ANSWERS = ROOT / "tests/data/sm90_probes.npz"
IMAGE_WORDS = 24576  # of shared memory that a probe fills


@dataclass(frozen=True)
class Probe:
    """One run of a probe: its parameters as tests/device/probes.cu lists them, its input, and the initial contents of `out`."""

    name: str
    parameters: tuple[int, ...]
    given: np.ndarray  # uint32
    out: np.ndarray  # uint32


def probes() -> dict[str, Probe]:
    """All probes by a descriptive name."""
    return {**_copies(), **_products(), **_others()}


def _untouched(words: int) -> np.ndarray:
    return np.full(words, 0xCDCDCDCD, np.uint32)


def _copies() -> dict[str, Probe]:
    """Boxes of a 16-bit and of an fp32 matrix whose elements are their indices: inside, across each edge, outside."""
    found = {}
    rows = 40
    for wide in (0, 1):
        columns, pitch, box_columns = (100, 104, 64) if not wide else (50, 52, 32)
        elements = np.arange(1, rows * pitch + 1, dtype=np.uint32 if wide else np.uint16)
        matrix = elements.view(np.uint32)
        tensor = (wide, rows, columns, pitch)
        edges = ((0, 0, 8), (box_columns, 0, 64), (16, 5, 16), (0, 33, 16), (-8, -3, 16), (columns + 28, 0, 8), (0, 40, 8))
        for c0, c1, box in edges:
            name = f"fp{32 if wide else 16} box of {box} rows at {c0} {c1}"
            found[f"load {name}"] = Probe(
                "load", (c0, c1, box * 128, *(0,) * 5, *tensor, box), matrix, _untouched(box * 32 + 32)
            )
            image = np.random.default_rng(2).integers(0, 2**32, IMAGE_WORDS, np.uint32)
            found[f"store {name}"] = Probe("store", (c0, c1, *(0,) * 6, *tensor, box), image, _untouched(matrix.size))
        parameters = (8, 0, 16 * 128, 16, *(0,) * 4, *tensor, 16)
        found[f"multicast fp{32 if wide else 16}"] = Probe("multicast", parameters, matrix, _untouched(2 * 2 * 16 * 32))
    return found


def _products() -> dict[str, Probe]:
    """Small integers all over the image, so that sums are exact and any wrong address shows."""
    found = {}
    random = np.random.default_rng(0)
    integers = random.integers(-8, 9, 2 * IMAGE_WORDS).astype(np.float32)
    halves = integers.astype(np.float16).view(np.uint32)
    bfloats = (integers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
    for (bf16, n), ta, tb in itertools.product(((0, 64), (0, 128), (0, 192), (0, 256), (1, 128)), (0, 1), (0, 1)):
        for k, accumulate in ((0, 0), (1, 1), (3, 0)):
            a = 1024 + k * (2048 if ta else 32)
            b = 16384 + k * (2048 if tb else 32)
            parameters = (a, b, 8192, 1024, 8192, 1024, accumulate, 0, bf16, n, ta, tb)
            name = f"wgmma {'bf16' if bf16 else 'fp16'} N={n} trans={ta}{tb} k={k} accumulate={accumulate}"
            found[name] = Probe("wgmma", parameters, bfloats if bf16 else halves, _untouched(64 * n))
    return found


def _others() -> dict[str, Probe]:
    special = [
        0.0, -0.0, 1.0, -1.0, 65504.0, 65519.0, 65520.0, 1e5, -1e5, np.inf, -np.inf, 2.0**-24, 2.0**-25, -(2.0**-25), 3e38,
    ]  # fmt: skip
    ties = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-133, 2.0**-134, 2.0**-149, 1 + 2.0**-12, 3.4e38]
    values = np.array(special + ties, np.float32).view(np.uint32)
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    random = np.random.default_rng(1).standard_normal(256 - len(values) - len(nans)).astype(np.float32).view(np.uint32)
    pairs = np.concatenate([values, nans, random])
    return {
        "stmatrix": Probe("stmatrix", (), pairs, _untouched(1024)),
        "round": Probe("round", (), pairs, _untouched(128 * 8)),
        "cluster": Probe("cluster", (), pairs, _untouched(2 * 128 * 2)),
    }


def ask(name: str, parameters: tuple[int, ...], library: ctypes.CDLL, given: int, out: int) -> None:
    """Run a probe on device memory, by address."""
    library.mpk_probe.restype = ctypes.c_char_p
    values = (ctypes.c_int64 * 13)(*parameters)
    error = library.mpk_probe(name.encode(), values, ctypes.c_void_p(given), ctypes.c_void_p(out))
    if error:
        raise RuntimeError(f"{name}: {error.decode()}")


def build(folder: Path) -> ctypes.CDLL:
    """The probes for sm_90a."""
    from torch.utils import cpp_extension

    includes = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    path = folder / "probes.so"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O2", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a", "-shared",
         "-Xcompiler=-fPIC", *includes, *(ROOT / source for source in SOURCES), "-o", path],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(path))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ANSWERS)
    out = parser.parse_args(arguments).out
    import torch

    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))

        def run(probe: Probe) -> np.ndarray:
            given, result = (torch.from_numpy(a.view(np.int32).copy()).cuda() for a in (probe.given, probe.out))
            ask(probe.name, probe.parameters, library, given.data_ptr(), result.data_ptr())
            torch.cuda.synchronize()
            return result.cpu().numpy().view(np.uint32)

        found = {name: run(probe) for name, probe in probes().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, gpu=torch.cuda.get_device_name(), **found)
    print(f"{len(found)} answers of {torch.cuda.get_device_name()} in {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
