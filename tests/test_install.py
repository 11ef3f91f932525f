# SPDX-License-Identifier: Apache-2.0
"""What setup.py says where something is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# ----- setup.py -------------------------------------------------------------------------------------


def setup(before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """`setup.py --name` as it answers behind a few lines that change what it finds."""
    script = f"import runpy, sys\n{before}\nsys.argv = ['setup.py', '--name']\nrunpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


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
