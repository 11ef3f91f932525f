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
LEVELS = ["not sweep and not release", pytest.param("sweep", marks=pytest.mark.sweep)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("file", FILES)
def test_triton_through_the_interpreter(file, level):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", level, file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    nothing_more = {pytest.ExitCode.NO_TESTS_COLLECTED} if level == "sweep" else set()
    assert result.returncode in {0} | nothing_more, result.stdout[-8000:] + result.stderr[-2000:]
