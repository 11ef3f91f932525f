# SPDX-License-Identifier: Apache-2.0
"""The proof itself: on this CPU for real, in a process of its own, and with fakes of that process that die or hang."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

import mpkernels as mpk
from mpkernels import __main__ as command
from mpkernels.runtime import cache, proof, resolve
from mpkernels.runtime.proof import Verdict
from mpkernels.testing import child

module = sys.modules["mpkernels.prove"]  # the attribute mpkernels.prove is the function
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ITEMS = [("update_scale_", "eager"), ("grad_stats_", "eager"), ("sgd_", "eager")]

# Instead of mpkernels.testing.child: it says what its first lines say, and at the op SCRIPT names does what that is.
FAKE_CHILD = """
import json, os, signal, sys, time
path, (device, todo, paths, full) = json.loads(sys.argv[1])
print("a line of another program", flush=True)
for op, backend in todo:
    row = {"op": op, "backend": backend, "device": "cpu", "key": op, "kept": True, "note": "", "speeds": {}, "date": "today"}
    print(json.dumps(row | {"state": "started"}), flush=True)
    if op == "grad_stats_":
        %s
    print(json.dumps(row | {"state": "right"}), flush=True)
    if op == os.environ.get("ENDS_AFTER"):
        os._exit(3)
"""


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path):
    """A cache and a lock of this test's own; three items."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "items", lambda device, full: iter(ITEMS))
    monkeypatch.setattr(cache, "_warned", set())
    proof._read.clear()
    yield
    proof._read.clear()


def with_child(monkeypatch, what: str) -> list[tuple[str, str]]:
    monkeypatch.setattr(module, "_CHILD", FAKE_CHILD % what)
    return [(row["state"], row["note"]) for row in mpk.prove("cpu")]


def test_prove_runs_in_a_process_and_remembers(tmp_path, capfd):
    rows = mpk.prove("cpu", out=tmp_path / "out.json")
    assert [(row["op"], row["backend"], row["state"]) for row in rows] == [(*item, "right") for item in ITEMS]
    assert [line.split(": ", 1)[1] for line in capfd.readouterr().err.splitlines()] == [
        f"{i + 1} of 3: {op}, {backend}" for i, (op, backend) in enumerate(ITEMS)
    ]
    for path in (proof.own_file(), tmp_path / "out.json"):
        kept = proof.load(path)
        assert [verdict.state for verdict in kept.values()] == ["right"] * 3
        op = resolve.ops["sgd_"]
        assert proof.key(op.name, op.package, "eager", CPU) in kept


def test_prove_tells_what_is_wrong(monkeypatch, capsys):
    """In the child's own words, in the file, in the table and by the exit code."""
    from mpkernels.testing import checks

    monkeypatch.setattr(checks, "wrong", lambda op, *_, **__: "off by one" if op.name == "sgd_" else None)
    monkeypatch.setattr(checks, "race", lambda *_: {"small": 1.5})
    for op, backend in ITEMS:
        child.prove_one(op, backend, CPU, [proof.own_file()], False)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["state"] for row in rows] == ["started", "right"] * 2 + ["started", "wrong"]
    monkeypatch.setattr(module, "prove", lambda *_, **__: [row for row in rows if row["state"] != "started"])
    assert module.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "wrong: off by one" in printed
    assert "sizes of grad_stats_: small" in printed
    assert {verdict.state for verdict in proof.load(proof.own_file()).values()} == {"right", "wrong"}


@pytest.mark.parametrize(
    ("what", "note"),
    [
        ("os._exit(7)", "the process ended with code 7"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended by signal 11"),
        ("raise SystemExit('Xid 31')", "the process ended with code 1: Xid 31"),
    ],
)
def test_prove_survives_a_process_that_dies(what, note, monkeypatch):
    """It counts as a crash of what was begun; another process goes on behind it."""
    assert with_child(monkeypatch, what) == [("right", ""), ("crashed", note), ("right", "")]
    assert proof.load(proof.own_file())["grad_stats_"].state == "crashed"


def test_prove_survives_a_process_that_hangs(monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 3.0)
    began = time.monotonic()
    found = with_child(monkeypatch, "time.sleep(600)")
    assert found == [("right", ""), ("crashed", "no answer for 3 s"), ("right", "")]
    assert time.monotonic() - began < 60


def test_prove_ends_what_the_process_started(monkeypatch, tmp_path):
    """The whole group, not the process alone."""
    monkeypatch.setattr(module, "LIMIT", 3.0)
    start = "import subprocess; p = subprocess.Popen(['sleep', '600']); "
    start += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    with_child(monkeypatch, start)
    pid = int((tmp_path / "pid").read_text())
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    assert state.strip()[:1] in ("", "Z")


def test_prove_goes_on_where_a_process_ended_between_two(monkeypatch):
    """As it does itself after an error that sticks to its context."""
    monkeypatch.setenv("ENDS_AFTER", "update_scale_")
    assert with_child(monkeypatch, "pass") == [("right", "")] * 3


def test_prove_keeps_what_was_found_where_no_other_process_begins(monkeypatch, tmp_path):
    """The GPU is lost, say: the rest is not now."""
    once = (
        f"path = {str(tmp_path / 'begun')!r}\nimport os\nif os.path.exists(path): raise SystemExit('lost')\nopen(path, 'w')\n"
    )
    monkeypatch.setattr(module, "_CHILD", once + FAKE_CHILD % "os._exit(7)")
    assert [row["state"] for row in mpk.prove("cpu")] == ["right", "crashed", "not now"]
    (tmp_path / "begun").unlink()
    assert "not now: prove: the process that proves did not begin: the process ended with code 1: lost" in module.table(
        mpk.prove("cpu"), CPU
    )


def test_prove_says_that_the_process_did_not_begin(monkeypatch):
    monkeypatch.setattr(module, "_CHILD", "raise ImportError('no numpy')")
    with pytest.raises(RuntimeError, match="did not begin: the process ended with code 1: ImportError: no numpy"):
        mpk.prove("cpu")


def test_prove_interrupted_is_no_crash(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        with_child(monkeypatch, "pass")
    assert proof.load(proof.own_file())["update_scale_"] == Verdict("not now", "interrupted")


def test_prove_waits_longer_for_the_beginning(monkeypatch):
    """A process imports torch before it says anything."""
    monkeypatch.setattr(module, "LIMIT", 0.5)
    monkeypatch.setattr(module, "_CHILD", "import time; time.sleep(1)" + FAKE_CHILD % "pass")
    assert [row["state"] for row in mpk.prove("cpu")] == ["right"] * 3
    monkeypatch.setattr(module, "BEGIN", 0.5)
    with pytest.raises(RuntimeError, match="did not begin: no answer for 0 s"):
        mpk.prove("cpu")


def test_prove_started_alone_is_a_crash():
    """Of a machine that went down with it: not tried again until a proof is asked for."""
    assert not Verdict("started").right
    assert str(Verdict("started")).startswith("crashed")


# ----- the process itself ---------------------------------------------------------------


def prove_one(capsys, name="update_scale_", not_now=None) -> list[dict]:
    child.prove_one(name, "eager", CPU, [proof.own_file()], False, not_now)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_child_holds_8_bits_apart(monkeypatch, capsys):
    """Of an implementation whose 8-bit sums are wrong the rest is right."""
    op = resolve.ops["linear_act"]
    right = op.function("eager")

    def function(x, *others):
        out, *rest = right(x, *others)
        return (out + (out.abs().amax() + 1 if x.dtype.itemsize == 1 else 0), *rest)

    monkeypatch.setattr(op, "function", lambda backend: function)
    states = {part: prove_one(capsys, part)[-1]["state"] for part in op.parts}
    assert states == {"linear_act": "right", "linear_act 8-bit": "wrong"}


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RuntimeError("PTX does not compile"), "crashed"),
        (torch.OutOfMemoryError("2 GB"), "not now"),
        (MemoryError(), "crashed"),
    ],
)
def test_child_tells_errors_apart(error, state, monkeypatch, capsys):
    """Out of memory says nothing of a kernel."""
    from mpkernels.testing import checks

    def wrong(*_, **__):
        raise error

    monkeypatch.setattr(checks, "wrong", wrong)
    assert [row["state"] for row in prove_one(capsys)] == ["started", state]
    assert [verdict.state for verdict in proof.load(proof.own_file()).values()] == [state]


def test_child_that_has_no_memory_for_a_race_keeps_what_is_right(monkeypatch, capsys):
    from mpkernels.testing import checks

    def race(*_):
        raise torch.OutOfMemoryError("2 GB")

    monkeypatch.setattr(checks, "race", race)
    assert [(row["state"], row["speeds"]) for row in prove_one(capsys)] == [("started", {}), ("right", {})]


def test_child_without_a_gpu_at_the_moment_leaves_verdicts(capsys):
    assert [row["state"] for row in prove_one(capsys)] == ["started", "right"]
    (row,) = prove_one(capsys, not_now="in exclusive use")
    assert (row["state"], row["note"]) == ("not now", "in exclusive use")
    assert [verdict.state for verdict in proof.load(proof.own_file()).values()] == ["right"]


def test_child_writes_before_it_begins(monkeypatch, capsys):
    from mpkernels.testing import checks

    seen = []
    monkeypatch.setattr(checks, "wrong", lambda *_, **__: seen.extend(proof.load(proof.own_file()).values()))
    prove_one(capsys)
    assert [verdict.state for verdict in seen] == ["started"]


def test_child_is_heard_before_it_dies():
    """Its output is a pipe, whose buffer would be lost."""
    lines = [
        "import os",
        "from mpkernels.testing import checks, child",
        "checks.wrong = lambda *_, **__: os._exit(7)",
        "child.main('cpu', [['update_scale_', 'eager']], [], False)",
    ]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False, env=buffered)
    assert (done.returncode, json.loads(done.stdout)["state"]) == (7, "started")


@pytest.mark.parametrize("full", [False, True])
def test_child_asks_for_memory_first(full, monkeypatch):
    capped = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: capped.append(share))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 30, 128 << 30))
    assert child._not_now(GPU, full) is None
    assert capped == [24 / 128 if full else 1 / 128]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 128 << 30))
    assert child._not_now(GPU, full) == f"needs {24 * 1024 if full else 1024} MB of memory, 1 are free"

    def exclusive(device):
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "mem_get_info", exclusive)
    assert child._not_now(GPU, full).startswith("the GPU cannot be used: CUDA-capable device")


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [(None, 1, "GPU-uuid-1"), ("3,5", 1, "5"), ("GPU-a, MIG-b", 1, "MIG-b"), ("", 0, "GPU-uuid-0")],
)
def test_child_sees_one_gpu_and_no_job(visible, index, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LD_PRELOAD", "CUDA_INJECTION64_PATH", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv(resolve.ENVIRONMENT_VARIABLE, "eager")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    properties = lambda device: type("Properties", (), {"uuid": f"uuid-{device.index}", "name": name})
    name = "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    found = module.environment(torch.device("cuda", index))
    assert found["CUDA_VISIBLE_DEVICES"] == expected
    assert found["XDG_CACHE_HOME"] == os.environ["XDG_CACHE_HOME"]
    left = {
        name for name in found if name.startswith(("RANK", "WORLD", "MASTER", "LD_PRE", "CUDA_INJ", "TORCHEL", "MPKERNELS"))
    }
    assert not left


# ----- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("busy", "match"),
    [("torch.compiler.is_compiling", "under torch.compile"), ("torch.cuda.is_current_stream_capturing", "graph is captured")],
)
def test_prove_refuses_where_it_cannot_run(busy, match, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(busy, lambda: True)
    with pytest.raises(RuntimeError, match=match):
        mpk.prove(GPU)


def test_prove_refuses_mps(monkeypatch):
    """A fault would reach its other clients."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps")
    with pytest.raises(RuntimeError, match="mps=True"):
        mpk.prove(GPU)
    module._refuse(GPU, mps=True)


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_prove_refuses_other_devices(device):
    with pytest.raises(ValueError, match=f"must be a CPU or a GPU of NVIDIA, got {device}"):
        mpk.prove(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_prove_without_a_gpu(capsys):
    with pytest.raises(RuntimeError, match="there is no GPU here"):
        mpk.prove("cuda")
    assert module.main([]) == 0
    assert "there is no GPU here" in capsys.readouterr().out


LOCK = """
import sys
from mpkernels import prove
with sys.modules["mpkernels.prove"]._lock(sys.modules["torch"].device("cpu")):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_prove_is_alone(monkeypatch, tmp_path):
    """While another process proves; one that was killed holds nothing back."""
    monkeypatch.setattr(module, "_CHILD", FAKE_CHILD % "pass")
    other = subprocess.Popen(
        [sys.executable, "-c", LOCK], env=os.environ | {"TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(RuntimeError, match=f"another process proves on cpu; {tmp_path}/.*-cpu0.lock is its lock"):
        mpk.prove("cpu")
    other.kill()
    other.communicate()
    assert len(mpk.prove("cpu")) == 3


def test_prove_where_its_lock_is_not_its_own(tmp_path):
    """A link that another user has made, say."""
    (tmp_path / f"mpkernels-prove-{os.getuid()}-cpu0.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="its lock, does not open"):
        mpk.prove("cpu")
    assert not (tmp_path / "elsewhere").exists()


def test_prove_where_the_cache_cannot_be_written(monkeypatch, tmp_path, capfd):
    """Rows come back all the same, and it says so."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(module, "items", lambda device, full: iter(ITEMS[:1]))
    assert [row["state"] for row in mpk.prove("cpu")] == ["right"]
    assert f"prove: {proof.own_file()} cannot be written" in capfd.readouterr().err


def test_prove_names_the_file_that_cannot_be_written(monkeypatch, tmp_path, capfd):
    """A cache that others can write is left alone; the file that the user named is written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    proof.own_file().parent.mkdir(parents=True)
    proof.own_file().parent.chmod(0o777)
    monkeypatch.setattr(module, "items", lambda device, full: iter(ITEMS[:1]))
    mpk.prove("cpu", out=tmp_path / "verdicts.json")
    said = capfd.readouterr().err
    assert f"prove: {proof.own_file()} cannot be written" in said
    assert "verdicts.json or" not in said
    assert (tmp_path / "verdicts.json").exists()


# ----- what is proven, and the command ---------------------------------------------------------------


TOOL = """#!{python}
import sys
assert sys.argv[1:5] == ["--tool", "memcheck", "--error-exitcode", "9"] and sys.argv[6:8] == ["-I", "-c"], sys.argv
print("========= COMPUTE-SANITIZER")
if '"sgd_"' in sys.argv[-1]:
    print("========= Invalid __global__ read of size 4 bytes\\n=========     at sgd_kernel")
    sys.exit(9)
sys.exit(1 if '"grad_stats_"' in sys.argv[-1] else 0)
"""


def asked_for_memcheck(ops: list[str], tmp_path) -> list[dict]:
    rows = [{"op": op, "backend": "native", "key": op, "device": "cuda", "kept": True} for op in ops]
    rows = [row | Verdict("right", speeds={"1": 2.0}, date="today")._asdict() for row in rows]
    module._memcheck(rows, GPU, [tmp_path / "verdicts.json"])
    return rows


def test_prove_asks_memcheck(monkeypatch, tmp_path):
    """A tool on PATH that finds something in one op, ends otherwise for another, and nothing for a third."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "environment", lambda device: dict(os.environ))
    rows = asked_for_memcheck(["adamw_", "sgd_", "grad_stats_"], tmp_path)
    found = "Invalid __global__ read of size 4 bytes"
    failed = "compute-sanitizer ended with code 1: ========= COMPUTE-SANITIZER"
    assert [(row["state"], row["memcheck"]) for row in rows] == [("right", "clean"), ("wrong", found), ("right", failed)]
    kept = proof.load(tmp_path / "verdicts.json")
    assert {key: (verdict.state, verdict.note) for key, verdict in kept.items()} == {"sgd_": ("wrong", f"memcheck: {found}")}
    shown = module.table(rows, GPU)
    assert "right; memcheck: clean" in shown
    assert f"wrong: memcheck: {found}" in shown
    assert module.takes_first(rows, "sgd_", GPU) == "eager"


def test_prove_without_memcheck_says_so_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = asked_for_memcheck(["adamw_", "sgd_"], tmp_path)
    assert capsys.readouterr().err == "prove: compute-sanitizer is not on PATH, so memcheck was not asked\n"
    assert [row["state"] for row in rows] == ["right"] * 2


@pytest.mark.parametrize("op", sorted(resolve.ops))
def test_memcheck_runs_a_case(op):
    """On this CPU, what runs under the tool."""
    from mpkernels.testing import memcheck

    memcheck.run_case(op, "eager", "cpu")


def test_prove_leaves_tritons_gemm_to_full(monkeypatch):
    monkeypatch.undo()
    for op in resolve.ops.values():
        monkeypatch.setattr(op, "why_not", lambda backend, device, dtype: None)
    usual, full = set(module.items(GPU, False)), set(module.items(GPU, True))
    assert full - usual == {("linear_act", "triton"), ("linear_act 8-bit", "triton"), ("linear_act_backward", "triton")}
    assert usual >= {(part, backend) for part in resolve.parts() for backend in ("native", "eager")}


def test_prove_table_shows_what_auto_takes(monkeypatch):
    right = {"state": "right", "note": "", "date": "today", "op": "sgd_"}
    rows = [
        right | {"backend": "native", "speeds": {"1e5": 0.5, "1e6": 0.5}},
        right | {"backend": "triton", "speeds": {"1e5": 1.5, "1e6": 1.25}},
        right | {"backend": "eager", "speeds": {}},
    ]
    rows += [right | {"op": "grad_stats_", "backend": "eager", "speeds": {}}]
    lines = module.table(rows, GPU).splitlines()
    assert [("takes" in line) for line in lines] == [False, False, True, False, True, False]
    assert "1.50  1.25" in lines[2]
    assert lines[-1] == "sizes of sgd_: 1e5, 1e6"


def test_prove_command(monkeypatch, capsys):
    monkeypatch.setattr(module, "items", lambda device, full: iter(ITEMS[:1]))
    monkeypatch.setattr(sys, "argv", ["mpkernels", "prove", "--device", "cpu"])
    assert command.main() == 0
    assert "update_scale_" in capsys.readouterr().out
    assert module.main(["--device", "xpu"]) == 1
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--full", "--out FILE", "--device", "--mps", resolve.VERDICTS_VARIABLE))
