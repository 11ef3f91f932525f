# SPDX-License-Identifier: Apache-2.0
"""What setup.py and make say where something is missing, what make installs for what, and when it makes the venv anew."""

import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


# ----- setup.py -------------------------------------------------------------------------------------


def setup(before: str = "", folder=ROOT, **environment: str) -> subprocess.CompletedProcess:
    """`setup.py --name` as it answers behind a few lines that change what it finds."""
    script = f"import runpy, sys\n{before}\nsys.argv = ['setup.py', '--name']\nrunpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)


NO_TORCH = "sys.modules['torch'] = None"
TORCH = """import types
for name in ('torch', 'torch.utils', 'torch.utils.cpp_extension'):
    sys.modules[name] = types.ModuleType(name)
sys.modules['torch.utils'].cpp_extension = None
sys.modules['torch'].__version__ = '{}'"""  # importing torch itself takes seconds


@pytest.mark.parametrize(
    "before, environment, said",
    [
        ("sys.version_info = (3, 10, 13, 'final', 0)", {}, "needs Python 3.11 or later, this is 3.10.13."),
        ("import setuptools; setuptools.__version__ = '65.5.0'", {}, 'Run: pip install "setuptools>=77"'),
        (NO_TORCH, {}, 'Run: pip install "torch>=2.11"'),
        (TORCH.format("2.10.1+cpu"), {}, 'needs torch 2.11 or later, this is 2.10.1+cpu. Run: pip install "torch>=2.11"'),
        (
            TORCH.format("2.13.0"),
            {"CXX": "nowhere/g++ -pipe"},
            "no C++17 compiler (nowhere/g++ -pipe: No such file or directory). Install g++",
        ),
        (TORCH.format("2.13.0"), {"CXX": "false"}, "no C++17 compiler (false: ). Install g++"),
    ],
    ids=["python", "setuptools", "torch", "old torch", "compiler", "failing compiler"],
)
def test_setup_says_what_to_install(before, environment, said):
    """One sentence and its remedy: no traceback, and no wheel without the library that was asked for."""
    result = setup(before, **environment)
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("mpkernels: ")
    assert said in result.stderr


def test_setup_builds_python_alone_in_isolation():
    """Neither torch nor pip is in the environment of an isolated build; what it builds is said."""
    result = setup(f"{NO_TORCH}; sys.modules['pip'] = None")
    assert (result.returncode, result.stdout) == (0, "mpkernels\n")
    assert "only the slower Python version is built" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_setup_builds_python_alone_elsewhere(system):
    """The library is C++ for Linux: another system needs neither torch nor a compiler to install."""
    before = f"import setuptools, sysconfig; sysconfig.get_config_vars(); {NO_TORCH}; sys.platform = {system!r}"
    result = setup(before, CXX="nowhere/g++")
    assert (result.returncode, result.stdout) == (0, "mpkernels\n")
    assert result.stderr == "mpkernels: the C++ library is built on Linux only; this is the slower Python version.\n"


TOOLKIT = """
import types
sys.modules['torch'].version = types.SimpleNamespace(cuda='13.0')
extension = types.SimpleNamespace(BuildExtension=None, _check_cuda_version=lambda *_: sys.exit('refused'))
def build(*args, **options):
    extension._check_cuda_version('c++', None)
    lists_headers = '-MD' in options['extra_compile_args']['nvcc']
    sys.exit(f"{extension.CUDA_HOME} {options['include_dirs'][0]} {options['library_dirs'][0]} {lists_headers}")
extension.CppExtension = build
sys.modules['torch.utils'].cpp_extension = extension
"""


def test_setup_builds_with_the_toolkit_that_is_named(tmp_path):
    """By CUDA_HOME, whatever nvcc the PATH has and whatever CUDA torch was built with."""
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch(mode=0o755)
    result = setup(TORCH.format("2.13.0+cu130") + TOOLKIT, CUDA_HOME=str(tmp_path))
    assert result.stderr.splitlines() == [f"{tmp_path} {tmp_path}/include {tmp_path}/lib64 False"]


@pytest.mark.parametrize("cuda", [None, "13.0"])
@pytest.mark.parametrize("touched, stays", [("a.cuh", False), ("a.cu", False), ("other.cuh", True)])
def test_setup_drops_objects_older_than_their_headers(touched, stays, cuda, tmp_path):
    """Of .cu files, by nvcc's list: under a torch without CUDA ninja reads none."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    made = tmp_path / "build" / "temp.linux-x86_64" / "csrc" / "a.o"
    sources = [tmp_path / "csrc" / name for name in ("a.cu", "a.cuh", "other.cuh")]
    for path in (tmp_path / "bin/nvcc", tmp_path / "include/cuda_runtime.h", made, *sources):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    made.with_suffix(".d").write_text(f"{made} : {sources[0]} \\\n    {sources[1]} \\\n")
    os.utime(tmp_path / "csrc" / touched, (2e9, 2e9))
    result = setup(TORCH.format("2.13.0") + TOOLKIT.replace("'13.0'", repr(cuda)), tmp_path, CUDA_HOME=str(tmp_path))
    assert result.stderr.splitlines() == [f"{tmp_path} {tmp_path}/include {tmp_path}/lib64 {cuda is None}"]
    assert made.exists() == (stays or cuda is not None)


# ----- make -----------------------------------------------------------------------------------------

INTERPRETER = """#!/bin/sh
# An interpreter of another version whose venvs hold itself, and whose pip writes down what it is asked for.
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") shift 2; echo "$@" >> installed ;;
    "setup.py -q") mkdir -p mpkernels ;;
    -c*) code="import sys, sysconfig; sys.version_info, sys.version = VERSION, '.'.join(map(str, VERSION)) + ' (main)'
sysconfig.get_path = lambda name: '.venv'
$2"
        exec PYTHON -c "$code" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """The Makefile among interpreters that install nothing; calls make with the given interpreter and targets."""
    for name in ("Makefile", "constraints.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    for version in ((3, 10, 13), (3, 11, 7), (3, 12, 1)):
        path = tmp_path / "python{}.{}".format(*version)
        path.write_text(INTERPRETER.replace("VERSION", repr(version)).replace("PYTHON", sys.executable))
        path.chmod(0o755)

    def make(python: str, *targets: str, **environment: str) -> tuple[int, str, list[str]]:
        """Exit status, what was said on stderr and stdout, and what each call of pip was asked for."""
        installed = tmp_path / "installed"
        installed.unlink(missing_ok=True)
        command = ["make", "--no-print-directory", f"PYTHON=./{python}", *targets]
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "CXX")} | environment
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return (
            result.returncode,
            result.stderr + result.stdout,
            installed.read_text().splitlines() if installed.exists() else [],
        )

    make.venv = tmp_path / ".venv"
    return make


@needs_make
@pytest.mark.parametrize("python", ["python3.10", "python4.0"])
def test_make_checks_python_before_the_venv(project, python):
    code, said, installed = project(python, "build")
    assert code != 0
    assert "mpkernels needs Python 3.11 or later: install it, or name one by make PYTHON=python3.11" in said
    assert ("python3.10 is Python 3.10.13" if python == "python3.10" else "not found") in said
    assert not installed
    assert not project.venv.exists()


@needs_make
def test_make_checks_the_compiler_before_the_venv(project):
    code, said, installed = project("python3.11", "build", CXX="nowhere/g++")
    assert code != 0
    assert "mpkernels needs a C++ compiler: install g++" in said
    assert not installed
    assert not project.venv.exists()


@needs_make
def test_make_installs_what_a_target_needs_once(project):
    """The demo's packages for what runs the library, others for tests, wheels, the site and examples; all constrained."""
    (demo,) = project("python3.11", "build")[2]
    assert project("python3.11", "build")[2] == []
    (package,) = project("python3.11", "wheel")[2][:-1]  # the last is `pip wheel` itself
    (rest,) = project("python3.11", "mutants")[2]
    (site,) = project("python3.11", "docs")[2]
    (apps,) = project("python3.11", "apps")[2]
    begin = "install --disable-pip-version-check -c constraints.txt "
    assert all(line.startswith(begin) for line in (demo, package, rest, site, apps))
    assert "--no-deps" in apps
    groups = [set(line.removeprefix(begin).split()) - {"--no-deps"} for line in (demo, package, rest, site, apps)]
    for group, some in zip(
        groups, ({"torch", "scikit-learn"}, {"auditwheel"}, {"pytest", "ruff"}, {"mkdocs-material"}, {"mlxtend"})
    ):
        assert some <= group
    constrained = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert sorted(itertools.chain(*groups)) == sorted(constrained)


@needs_make
def test_make_takes_another_torch(project):
    """In a venv of its own, under the constraints but for torch, and the Triton and setuptools that it asks for."""
    assert project("python3.11", "build")[0] == 0
    (project.venv / "left").touch()
    (demo,) = project("python3.11", "build", "TORCH=2.11.0")[2]
    assert not (project.venv / "left").exists()
    constraints = (project.venv.parent / demo.split(" -c ")[1].split()[0]).read_text()
    assert "\ntorch==2.11.0\n" in constraints
    assert not re.search(r"^(triton|setuptools)\b", constraints, flags=re.M)
    assert "\nnumpy==" in constraints
    assert project("python3.11", "build", "TORCH=2.11.0")[2] == []


@needs_make
def test_make_remakes_the_venv_of_another_interpreter(project):
    assert project("python3.11", "build")[0] == 0
    (project.venv / "left").touch()
    assert project("python3.11", "build")[2] == []
    assert (project.venv / "left").exists()
    code, said, installed = project("python3.12", "build")
    assert (code, len(installed)) == (0, 1), said
    assert not (project.venv / "left").exists()
    assert len(project("python3.11", "build")[2]) == 1


@needs_make
@pytest.mark.parametrize(
    ("toolkits", "taken"), [((), ""), (("13.0",), ""), (("12.0", "12.4", "13.0"), "12.4"), (("12.4", "12.8", "12.6"), "12.8")]
)
def test_make_wheel_takes_the_newest_toolkit_of_cuda_12(tmp_path, toolkits, taken):
    """CUDA_HOME comes first; where there is no CUDA 12, setup.py looks for what there is."""
    for version in toolkits:
        (tmp_path / f"cuda-{version}").mkdir()
    command = ["make", "-n", "wheel", f"TOOLKITS={tmp_path}/cuda-12.[4-9]", f"PYTHON={sys.executable}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.replace("\\\n", "")
    line = next(line for line in said.splitlines() if "pip wheel" in line)
    home = f"{tmp_path}/cuda-{taken}" if taken else ""
    assert line.startswith(f'CUDA_HOME="${{CUDA_HOME:-{home}}}" ')


@needs_make
def test_make_clean_removes_the_venv(project):
    assert project("python3.11", "build")[0] == 0
    assert project("python3.11", "clean")[0] == 0
    assert not project.venv.exists()
