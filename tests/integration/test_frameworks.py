# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/frameworks train in fp16 through an overflow: only the fused step ran, and the norms are right."""

import csv
import json
import math
import os
import runpy
import subprocess
import sys

import pytest
import torch

from tests.bounds import check_norm
from tests.framework_spy import OVERFLOW, Spy
from tests.paths import ROOT

EXAMPLES = ROOT / "docs" / "frameworks"
STEPS = 30


def main(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def check(seen: list[dict], rows: list[dict], reads: int = 1) -> None:
    """`seen`: what each rank's spy saw; `rows`: what was logged; `reads`: of the gradients, in a step."""
    squares = [math.fsum(parts) for parts in zip(*(rank["squares"][::reads] for rank in seen), strict=True)]
    assert len(squares) == len(rows) == STEPS
    for step, (row, square) in enumerate(zip(rows, squares, strict=True)):
        if step == OVERFLOW:
            assert not math.isfinite(row["grad_norm"])
        else:
            check_norm(row["grad_norm"], math.sqrt(square), seen[0]["elements"])
    for rank in seen:
        calls = rank["calls"]
        assert calls["adamw_"] == STEPS * rank["groups"]  # one pass, the skipped one too: decided on the device
        assert calls["update_scale_"] == STEPS
        assert calls["grad_stats_"] == len(rank["squares"]) == reads * STEPS
        assert calls["linear_act"] >= STEPS
        assert calls["linear_act_backward"] >= STEPS
        assert calls.keys() == {"adamw_", "grad_stats_", "update_scale_", "linear_act", "linear_act_backward"}
        assert rank["steps"] == [STEPS - 1]
    losses = [row["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.fixture(autouse=True)
def _seeded(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def test_plain_loop():
    with Spy() as spy:
        rows = main("plain")(STEPS)
    check([spy.seen()], rows)


def test_accelerate():
    tracking = pytest.importorskip("accelerate.tracking")

    class Rows(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "rows", False, None

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **kwargs):
            rows.append(values)

    rows = []
    with Spy() as spy:
        main("with_accelerate")(STEPS, log_with=Rows())
    check([spy.seen()], rows)


def test_transformers_trainer():
    pytest.importorskip("transformers")
    with Spy() as spy:
        rows = main("with_trainer")(STEPS)
    check([spy.seen()], rows)


def test_lightning_fabric():
    pytest.importorskip("lightning_fabric")
    with Spy() as spy:
        main("with_fabric")(STEPS)
    with open("logs/fabric/version_0/metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    check([spy.seen()], rows)


@pytest.mark.sweep
def test_fsdp2_with_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               ROOT / "tests" / "framework_spy.py", tmp_path, EXAMPLES / "with_fsdp2.py"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    check(seen, rows, reads=2)  # a rank cannot know whether another wrote a gradient after the clip


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name
