# SPDX-License-Identifier: Apache-2.0
"""What is given to users: the version in pure Python, the sources, and the wheel of `make wheel`, each installed as it is."""

import contextlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.paths import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
README_EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
EXAMPLE = f"""
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
loader = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(3)]
{README_EXAMPLE}"""


def python_files() -> set[str]:
    """What the package has besides the library."""
    found = (path for path in (ROOT / "mpkernels").rglob("*") if path.suffix in (".py", ".json") or path.name == "py.typed")
    return {str(path.relative_to(ROOT)) for path in found}


def run(*command, cwd, **environment) -> str:
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# ----- pure Python -------------------------------------------------------------------------------------

BUILD = "import runpy, sys; sys.modules.update(torch=None, pip=None); runpy.run_path('setup.py', run_name='__main__')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sources of a build that has neither torch nor pip, as an isolated one."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-c", BUILD, "-q", "egg_info", "-e", folder, "build", "-b", folder / "build"]
    run(*command, "bdist_wheel", "-b", folder / "wheel", "-d", folder, "sdist", "-d", folder, cwd=ROOT)
    return folder


def test_pure_python_wheel_holds_the_package(built):
    names = zipfile.ZipFile(built / f"mpkernels-{VERSION}-py3-none-any.whl").namelist()
    assert {name for name in names if ".dist-info/" not in name} == python_files()


def test_sdist_holds_what_builds(built):
    """The package, the library's sources, and what setup.py and pyproject.toml name."""
    with tarfile.open(built / f"mpkernels-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert python_files() | sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith(("tests", "build", ".venv")) or name.endswith((".so", ".pyc"))]


# What Linux has and another system lacks; what of it torch and the standard library hold already stays theirs.
ELSEWHERE = """
import multiprocessing, os, platform, signal, subprocess, sys, tempfile
import torch, torch._dynamo, torch.distributed
SYSTEM, NAME, LACKS = {elsewhere!r}
sys.platform, os.name = SYSTEM, NAME
platform.system = lambda: {{"darwin": "Darwin", "win32": "Windows"}}[SYSTEM]
for module in LACKS["modules"]:
    sys.modules[module] = None
for module, names in (("os", LACKS["os"]), ("signal", LACKS["signal"])):
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]
open_file = open
def refuses_proc(event, args):
    assert event != "open" or not str(args[0]).startswith(("/proc", "/sys", "/dev/shm")), args
sys.addaudithook(refuses_proc)
{example}
from mpkernels import __main__
sys.argv = ["mpkernels"]
assert __main__.main() == 0
assert not mpk.is_available("native")
if SYSTEM == "win32":
    try:
        mpk.prove()
    except RuntimeError as error:
        assert str(error).endswith("use Linux")
    else:
        raise AssertionError("prove ran")
"""
MACOS = ("darwin", "posix", {
    "modules": ["triton", "spwd", "ossaudiodev"],
    "os": ["sched_getaffinity", "sched_setaffinity", "memfd_create", "eventfd", "getrandom", "pidfd_open", "setresuid"],
    "signal": ["SIGPWR", "SIGPOLL", "SIGRTMIN", "SIGRTMAX", "sigtimedwait", "sigwaitinfo"],
})  # fmt: skip
WINDOWS = ("win32", "posix", {
    "modules": ["triton", "fcntl", "grp", "pwd", "pty", "resource", "syslog", "termios", "tty"],
    "os": [
        "sched_getaffinity", "sched_setaffinity", "fork", "forkpty", "geteuid", "getuid", "getgid", "killpg", "setsid", "uname",
        "getpgid", "getloadavg", "sysconf", "mkfifo", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY",
    ],
    "signal": ["SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "alarm", "setitimer", "pthread_sigmask", "pthread_kill"],
})  # fmt: skip


@pytest.mark.parametrize("elsewhere", [pytest.param(MACOS, marks=pytest.mark.sweep), WINDOWS], ids=["macos", "windows"])
def test_pure_python_trains_on_other_systems(built, elsewhere, tmp_path):
    """The wheel for them, with what Linux alone has hidden: it imports, trains README's example, and reports what works."""
    zipfile.ZipFile(built / f"mpkernels-{VERSION}-py3-none-any.whl").extractall(tmp_path)
    script = ELSEWHERE.format(elsewhere=elsewhere, example=EXAMPLE)
    environment = dict(PYTHONPATH=str(tmp_path), HOME=str(tmp_path), OMP_NUM_THREADS="1")
    said = run(sys.executable, "-c", script, cwd=tmp_path, **environment)
    assert said.startswith("the last step was taken\n")
    assert "not built" in said


# ----- the wheel -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> Path:
    """Of these sources, in dist/."""
    found = list((ROOT / "dist").glob(f"mpkernels-{VERSION}-cp311-abi3-*.whl"))
    assert len(found) == 1, "run make wheel: it is built before the sweep"
    return found[0]


@pytest.mark.sweep
def test_wheel_holds_the_package_as_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert names == python_files() | {"mpkernels/_C.abi3.so"}
    assert not [name for name in python_files() if archive.read(name) != (ROOT / name).read_bytes()], "run make wheel"


@pytest.mark.sweep
def test_wheel_needs_what_its_name_says(wheel, tmp_path):
    """Its tag is in its name and inside; no symbol is of a later glibc, of a later libstdc++ or beyond Python's stable ABI."""
    glibc = re.search(r"^GLIBC := ([\d.]+)", (ROOT / "Makefile").read_text(), re.M)[1]
    tag = re.fullmatch(rf"mpkernels-{VERSION}-(cp311-abi3-manylinux_{glibc.replace('.', '_')}_\w+)\.whl", wheel.name)[1]
    archive = zipfile.ZipFile(wheel)
    assert f"Tag: {tag}\n" in archive.read(f"mpkernels-{VERSION}.dist-info/WHEEL").decode()
    run(Path(sys.executable).with_name("abi3audit"), "--strict", wheel, cwd=tmp_path)
    library = archive.extract("mpkernels/_C.abi3.so", tmp_path)
    symbols = subprocess.run(["readelf", "-W", "--version-info", library], capture_output=True, text=True, check=True).stdout
    newest = {
        name: max(tuple(map(int, version.split("."))) for version in re.findall(rf"\b{name}_([\d.]+)", symbols))
        for name in ("GLIBC", "GLIBCXX", "CXXABI")
    }
    assert newest["GLIBC"] <= tuple(map(int, glibc.split(".")))
    assert newest["GLIBCXX"] <= (3, 4, 24)  # of manylinux_2_28
    assert newest["CXXABI"] <= (1, 3, 11)
    # What the linker found nowhere has no version. Python's own are with the interpreter.
    unversioned = {name for name in symbols_of(library, "--undefined-only", "U") if "@" not in name}
    of_torch = {
        name.partition("@")[0]
        for file in ("libc10.so", "libtorch_cpu.so")
        for name in symbols_of(Path(torch.__file__).parent / "lib" / file, "--defined-only")
    }
    assert {name for name in unversioned - of_torch if not re.match("_?Py", name)} == set()


def symbols_of(library: str | Path, option: str, kind: str = r"\w") -> set[str]:
    """The names in a library's dynamic table, of one kind as nm has it."""
    table = subprocess.run(["nm", "-D", option, library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(rf"^[\da-f ]* {kind} (\S+)$", table, re.M))


def requirements(name: str, found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """The installed distribution of that name, and those that it needs and that are here, besides `found`."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        found[name] = metadata.distribution(name)
        for needed in (re.match(r"[\w.-]+", line)[0] for line in found[name].requires or () if "extra ==" not in line):
            if needed not in found:
                requirements(needed, found)
    return found


@pytest.mark.sweep
def test_wheel_installs_and_trains_without_a_compiler(wheel, tmp_path):
    """A new environment with torch and what it needs, and nothing else: pip takes the wheel, README's example runs in C++."""
    venv.create(tmp_path / "venv", with_pip=True)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for distribution in requirements("numpy", requirements("torch", {})).values():
        tops = {file.parts[0] for file in distribution.files or () if ".." not in file.parts}
        for top in tops - {"__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    environment = dict(PATH=str(tmp_path / "venv" / "bin"), HOME=str(tmp_path), OMP_NUM_THREADS="1")
    assert not [name for name in ("c++", "g++", "gcc", "nvcc") if shutil.which(name, path=environment["PATH"])]
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-index", wheel, cwd=tmp_path, **environment)
    script = f"{EXAMPLE}\nprint(mpk.__file__, mpk.why_not('native'))"
    said = run(python, "-c", script, cwd=tmp_path, **environment).splitlines()
    assert said[0] == "the last step was taken"
    assert said[1] == f"{packages}/mpkernels/__init__.py None"
    run(python, "-m", "mpkernels", cwd=tmp_path, **environment)
