# SPDX-License-Identifier: Apache-2.0
"""What compute-sanitizer's memcheck says of a kernel: reads and writes outside of what was allocated, misaligned ones.

A small case of the op runs once in a process under the tool, without torch's cache of memory, in which one tensor's end is
another's beginning.
"""

import json
import re
import shutil
import sys

import torch

TOOL = "compute-sanitizer"
FOUND = 9  # what the tool exits with where it found something
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_CHILD = """
import json, sys
sys.path[:], arguments = json.loads(sys.argv[1])
from mpkernels.testing import memcheck
memcheck.run_case(*arguments)
"""


def command(op: str, backend: str) -> list[str] | None:
    """What to start, or None where the tool is not on PATH."""
    tool = shutil.which(TOOL)
    if tool is None:
        return None
    arguments = json.dumps([sys.path, [op, backend]])
    options = ["--tool", "memcheck", "--error-exitcode", str(FOUND)]
    return [tool, *options, sys.executable, "-I", "-c", _CHILD, arguments]


def wrong(code: int, output: str) -> str | None:
    """What the tool found, in a sentence, or None. Raises RuntimeError where it, or what ran under it, failed otherwise."""
    if code == 0:
        return None
    lines = [re.sub(r"^=+ *", "", line).strip() for line in output.splitlines() if line.startswith("===")]
    if code == FOUND:
        return next((line for line in lines if re.match("Invalid|Misaligned|Program hit|Uninitialized", line)), "errors")
    raise RuntimeError(f"{TOOL} ended with code {code}: {(output.strip().splitlines() or ['without a word'])[-1]}")


def run_case(op: str, backend: str, device: str = "cuda:0") -> None:
    """The first of the op's small cases that the implementation takes."""
    import mpkernels.ops  # noqa: F401 - the ops are defined there
    from mpkernels.runtime.resolve import ops
    from mpkernels.testing import cases
    from mpkernels.testing.memory import Memory

    device, op = torch.device(device), ops[op]
    for case in cases.of(op.name, few=True):
        if op.why_not_key(backend, op.key(device, *case.call)) is None:
            with torch.no_grad():
                op.function(backend)(*case.make(Memory(device)))
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)
