# SPDX-License-Identifier: Apache-2.0
"""bench/device.sh, as far as it goes without a GPU: it lists its parts, refuses others, and says that there is no GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "bench" / "device.sh"
PARTS = ["build", "probes", "report", "gemm", "step", "sanitizer", "tune", "bench"]


def device_sh(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False)


def test_device_sh_lists_its_parts():
    """With the files that they name, which are there."""
    done = device_sh("--list")
    assert done.returncode == 0
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == PARTS
    assert (SCRIPT.parents[1] / "tests/device/probes.py").exists()


@pytest.mark.parametrize(
    ("arguments", "message"), [(["unheard-of"], "no part unheard-of"), (["--fast"], "usage:"), (["--out"], "--out needs")]
)
def test_device_sh_refuses(arguments, message):
    done = device_sh(*arguments)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_sh_without_a_gpu_fails_and_says_so(tmp_path):
    done = device_sh("--out", str(tmp_path), *PARTS[1:])
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{part}: there is no GPU" for part in PARTS[1:]]
    assert (tmp_path / "device.txt").read_text() == ""


def test_device_sh_does_not_run_again_what_passed(tmp_path):
    commit = (
        subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=SCRIPT.parent, capture_output=True, text=True, check=False
        ).stdout.strip()
        or "unknown"
    )
    (tmp_path / "device.txt").write_text("".join(f"{part}: passed, 1 s, a GPU, {commit}\n" for part in PARTS))
    done = device_sh("--out", str(tmp_path))
    assert done.stdout.splitlines() == [f"{part}: passed before" for part in PARTS]
    assert done.returncode == 0


def test_device_sh_is_clean():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    assert subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False).stdout == ""
