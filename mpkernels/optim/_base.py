# SPDX-License-Identifier: Apache-2.0
"""What the optimizers share: masters, compute copies, the check before the step, clipping, checkpoints.

An optimizer here is one read of all gradients (only where a verdict or a norm is wanted) and one pass that updates.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest
from operator import is_
from typing import Any, TypeVar, overload

import torch

from mpkernels import _copies
from mpkernels._dispatch import move_versions
from mpkernels.ops._cast import DTYPES, cast
from mpkernels.ops._layout import Tensors, overlaps
from mpkernels.ops._multi_tensor import MASTER_DTYPES, MOMENT_DTYPES, skip_flag
from mpkernels.optim import _checkpoints, _hyperparameters, _ranks, _stats
from mpkernels.optim._parameters import first_shared, has_memory, is_lazy, name_of, shape_of
from mpkernels.optim._rows import Rows
from mpkernels.optim._stats import Clip, GradStats
from mpkernels.optim._unscale import Unscaling

Loss = TypeVar("Loss")
Params = Iterable[torch.Tensor | tuple[str, torch.Tensor] | dict[str, Any]]  # of a union of Iterables mypy infers nothing


@dataclass(eq=False)
class _Call:
    """One call of the update op."""

    rows: Rows
    arguments: tuple
    options: dict


class Optimizer(torch.optim.Optimizer):
    """Base of AdamW, Adam and SGD.

    master_dtype: fp32 or fp64, what 16-bit parameters are updated in (None: fp32). state_dtype: of the moments: None, the
    master's, or bf16, for 2 bytes less per moment and parameter than fp32, of memory and of traffic each way; the arithmetic
    stays the master's, see mpkernels.ops.adamw for what is lost.
    max_norm: clip the global norm over all groups inside the step. write_grads: leave `.grad` unscaled after a step
    under a scaler, as torch does. skip_nonfinite: without a scaler, skip a step with inf or NaN gradients.
    process_group: needed where plain tensors are sharded by hand: the ranks that share one verdict and whose gradients
    one norm sums; every one of them calls each step. DTensors (FSDP2) need none, nor does DDP, whose ranks have the same
    gradients.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then passes grad_scale and found_inf as attributes

    def __init__(
        self, params: Params, defaults: dict[str, Any], *, master_dtype: torch.dtype | None, state_dtype: torch.dtype | None,
        max_norm: float | None, write_grads: bool, skip_nonfinite: bool, process_group: "torch.distributed.ProcessGroup | None",
    ) -> None:  # fmt: skip
        if master_dtype not in (None, *MASTER_DTYPES):
            raise ValueError(f"master_dtype must be torch.float32 or torch.float64, got {master_dtype}")
        if state_dtype not in (None, *MOMENT_DTYPES):
            raise ValueError(f"state_dtype must be None, the master's dtype or torch.bfloat16, got {state_dtype}")
        if max_norm is not None and not _hyperparameters.as_float(max_norm) > 0:
            raise ValueError(f"Invalid max_norm: {max_norm!r}: it must be a number greater than 0, or None")
        if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
            raise TypeError(f"process_group must be a ProcessGroup that this rank is in, got {process_group!r}")
        self.process_group = process_group
        self.master_dtype, self.state_dtype, self.max_norm = master_dtype, state_dtype, max_norm
        self.write_grads, self.skip_nonfinite = write_grads, skip_nonfinite
        self._forget()
        _hyperparameters.check_as_torch(defaults)
        self._check_hyperparameters(defaults)
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Start without anything that is tied to these Parameter objects: at construction, and in a copy."""
        self.grad_norm: torch.Tensor | None = None
        self.steps_called = 0
        self._stats: dict[torch.device, GradStats] = {}
        self._pending_clip: Clip | None = None  # of scaler.clip_grad_norm_, until the next step
        self._formats: dict[int, tuple[torch.dtype, torch.Size]] = {}
        self._rows: dict[tuple[int, torch.device], Rows] = {}
        self._entries: list[dict] = []  # the state of every parameter that the rows were made of
        self._ranks = _ranks.Ranks([])
        self._checked_values: dict[int, list] = {}  # of hyperparameters, by group, as of the last step
        self._lent = False  # inside master_weights
        self._disjoint: list[list[int]] = []  # addresses of parameters that were found to share no memory

    def __getstate__(self) -> dict:
        self._refuse_while_lent("a copy of the optimizer")
        ours = ("master_dtype", "state_dtype", "max_norm", "write_grads", "skip_nonfinite", "process_group")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}}

    def __setstate__(self, state: dict) -> None:
        self._forget()
        super().__setstate__(state)
        self._formats = {id(p): (p.dtype, p.shape) for p in self._parameters() if not is_lazy(p)}
        self._ranks = _ranks.Ranks(self._parameters(), self.process_group)

    # ----- construction -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._refuse_while_lent("add_param_group")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_hyperparameters(group)
            seen = set()
            for i, parameter in enumerate(group["params"]):
                # What is frozen may be anything: quantized, complex. What is lazy has no shape before the first forward.
                trained = parameter.requires_grad and not is_lazy(parameter)
                if trained and (problem := self._parameter_problem(parameter, name_of(group, i))):
                    raise ValueError(problem)
                if id(parameter) in seen:
                    raise ValueError(f"{name_of(group, i)} stands twice in one group")
                seen.add(id(parameter))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._formats.update((id(p), (p.dtype, p.shape)) for p in group["params"] if not is_lazy(p))
        self._ranks = _ranks.Ranks(self._parameters(), self.process_group)

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _parameter_problem(self, parameter: torch.Tensor, name: str) -> str | None:
        """Why this parameter cannot be stepped, or None."""
        if parameter.layout != torch.strided or parameter.dtype not in DTYPES:
            return (
                f"{name} must be a dense float16, bfloat16, float32 or float64 tensor, "
                f"got {parameter.dtype}, {parameter.layout}"
            )
        if overlaps(parameter):
            return f"{name} overlaps itself (strides {parameter.stride()}): its elements are not updated one by one"
        if any(where.is_partial() for where in _ranks.placement(parameter)[1]):
            return f"{name} has placements {parameter.placements}: no rank has its values"
        if self.master_dtype is not None and self.master_dtype.itemsize < parameter.dtype.itemsize:
            return f"master_dtype {self.master_dtype} is narrower than {parameter.dtype} of {name}"
        if self.state_dtype not in (None, master := self._master_dtype(parameter), torch.bfloat16):
            return f"state_dtype must be None, {master} as the master of {name}, or torch.bfloat16, got {self.state_dtype}"
        return None

    _rules: dict[str, _hyperparameters.Rule]  # what each hyperparameter must be

    def _check_hyperparameters(self, group: dict) -> None:
        _hyperparameters.check(self._rules, group)

    def _parameter_names(self) -> dict[int, str]:
        """id -> name if the optimizer was made from named parameters, else index over all groups and shape."""
        named = [(p, name) for g in self.param_groups for p, name in zip_longest(g["params"], g.get("param_names", ()))]
        return {id(p): name or f"parameter {i} {shape_of(p)}" for i, (p, name) in enumerate(named)}

    # ----- the step ---------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    # NOTE: under torch.compile the step is a graph break: it is one or two kernels already, and dynamo would trace our
    # bookkeeping in nine pieces. torch.compiler.disable does the same, but imports dynamo when this file is imported.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure=None):
        """Take a step, or skip it on the device where a scaler or `skip_nonfinite` asks for it. Returns the closure's loss.

        A scaler sets `grad_scale` (the gradients are divided by it) and, when it has checked already, `found_inf`.
        Raises RuntimeError for a gradient that is sparse or wider than its master, a parameter whose dtype or shape changed, a
        closure under a scaler.
        After an exception, out of a hook too, the step can be taken again or left out: what can fail, or allocates, comes
        before the first write. (Not so where the op itself fails to allocate: `eager`, and layouts that differ.)
        """
        self._refuse_while_lent("step")
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        foreign = found_inf is not None  # somebody else's scalars: the op checks them
        _check_scalars(grad_scale=grad_scale, found_inf=found_inf)
        loss = None
        if closure is not None:
            if grad_scale is not None:
                raise RuntimeError("a closure cannot be used with loss scaling")
            with torch.enable_grad():
                loss = closure()
        _hyperparameters.check_replaced(self, self._checked_values)
        try:
            calls = self._prepare(grad_scale, found_inf)
            for call in calls:  # all of them before the first write
                if foreign or not call.rows.checked:
                    self._op.check(*call.arguments, **call.options)
            unscalings = [_unscaling(call) for call in calls] if self.write_grads and grad_scale is not None else []
        except BaseException:
            self._stats = {}  # what was read of these gradients: the next step may be of others
            self._let_grads_go()
            raise
        for call in calls:
            self._op(*call.arguments, **call.options, checked=True)
            self._after_update(call.rows)
        self.steps_called += 1
        self._pending_clip = None
        for unscaling in unscalings:
            unscaling.write()
        self._let_grads_go()
        return loss

    def _let_grads_go(self) -> None:
        """Or those of this step would live on while the next backward allocates its own."""
        for rows in self._rows.values():
            rows.grads.clear()

    def _prepare(self, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> list[_Call]:
        """Read the gradients if need be and make all that a step needs: what fails here, or allocates, has written nothing."""
        clip, rows = self._clip_in_force(), self._all_rows()
        max_norm = self.max_norm if clip is None else clip.max_norm
        check = found_inf is None and (grad_scale is not None or self.skip_nonfinite)
        if clip is None or not self._stats:
            self._stats = {}
            if check or max_norm is not None:
                self._read_grads(rows, grad_scale, norm=max_norm is not None)
        if check and self._stats:
            found_inf = next(iter(self._stats.values())).found_inf
        calls = []
        for (index, device), group_rows in rows.items():
            group = self.param_groups[index]
            group_rows.checked &= not isinstance(group["lr"], torch.Tensor)
            options = self._step_options(device, grad_scale, found_inf, max_norm)
            calls.append(_Call(group_rows, self._arguments(group, group_rows, group_rows.grads), options))
        return calls

    def _step_options(self, device, grad_scale, found_inf, max_norm) -> dict:
        norm = None if max_norm is None else _stats.scalar(self.grad_norm, device)
        grad_scale, found_inf = _stats.scalar(grad_scale, device), _stats.scalar(found_inf, device)
        return dict(grad_scale=grad_scale, found_inf=found_inf, grad_norm=norm, max_norm=max_norm)

    _op = None  # the op of the update

    def _arguments(self, group: dict, rows: Rows, grads: list[torch.Tensor]) -> tuple:
        """What `_op` is given, up to the options that all of them share."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a clip that was asked for these gradients goes with them."""
        self._pending_clip = None
        super().zero_grad(set_to_none)

    def _clip_in_force(self) -> Clip | None:
        """The clip that was asked for unless its gradients are gone; what was read is forgotten where they have changed."""
        if self._pending_clip is None:
            return None
        _, grads = _with_gradient(self._parameters())
        if self._pending_clip.is_gone(grads):
            return None
        if self._pending_clip.is_stale(grads):
            self._stats = {}
        return self._pending_clip

    @torch.no_grad()
    def _unscale_grads(self, grad_scale: torch.Tensor) -> dict[torch.device, torch.Tensor]:
        """Divide the gradients by `grad_scale`; found_inf by device. 16-bit ones become fp32: nothing is rounded or lost."""
        clip, rows = self._clip_in_force(), self._all_rows()
        for (_, device), group_rows in rows.items():
            for parameter in group_rows.params:
                if parameter.grad.dtype.itemsize == 2:
                    parameter.grad_dtype = None  # any: float32 would stick, and DDP refuse the next backward
                    parameter.grad = parameter.grad.float()
            group_rows.give(self._local_grads(group_rows.params))
            Unscaling(group_rows.grads, _stats.scalar(grad_scale, device), None).write()
        self._read_grads(rows, None, norm=clip is not None)
        self._pending_clip = clip and self._clip_of_these(clip.max_norm)
        for device, stats in self._stats.items():
            stats.grad_scale = grad_scale.to(device, copy=True)
            stats.found_inf = skip_flag(stats.found_inf, stats.grad_scale).float()
        self._let_grads_go()
        return {device: stats.found_inf for device, stats in self._stats.items()}

    @torch.no_grad()
    def _clip_at_next_step(self, grad_scale: torch.Tensor | None, max_norm: float) -> torch.Tensor | None:
        """Read the gradients now and clip them to max_norm in the next step; the norm, or None without gradients."""
        self._read_grads(self._all_rows(), grad_scale, norm=True)
        self._let_grads_go()
        if not self._stats:
            return None
        self._pending_clip = self._clip_of_these(max_norm)
        return self.grad_norm

    def _clip_of_these(self, max_norm: float) -> Clip:
        return Clip(max_norm, _with_gradient(self._parameters())[1])

    def _read_grads(self, rows: dict, grad_scale: torch.Tensor | None, *, norm: bool) -> None:
        """Read all gradients once: per-tensor statistics, the verdict and (norm) `grad_norm`, over all devices."""
        by_device: dict[torch.device, list[Rows]] = {}
        for (_, device), group_rows in rows.items():
            by_device.setdefault(device, []).append(group_rows)
        if self._ranks.many:
            params = {device: [p for rows in members for p in rows.params] for device, members in by_device.items()}
            self._read_on_ranks(params, grad_scale, norm)
        else:
            self._stats = {d: _stats.read_rows(d, members, grad_scale, norm) for d, members in by_device.items()}
            if len(self._stats) > 1:
                _stats.combine_devices(list(self._stats.values()))
        if norm and self._stats:
            self.grad_norm = next(iter(self._stats.values())).grad_norm

    def _read_on_ranks(self, by_device: dict, grad_scale: torch.Tensor | None, norm: bool) -> None:
        """The same with the verdict and the norm of all ranks; a rank without gradients joins in with none."""
        by_device = by_device or {self._parameters()[0].device: []}
        self._stats, squares = {}, {}
        for device, params in by_device.items():
            parts = self._ranks.parts(params) if norm and params else {_ranks.HERE: params}
            reads = {part: self._read(device, members, grad_scale, norm) for part, members in parts.items()}
            self._stats[device] = _stats.joined(list(reads.values()))
            for part, stats in reads.items() if norm else ():
                square = stats.grad_norm.square().to(next(iter(by_device)), non_blocking=True)
                squares[part] = squares[part] + square if part in squares else square
        if len(self._stats) > 1:
            _stats.combine_devices(list(self._stats.values()))
        first = next(iter(self._stats.values()))
        first.found_inf, first.grad_norm = self._ranks.agree(first.found_inf, squares if norm else None)

    def _local_grads(self, params: list[torch.Tensor]) -> list[torch.Tensor]:
        return [_ranks.local(p.grad) for p in params] if self._ranks.dtensors else [p.grad for p in params]

    def _read(self, device, params: list[torch.Tensor], grad_scale: torch.Tensor | None, norm: bool) -> GradStats:
        return _stats.read(device, params, self._local_grads(params), grad_scale, norm)

    # ----- rows: the parameters of a step and their state --------------------------------------------

    def _all_rows(self) -> dict[tuple[int, torch.device], Rows]:
        """Rows by (group, device) of the parameters that have a gradient; state is made where it is missing."""
        self._refuse_while_lent("a scaler's unscale_ or clip_grad_norm_")
        if self._ranks.dtensors:
            _ranks.redistribute_grads(self._parameters())
        known = len(self.state) == len(self._entries) and all(map(is_, self.state.values(), self._entries))
        if not known:  # at first, or somebody has taken the state away, or put in another
            self._rows.clear()
        present: dict[tuple[int, torch.device], list[torch.Tensor]] = {}
        taken = set()
        for index, group in enumerate(self.param_groups):
            params, grads = group["params"], [p.grad for p in group["params"]]
            if any(map(is_, grads, repeat(None))):
                params, grads = _with_gradient(params)
            rows = self._rows.get((index, params[0].device)) if params else None
            if rows is not None and rows.take(params, grads):
                present[index, params[0].device] = params
                taken.add(index)
            else:
                self._check_formats(index, group, present)
        rows = {key: self._rows_of(*key, params, key[0] in taken) for key, params in present.items()}
        if not known or len(self.state) != len(self._entries):
            self._entries = list(self.state.values())
        if not all(some.held.placed and some.grads.placed for some in rows.values()):
            for index, group in enumerate(self.param_groups):  # it may be only that a tensor has no elements
                self._check_formats(index, group, {})
        self._refuse_shared(list(rows.values()))
        for group_rows in rows.values():
            self._follow_foreign_writes(group_rows)
        return rows

    def _check_formats(self, index: int, group: dict, present: dict) -> None:
        """Raise RuntimeError for a parameter or gradient that is not what it should be; enter the others in `present`."""
        for i, parameter in enumerate(group["params"]):
            grad = parameter.grad
            if grad is None:  # a lazy one has no shape then
                continue
            shape = parameter.shape
            if problem := self._parameter_problem(parameter, name_of(group, i)):
                raise RuntimeError(problem)
            if self._formats.setdefault(id(parameter), (parameter.dtype, shape)) != (parameter.dtype, shape):
                _refuse_changed(name_of(group, i), self._formats[id(parameter)], (parameter.dtype, shape))
            if self._ranks.dtensors or type(grad) is not torch.Tensor:
                _ranks.check_placements(name_of(group, i), parameter, grad)
            if grad.layout != torch.strided or grad.dtype not in DTYPES or grad.shape != shape:
                raise RuntimeError(
                    f"the gradient of {name_of(group, i)} must be a dense floating-point tensor of shape {tuple(shape)}, "
                    f"got {tuple(grad.shape)} {grad.dtype}, {grad.layout}"
                )
            if grad.device != parameter.device:
                raise RuntimeError(f"the gradient of {name_of(group, i)} is on {grad.device}, expected {parameter.device}")
            if grad.dtype.itemsize > (master := self._master_dtype(parameter)).itemsize:
                raise RuntimeError(
                    f"the gradient of {name_of(group, i)} is {grad.dtype}, wider than its master, {master}: "
                    f"make the optimizer with master_dtype={grad.dtype}"
                )
            for what, tensor in (("", parameter), ("the gradient of ", grad)):
                if not has_memory(_ranks.local(tensor)):
                    raise RuntimeError(f"{what}{name_of(group, i)} has no memory: its storage was freed, or it is a ZeroTensor")
            present.setdefault((index, parameter.device), []).append(parameter)

    def _refuse_shared(self, rows: list[Rows]) -> None:
        """Raise RuntimeError where two parameters share memory, of which each would update its part of the other."""
        addresses = [some.held.addresses for some in rows]
        if addresses == self._disjoint:
            return
        if shared := first_shared([t for some in rows for t in some.held], list(chain.from_iterable(addresses))):
            names, params = self._parameter_names(), [p for some in rows for p in some.params]
            first, second = (names[id(params[i])] for i in sorted(shared))
            raise RuntimeError(f"{second} shares memory with {first}: use one Parameter in both places")
        self._disjoint = addresses

    def _rows_of(self, index: int, device: torch.device, params: list[torch.Tensor], taken: bool) -> Rows:
        """The rows of the last step if they are still those; one set at a time.

        taken: whether these, should they be still those, have the gradients already.
        """
        group, rows = self.param_groups[index], self._rows.get((index, device))
        if (
            rows is None
            or rows.generation != _copies.generation
            or tuple(rows.states) != self._group_state_names(group)
            or not (taken or rows.are(params))
            or rows.moved()
        ):
            rows = self._rows[index, device] = self._make_rows(group, params)
            taken = False
        if not taken:
            rows.give(self._local_grads(params))
        return rows

    def _make_rows(self, group: dict, params: list[torch.Tensor]) -> Rows:
        params = list(params)  # the group's own list may grow
        for parameter in params:
            self._init_state(group, parameter)
        names, generation = self._group_state_names(group), _copies.generation
        held = Tensors([_ranks.local(p) for p in params] if self._ranks.dtensors else params)
        masters, copies, mastered = [], [], []
        compute_copies = _copies.claim(self, params)
        for i, parameter in enumerate(params):
            state = self.state[parameter]
            masters.append(_ranks.local(state["master"]) if "master" in state else held[i])
            if "master" in state:
                mastered.append(i)
                copies.append(held[i])
            elif i in compute_copies:
                copies.append(compute_copies[i].tensor)
            else:
                copies.append(torch.empty(0, dtype=torch.float16, device=parameter.device))
        entries = [self.state[p] for p in params]
        return Rows(
            params, held, masters=held if not mastered else Tensors(masters),
            copies=held if len(mastered) == len(params) else Tensors(copies),
            states={name: Tensors(_ranks.local(entry[name]) for entry in entries) for name in names},
            steps=Tensors(entry["step"] for entry in entries), entries=entries,
            compute_copies=compute_copies, mastered=mastered, generation=generation,
            dtensors=self._ranks.dtensors,
        )  # fmt: skip

    def _follow_foreign_writes(self, rows: Rows) -> None:
        """Take over what somebody else wrote since our last step: a skipped one must not leave a copy behind its weight."""
        versions, old = rows.versions_now(), rows.versions
        if versions != old:
            for i in rows.mastered:
                if old is None or versions[i] != old[i]:
                    _take_over(rows.masters[i], rows.held[i])
        if rows.compute_copies:
            stamps = rows.copy_stamps(versions)
            for i, compute_copy in rows.compute_copies.items():
                if compute_copy.stamp != stamps[i]:
                    compute_copy.write(cast(rows.params[i], compute_copy.tensor.dtype))

    def _after_update(self, rows: Rows) -> None:
        rows.checked = True
        move_versions(rows.written)
        rows.versions = rows.versions_now()
        if rows.compute_copies:
            stamps = rows.copy_stamps(rows.versions)
            for i, compute_copy in rows.compute_copies.items():
                compute_copy.stamp = stamps[i]

    def _master_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self.master_dtype or torch.promote_types(parameter.dtype, torch.float32)

    def _moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self.state_dtype or self._master_dtype(parameter)

    def _init_state(self, group: dict, parameter: torch.Tensor) -> None:
        """Make what is missing of the state: all of it at first, later what a changed hyperparameter asks for; or nothing."""
        dtype, state, new = self._master_dtype(parameter), self.state.get(parameter, {}), {}
        if "step" not in state:
            new["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            if dtype != parameter.dtype:
                new["master"] = torch.empty_like(parameter, dtype=dtype)
        for name in self._group_state_names(group):
            if name not in state:
                new[name] = torch.zeros_like(
                    parameter, dtype=self._moment_dtype(parameter), memory_format=torch.preserve_format
                )
        if "master" in new:
            new["master"].copy_(parameter)
        if new:
            self.state[parameter].update(new)

    _optional_states: tuple[str, ...] = ()  # those that a hyperparameter asks for, now or at other times

    def _group_state_names(self, group: dict) -> tuple[str, ...]:
        raise NotImplementedError

    # ----- masters ------------------------------------------------------------------------------

    @torch.no_grad()
    def sync_masters_(self) -> None:
        """Take over into masters and compute copies what was written to the parameters through `.data`."""
        for parameter, state in self.state.items():
            if "master" in state:
                _take_over(_ranks.local(state["master"]), _ranks.local(parameter))
        for rows in self._rows.values():
            for compute_copy in rows.compute_copies.values():
                compute_copy.stamp = None

    @contextlib.contextmanager
    def master_weights(self) -> Iterator[None]:
        """Lend the masters: inside, each parameter that has one holds it, in its dtype; afterwards its own 16 bits again.

        For evaluation, an EMA and saving; nothing is copied. Gradients, hooks and versions of the parameters are put aside
        and come back. A write to a parameter inside that torch can see is one to its master, rounded to 16 bits at the end.
        Raises RuntimeError for a DTensor that has a master (use `master_state_dict`) and, inside, for what would step,
        load or copy the optimizer.
        """
        self._refuse_while_lent("master_weights")
        masters = [(p, state["master"]) for p, state in self.state.items() if "master" in state]
        if any(_ranks.is_dtensor(p) for p, _ in masters):
            raise RuntimeError("master_weights cannot lend the masters of DTensors: use master_state_dict")
        with torch.no_grad():
            for parameter, master in masters:
                _take_over(master, parameter)
        with contextlib.ExitStack() as loans:
            self._lent = True
            loans.callback(setattr, self, "_lent", False)
            for parameter, master in masters:
                loans.enter_context(_lent(parameter, master))
            yield

    def _refuse_while_lent(self, what: str) -> None:
        if self._lent:
            raise RuntimeError(f"{what} is not possible inside master_weights(): the parameters are the masters there")

    def master_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """`model.state_dict()` with the master in place of every parameter that has one."""
        masters = {p: state["master"] for p, state in self.state.items() if "master" in state}
        result = model.state_dict()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in masters and name in result:
                result[name] = masters[parameter].detach()
        return result

    # ----- checkpoints --------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ours or torch's. A 16-bit parameter without a saved master gets one of its own value.

        Where a 16-bit parameter is not its loaded master rounded, the next step starts from the parameter.
        Raises ValueError for groups, keys, shapes or values that do not fit; nothing is loaded then.
        """
        self._refuse_while_lent("load_state_dict")
        state_dict = copy.copy(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            returned = hook(self, state_dict)
            state_dict = state_dict if returned is None else returned
        loaded = _checkpoints.checked_state(self, state_dict)
        groups = copy.deepcopy(state_dict["param_groups"])
        for group, new in zip(self.param_groups, groups, strict=True):
            group.update({**new, **_checkpoints.identity(group)})
        self.state.clear()
        self.state.update(loaded)
        self._rows.clear()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    _default_step: int | None = None


def _with_gradient(params: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    params = [p for p in params if p.grad is not None]
    return params, [p.grad for p in params]


def _check_scalars(**scalars: torch.Tensor | None) -> None:
    for name, tensor in scalars.items():
        if isinstance(tensor, int):  # torch's GradScaler without any gradient: the sum of no tensors
            continue
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise RuntimeError(f"{name} must be a 1-element float32 tensor, got {tensor!r}")
        if tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.is_meta:
            raise RuntimeError(
                f"{name} must be a 1-element float32 tensor, got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )


def _refuse_changed(name: str, before: tuple, now: tuple) -> None:
    index = int(before[0] == now[0])
    what = ("dtype", "shape")[index]
    raise RuntimeError(
        f"{name} changed {what} since construction: {before[index]} then, {now[index]} now; make the optimizer after convert"
    )


def _take_over(master: torch.Tensor, parameter: torch.Tensor) -> None:
    """What somebody wrote to the parameter becomes the master's; where the parameter is the master rounded, it stays."""
    master.copy_(torch.where(cast(master, parameter.dtype) == parameter, master, parameter))


@contextlib.contextmanager
def _lent(parameter: torch.Tensor, master: torch.Tensor):
    """Inside, `parameter` is `master`.

    NOTE: `parameter.data = master` would change its dtype, for which torch drops the node that accumulates its gradient,
    and with it, silently, the hooks by which DDP averages gradients. Here the whole parameter steps aside.
    """
    loan = master.detach().requires_grad_(parameter.requires_grad)
    version = master._version
    torch._C._swap_tensor_impl(parameter, loan)  # what torch.utils.swap_tensors does, which refuses weak references
    try:
        yield
    finally:
        torch._C._swap_tensor_impl(parameter, loan)
        if master._version != version:
            with torch.no_grad():
                parameter.copy_(cast(master, parameter.dtype))


def _unscaling(call: _Call) -> Unscaling:
    return Unscaling(call.rows.grads, call.options["grad_scale"], call.options["found_inf"])
