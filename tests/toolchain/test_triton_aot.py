# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiled for GPUs that are not here: it fits, does not spill, and its ReLU keeps NaN."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mpkernels.ops.linear_act import Activation
from mpkernels.ops.linear_act.tile_config import Float8
from tests.paths import ROOT
from tests.toolchain.triton_aot import SHARED_LIMIT, TENSOR_CORES

FOLDER = Path(__file__).parent
# The oldest and the newest that torch 2.11 to 2.15 come with; the tests run with the one that constraints.txt pins.
OTHER_VERSIONS = ("3.6.0", "3.9.0")
OPS = sorted(path.stem.removeprefix("triton_aot_") for path in FOLDER.glob("triton_aot_*.py") if "control" not in path.stem)


def compiled(op: str, sm: int, *options: str, version: str | None = None) -> list[dict]:
    """The rows of `python -m tests.toolchain.triton_aot` in a process that does not interpret; `version`: of another Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(other_triton(version)), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.toolchain.triton_aot", op, "--sm", str(sm), *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert rows
    assert version in (None, rows[0]["triton"])
    return rows


def other_triton(version: str) -> Path:
    """A folder with that Triton, installed once; skips where no package index gives it."""
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / "triton").exists():
        folder.parent.mkdir(exist_ok=True)
        room = tempfile.mkdtemp(dir=folder.parent)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--target", room, f"triton=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(room)
            pytest.skip(f"triton {version} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        try:
            os.rename(room, folder)
        except OSError:  # another process was quicker
            shutil.rmtree(room)
    return folder


def check(row: dict) -> None:
    assert row["shared"] <= SHARED_LIMIT[row["sm"]], row
    assert row["n_spills"] == 0, row
    assert row["stack"] == 0, row
    if row["constexprs"].get("RELU") or row["constexprs"].get("ACTIVATION") == Activation.RELU:
        assert row["maxima_that_drop_nan"] == [], row
    if row["signature"].get("a_ptr", "").startswith(("*fp16", "*bf16")):
        assert any(row["opcodes"][opcode] for opcode in TENSOR_CORES), row
    if row["constexprs"].get("FLOAT8"):
        check_float8(row)
    if row["name"] == "gemm_tma_kernel":
        check_tma(row)


def check_tma(row: dict) -> None:
    """Operands and result go by TMA, the products by the generation's own tensor cores and none by an older one's."""
    opcodes = row["opcodes"]
    if not row["constexprs"]["FLOAT8"]:
        own = {90: "HGMMA", 100: "UTCHMMA"}[row["sm"]]
        assert [opcode for opcode in TENSOR_CORES if opcodes[opcode]] == [own], row
    assert opcodes["UTMALDG"] > 0, row
    assert opcodes["UTMASTG"] > 0, row
    assert row["specialized"] == row["constexprs"]["SPECIALIZE"], row  # Triton leaves it out without a word


def check_float8(row: dict) -> None:
    """The products by the tensor cores of 8-bit floats, unconverted, where there are any; where those keep 14 bits, every sum
    of at most 128 of K added in fp32."""
    opcodes, constants, own = row["opcodes"], row["constexprs"], {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}
    assert [opcode for opcode in TENSOR_CORES if opcodes[opcode]] == [own.get(row["sm"], "HMMA")], row
    assert opcodes["F2FP.F16.E"] == 0, row
    assert (constants["FLOAT8"] == Float8.PROMOTED) == (row["sm"] in (89, 90)), row
    if constants["FLOAT8"] == Float8.PROMOTED:
        assert constants["BLOCK_K"] <= 128, row
        assert opcodes["FADD"] >= constants["BLOCK_M"] * constants["BLOCK_N"] // (32 * row["options"]["num_warps"]), row


@pytest.mark.parametrize("sm", [80, 90])
def test_triton_aot_tells_a_relu_that_drops_nan(sm):
    drops, keeps = compiled("control", sm)
    assert drops["maxima_that_drop_nan"]
    assert not keeps["maxima_that_drop_nan"]


def levels(values, *, sweep, quick=()) -> list:
    """Parameters: those that every run takes, those of the sweep, and the others before a release."""
    marks = dict.fromkeys(values, pytest.mark.release) | dict.fromkeys(sweep, pytest.mark.sweep) | dict.fromkeys(quick, ())
    return [pytest.param(*value, marks=mark) for value, mark in marks.items()]


# None: the version that is pinned. Every architecture and every version is in the sweep.
PAIRS = [(version, sm) for version in (None, *OTHER_VERSIONS) for sm in sorted(SHARED_LIMIT)]
SWEEP = ((None, 80), (None, 86), (None, 100), ("3.6.0", 80), ("3.9.0", 89))


@pytest.mark.parametrize("version, sm", levels(PAIRS, sweep=SWEEP, quick=[(None, 90)]))
@pytest.mark.parametrize("op", OPS)
def test_triton_aot_few_tiles(op, version, sm):
    for row in compiled(op, sm, version=version):
        check(row)


@pytest.mark.parametrize("sm", levels([(sm,) for sm in sorted(SHARED_LIMIT)], sweep=[(90,)]))
@pytest.mark.parametrize("op", OPS)
def test_triton_aot_every_tile(op, sm):
    for row in compiled(op, sm, "--all"):
        check(row)


@pytest.mark.parametrize(
    "version, sm",
    levels([pair for pair in PAIRS if pair[0] and pair[1] in (90, 100)], sweep=[("3.6.0", 100), ("3.9.0", 90)]),
)
def test_triton_aot_every_tile_of_descriptors(version, sm):
    """Triton's versions differ in what they specialize, and die of."""
    rows = compiled("linear_act", sm, "--all", "--kernel", "gemm_tma_kernel", version=version)
    assert any(row["specialized"] for row in rows) == (sm == 90 and version != "3.6.0")
    for row in rows:
        check(row)
