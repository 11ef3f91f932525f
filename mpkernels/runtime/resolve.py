# SPDX-License-Identifier: Apache-2.0
"""Which implementation serves a call, and why another cannot.

Two environment variables are read at run time, and their names stand here alone: `MPKERNELS_BACKEND` (auto | eager | triton |
native, or `op=backend,...`), and `MPKERNELS_VERDICTS`, a file of verdicts that were found elsewhere.

`auto`: on a CPU what the tests proved, C++ before torch. On a GPU what was proven on that very GPU, driver and code by
`python -m mpkernels prove`, C++ before Triton, without what was slower there; where nothing was, eager. Among what is proven
a tuned table decides by problem.
"""

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from mpkernels.runtime import cache, native, proof

BackendName = Literal["eager", "triton", "native"]
BACKENDS: tuple[str, ...] = get_args(BackendName)
ENVIRONMENT_VARIABLE, VERDICTS_VARIABLE = "MPKERNELS_BACKEND", "MPKERNELS_VERDICTS"

ops: dict[str, Any] = {}  # name -> Op, which enters itself


def parts() -> dict[str, Any]:
    """The Op of each part of the cases of a proof, by the part's name."""
    return {part: op for op in ops.values() for part in op.parts}


class Key(NamedTuple):
    """All that the choice may depend on. Where an op has more, its calls have a key of their own that begins so."""

    device: torch.device
    dtype: torch.dtype  # of the arithmetic


class Kernel(NamedTuple):
    """What serves a call: `function` takes it. saves_mask: whether it writes a ReLU's mask, and selects by it in backward."""

    backend: str
    function: Callable
    saves_mask: bool


@dataclass(frozen=True)
class Implementation:
    """One way to run an op; mpkernels/runtime/op.py says how its module is found.

    device_types: where the code exists. module: its file, where that is not named as the backend. sm: the one compute
    capability of GPUs that has it, 90 for 9.0, None is any. saves_mask: see Kernel.
    """

    backend: str
    device_types: tuple[str, ...]
    module: str | None = None
    sm: int | None = None
    saves_mask: bool = False

    def exists_on(self, device: torch.device) -> bool:
        """Whether the code for such a device is there."""
        if device.type not in self.device_types:
            return False
        if self.sm is None or device.type != "cuda":
            return True
        if torch.version.hip is not None or not torch.cuda.is_available():
            return False
        return torch.cuda.get_device_capability(device) == divmod(self.sm, 10)

    def why_not(self, device: torch.device) -> str | None:
        """One sentence why it serves no call on `device`, one of its device types, or None."""
        if self.backend == "eager":
            return None
        if self.backend == "triton":
            return triton_why_not(device)
        if device.type != "cuda":
            return native.why_not()
        reason = native.cuda_why_not(device)
        if reason is None and not self.exists_on(device):
            return "needs sm{}, got sm{}{}".format(self.sm, *torch.cuda.get_device_capability(device))
        return reason


@functools.cache
def module_of(package: str, implementation: Implementation):
    return importlib.import_module(f"{package}.{implementation.module or implementation.backend}")


# ----- the choice ---------------------------------------------------------------


@functools.lru_cache(maxsize=4096)  # a model has few layers, but a process may see many models
def choose(name: str, key, setting: bytes | str | None, preferred: str | None) -> Kernel:
    """What serves calls of `key`. setting: MPKERNELS_BACKEND's value; preferred: the backend that a tuned table names.

    Raises RuntimeError where a forced one cannot, SelfCheckDeferred where it is not the time to read verdicts.
    """
    op, setting = ops[name], "auto" if setting is None else os.fsdecode(setting)
    backend = _forced(op, key.device, parse_setting(setting))
    if backend is None:
        served = (backend for backend in _candidates(op, key, preferred) if op.why_not_key(backend, key) is None)
        return op.kernel(next(served, "eager"), key.device)
    reason = op.why_not_key(backend, key)
    if reason is not None:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}={setting}: {name} on {key.device.type} cannot use {backend}: {reason}; "
            f"{ENVIRONMENT_VARIABLE}=auto takes what works"
        )
    return op.kernel(backend, key.device)


def _forced(op, device: torch.device, forced: dict[str, str]) -> str | None:
    """The backend that `op` has to take: by its name, or by one for all ops where it has that on such a device."""
    backend = forced.get(op.name)
    if backend is None and "*" in forced:
        implementation = op.implementation(forced["*"], device)
        if implementation is not None and implementation.exists_on(device):
            backend = implementation.backend
    return None if backend == "auto" else backend


def _candidates(op, key, preferred: str | None) -> list[str]:
    """What `auto` may take on the device, the best first; a table may prefer what is slow as a rule."""
    if key.device.type != "cuda":
        found = [backend for backend in op.backends if backend != "triton"]  # whose interpreter is for tests
    else:
        choices = _proven(op, op.part_of(key), proof.indexed(key.device))
        found = [b for b in proof.PREFERENCE if b == "eager" or (b in choices and (b == preferred or not choices[b]))]
    return sorted(found, key=lambda backend: backend != preferred)


def _proven(op, part: str | None, device: torch.device) -> dict[str, bool]:
    """op.choices; SelfCheckDeferred where verdicts are still to be read and something else than eager execution goes on."""
    if not torch.cuda.is_available():  # a FakeTensor's, say
        return {}
    if not proof.is_read(device) and (op.is_tracing() or torch.cuda.is_current_stream_capturing()):
        raise proof.SelfCheckDeferred
    found = (op.verdict(name, backend, device) for name in op.parts for backend in op.backends)
    unproven = device not in proof.agreed and not any(found)
    if unproven and any(op.why_not(backend, device, op.dtype) is None for backend in ("native", "triton")):
        warn_unproven()
    return {} if part is None else op.choices(part, device)


def warn_unproven() -> None:
    cache.warn_once(
        "mpkernels: no kernel was proven on this GPU yet, so torch's own ops serve. To prove them, once: "
        "python -m mpkernels prove"
    )


@functools.cache
def parse_setting(setting: str) -> dict[str, str]:
    """`"auto"` -> {}, `"eager"` -> {"*": "eager"}, `"adamw_=native"` -> {"adamw_": "native"}; ValueError otherwise."""
    forced = {}
    for part in setting.split(","):
        name, equals, backend = part.strip().rpartition("=")
        if backend not in ("auto", *BACKENDS) or (equals and name not in ops):
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={setting!r}: expected one of auto, {', '.join(BACKENDS)}, "
                f"or op=backend with an op of {', '.join(sorted(ops))}"
            )
        forced[name or "*"] = backend
    return {name: backend for name, backend in forced.items() if (name, backend) != ("*", "auto")}


# ----- why not ---------------------------------------------------------------


@functools.cache
def triton_why_not(device: torch.device) -> str | None:
    """Why no Triton kernel runs on `device`: shared by all implementations in Triton."""
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return "needs a CUDA GPU (or TRITON_INTERPRET=1, which is slow)"
    if torch.version.hip is not None:  # NOTE: ROCm calls its GPUs cuda, and gfx90a reports the capability of Hopper
        return f"needs an NVIDIA GPU, this torch is built for ROCm {torch.version.hip}"
    if not torch.cuda.is_available():  # of a FakeTensor, say
        return "there is no GPU here"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"needs sm80, got sm{major}{minor}"
    return None


def is_available(backend: BackendName) -> bool:
    """Whether any op can run on `backend` ("eager", "triton" or "native") on this machine; `why_not` says why it cannot."""
    return why_not(backend) is None


def why_not(backend: BackendName) -> str | None:
    """One sentence why no op can run on `backend` ("eager", "triton" or "native") on this machine, or None where one can."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = []
    for op in ops.values():
        for where in {device, torch.device("cpu")}:
            reason = op.why_not(backend, where, op.dtype)
            if reason is None:
                return None
            reasons.append(reason)
    return max(set(reasons) - {"not implemented"} or {"not implemented"}, key=reasons.count)
