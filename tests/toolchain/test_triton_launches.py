# SPDX-License-Identifier: Apache-2.0
"""linear_act launches by itself what Triton compiled for tensors of the same kind, and nothing else."""

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT


def test_linear_act_launches_what_triton_would():
    """In a process that does not interpret: without a GPU, what reaches the driver is noted by triton_stub_driver.py."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.toolchain.triton_launches"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
