# SPDX-License-Identifier: Apache-2.0
"""Result rows: one JSON line per case and implementation, with the machine, the versions, the commit and the date.

docs/methodology.md says what the keys are.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import mpkernels
from mpkernels.runtime.resolve import ops

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device) -> dict[str, object]:
    """What a result depends on."""
    return {
        **machine(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "mpkernels": mpkernels.__version__,
        "backends": {name: op.backend(device, torch.float16) for name, op in sorted(ops.items())},
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def machine(device: torch.device) -> dict[str, object]:
    """The device by name, and how busy it is."""
    found = {"device": cpu(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    if device.type == "cuda":
        query = "clocks.sm,clocks.mem,power.draw,driver_version"
        answer = run("nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={query}", "--format=csv,noheader,nounits")
        values = dict(zip(("sm_mhz", "memory_mhz", "watts", "driver"), map(str.strip, answer.split(",")), strict=False))
        found = found | {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, **values}
    return found


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor could take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].removesuffix("kB")) * 1024


def cpu() -> str:
    """Vendor's name, family and model: the name alone does not tell one generation from the next."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(reversed([map(str.strip, line.split(":", 1)) for line in lines if ":" in line]))
    return f"{fields.get('model name', platform.processor())} family {fields.get('cpu family')} model {fields.get('model')}"


def git(*arguments: str) -> str:
    """What git says of this checkout, or nothing."""
    return run("git", "-C", str(Path(__file__).parent), *arguments)


def run(*command: str) -> str:
    """What a command prints, or nothing where it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def python(*arguments: str) -> str:
    """What Python prints that runs in a process of its own, in this checkout. Raises RuntimeError where it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def _version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def read(*paths: Path) -> list[dict]:
    """The rows of these files."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def merge(path: Path, rows: list[dict]) -> None:
    """Write `rows` into a file of rows, in place of those of the same cases."""
    new = {row["case"] for row in rows}
    kept = [row for row in read(path) if row["case"] not in new] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept + rows))
