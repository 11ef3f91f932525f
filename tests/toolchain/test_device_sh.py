# SPDX-License-Identifier: Apache-2.0
"""bench/device.sh, as far as it goes without a GPU: its flow of control on fakes, and what its parts run on the CPU."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bench import limits, race, rows, sanitize
from bench.__main__ import main as bench_main
from mpkernels.ops.linear_act import forward_op
from mpkernels.runtime import native
from mpkernels.runtime.resolve import ops
from tests import linear_act_cases
from tests.device import sweep
from tests.emulator import host_kernels
from tests.paths import ROOT

SCRIPT = ROOT / "bench" / "device.sh"
FIRST = ["build", "prove", "probes", "sweep", "race", "step"]
SECOND = ["replay", "native", "triton", "memcheck"]
PARTS = FIRST + SECOND
SOURCES = ("setup.py", "mpkernels/a.py", "csrc/a.cuh", "tests/a.py")
# Instead of python3: a machine with a GPU, on which everything passes at once but what is named.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *get_device_name*) echo "a GPU" ;;
  *xdist*) exit 1 ;;
  *$SLOW*) echo "$*"; trap "" TERM; sleep 30 & wait; sleep 30 ;;
  *$FAILING*) echo "the GPU is in an error"; exit 3 ;;
  *$SKIPPED*) echo "9 skipped in 1 s" ;;
  '-m pytest '*) echo "$*"; echo "9 passed in 1 s" ;;
  *cuda_why_not*) echo loads ;;
  *) echo "$*, by ${MPKERNELS_BACKEND:-auto}" ;;
esac
"""


def device_sh(*arguments: str, script: Path = SCRIPT, **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable} | more
    return subprocess.run(["bash", str(script), *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def on_a_gpu(tmp_path):
    """on_a_gpu(part, ..., slow=..., failing=...): the script's own flow of control on the fake machine; (code, lines)."""
    for name in ("bench", "mpkernels", "csrc", "tests"):
        (tmp_path / name).mkdir()
    for name in SOURCES:
        (tmp_path / name).write_text("before")
    for name, text in (("python", FAKE_PYTHON), ("compute-sanitizer", '#!/bin/bash\nshift 4; "$@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "bench/device.sh"
    script.write_text(SCRIPT.read_text().replace("GRACE=5", "GRACE=1").replace("[race]=35", "[race]=1"))

    def run(*parts, slow="nothing", failing="nothing", skipped="nothing"):
        found = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
        words = {"SLOW": slow, "FAILING": failing, "SKIPPED": skipped}
        done = device_sh("--out", str(tmp_path / "out"), *parts, script=script, **found, **words)
        return done.returncode, done.stdout.splitlines()

    return run


def outcomes(lines: list[str]) -> list[str]:
    return [line.split(",")[0] for line in lines]


def logs(out: Path) -> dict[str, str]:
    with tarfile.open(out / "log.tgz") as file:
        return {Path(m.name).stem: file.extractfile(m).read().decode() for m in file.getmembers() if m.isfile()}


def test_device_sh_lists_its_parts():
    """With their seconds: 300 at most in the first half, under 500 in all. What they name is there."""
    done = device_sh("--list")
    assert done.returncode == 0
    found = {line.split(",")[0]: int(re.search(r", (\d+) s:", line).group(1)) for line in done.stdout.splitlines()}
    assert list(found) == PARTS
    assert sum(found[part] for part in FIRST) <= 300
    assert sum(found.values()) < 500
    files = re.findall(r"\btests/[\w/]+\.py", done.stdout)
    braces = re.search(r"tests/ops/{\S*}\.py", done.stdout).group()
    expanded = subprocess.run(["bash", "-c", f"echo {braces}"], capture_output=True, text=True, check=True).stdout
    files += expanded.split()
    assert len(files) >= 8
    for module in re.findall(r"-m ((?:bench|tests)\.[\w.]+)", done.stdout):
        files.append(module.replace(".", "/") + ".py")
    assert not [file for file in files if not (SCRIPT.parents[1] / file).exists()]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["unheard-of"], "no part unheard-of"), (["--fast"], "usage:"), (["--out"], "--out needs")]
)
def test_device_sh_refuses(arguments, message):
    done = device_sh(*arguments)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_sh_without_a_gpu_fails_and_says_so(tmp_path):
    done = device_sh("--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{part}: there is no GPU" for part in PARTS]
    assert (tmp_path / "device.txt").read_text() == ""


def test_device_sh_runs_every_part_once(on_a_gpu, tmp_path):
    """Again only what is named, or everything where a source has changed: with or without git, committed or not."""
    code, lines = on_a_gpu()
    assert code == 0
    assert outcomes(lines) == [f"{part}: passed" for part in PARTS]
    assert lines == (tmp_path / "out/device.txt").read_text().splitlines()
    assert set(logs(tmp_path / "out")) == set(PARTS)
    assert len(list((tmp_path / "out").iterdir())) <= 8
    (tmp_path / "README.md").write_text("no source")
    assert on_a_gpu() == (0, [f"{part}: passed before" for part in PARTS])
    assert outcomes(on_a_gpu("second", "probes")[1]) == [f"{part}: passed" for part in (*SECOND, "probes")]
    for name in SOURCES:
        (tmp_path / name).write_text("after")
        assert outcomes(on_a_gpu()[1]) == [f"{part}: passed" for part in PARTS]


def test_device_sh_says_what_a_part_found(on_a_gpu):
    """Its last line; that tests were skipped is no success."""
    code, lines = on_a_gpu("step", "native", "build", "triton", skipped="-m gpu")
    assert code == 1
    assert re.fullmatch(r"step: passed, \d+ s, a GPU, of \w{12}: -m bench.race step .*, by grad_stats_=native,.*", lines[0])
    assert lines[1].endswith(": 9 passed in 1 s")
    assert lines[2].endswith(": the library that is there loads")
    assert lines[3].startswith("triton: FAILED")
    assert lines[3].endswith(": 9 skipped in 1 s")


def test_device_sh_goes_on_after_a_hang_and_an_error(on_a_gpu, tmp_path):
    """One that does not even end when it is asked to; the next call runs these two alone."""
    code, lines = on_a_gpu("sweep", "race", "step", slow="race gemm", failing="device.sweep")
    assert code == 1
    assert outcomes(lines) == ["sweep: FAILED (3)", "race: CUT OFF", "step: passed"]
    assert lines[0].endswith(": the GPU is in an error")
    assert logs(tmp_path / "out")["race"].startswith("-m bench.race gemm")
    code, lines = on_a_gpu()
    assert code == 0
    assert [line.split(":")[0] for line in lines if line.endswith("passed before")] == ["step"]


def test_device_sh_builds_a_library_where_none_loads(on_a_gpu, tmp_path):
    text = FAKE_PYTHON.replace("*cuda_why_not*) echo loads", "*cuda_why_not*) [ -f built ] && echo loads || echo none")
    builds = '  *setup.py*) echo "$TORCH_CUDA_ARCH_LIST: $*" | tee built ;;\n  *) echo'
    (tmp_path / "python").write_text(text.replace("\n  *) echo", "\n" + builds))
    assert outcomes(on_a_gpu("build")[1]) == ["build: passed"]
    assert (tmp_path / "built").read_text() == "9.0a: setup.py -q build_ext --inplace\n"


@pytest.mark.skipif(torch.version.cuda is not None, reason="it would ask for a GPU")
def test_device_sh_asks_the_library_what_it_lacks():
    """What it runs in Python is there, though a fake answers above."""
    program = re.search(r'local why_not="(.*)"', SCRIPT.read_text()).group(1)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] in ("this torch is built without CUDA", native.why_not())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_sh_proves_by_the_command(tmp_path):
    """What it runs in Python is there: the module, the limit that it sets, and the command's option."""
    program = re.search(r'-c "\n(import importlib.*?)" prove --out', SCRIPT.read_text(), re.DOTALL).group(1)
    command = [sys.executable, "-c", program, "prove", "--out", str(tmp_path / "verdicts.json")]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("there is no GPU here")
    assert isinstance(importlib.import_module("mpkernels.prove").LIMIT, float)


# ----- what the parts run ---------------------------------------------------------------


class Ops:
    """The GEMM's three operators in torch, as the sweep calls them. wrong: what is wrong with them."""

    def __init__(self, wrong: str = ""):
        self.wrong, self.calls = wrong, 0

    def write(self, out, result, operand):
        self.calls += 1
        out.copy_(result)
        if self.wrong == "second run" and self.calls % 2:
            out[0, 0] += 1
        elif self.wrong == "NaN":
            out[-1, -1] = torch.nan
        elif self.wrong == "past the end":
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1)
        elif self.wrong == "operand":
            operand[0, 0] = 9

    def parts(self, a, b, out, splits):
        """Of a @ b, as the kernels lay them out."""
        rows = out.shape[0] // splits
        result = torch.zeros(out.shape, dtype=torch.float64)
        for i, (left, right) in enumerate(zip(a.chunk(splits, 1), b.chunk(splits), strict=True)):
            result[i * rows : i * rows + a.shape[0]] = left.double() @ right.double()
        return result

    def linear_act_fprop(self, x, weight, bias, relu, out, mask, block_n, cluster, blocks, ping_pong, splits):
        exact = self.parts(x, weight.t(), out, splits) + (0 if bias is None else bias.double())
        self.write(out, exact.relu() if relu else exact, x)
        if mask is not None:
            mask.copy_(sweep.pack(exact > 0) ^ (self.wrong == "mask"))

    def linear_act_dgrad(self, grad_z, weight, mask, out, sums, block_n, cluster, blocks, ping_pong, splits):
        exact = self.parts(grad_z, weight, out, splits)
        if mask is not None:
            exact *= torch.from_numpy(linear_act_cases.bits_of(mask, exact.shape[1])[:, : exact.shape[1]])
        self.write(out, exact, grad_z)
        for i in range(0 if sums is None else sums.shape[0]):
            sums[i] = exact[64 * i : 64 * (i + 1)].sum(0) + (self.wrong == "sums")

    def linear_act_wgrad(self, grad_z, x, out, splits, *config):
        self.write(out, self.parts(grad_z.t(), x, out, splits), grad_z)

    def linear_act_sum(self, parts, out, bias=None, relu=False, mask=None):
        exact = parts.double().sum(0) + (0 if bias is None else bias.double())
        out.copy_(exact.relu() if relu else exact)
        if mask is not None:
            mask.copy_(sweep.pack(exact > 0))


def test_sweep_finds_nothing_wrong_with_what_is_right():
    ops = Ops()
    assert sweep.sweep(ops, torch.device("cpu"), len(sweep.CONFIGS), max_size=150) == []
    assert ops.calls == 2 * 3 * len(sweep.CONFIGS)


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [("second run", 1), ("NaN", 0), ("past the end", 2), ("operand", 3), ("mask", 0), ("sums", 0)],
)
def test_sweep_notices(wrong, fact):
    found = sweep.sweep(Ops(wrong), torch.device("cpu"), 4, max_size=150)
    assert any(line.endswith(sweep.FACTS[fact]) for line in found), found


def test_sweep_of_the_kernels_on_the_host():
    """The kernels' own source, by tests/emulator: every tile, cluster and split once or twice."""
    reason = host_kernels.why_not()
    if reason is not None:
        pytest.skip(reason)
    host_kernels.library("mpkernels_hopper").host_seed(1)
    ops = host_kernels.HostOps(library="mpkernels_hopper")
    assert sweep.sweep(ops, torch.device("cpu"), 8, max_size=130, blocks=4) == []


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_race_says_who_is_faster(backend, monkeypatch, tmp_path):
    if forward_op.why_not(backend, torch.device("cpu"), torch.float16) is not None:
        pytest.skip("the library is not built")
    monkeypatch.setattr(race, "SHAPES", ((24, 40, 16),))
    monkeypatch.setattr(race, "STEPS", ((64, 2),))
    file = tmp_path / "rows.jsonl"
    said = [line for what in ("gemm", "step") for line in race.run(what, torch.device("cpu"), backend, file, rounds=1)]
    names = [*(f"{role} M=24 K=40 N=16" for role in ("fprop", "dgrad", "wgrad")), "step of 6e+01 in 2"]
    assert [line.split(":")[0] for line in said] == names
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["part"] for row in found} == {"gemm", "step"}
    for case in {row["case"] for row in found}:
        assert {"mpkernels", race.COPY} < {row["implementation"] for row in found if row["case"] == case}
    assert all(row["us_p50"] > 0 for row in found)


def test_race_implementations_compute_the_same():
    """Ours and the first of torch's, role by role: shapes and signs."""
    torch.manual_seed(0)
    for role in ("fprop", "dgrad", "wgrad"):
        runs = race.gemm(role, 24, 40, 16, torch.device("cpu"), "eager")
        ours, theirs = (runs[name]() for name in list(runs)[:2])
        got = ours[{"fprop": 0, "dgrad": 0, "wgrad": 1}[role]]
        right = theirs[0] if isinstance(theirs, tuple) else theirs
        assert got.shape == right.shape
        assert torch.equal(got > 0, right > 0)


def test_race_asks_the_decisive_first():
    assert race.SHAPES[:3] == ((8192, 8192, 8192), (4096, 4096, 4096), (4096, 1024, 4096))
    assert race.STEPS[0] == (10**8, 300)
    assert {n for n, _ in race.STEPS} == {10**6, 10**7, 10**8, 10**9}
    assert {tensors for _, tensors in race.STEPS} == {1, 300, 10_000}


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
