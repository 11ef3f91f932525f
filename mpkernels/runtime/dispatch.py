# SPDX-License-Identifier: Apache-2.0
"""Define an op, choose the implementation that serves a call, and say why another cannot.

An op is one schema, one fake and a table of implementations. Two environment variables are read at run time, and this is
the only place that reads them: `MPKERNELS_BACKEND` (auto | eager | triton | native, or `op=backend,...`), and
`MPKERNELS_VERDICTS`, a file of verdicts that were found elsewhere.

`auto`: on a CPU what the tests proved, C++ before torch. On a GPU what was proven on that very GPU, driver and code by
`python -m mpkernels prove`, C++ before Triton, without what was slower there; where nothing was, eager. Among what is proven
a tuned table decides by problem.
"""

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mpkernels.runtime import agreement, cache, proof, tuned_table
from mpkernels.runtime.tuned_table import BACKENDS, BackendName

ENVIRONMENT_VARIABLE, VERDICTS_VARIABLE = "MPKERNELS_BACKEND", "MPKERNELS_VERDICTS"

_library = torch.library.Library("mpkernels", "FRAGMENT")
ops: dict[str, "Op"] = {}

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: the module `<op folder>.impl_<backend>`, imported at its first use.

    `device_types`: where the code exists; `sm`: the one compute capability of GPUs that has it, 90 for 9.0, None is any.
    The module has a function named as the op and `why_not(device, dtype) -> str | None`, and it may have
    `why_not_call(*call)` for GPUs, of what the op's `call` makes of the arguments.
    """

    backend: str
    device_types: tuple[str, ...]
    sm: int | None = None

    def exists_on(self, device: torch.device) -> bool:
        """Whether the code for such a device is there."""
        if device.type not in self.device_types:
            return False
        if self.sm is None or device.type != "cuda":
            return True
        return torch.version.hip is None and torch.cuda.get_device_capability(device) == divmod(self.sm, 10)


class Op:
    """An op with its schema and its implementations, in order of preference on a CPU.

    check: raises on bad input; runs before every call and in the fake.
    fake: shapes and dtypes of the result, from the same arguments.
    key: `(device, dtype)` of a call, which the selector chooses by.
    problem: what a tuned table is asked by, from the same arguments; None where there are none.
    call: what else an implementation for GPUs may refuse a call by, hashable; None where none does.
    covers: whether the cases of a proof are of such a `call`: of others a verdict says nothing, and `auto` takes eager.
    mutated: the tensors that a call writes, whose version counters are moved (raw-pointer writes do not move them).
    dtype: what its arithmetic is asked for in where no call says so: one that every implementation has.
    """

    def __init__(
        self,
        schema: str,
        package: str,
        implementations: tuple[Implementation, ...],
        *,
        check: Callable[..., None],
        fake: Callable[..., object],
        key: Callable[..., tuple[torch.device, torch.dtype]],
        problem: Callable[..., tuned_table.Problem] | None = None,
        call: Callable[..., tuple] | None = None,
        covers: Callable[[tuple], bool] = lambda call: True,
        mutated: Callable[..., list[torch.Tensor]] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.name = schema.split("(")[0]
        self.package = package
        self.implementations = {i.backend: i for i in implementations}
        self.check, self.fake, self.key, self.problem, self.mutated = check, fake, key, problem, mutated
        self.dtype, self.call, self.covers = dtype, call, covers
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mpkernels::{self.name}", self._fake, lib=_library)
        ops[self.name] = self

    def _fake(self, *args, **kwargs):
        self.check(*args, **kwargs)
        return self.fake(*args, **kwargs)

    def _run(self, *args, **kwargs):
        self.check(*args, **kwargs)
        result = self._run_checked(*args, **kwargs)
        if self.mutated is not None:
            move_versions(self.mutated(*args, **kwargs))
        return result

    def _run_checked(self, *args, **kwargs):
        device, dtype = self.key(*args, **kwargs)
        tuned = self.tuned(*args, **kwargs) if self.problem and tuned_table.of(device) else None
        function = self.function(self.backend(device, dtype, tuned, self.gpu_call(device, *args, **kwargs)))
        with torch._C._DisableAutocast():  # dtypes are in the arguments: the torch ops inside are not to be cast again
            if self.mutated is not None:
                return function(*args, **kwargs)
            # A result that torch knows as a view could not be changed in place (`+=`, nn.ReLU(inplace=True)).
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return function(*args, **kwargs)

    def __call__(self, *args, checked: bool = False, **kwargs):
        """The op, without the dispatcher where nothing but eager execution goes on: it costs as much as a small GEMM.

        The dispatcher also carries out the minus of a view such as `z.conj().imag`, which a kernel would not see.

        checked: these tensors have passed `check` before; only their values are new. Versions are then the caller's to move.
        """
        if _is_watched() or not _are_plain(args):
            return getattr(torch.ops.mpkernels, self.name)(*args, **kwargs)
        return self._run_checked(*args, **kwargs) if checked else self._run(*args, **kwargs)

    def function(self, backend: str) -> Callable:
        """The implementation's function, whatever `why_not` says of it."""
        return _function(self.package, backend, self.name)

    def why_not(self, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """One sentence why `backend` cannot run this op there, or None."""
        implementation = self.implementations.get(backend)
        if implementation is None:
            return "not implemented"
        if device.type not in implementation.device_types:
            return f"not implemented for {device.type}"
        return self._module(backend).why_not(device, dtype)

    def tuned(self, *args, **kwargs) -> str | None:
        """The backend that a tuned table names for a call, or None."""
        if self.problem is None:
            return None
        table = tuned_table.of(self.key(*args, **kwargs)[0])
        entry = table.get(self.problem(*args, **kwargs)) if table else None
        return None if entry is None else entry.backend

    def gpu_call(self, device: torch.device, *args, **kwargs) -> tuple | None:
        """What `why_not_call` is asked by, on a GPU."""
        return self.call(*args, **kwargs) if self.call is not None and device.type == "cuda" else None

    def backend(
        self, device: torch.device, dtype: torch.dtype, tuned: str | None = None, call: tuple | None = None
    ) -> BackendName:
        """Name of the backend that serves a call on `device`, its arithmetic in `dtype`; `tuned` is asked before others.

        Raises RuntimeError where a forced one cannot.
        """
        try:
            return _choose(self.name, device, dtype, _setting(), tuned, call)
        except proof.NotNow:
            return "eager"

    def verdict(self, backend: str, device: torch.device) -> proof.Verdict | None:
        """What a proof found of an implementation on `device`; read once per process."""
        key = proof.key(self.name, self.package, backend, device)
        return proof.of(device, os.environ.get(VERDICTS_VARIABLE)).get(key)

    def choices(self, device: torch.device) -> dict[str, bool]:
        """What is proven on a GPU besides eager, or what ranks agreed on, and whether it is slow."""
        if proof.has_agreed(device):
            return proof.agreed(device).get(self.name, {})
        found = {backend: self.verdict(backend, device) for backend in self.implementations if backend != "eager"}
        return {backend: verdict.slow for backend, verdict in found.items() if verdict is not None and verdict.right}

    def _module(self, backend: str):
        return importlib.import_module(f"{self.package}.impl_{backend}")


def move_versions(tensors: list[torch.Tensor]) -> None:
    """Tell torch that these were written: writes through raw pointers move no version counter."""
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version(tensors)


_environment = os.environ._data  # what `os.environ` reads: itself it takes longer than all of `_choose` to say "not there"
_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def _setting() -> str:
    return os.environ[ENVIRONMENT_VARIABLE] if _KEY in _environment else "auto"


def _is_watched() -> bool:
    """Whether something else than eager execution goes on: a compiler, a mode, a transform."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or (_VMAP_MODE is not None and torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE))
    )


# Set under the vmap that is older than functorch's, by which is_grads_batched=True runs backward; None: torch has it no more.
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")


def _are_plain(args) -> bool:
    """Whether no tensor is of a class that may change what an op does, or has its minus put off."""
    for a in args:  # noqa: SIM110 - a generator takes longer
        if isinstance(a, torch.Tensor) and (type(a) not in _PLAIN or a.is_neg()):
            return False
    return True


@functools.cache
def _function(package: str, backend: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"{package}.impl_{backend}"), name)


@functools.lru_cache(maxsize=4096)  # a model has few layers, but a process may see many models
def _choose(
    name: str, device: torch.device, dtype: torch.dtype, setting: str, tuned: str | None, call: tuple | None
) -> BackendName:
    op, forced = ops[name], parse_setting(setting)
    backend = forced.get(name)
    if backend is None:
        implementation = op.implementations.get(forced.get("*"))
        if implementation is not None and implementation.exists_on(device):
            backend = implementation.backend
    if backend not in (None, "auto"):
        reason = op.why_not(backend, device, dtype)
        if reason is not None:
            raise RuntimeError(
                f"{ENVIRONMENT_VARIABLE}={setting}: {name} on {device.type} cannot use {backend}: {reason}; "
                f"{ENVIRONMENT_VARIABLE}=auto takes what works"
            )
        return backend
    for backend in _candidates(op, device, tuned):
        if op.why_not(backend, device, dtype) is None and not _refuses(op, backend, call):
            return backend
    return "eager"


def _candidates(op: Op, device: torch.device, tuned: str | None) -> list[str]:
    """What `auto` may take on `device`, the best first; a table may prefer what is slow as a rule."""
    if device.type != "cuda":
        found = [backend for backend in op.implementations if backend != "triton"]  # whose interpreter is for tests
    else:
        choices = _proven(op, proof.indexed(device))
        found = [b for b in proof.PREFERENCE if b == "eager" or (b in choices and (b == tuned or not choices[b]))]
    return sorted(found, key=lambda backend: backend != tuned)


def _proven(op: Op, device: torch.device) -> dict[str, bool]:
    """op.choices; NotNow where verdicts are still to be read and something else than eager execution goes on."""
    if not torch.cuda.is_available():  # a FakeTensor's, say
        return {}
    if not proof.is_read(device) and (_is_watched() or torch.cuda.is_current_stream_capturing()):
        raise proof.NotNow
    choices = op.choices(device)
    unproven = not proof.has_agreed(device) and not any(op.verdict(backend, device) for backend in op.implementations)
    if unproven and any(op.why_not(backend, device, op.dtype) is None for backend in ("native", "triton")):
        _warn_unproven()
    return choices


def _warn_unproven() -> None:
    cache.warn_once(
        "mpkernels: no kernel was proven on this GPU yet, so torch's own ops serve. To prove them, once: "
        "python -m mpkernels prove"
    )


def _refuses(op: Op, backend: str, call: tuple | None) -> bool:
    """Whether that implementation cannot serve such a call on a GPU, or was not proven on its like."""
    if call is None or backend == "eager":
        return False
    why_not_call = getattr(op._module(backend), "why_not_call", None)
    return not op.covers(call) or (why_not_call is not None and why_not_call(*call) is not None)


def agree_on_backends() -> None:
    """Make all ranks of a job choose alike on GPUs: called where a model is converted and an optimizer is made."""
    if not agreement.is_due() or _is_watched():
        return
    device = proof.indexed(torch.device("cuda"))
    found = {(op.name, backend): op.verdict(backend, device) for op in ops.values() for backend in op.implementations}
    keys = [proof.key(op.name, op.package, backend, device) for op in ops.values() for backend in op.implementations]
    wrong = [", ".join(pair) for pair, verdict in found.items() if verdict is not None and not verdict.right]
    if torch.distributed.get_rank() == 0 and not any(found.values()):
        _warn_unproven()
    agreement.agree(device, {op.name: op.choices(device) for op in ops.values()}, keys, wrong)
    _choose.cache_clear()


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


@functools.cache
def triton_why_not(device: torch.device) -> str | None:
    """Why no Triton kernel runs on `device`: shared by every impl_triton."""
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
