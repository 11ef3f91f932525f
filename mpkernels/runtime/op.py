# SPDX-License-Identifier: Apache-2.0
"""An op: a schema, a check, a fake and a table of implementations, all of which take one call.

The dispatcher carries flat arguments. `Op` turns them once into the op's call, a NamedTuple whose fields are those of the
schema, in their order and with their defaults. A call has

    key           hashable: all that the choice of an implementation may depend on; `device` and `dtype` come first
    gemm_key      what a tuned table is asked by, or None; an op that no table is about has none
    written       of an op that writes: the tensors whose version counters are moved (raw-pointer writes do not move them)

An implementation is a module of the op's folder, named as its backend (`eager.py`, `triton.py`, `native.py`), or as
`Implementation.module` says where a backend has several (`cpu.py` and `sm90.py` are linear_act's `native`). It is imported at
its first use on a device that has what it needs, and has a function named as the op, which takes the call, and, where it
does not take every call, `why_not(key) -> str | None`.
Where a result is not wanted it may return None for it; the dispatcher is given what the op's `fill` makes of that.

mpkernels/runtime/resolve.py chooses; a call is chosen for once.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

from mpkernels.runtime import agreement, proof, resolve, tuned_table
from mpkernels.runtime.resolve import BackendName, Implementation, Kernel, Key, ops

_library = torch.library.Library("mpkernels", "FRAGMENT")

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

# What `os.environ` reads: a lookup there takes longer than all of `Op.resolve` to say "not there".
_environment, _BACKEND = os.environ._data, os.environ.encodekey(resolve.ENVIRONMENT_VARIABLE)


class Op:
    """An op with its schema and its implementations, in order of preference on a CPU.

    call: the NamedTuple class of its calls. key: of their keys.
    check: raises on a bad call; runs before every call, and in the fake.
    fake: shapes and dtypes of the result.
    fill: (call, results) -> results, with tensors of size 0 where an implementation returned None.
    parts: of the cases of a proof, each of which has verdicts of its own: names, that of the op first, and what dtype each
        computes in. The first dtype is what the op is asked for in where no call says so: every implementation has it.
    part_of: the part whose cases are of such a key; None: none are, verdicts say nothing of it, and `auto` takes eager.
    function: its name in the implementations' modules; None: the op's.
    """

    def __init__(
        self,
        schema: str,
        package: str,
        implementations: tuple[Implementation, ...],
        *,
        call: Callable[..., Any],
        check: Callable[[Any], None],
        fake: Callable[[Any], Any] = lambda call: None,
        fill: Callable[[Any, Any], Any] = lambda call, results: results,
        key: Callable[..., Any] = Key,
        parts: dict[str, torch.dtype] | None = None,
        part_of: Callable[[Any], str | None] | None = None,
        function: str | None = None,
    ):
        self.name = schema.split("(")[0]
        self.function_name = function or self.name
        self.package, self.implementations = package, implementations
        self.backends: tuple[BackendName, ...] = tuple(dict.fromkeys(i.backend for i in implementations))
        self.call, self.check, self.fake, self.fill, self.key = call, check, fake, fill, key
        self.parts = parts or {self.name: torch.float32}
        self.dtype = self.parts[self.name]
        self.part_of = part_of or (lambda key: self.name)
        self.writes = "!" in schema
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._dispatched, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mpkernels::{self.name}", self._fake, lib=_library)
        ops[self.name] = self

    # ----- a call ---------------------------------------------------------------

    def run(self, call):
        """The op, without the dispatcher where nothing but eager execution goes on: it costs as much as a small GEMM.

        The dispatcher also resolves a lazily negated view such as `z.conj().imag`, whose negative bit a kernel would not see.
        What was not computed may be None.
        """
        return self._run(call) if is_direct(call) else self.dispatch(call)

    def run_checked(self, call):
        """`run` of tensors that have passed `check` before; only their values are new. Versions are the caller's to move."""
        return self.execute(call, self.resolve(call)) if is_direct(call) else self.dispatch(call)

    def dispatch(self, call):
        """The op on a call, by the dispatcher."""
        return getattr(torch.ops.mpkernels, self.name)(*without_defaults(call))

    def resolve(self, call) -> Kernel:
        """What serves a call. Raises RuntimeError where an implementation is forced that cannot."""
        key, preferred = call.key, None
        table = tuned_table.tables.get(key.device)
        if table is None:
            table = tuned_table.load(key.device)
        if table:
            entry = table.get(getattr(call, "gemm_key", None))
            preferred = None if entry is None else entry.backend
        return self._chosen(key, preferred)

    def _chosen(self, key, preferred: str | None = None) -> Kernel:
        try:
            return resolve.choose(self.name, key, _environment.get(_BACKEND), preferred)
        except proof.SelfCheckDeferred:
            return self.kernel("eager", key.device)

    def execute(self, call, kernel: Kernel):
        """Run a kernel on a call that was checked."""
        if torch._C._is_any_autocast_enabled():
            with torch._C._DisableAutocast():  # dtypes are in the arguments: the torch ops inside are not to be cast again
                return self.execute(call, kernel)
        if profiler._is_profiler_enabled:  # which sees the dispatcher's ops alone
            with profiler.record_function(f"mpkernels::{self.name} ({kernel.backend})"):
                return self._execute(call, kernel)
        return self._execute(call, kernel)

    def _execute(self, call, kernel: Kernel):
        if self.writes:
            return kernel.function(call)
        # A result that torch knows as a view could not be changed in place (`+=`, nn.ReLU(inplace=True)).
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return kernel.function(call)

    def _run(self, call):
        self.check(call)
        result = self.execute(call, self.resolve(call))
        if self.writes:
            move_versions(call.written)
        return result

    def _dispatched(self, *args, **kwargs):
        call = self.call(*args, **kwargs)
        return self.fill(call, self._run(call))

    def _fake(self, *args, **kwargs):
        call = self.call(*args, **kwargs)
        self.check(call)
        return self.fake(call)

    # ----- its implementations ---------------------------------------------------------------

    def function(self, backend: str) -> Callable:
        """The implementation as a function of the op's arguments, whatever `why_not` says of it; all results are tensors."""

        def run(*args, **kwargs):
            call = self.call(*args, **kwargs)
            return self.fill(call, self.kernel(backend, call.key.device).function(call))

        return run

    def kernel(self, backend: str, device: torch.device) -> Kernel:
        """The implementation on `device`, whatever `why_not` says of it; eager serves devices that no table names."""
        implementation = self.implementation(backend, device) or self.implementation(backend, torch.device("cpu"))
        function = getattr(self._module(implementation), self.function_name)
        return Kernel(backend, function, implementation.saves_mask)

    def implementation(self, backend: str, device: torch.device) -> Implementation | None:
        """That of `backend` for the type of `device`, or None."""
        return next((i for i in self.implementations if i.backend == backend and device.type in i.device_types), None)

    def why_not(self, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """One sentence why `backend` cannot run this op there at all, or None."""
        return self.why_not_key(backend, self.key(device, dtype))

    def why_not_key(self, backend: str, key) -> str | None:
        """One sentence why `backend` cannot run a call of such a key, or None."""
        if backend not in self.backends:
            return "not implemented"
        implementation = self.implementation(backend, key.device)
        if implementation is None:
            return f"not implemented for {key.device.type}"
        reason = implementation.why_not(key.device)
        if reason is None and (refuses := getattr(self._module(implementation), "why_not", None)) is not None:
            return refuses(key)
        return reason

    def backend(self, device: torch.device, dtype: torch.dtype) -> BackendName:
        """Name of the backend of `plainest`."""
        return self.plainest(device, dtype).backend

    def plainest(self, device: torch.device, dtype: torch.dtype) -> Kernel:
        """What serves the plainest call on `device`, its arithmetic in `dtype`. Raises RuntimeError as `resolve`."""
        return self._chosen(self.key(device, dtype))

    def verdict(self, part: str, backend: str, device: torch.device) -> proof.Verdict | None:
        """What a proof found of an implementation on `device` by a part of the cases; read once per process."""
        key = proof.key(part, self.package, backend, device)
        return proof.of(device, os.environ.get(resolve.VERDICTS_VARIABLE)).get(key)

    def choices(self, part: str, device: torch.device) -> dict[str, bool]:
        """What is proven on a GPU besides eager, or what ranks agreed on, and whether it is slow."""
        if device in proof.agreed:
            return proof.agreed[device].get(part, {})
        found = {backend: self.verdict(part, backend, device) for backend in self.backends if backend != "eager"}
        return {backend: verdict.slow for backend, verdict in found.items() if verdict is not None and verdict.right}

    def _module(self, implementation: Implementation):
        return resolve.module_of(self.package, implementation)

    @staticmethod
    def is_tracing() -> bool:
        """Whether something else than eager execution goes on: a compiler, a mode, a transform, torch.jit.trace."""
        return bool(
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or (_VMAP_MODE is not None and torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE))
        )


# Set under the vmap that is older than functorch's, by which is_grads_batched=True runs backward; None: torch has it no more.
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")


def without_defaults(call) -> tuple:
    """The arguments of a call, but for defaults at the end: what a graph or a strategy of sharding need not see."""
    arguments, defaults = list(call), call._field_defaults
    for name in reversed(call._fields):
        if name not in defaults or arguments[-1] is not defaults[name]:
            break
        arguments.pop()
    return tuple(arguments)


def move_versions(tensors: list[torch.Tensor]) -> None:
    """Tell torch that these were written: writes through raw pointers move no version counter."""
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version(tensors)


# ----- whether the dispatcher has to see a call ---------------------------------------------------------------


def are_plain(values) -> bool:
    """Whether no tensor is of a class that may change what an op does, or is lazily negated."""
    for value in values:
        if value is None:
            continue
        kind = type(value)
        if kind in PLAIN:
            if value.is_neg():
                return False
        elif kind not in _NO_TENSORS and not isinstance(value, list) and isinstance(value, torch.Tensor):
            return False
    return True


# Most of a call's arguments; isinstance takes several times as long to say so, as torch.Tensor has a metaclass.
_NO_TENSORS = frozenset({bool, int, float, list, torch.dtype})


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, without importing what torch itself imports only at its first use."""
    if type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_direct(call) -> bool:
    """Whether nothing but eager execution of plain tensors goes on."""
    return not Op.is_tracing() and are_plain(call)


# ----- ranks ---------------------------------------------------------------


def agree_on_backends() -> None:
    """Make all ranks of a job choose alike on GPUs: called where a model is converted and an optimizer is made."""
    if not agreement.is_due() or Op.is_tracing():
        return
    device = proof.indexed(torch.device("cuda"))
    parts = resolve.parts()
    found = {(part, backend): op.verdict(part, backend, device) for part, op in parts.items() for backend in op.backends}
    keys = [proof.key(part, parts[part].package, backend, device) for part, backend in found]
    wrong = [", ".join(pair) for pair, verdict in found.items() if verdict is not None and not verdict.right]
    if torch.distributed.get_rank() == 0 and not any(found.values()):
        resolve.warn_unproven()
    agreement.agree(device, {part: op.choices(part, device) for part, op in parts.items()}, keys, wrong)
    resolve.choose.cache_clear()
