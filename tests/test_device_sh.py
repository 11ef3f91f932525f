# SPDX-License-Identifier: Apache-2.0
"""bench/device.sh, as far as it goes without a GPU: it lists its parts, refuses others, and says that there is no GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import limits, rows, sanitize
from bench.__main__ import main as bench_main
from mpkernels._dispatch import ops

SCRIPT = Path(__file__).parent.parent / "bench" / "device.sh"
PARTS = [
    "build",
    "probes",
    "report",
    "gemm",
    "shapes_native",
    "shapes_triton",
    "step",
    "bench_native",
    "bench_triton",
    "bench_step",
    "sanitizer",
    "tune",
    "bench",
]
# Instead of python3: a machine with a GPU, on which everything passes at once but what is named.
STAND_IN = """#!/bin/bash
case "$*" in
  *get_device_name*) echo "a GPU" ;;
  *xdist*) exit 1 ;;
  *$SLOW*) echo "$*"; sleep 30 ;;
  *$FAILING*) exit 3 ;;
  *) echo "$*, by ${MPKERNELS_BACKEND:-auto}" ;;
esac
"""


def device_sh(*arguments: str, script: Path = SCRIPT, **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable} | more
    return subprocess.run(["bash", str(script), *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def on_a_gpu(tmp_path):
    """on_a_gpu(part, ..., slow=..., budget=...): the script's own flow of control on the stand-in; (code, lines, logs)."""
    (tmp_path / "bench").mkdir()
    for name, text in (("python", STAND_IN), ("compute-sanitizer", '#!/bin/bash\nshift 4; "$@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"

    def run(*parts, slow="nothing", failing="nothing", budget=60):
        script = tmp_path / "bench/device.sh"
        text = SCRIPT.read_text().replace("BUDGET=520", f"BUDGET={budget}").replace("LEAST=20", "LEAST=2")
        script.write_text(text.replace("cp mpkernels/tuned/*.json", "true"))
        paths = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python"),
            "SLOW": slow,
            "FAILING": failing,
        }
        done = device_sh("--out", str(out), *parts, script=script, **paths)
        return done.returncode, done.stdout.splitlines(), {path.stem: path.read_text() for path in out.glob("*.log")}

    return run


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


def test_device_sh_runs_every_part_once(on_a_gpu):
    code, lines, logs = on_a_gpu()
    assert code == 0
    assert [line.split(", ")[0] for line in lines] == [f"{part}: passed" for part in PARTS]
    for backend in ("native", "triton"):
        for line in logs[f"bench_{backend}"].splitlines():
            assert line.endswith(f"/cuda-{backend}.jsonl, by linear_act={backend},linear_act_backward={backend}")
    tools = [line.split()[1:] for line in logs["sanitizer"].splitlines() if line.startswith("==")]
    assert tools == [[f"{t},", b] for b in ("native", "triton") for t in ("memcheck", "racecheck", "initcheck")]
    again, lines, _ = on_a_gpu()
    assert again == 0
    assert lines == [f"{part}: passed before" for part in PARTS]


def test_device_sh_cuts_off_and_goes_on(on_a_gpu):
    """What takes too long is stopped, what has no time left is not begun; the next call does these two alone."""
    parts = ("report", "step", "tune")
    code, lines, _ = on_a_gpu(*parts, slow="test_adamw", budget=4)
    assert code == 1
    assert lines[0].startswith("report: passed")
    assert lines[1].startswith("step: cut off after ")
    assert lines[2] == "tune: no time left, call again"
    code, lines, _ = on_a_gpu()
    assert code == 0
    assert [line.split(":")[0] for line in lines if line.endswith("passed before")] == ["report"]


def test_device_sh_tells_a_failure(on_a_gpu):
    """And runs it again the next time."""
    code, lines, _ = on_a_gpu("report", "build", failing="setup.py")
    assert code == 1
    assert [line.split(",")[0] for line in lines if ": " in line][:2] == ["report: passed", "build: FAILED (3)"]
    code, lines, _ = on_a_gpu()
    assert code == 0
    assert lines[0].startswith("build: passed, ")


def test_device_sh_sanitizes_every_op(capsys):
    """What compute-sanitizer is given to run, on the backend that is here."""
    sanitize.main("eager", "cpu")
    assert [line.split(": ")[1:] for line in capsys.readouterr().out.splitlines()] == [[op, "done"] for op in ops]


def test_device_sh_bench_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """--missing: cases with rows of this commit are left out, those of another are not; with all of them there is no run."""
    out = tmp_path / "rows.jsonl"
    case = "linear_act/forward/float16/64x784x512"
    row = {"case": case, "commit": rows.git("rev-parse", "--short", "HEAD")}
    out.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(sys, "argv", ["bench", "--case", case, "--missing", "--out", str(out)])
    assert bench_main() == 0
    assert capsys.readouterr().out == "every case has its rows\n"
    out.write_text(json.dumps(row | {"commit": "another"}) + "\n")
    monkeypatch.setattr(limits, "measure", lambda device, clock: {"gb_s": 1.0, "tflop_s": {}})
    seen = []
    monkeypatch.setattr("bench.__main__.measure", lambda case, *_: seen.append(case.name) or [])
    bench_main()
    assert seen == [case]


def test_device_sh_is_clean():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    assert subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True, check=False).stdout == ""
