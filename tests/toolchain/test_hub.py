# SPDX-License-Identifier: Apache-2.0
"""hub/make.py: the layout of a kernel of the Hugging Face Hub, and that what it makes runs without a name of its own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.toolchain.test_packages import EXAMPLE, run

# As the `kernels` library loads a build: by its file, under a name that is no folder's, beside an installed mpkernels.
LOAD = """
import importlib.util, sys
import mpkernels
spec = importlib.util.spec_from_file_location("mpkernels_1234", FOLDER + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules["mpkernels_1234"] = module
spec.loader.exec_module(module)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    run(sys.executable, ROOT / "hub" / "make.py", folder, cwd=folder)
    return folder


def load(package: Path, script: str, folder: Path) -> list[str]:
    """What `script` prints where `mpk` is the package, loaded from a folder of another name."""
    copy = shutil.copytree(package, folder / "torch-cpu", ignore=shutil.ignore_patterns("__pycache__"))
    environment = dict(PYTHONPATH=str(ROOT), HOME=str(folder), OMP_NUM_THREADS="1", PATH=os.environ["PATH"])
    loading = LOAD.replace("FOLDER", repr(str(copy)))
    return run(sys.executable, "-c", loading + script, cwd=folder, **environment).splitlines()


def test_hub_layout(made):
    """What kernel-builder asks for: build.toml, its sources, one package in torch-ext, imports that need no name."""
    for variant, framework in (("native", "torch"), ("universal", "torch-noarch")):
        folder = made / variant
        build = tomllib.loads((folder / "build.toml").read_text())
        assert framework in build
        assert (build["general"]["name"], build["general"]["license"]) == ("mpkernels", "apache-2.0")
        assert (folder / "CARD.md").is_file()
        modules = list((folder / "torch-ext" / "mpkernels").rglob("*.py"))
        assert len(modules) > 80
        for path in modules:
            assert not re.search(r"^ *(from|import) mpkernels\b", path.read_text(), re.M), path
            compile(path.read_text(), path.name, "exec")
    assert "kernel" not in tomllib.loads((made / "universal" / "build.toml").read_text())


def test_hub_builds_every_source(made):
    build = tomllib.loads((made / "native" / "build.toml").read_text())
    assert build["torch"]["stable-abi"] == {"cpu": "2.11", "cuda": "2.11"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} - {"csrc/common/python.cpp"}
    listed = {name: set(kernel["src"]) for name, kernel in build["kernel"].items()}
    assert listed["mpkernels_cuda"] == sources
    assert listed["mpkernels_cpu"] == {source for source in sources if not source.endswith(".cu")}
    assert all((made / "native" / source).is_file() for source in [*sources, *build["torch"]["src"]])
    assert build["kernel"]["mpkernels_cuda"]["cuda-capabilities"] == ["7.5", "8.0", "9.0a"]
    assert "MPK_INIT(TORCH_EXTENSION_NAME)" in (made / "native" / "torch-ext" / "torch_binding.cpp").read_text()


@pytest.mark.sweep
def test_hub_universal_trains_and_proves_beside_the_package(made, tmp_path):
    """README's example by ops of a name of their own; the process of a proof loads the same copy."""
    script = EXAMPLE.replace("import torch, mpkernels as mpk", "import torch; mpk = module")
    script += "\nprint(mpk.why_not('native'))\nrows = mpk.prove('cpu')\nprint({row['state'] for row in rows}, len(rows) > 5)"
    said = load(made / "universal" / "torch-ext" / "mpkernels", script, tmp_path)
    assert said[0] == "the last step was taken"
    assert said[1].startswith("not built")
    assert said[2] == "{'right'} True"


@pytest.mark.release
def test_hub_native_builds_and_trains(made, tmp_path):
    """The CPU's sources of build.toml, and no others, are a library that the package beside it takes. Minutes."""
    import torch

    folder = made / "native"
    build = tomllib.loads((folder / "build.toml").read_text())
    kernel = build["kernel"]["mpkernels_cpu"]
    sources = [source for source in (*kernel["src"], *build["torch"]["src"]) if source.endswith(".cpp")]
    include = [f"-I{path}" for path in ("csrc", sysconfig.get_path("include"), Path(torch.__file__).parent / "include")]
    options = ["-std=c++17", "-O3", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000", *kernel["cxx-flags"], *include]
    options += ["-DTORCH_EXTENSION_NAME=_mpkernels_cpu_1234", "-DPy_LIMITED_API=0x030b0000"]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    library = folder / "torch-ext" / "mpkernels" / "_mpkernels_cpu_1234.abi3.so"
    compiled = subprocess.run(
        [os.environ.get("CXX", "c++"), "-shared", *options, *sources, *libraries, "-o", library],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    example = EXAMPLE.replace("import torch, mpkernels as mpk", "import torch; mpk = module")
    said = load(library.parent, f"{example}\nprint(mpk.why_not('native'), mpkernels.why_not('native'))", tmp_path)
    assert said == ["the last step was taken", "None None"]
