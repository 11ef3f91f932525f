# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiled for GPUs that are not here: it fits, does not spill, and its ReLU keeps NaN."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_aot import SHARED_LIMIT

HERE = Path(__file__).parent
OPS = sorted(path.stem.removeprefix("triton_aot_") for path in HERE.glob("triton_aot_*.py") if "control" not in path.stem)


def compiled(op: str, sm: int, *options: str) -> list[dict]:
    """The rows of `python -m tests.triton_aot`, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_aot", op, "--sm", str(sm), *options]
    result = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert rows
    return rows


def check(row: dict) -> None:
    assert row["shared"] <= SHARED_LIMIT[row["sm"]], row
    assert row["n_spills"] == 0, row
    assert row["stack"] == 0, row
    if row["constexprs"].get("RELU"):
        assert row["maxima_that_drop_nan"] == [], row
    if row["signature"].get("a_ptr", "").startswith(("*fp16", "*bf16")):
        assert row["tensor_core"] > 0, row


@pytest.mark.parametrize("sm", [80, 90])
def test_triton_aot_tells_a_relu_that_drops_nan(sm):
    drops, keeps = compiled("control", sm)
    assert drops["maxima_that_drop_nan"]
    assert not keeps["maxima_that_drop_nan"]


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("op", OPS)
def test_triton_aot_few_tiles(op, sm):
    for row in compiled(op, sm):
        check(row)


@pytest.mark.sweep
@pytest.mark.parametrize("sm", sorted(SHARED_LIMIT))
@pytest.mark.parametrize("op", OPS)
def test_triton_aot_every_tile(op, sm):
    for row in compiled(op, sm, "--all"):
        check(row)
