# SPDX-License-Identifier: Apache-2.0
"""What is here, what works, and why the rest does not: `python -m mpkernels [--json]`.

On the CPU every implementation of every op is run and compared with fp64; of GPUs what `python -m mpkernels prove` found
there is shown, and nothing is run. Exit 1 if something computes wrongly. `tune` finds the fastest implementation of each
GEMM: see mpkernels/prove.py and mpkernels/tune.py.
"""

import argparse
import importlib
import json
import os
import platform
import sys

import torch

import mpkernels
from mpkernels.runtime import cache, native, resolve, tuned_table


def main() -> int:
    if sys.argv[1:2] in (["tune"], ["prove"]):
        return importlib.import_module(f"mpkernels.{sys.argv[1]}").main(sys.argv[2:])
    if sys.argv[1:2] in (["advise"], ["plan"]):
        return importlib.import_module("mpkernels.precision.command").main(sys.argv[1], sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m mpkernels",
        usage="%(prog)s [-h] [--json]\n       %(prog)s {prove,tune,advise,plan} [-h] ...",
        description=f"""{__doc__.splitlines()[0]}

commands:
  (none)  a table of versions, devices and implementations; on the CPU every one is run and
          compared with fp64, of GPUs the verdicts are shown; exit 1 if something is wrong
  prove   hold every implementation against fp64 on this GPU and remember the verdicts: what
          auto takes there
  tune    find the fastest implementation of each GEMM on this device and remember it;
          `python -m mpkernels tune --show` prints what is remembered
  advise  say which format each linear of a model should have
  plan    say which policy fits a memory budget

{resolve.ENVIRONMENT_VARIABLE}=auto, {", ".join(resolve.BACKENDS)} or op=backend,... forces implementations.
{resolve.VERDICTS_VARIABLE}=FILE names verdicts besides those of the user's cache.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    as_json = parser.parse_args().json
    try:
        forced = resolve.parse_setting(os.environ.get(resolve.ENVIRONMENT_VARIABLE, "auto"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    report = {"versions": versions(), "forced": forced, "implementations": implementations()}
    print(json.dumps(report, indent=1) if as_json else table(report))
    return int(any(row["state"] == "wrong" for row in report["implementations"]))


def versions() -> dict[str, str]:
    """Versions of what results depend on, and the devices."""
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError as error:
        triton = f"not installed ({error})"
    found = {
        "mpkernels": mpkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "native": native.why_not() or "loaded",
        "cache": cache.untrusted_reason() or str(cache.folder()),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, sm{properties.major}{properties.minor}, CUDA {torch.version.cuda}"
        found[f"tuned:{index}"] = tuned(torch.device("cuda", index), properties.name)
    return found


def tuned(device: torch.device, name: str) -> str:
    """How many problems the table of `device` answers, or that there is none."""
    count = len(tuned_table.load(device))
    return f"table of {count} problems for {name}" if count else f"no table for {name}: python -m mpkernels tune"


def implementations() -> list[dict[str, str]]:
    """A row per op or part of one, device and backend: `chosen`, `works`, `unproven`, `unavailable` or `wrong`, and a note."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return [
        {"op": part, "device": str(device), "backend": backend, **dict(zip(("state", "note"), state(part, device, backend)))}
        for part in resolve.parts()
        for device in devices
        for backend in resolve.BACKENDS
    ]


def state(part: str, device: torch.device, backend: str) -> tuple[str, str]:
    """State and note of one implementation: on a CPU after a run of it, on a GPU by its verdict."""
    op = resolve.parts()[part]
    reason = op.why_not(backend, device, op.parts[part])
    if reason is not None:
        return "unavailable", reason
    found, note = checked(part, device, backend) if device.type == "cpu" else proven(part, device, backend)
    if found != "works":
        return found, note
    try:
        chosen = op.backend(device, op.parts[part])
    except RuntimeError as error:
        return "works", str(error)
    return ("chosen" if backend == chosen else "works"), note


def checked(part: str, device: torch.device, backend: str) -> tuple[str, str]:
    """After a run of a few small cases."""
    from mpkernels.testing import checks

    try:
        wrong = checks.wrong(resolve.parts()[part], backend, device, part)
    except Exception as error:  # whatever a kernel raises that does not compile here
        wrong = f"{type(error).__name__}: {error}".splitlines()[0]
    if wrong is not None:
        return "wrong", wrong
    gemm = part.startswith("linear") and backend == "eager"
    return "works", "GEMM by oneDNN or MKL" if gemm else ""


def proven(part: str, device: torch.device, backend: str) -> tuple[str, str]:
    """By the verdict that was found there, with its date; and why `auto` leaves out what is right."""
    verdict = resolve.parts()[part].verdict(part, backend, device)
    if verdict is None:
        return ("works", "torch's own ops") if backend == "eager" else ("unproven", "python -m mpkernels prove")
    if not verdict.right:
        return "wrong" if verdict.state in ("wrong", "crashed", "started") else "unproven", f"{verdict}, {verdict.date}"
    speeds = ", ".join(f"{speed:.2f}" for speed in verdict.speeds.values())
    note = f"right, {verdict.date}" + (f", {speeds} x the speed of eager" if speeds else "")
    return "works", note + (": slower, left out" if verdict.slow else "")


def table(report: dict) -> str:
    """The user-facing report."""
    lines = [f"{name:10} {value}" for name, value in report["versions"].items()]
    forced = ", ".join(f"{op}={backend}" for op, backend in report["forced"].items()) or "auto"
    lines += [f"{'backend':10} {forced}  ({resolve.ENVIRONMENT_VARIABLE})", ""]
    lines += [f"{'op':22} {'device':7} {'backend':8} {'state':12} note"]
    lines += [
        f"{row['op']:22} {row['device']:7} {row['backend']:8} {row['state']:12} {row['note']}".rstrip()
        for row in report["implementations"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
