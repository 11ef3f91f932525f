# SPDX-License-Identifier: Apache-2.0
"""Run tests/ops/*/test_*_triton.py through Triton's interpreter, each in a process of its own.

NOTE: TRITON_INTERPRET must be set before triton is imported, and would change every other test in its process.
"""

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/ops/*/test_*_triton.py"))


@pytest.mark.parametrize("file", FILES)
def test_triton_through_the_interpreter(file):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
