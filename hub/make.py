# SPDX-License-Identifier: Apache-2.0
"""Lay the sources out as kernels of the Hugging Face Hub: python hub/make.py FOLDER makes FOLDER/native and FOLDER/universal.

Each is what kernel-builder takes. native: the library, by the stable ABI of torch, for CPU and CUDA, with the Python part.
universal: the Python part alone, torch's own ops and Triton, for every system. A kernel is loaded from a folder of any name,
beside other versions of itself and beside an installed mpkernels: so imports become relative, and ops are registered under a
name made of the sources. Nothing here uploads anything.
"""

import hashlib
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CSRC = ROOT / "mpkernels", ROOT / "csrc"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = re.search(r"torch>=([\d.]+)", " ".join(PROJECT["dependencies"]))[1]
SETUP = (ROOT / "setup.py").read_text()
ARCHITECTURES = [number.removesuffix("+PTX") for number in re.search(r'CUDA_ARCHITECTURES = "(.*)"', SETUP)[1].split(";")]
LEFT_OUT = ("__main__.py",)  # of `python -m`; a kernel of the hub has no name to run by

# What a process of the proof runs, in a string of the package's code: there the package has no name either.
CHILD = re.compile(r'^from mpkernels\.testing import (\w+)\n(.*)\n"""', re.M)
LOADED = r'''from importlib import import_module, util
spec = util.spec_from_file_location("{name}", INIT)
sys.modules["{name}"] = util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["{name}"])
\1 = import_module("{name}.testing.\1")
\2
""".replace("INIT", repr(__import__("os").path.abspath(__file__ + "{up}/__init__.py")))'''

GENERAL = """[general]
name = "mpkernels"
version = 1
license = "{license}"
backends = ["cpu", "cuda"]
"""
BINDING = """
[torch]
src = ["torch-ext/torch_binding.cpp"]

[torch.stable-abi]
cpu = "{torch}"
cuda = "{torch}"
"""
KERNEL = """
[kernel.mpkernels_{backend}]
backend = "{backend}"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {cxx_flags}
src = {sources}
"""


def main(folder: Path) -> None:
    name = namespace()
    for variant in ("universal", "native"):
        shutil.rmtree(folder / variant, ignore_errors=True)
        write_package(folder / variant / "torch-ext" / "mpkernels", name)
        shutil.copy(ROOT / "hub" / "CARD.md", folder / variant / "CARD.md")
        shutil.copy(ROOT / "LICENSE", folder / variant / "LICENSE")
    (folder / "universal" / "build.toml").write_text(f"{general()}\n[torch-noarch]\n")
    write_library(folder / "native")


def namespace() -> str:
    """Of the ops: the same for the same sources and no others."""
    found = hashlib.sha256()
    for path in sorted([*package_files(), *CSRC.rglob("*")]):
        found.update(path.read_bytes() if path.is_file() else b"")
    return f"mpkernels_{found.hexdigest()[:10]}"


def package_files() -> list[Path]:
    files = (path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json") or path.name == "py.typed")
    return [path for path in files if path.name not in LEFT_OUT]


def general() -> str:
    return GENERAL.format(license=PROJECT["license"].lower())


# ----- Python -------------------------------------------------------------------------------------


def write_package(folder: Path, name: str) -> None:
    for path in package_files():
        target = folder / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        target.write_text(rewritten(text, path, name) if path.suffix == ".py" else text)


def rewritten(text: str, path: Path, name: str) -> str:
    """A module with relative imports and ops of that name, whose library is the one beside it, whatever it is called."""
    dots = "." * len(path.relative_to(PACKAGE).parts)
    text = CHILD.sub(LOADED.format(name=name, up="/.." * len(dots)), text)
    text = re.sub(r"^( *)from mpkernels(?:\.([\w.]+))? import ", rf"\1from {dots}\2 import ", text, flags=re.M)
    text = re.sub(r"^( *)import mpkernels\.(\w+)(?=  #|$)", rf"\1from {dots} import \2", text, flags=re.M)
    text = re.sub(r"\btorch\.ops\.mpkernels\b", rf"torch.ops.{name}", text)
    text = re.sub(r'"mpkernels(::|", "FRAGMENT")', rf'"{name}\1', text)
    text = text.replace("python -m mpkernels prove", "prove() of this kernel")
    if path == PACKAGE / "runtime" / "native.py":
        text = text.replace(
            'Path(__file__).parents[1] / "_C.abi3.so"', f"next(Path(__file__).parents[1].glob({'_*.so'!r}), Path())"
        )
        text = text.replace("not LIBRARY.exists()", "not LIBRARY.is_file()")
    return text


# ----- C++ -------------------------------------------------------------------------------------


def write_library(folder: Path) -> None:
    """The sources; that of the extension module is the binding that kernel-builder asks for."""
    sources = {".cpp": [], ".cu": []}
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        if path.name == "python.cpp":
            target = folder / "torch-ext" / "torch_binding.cpp"
            text = text.replace('"native_op.h"', '"../csrc/common/native_op.h"')
        elif path.suffix in sources:
            sources[path.suffix].append(str(path.relative_to(ROOT)))
        target.write_text(text)
    headers = sorted(str(path.relative_to(folder)) for path in (folder / "csrc").rglob("*.*h"))
    text = general() + BINDING.format(torch=TORCH)
    flags = [flag for flag in re.findall(r'"(-[fD][\w=-]+)"', SETUP) if flag.startswith(("-ff", "-fno", "-fv"))]
    for backend, files in (("cpu", sources[".cpp"]), ("cuda", sources[".cpp"] + sources[".cu"])):
        text += KERNEL.format(backend=backend, cxx_flags=listed(flags), sources=listed([*files, *headers]))
    text += f'cuda-capabilities = {listed(ARCHITECTURES)}\ncuda-flags = ["-O3", "-fmad=false"]\n'
    (folder / "build.toml").write_text(text)


def listed(values: list[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
