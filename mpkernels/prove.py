# SPDX-License-Identifier: Apache-2.0
"""Prove the implementations on this GPU: each is held against fp64 and raced with eager, in a process of its own.

`python -m mpkernels prove` or `mpk.prove()`. Verdicts go to the user's cache; `auto` takes what is right there, and nothing
that is not: see mpkernels/runtime/proof.py. A kernel that crashes or hangs ends the process that proves, not this one.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mpkernels.runtime import cache, proof, resolve
from mpkernels.runtime.proof import Verdict

LIMIT, LIMIT_FULL = 120.0, 900.0  # seconds without a word from the process that proves
BEGIN = 120.0  # seconds that it may take to begin: it imports torch and makes a context
GRACE = 5.0  # seconds after which a process that was killed is left alone: one in the driver cannot be waited for

# In the process that proves: what the launcher of a job set, what would be preloaded into it, and what this package reads.
_REMOVED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_INJECTION64_PATH",
    "LD_PRELOAD", "CUDA_LAUNCH_BLOCKING", resolve.ENVIRONMENT_VARIABLE, resolve.VERDICTS_VARIABLE,
)  # fmt: skip
_CHILD = """
import json, sys
sys.path[:], arguments = json.loads(sys.argv[1])
from mpkernels.testing import child
child.main(*arguments)
"""


def prove(
    device: torch.device | str | None = None, full: bool = False, *, out: str | os.PathLike | None = None, mps: bool = False
) -> list[dict[str, Any]]:
    """Hold every implementation against fp64 on `device`, remember the verdicts, and return them, a dict for each.

    device: by default the current GPU. full: Triton's GEMM, every size, offsets past 2^31, memcheck; minutes, 24 GB of memory.
    out: a file for the verdicts besides the user's cache, which MPKERNELS_VERDICTS may name elsewhere. mps: also where
    NVIDIA's MPS serves several processes, which a kernel that fails would take with it.
    What crashed before is tried again. A process that has chosen its kernels already keeps them.
    Raises RuntimeError under torch.compile, in CUDA graph capture, under MPS, on Windows, and while another process proves.
    """
    device = _device(device)
    _refuse(device, mps)
    todo = list(items(device, full))
    paths = [proof.own_file(), *([Path(out).absolute()] if out is not None else [])]
    rows = []
    with _lock(device):
        while todo:
            try:
                found = _prove_in_child(device, todo, paths, full, len(rows))
            except RuntimeError as error:
                if not rows:
                    raise
                found = [_not_now(op, backend, device, str(error)) for op, backend in todo]  # as where the GPU is lost
            rows += found
            todo = todo[len(found) :]
        if full and device.type == "cuda":
            _memcheck(rows, device, paths)
    if not all(row["kept"] for row in rows):
        untrusted = cache.untrusted_reason()
        files, reason = (paths[:1], untrusted) if untrusted else (paths, "disk full or permission denied")
        print(f"prove: {' or '.join(map(str, files))} cannot be written: {reason}", file=sys.stderr)
    return rows


def _not_now(op: str, backend: str, device: torch.device, note: str) -> dict[str, Any]:
    more = {"op": op, "backend": backend, "device": str(device), "kept": True}
    return Verdict("not now", proof.sentence(note))._asdict() | more


def _device(device) -> torch.device:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"prove: device must be a CPU or a GPU of NVIDIA, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("prove: there is no GPU here")
    return proof.indexed(device)


def _refuse(device: torch.device, mps: bool) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("prove: cannot run under torch.compile; call it before")
    if not hasattr(os, "killpg"):  # Windows
        raise RuntimeError("prove: ends a process that hangs with all that it started, which this system cannot: use Linux")
    if device.type != "cuda":
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("prove: cannot run while a CUDA graph is captured; call it before the capture")
    if not mps and _is_shared_by_mps():
        raise RuntimeError(
            "prove: MPS serves this GPU to several processes, and a kernel that fails would end them all; "
            "pass mps=True (--mps) where none of them matters"
        )


def _is_shared_by_mps() -> bool:
    return "CUDA_MPS_PIPE_DIRECTORY" in os.environ or Path("/tmp/nvidia-mps/control").exists()


def items(device: torch.device, full: bool) -> Iterator[tuple[str, str]]:
    """Part of the cases and implementation of what can run there; eager too, which is what the others are raced with."""
    for part, op in resolve.parts().items():
        for backend in proof.PREFERENCE:
            gemm = op.name.startswith("linear") and backend == "triton"
            if op.why_not(backend, device, op.parts[part]) is None and (full or not gemm):
                yield part, backend


# ----- the process that proves ---------------------------------------------------------------


def _prove_in_child(device, todo, paths, full: bool, done: int) -> list[dict]:
    """Rows of the first items of `todo`: all, or up to one that ended the process or took too long."""
    limit = LIMIT_FULL if full else LIMIT
    where = "cuda:0" if device.type == "cuda" else "cpu"
    arguments = [sys.path, [where, todo, [str(path) for path in paths], full]]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, json.dumps(arguments)],
            env=environment(device), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
        rows, started = [], None
        try:
            while len(rows) < len(todo):
                try:
                    wait = limit if rows or started else max(limit, BEGIN)
                    line = lines.get(timeout=wait)
                except queue.Empty:
                    ending = f"no answer for {wait:.0f} s"
                    break
                if line is None:
                    ending = _ending(process, errors)
                    break
                row = json.loads(line)
                if row["state"] == "started":
                    started = row
                    _progress(done + len(rows), done + len(todo), row)
                else:
                    rows.append(row)
                    started = None
            else:
                return rows
        except KeyboardInterrupt:  # an interrupted proof is no crash
            if started is not None:
                _record(paths, started, Verdict("not now", "interrupted"))
            raise
        finally:
            _kill(process)
    if started is None and rows:  # it ended between two: the next process goes on
        return rows
    if started is None:
        raise RuntimeError(f"prove: the process that proves did not begin: {ending}")
    return [*rows, _record(paths, started, Verdict("crashed", proof.sentence(ending), date=time.strftime("%Y-%m-%d")))]


def _record(paths: list[Path], started: dict, verdict: Verdict) -> dict:
    """The row of what was started and did not end, written to the files."""
    more = {name: started[name] for name in ("op", "backend", "device")}
    kept = [proof.record(path, started["key"], verdict, **more) for path in paths]
    return started | verdict._asdict() | {"kept": all(kept)}


def _read_lines(stream, lines: queue.SimpleQueue) -> None:
    for line in stream:
        if line.startswith("{"):
            lines.put(line)
    lines.put(None)


def _memcheck(rows: list[dict], device: torch.device, paths: list[Path]) -> None:
    """Ask compute-sanitizer about what is right of C++: row["memcheck"]; what it finds makes the verdict wrong."""
    from mpkernels.testing import memcheck

    for row in rows:
        if (row["backend"], row["state"]) != ("native", "right"):
            continue
        command = memcheck.command(row["op"], row["backend"])
        if command is None:
            return print(f"prove: {memcheck.TOOL} is not on PATH, so memcheck was not asked", file=sys.stderr)
        process = subprocess.Popen(
            command, env=environment(device) | memcheck.ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=LIMIT_FULL)
            row["memcheck"] = found = memcheck.wrong(process.returncode, output) or "clean"
            if found != "clean":
                row.update(_record(paths, row, Verdict("wrong", f"memcheck: {proof.sentence(found)}", date=row["date"])))
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # of the tool, not of the kernel
            row["memcheck"] = proof.sentence(f"{error}")
        finally:
            _kill(process)


def _ending(process: subprocess.Popen, errors) -> str:
    """How it ended, with the last line that it wrote."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    errors.seek(0)
    last = errors.read()[-2000:].strip().splitlines()[-1:]
    code = process.returncode
    how = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    return f"the process {how}{': ' + last[0] if last else ''}"


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def environment(device: torch.device) -> dict[str, str]:
    """Of the process that proves: it sees the one GPU, and is no rank of a job."""
    found = {name: value for name, value in os.environ.items() if name not in _REMOVED and not name.startswith("TORCHELASTIC")}
    if device.type == "cuda":
        visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
        properties = torch.cuda.get_device_properties(device)
        if device.index < len(visible):
            found["CUDA_VISIBLE_DEVICES"] = visible[device.index]
        elif "MIG" not in properties.name:  # of a slice this is the whole GPU's; a process sees one slice at most
            found["CUDA_VISIBLE_DEVICES"] = f"GPU-{properties.uuid}"
        found.pop("TRITON_INTERPRET", None)
    return found


def _progress(done: int, total: int, row: dict) -> None:
    print(f"prove: {done + 1} of {total}: {row['op']}, {row['backend']}", file=sys.stderr, flush=True)


# ----- one at a time ---------------------------------------------------------------


@contextlib.contextmanager
def _lock(device: torch.device):
    """A file of this node that one process at a time locks; however that ends, its lock ends with it."""
    import fcntl  # Windows has none

    path = Path(tempfile.gettempdir(), f"mpkernels-prove-{os.getuid()}-{device.type}{device.index or 0}.lock")
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RuntimeError(f"prove: {path}, its lock, does not open ({error.strerror})") from None
    with os.fdopen(descriptor) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"prove: another process proves on {device}; {path} is its lock") from None
        yield


# ----- the command ---------------------------------------------------------------


def table(rows: list[dict], device: torch.device) -> str:
    """What was found: right or what was wrong, times eager's speed at each size, what `auto` takes."""
    lines = [f"{'op':22} {'backend':8} {'auto':5} {'times the speed of eager':36} verdict"]
    for row in rows:
        verdict = _verdict(row)
        speeds = "  ".join(f"{speed:.2f}" for speed in verdict.speeds.values())
        takes = "takes" if takes_first(rows, row["op"], device) == row["backend"] else ""
        asked = f"; memcheck: {row['memcheck']}" if verdict.right and "memcheck" in row else ""
        lines.append(f"{row['op']:22} {row['backend']:8} {takes:5} {speeds:36} {verdict}{asked}")
    for op in dict.fromkeys(row["op"] for row in rows):
        sizes = next((row["speeds"] for row in rows if row["op"] == op and row["speeds"]), {})
        if sizes:
            lines.append(f"sizes of {op}: {', '.join(sizes)}")
    return "\n".join(lines)


def takes_first(rows: list[dict], op: str, device: torch.device) -> str:
    """What `auto` takes by these verdicts; on a CPU it takes what the tests proved."""
    if device.type != "cuda":
        of = resolve.parts()[op]
        return of.backend(device, of.parts[op])
    right = {row["backend"] for row in rows if row["op"] == op and (verdict := _verdict(row)).right and not verdict.slow}
    return next((backend for backend in proof.PREFERENCE if backend in right), "eager")


def _verdict(row: dict) -> Verdict:
    return Verdict(*(row[name] for name in Verdict._fields))


def main(arguments: list[str]) -> int:
    """`python -m mpkernels prove`."""
    parser = argparse.ArgumentParser(prog="python -m mpkernels prove", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="Triton's GEMM, every size, beyond 2^31, memcheck; minutes")
    parser.add_argument("--out", metavar="FILE", help=f"write the verdicts there too; {resolve.VERDICTS_VARIABLE} reads it")
    parser.add_argument("--device", help="cuda:1, say, or cpu; by default the current GPU")
    parser.add_argument("--mps", action="store_true", help="also under NVIDIA's MPS, whose other clients a fault would end")
    options = parser.parse_args(arguments)
    if options.device is None and not torch.cuda.is_available():
        print("there is no GPU here; on a CPU the tests have proven what auto takes (--device cpu proves it again)")
        return 0
    try:
        device = _device(options.device)
        rows = prove(device, options.full, out=options.out, mps=options.mps)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows, device))
    return int(any(row["state"] in ("wrong", "crashed") for row in rows))
