# SPDX-License-Identifier: Apache-2.0
"""Build mpkernels/_C.abi3.so, or say in a sentence what is missing; in an isolated build, without torch, install the Python
part, which works by itself.

The library uses the stable ABI of LibTorch and the limited API of Python: one file serves every Python from 3.11 and every
torch from 2.11. CUDA sources are compiled when nvcc is there; no GPU is asked for.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

import setuptools

ROOT = Path(__file__).parent.resolve()
PYTHON_ONLY = "Without it, `pip install .` installs the slower version in pure Python."
BUILD_IT = "For the C++ library: pip install setuptools ninja torch numpy, then pip install --no-build-isolation ."
STABLE_ABI = "0x020b000000000000"  # torch 2.11
CUDA_ARCHITECTURES = "7.5;8.0+PTX;9.0a"  # WGMMA needs 9.0a, which runs on no other card

# -ffp-contract=off: the same bits from every variant of a loop, whether the CPU has FMA or not.
# -fno-math-errno, -fno-trapping-math: without them sqrt and comparisons keep a loop from being vectorized; values stay.
CXX_FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3", f"-ffile-prefix-map={ROOT}=.",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
]  # fmt: skip
# -fmad=false as -ffp-contract=off: vectors and single elements of a tensor get the same bits, and those of the CPU.
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-fmad=false", f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
    f"-Xcompiler=-fPIC,-fvisibility=hidden,-ffile-prefix-map={ROOT}=.",
]  # fmt: skip


def cuda_home() -> Path | None:
    """The toolkit: where nvcc and the runtime's headers are. NOTE: nvcc on the PATH may be a wrapper that lies elsewhere."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    for place in [*places, "/usr/local/cuda"]:
        if place and (Path(place) / "bin/nvcc").exists() and (Path(place) / "include/cuda_runtime.h").exists():
            return Path(place)
    return None


def stop(missing: str, remedy: str) -> NoReturn:
    sys.exit(f"mpkernels: {missing}. {remedy}")


def check_python() -> None:
    """Before what an old Python or setuptools cannot read; pip asks for `requires-python` only afterwards."""
    if sys.version_info < (3, 11):  # noqa: UP036
        version = ".".join(map(str, sys.version_info[:3]))
        stop(f"needs Python 3.11 or later, this is {version}", "Make the environment with a newer one: python3.11 -m venv")
    if int(setuptools.__version__.split(".")[0]) < 77:
        stop(f"needs setuptools 77 or later, this is {setuptools.__version__}", 'Run: pip install "setuptools>=77"')


def extension() -> dict:
    """Arguments of setup() that build the library; none in an isolated build, whose environment has neither torch nor pip, and
    none but on Linux."""
    if sys.platform != "linux":
        print("mpkernels: the C++ library is built on Linux only; this is the slower Python version.", file=sys.stderr)
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if importlib.util.find_spec("pip") is None:
            print(
                f"mpkernels: without torch at build time, only the slower Python version is built. {BUILD_IT}", file=sys.stderr
            )
            return {}
        stop(f"torch cannot be imported ({error})", f'Run: pip install "torch>=2.11" numpy. {PYTHON_ONLY}')
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        stop(f"needs torch 2.11 or later, this is {torch.__version__}", 'Run: pip install "torch>=2.11"')
    check_compilers()
    sources = _glob("csrc/**/*.cpp")
    cuda_sources, home = _glob("csrc/**/*.cu"), cuda_home()
    options = {}
    if cuda_sources and home is not None:
        cpp_extension.CUDA_HOME = str(home)  # None under a CPU-only torch, whatever the environment says
        cpp_extension._check_cuda_version = lambda *_: None  # torch's own may be of another generation: nothing of it is linked
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)  # without a GPU torch finds none to build for
        if torch.version.cuda is None:
            NVCC_FLAGS.append("-MD")
            drop_stale_objects()
        sources += cuda_sources
        options = {
            "include_dirs": [str(home / "include"), str(ROOT / "csrc")],
            "library_dirs": [str(home / "lib64")],
            "libraries": ["cudart_static", "dl", "rt", "pthread"],  # static: a user without CUDA has no libcudart
        }
    library = cpp_extension.CppExtension(
        "mpkernels._C",
        sources,
        py_limited_api=True,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-Wl,-z,relro,-z,now"],
        **options,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def drop_stale_objects() -> None:
    """Of .cu files, a header of which is newer by the .d that nvcc wrote: a torch without CUDA has ninja look into none."""
    for listed in ROOT.glob("build/temp*/**/*.d"):
        made, read = listed.with_suffix(".o"), listed.read_text().replace("\\\n", " ").split()[2:]
        if made.exists() and any(not Path(p).exists() or Path(p).stat().st_mtime > made.stat().st_mtime for p in read):
            made.unlink()


def check_compilers() -> None:
    """Those that torch compiles and setuptools links with, on a few lines that need C++17 and the standard library."""
    source = "#include <optional>\nint main() { return std::optional<int>(0).value(); }"
    for command in {os.environ.get("CXX", "c++"), os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"}:
        check = [*shlex.split(command), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
        try:
            subprocess.run(check, input=source, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error.strerror
            stop(
                f"no C++17 compiler ({command}: {reason})",
                f"Install g++ (apt install g++, dnf install gcc-c++), or name a compiler in CXX. {PYTHON_ONLY}",
            )


def _glob(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


check_python()
setuptools.setup(**extension())
