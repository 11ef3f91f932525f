# SPDX-License-Identifier: Apache-2.0
"""What the optimizers share: masters, compute copies, the check before the step, clipping, checkpoints.

An optimizer here is one read of all gradients (only where a verdict or a norm is wanted) and one pass that updates.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, TypeVar, overload

import torch

from mpkernels.ops.common.cast import DTYPES, cast
from mpkernels.ops.common.layout import overlaps
from mpkernels.ops.common.multi_tensor import MASTER_DTYPES, MOMENT_DTYPES, skip_flag
from mpkernels.optim import _checkpoints, _hyperparameters, _ranks, _stats, master_weights
from mpkernels.optim._parameters import first_shared, has_memory, is_lazy, name_of, shape_of, takes_another_grad_dtype
from mpkernels.optim._stats import Clip, GradStats
from mpkernels.optim._unscale import Unscaling
from mpkernels.optim.step_plan import Call, Signature, StepPlan
from mpkernels.runtime import compute_copy
from mpkernels.runtime.dispatch import agree_on_backends, move_versions
from mpkernels.runtime.fake import addresses

Loss = TypeVar("Loss")
Params = Iterable[torch.Tensor | tuple[str, torch.Tensor] | dict[str, Any]]  # of a union of Iterables mypy infers nothing

PLANS = 8  # kept at most: steps that find other parameters with a gradient, as of experts and dropped layers, take turns


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
        if any(takes_another_grad_dtype(p) for p in self._parameters()):
            self._make_state_ahead()
        agree_on_backends()

    @torch.no_grad()
    def _make_state_ahead(self) -> None:
        """Where there is no state, torch's distributed checkpoints step with gradients of the parameter's dtype to get it.

        Parameters that take gradients of another refuse those: here all that is trained has its state from construction.
        """
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter.requires_grad and not is_lazy(parameter):
                    self._init_state(group, parameter, name_of(group, i))
        self._remember_dtypes()

    def _forget(self) -> None:
        """Start without anything that is tied to these Parameter objects: at construction, and in a copy."""
        self.grad_norm: torch.Tensor | None = None
        self.steps_called = 0
        self._stats: dict[torch.device, GradStats] = {}
        self._pending_clip: Clip | None = None  # of scaler.clip_grad_norm_, until the next step
        self._plans: list[StepPlan] = []  # the last used first
        self._stamps: dict[int, tuple] = {}  # by id, version and address of the parameters of these plans after our last write
        self._made_for: dict[int, tuple[dict, torch.dtype]] = {}  # by id, the state of a parameter and the dtype it was for
        self._ranks = _ranks.Ranks([])
        self._checked_values: dict[int, list] = {}  # of hyperparameters, by group, as of the last step
        self._swapped = False  # inside master_weights

    def __getstate__(self) -> dict:
        self._refuse_while_swapped("a copy of the optimizer")
        ours = ("master_dtype", "state_dtype", "max_norm", "write_grads", "skip_nonfinite", "process_group")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}}

    def __setstate__(self, state: dict) -> None:
        self._forget()
        super().__setstate__(state)
        self._remember_dtypes()

    # ----- construction -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._refuse_while_swapped("add_param_group")
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
        self._refuse_while_swapped("step")
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        _check_scalars(grad_scale=grad_scale, found_inf=found_inf)
        loss = None
        if closure is not None:
            if grad_scale is not None:
                raise RuntimeError("a closure cannot be used with loss scaling: run it before, and call step() without it")
            with torch.enable_grad():
                loss = closure()
        _hyperparameters.check_replaced(self, self._checked_values)
        try:
            plan = self._current_plan()
            calls = self._prepare(plan, grad_scale, found_inf)
            unscalings = [
                Unscaling(call.grads, options["grad_scale"], options["found_inf"])
                for call, _, options in (calls if self.write_grads and grad_scale is not None else ())
            ]
        except BaseException:
            self._stats = {}  # what was read of these gradients: the next step may be of others
            self._release_grads()
            raise
        for call, arguments, options in calls:
            self._op(*arguments, **options, checked=True)
            move_versions(call.written)
        self._after_update(plan)
        self.steps_called += 1
        self._pending_clip = None
        for unscaling in unscalings:
            unscaling.write()
        self._release_grads()
        return loss

    def _release_grads(self) -> None:
        for plan in self._plans[:1]:
            plan.release_grads()

    def _prepare(self, plan: StepPlan, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> list[tuple]:
        """Read the gradients if need be; the calls of the op with their arguments and options, checked.

        What fails here, or allocates, has written nothing.
        """
        clip = self._clip_in_force()
        max_norm = self.max_norm if clip is None else clip.max_norm
        check = found_inf is None and (grad_scale is not None or self.skip_nonfinite)
        foreign = found_inf is not None  # somebody else's scalars: the op checks them
        if clip is None or not self._stats or plan.ranks.many:  # only a collective would tell of another rank's writes
            self._stats = {}
            if check or max_norm is not None:
                self._read_grads(plan, grad_scale, norm=max_norm is not None)
        if check and self._stats:
            found_inf = next(iter(self._stats.values())).found_inf
        calls = []
        for call in plan.calls:
            group = self.param_groups[call.group]
            options = self._step_options(call.device, grad_scale, found_inf, max_norm)
            calls.append((call, self._arguments(group, call), options))
            if foreign or not plan.checked or isinstance(group["lr"], torch.Tensor):
                self._op.check(*calls[-1][1], **options)
        return calls

    def _step_options(self, device, grad_scale, found_inf, max_norm) -> dict:
        norm = None if max_norm is None else _stats.scalar(self.grad_norm, device)
        grad_scale, found_inf = _stats.scalar(grad_scale, device), _stats.scalar(found_inf, device)
        return dict(grad_scale=grad_scale, found_inf=found_inf, grad_norm=norm, max_norm=max_norm)

    _op = None  # the op of the update

    def _arguments(self, group: dict, call: Call) -> tuple:
        """What `_op` is given, up to the options that all of them share."""
        raise NotImplementedError

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
        plan, clip = self._current_plan(), self._clip_in_force()
        for parameter in plan.params:
            if parameter.grad.dtype.itemsize == 2:
                parameter.grad_dtype = None  # any: float32 would stick, and DDP refuse the next backward
                parameter.grad = parameter.grad.float()
        plan.give([plan.local(p.grad) for p in plan.params])
        self._read_grads(plan, grad_scale, norm=clip is not None)
        for stats in self._stats.values():
            stats.found_inf = skip_flag(stats.found_inf, stats.grad_scale).float()
        unscalings = [Unscaling(call.grads, _stats.scalar(grad_scale, call.device), None) for call in plan.calls]
        for unscaling in unscalings:  # what allocates came before: an exception leaves all gradients scaled
            unscaling.write()
        self._pending_clip = clip and self._clip_of_these(clip.max_norm)
        self._release_grads()
        return {device: stats.found_inf for device, stats in self._stats.items()}

    @torch.no_grad()
    def _clip_at_next_step(self, grad_scale: torch.Tensor | None, max_norm: float) -> torch.Tensor | None:
        """Read the gradients now and clip them to max_norm in the next step; the norm, or None without gradients.

        A clip that is pending holds as well: torch's, which comes at once, is not undone by a wider one.
        """
        plan, clip = self._current_plan(), self._clip_in_force()
        self._read_grads(plan, grad_scale, norm=True)
        self._release_grads()
        if not self._stats:
            return None
        self._pending_clip = self._clip_of_these(max_norm if clip is None else min(max_norm, clip.max_norm))
        return self.grad_norm

    def _clip_of_these(self, max_norm: float) -> Clip:
        return Clip(max_norm, _with_gradient(self._parameters())[1])

    def _read_grads(self, plan: StepPlan, grad_scale: torch.Tensor | None, *, norm: bool) -> None:
        """Read all gradients once: per-tensor statistics, the verdict and (norm) `grad_norm`, over all devices."""
        if plan.ranks.many:
            self._read_on_ranks(plan, grad_scale, norm)
        else:
            self._stats = {r.device: _stats.read(r.device, r.params, r.grads, grad_scale, norm) for r in plan.readings}
            if len(self._stats) > 1:
                _stats.combine_devices(list(self._stats.values()))
        if norm and self._stats:
            self.grad_norm = next(iter(self._stats.values())).grad_norm

    def _read_on_ranks(self, plan: StepPlan, grad_scale: torch.Tensor | None, norm: bool) -> None:
        """The same with the verdict and the norm of all ranks; a rank without gradients joins in with none."""
        by_device = {r.device: r.params for r in plan.readings} or {self._parameters()[0].device: []}
        self._stats, squares = {}, {}
        for device, params in by_device.items():
            parts = plan.ranks.parts(params) if norm and params else {_ranks.HERE: params}
            reads = {
                part: _stats.read(device, members, [plan.local(p.grad) for p in members], grad_scale, norm)
                for part, members in parts.items()
            }
            self._stats[device] = _stats.joined(list(reads.values()))
            for part, stats in reads.items() if norm else ():
                square = stats.grad_norm.square().to(next(iter(by_device)), non_blocking=True)
                squares[part] = squares[part] + square if part in squares else square
        if len(self._stats) > 1:
            _stats.combine_devices(list(self._stats.values()))
        first = next(iter(self._stats.values()))
        first.found_inf, first.grad_norm = plan.ranks.agree(first.found_inf, squares if norm else None)

    # ----- the plan of a step ---------------------------------------------------------------------

    def _current_plan(self) -> StepPlan:
        """The plan of a step that finds these gradients; state is made where it is missing, foreign writes are taken over."""
        self._refuse_while_swapped("a scaler's unscale_ or clip_grad_norm_")
        signature = Signature(self.param_groups, self._partition())
        names = [self._group_state_names(group) for group in self.param_groups]
        plan = next((plan for plan in self._plans if plan.signature.matches(signature)), None)
        if plan is None or not plan.is_current(self.state, names):
            plan = self._make_plan(signature, names)
        else:
            self._use(plan)
            if plan.dtensors:
                signature.redistribute_grads()
                self._check_formats(plan.ranks)
            grads = signature.with_gradient()[1]
            if plan.dtensors:
                grads = list(map(_ranks.local, grads))
            if not plan.rebind(grads):
                self._check_formats(plan.ranks)
                plan.give(grads)
            elif not plan.has_memory():  # it may be only that a tensor has no elements
                self._check_formats(plan.ranks)
        self._sync_external_writes(plan)
        return plan

    def _partition(self) -> list[int]:
        """Per group, the first with the same hyperparameters: one call of the op serves both."""
        if len(self.param_groups) == 1:
            return [0]
        first: dict[tuple, int] = {}
        result = []
        for i, group in enumerate(self.param_groups):
            result.append(first.setdefault(tuple(_by_value(group.get(name)) for name in self._rules), i))
        return result

    def _make_plan(self, signature: Signature, names: list[tuple[str, ...]]) -> StepPlan:
        ranks = _ranks.Ranks(signature.params, self.process_group)
        if ranks.dtensors:
            signature.redistribute_grads()
        self._check_formats(ranks)
        params, _ = signature.with_gradient()
        self._refuse_shared([_ranks.local(p) for p in params], params)
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._init_state(group, parameter, name_of(group, i))
        self._remember_dtypes()
        self._save_stamps()
        plan = StepPlan(signature, self.state, names, ranks, self)
        kept = (p for p in self._plans if not p.signature.matches(signature) and p.signature.has_params_of(signature))
        self._plans = [plan, *kept][:PLANS]
        known = {id(p) for some in self._plans for p in some.params}
        self._stamps = {key: stamp for key, stamp in self._stamps.items() if key in known}
        self._ranks = ranks
        return plan

    def _use(self, plan: StepPlan) -> None:
        """Put `plan` first. What was written meanwhile under other plans is not foreign to it."""
        if plan is not self._plans[0]:
            self._save_stamps()
            plan.versions = [self._stamps.get(id(p), (None,))[0] for p in plan.params]
            self._plans.remove(plan)
            self._plans.insert(0, plan)
            self._ranks = plan.ranks

    def _save_stamps(self) -> None:
        for plan in self._plans[:1]:
            self._stamps.update(plan.stamps())

    def _remember_dtypes(self) -> None:
        """Of which dtype a parameter was when its state was made."""
        old, self._made_for = self._made_for, {}
        for parameter, entry in self.state.items():
            if isinstance(entry, dict) and isinstance(parameter, torch.Tensor):
                before = old.get(id(parameter))
                known = before is not None and before[0] is entry
                self._made_for[id(parameter)] = before if known else (entry, parameter.dtype)

    def _check_formats(self, ranks: _ranks.Ranks) -> None:
        """Raise RuntimeError for a parameter or gradient that is not what it should be."""
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is not None:  # a lazy one has no shape then
                    self._check_format(parameter, parameter.grad, name_of(group, i), ranks)

    def _check_format(self, parameter: torch.Tensor, grad: torch.Tensor, name: str, ranks: _ranks.Ranks) -> None:
        shape, (entry, dtype) = parameter.shape, self._made_for.get(id(parameter), (None, None))
        if problem := self._parameter_problem(parameter, name):
            raise RuntimeError(problem)
        if entry is not None and entry is self.state.get(parameter) and dtype != parameter.dtype:
            raise RuntimeError(
                f"{name} changed dtype since its state was made: {dtype} then, {parameter.dtype} now: "
                "make the optimizer after convert"
            )
        if ranks.dtensors or type(grad) is not torch.Tensor:
            _ranks.check_placements(name, parameter, grad)
        if grad.layout != torch.strided or grad.dtype not in DTYPES or grad.shape != shape:
            raise RuntimeError(
                f"the gradient of {name} must be a dense floating-point tensor of shape {tuple(shape)}, "
                f"got {tuple(grad.shape)} {grad.dtype}, {grad.layout}"
            )
        if grad.device != parameter.device:
            raise RuntimeError(f"the gradient of {name} is on {grad.device}, expected {parameter.device}")
        if grad.dtype.itemsize > (master := self._master_dtype(parameter)).itemsize:
            raise RuntimeError(
                f"the gradient of {name} is {grad.dtype}, wider than its master, {master}: "
                f"make the optimizer with master_dtype={grad.dtype}"
            )
        for what, tensor in (("", parameter), ("the gradient of ", grad)):
            if not has_memory(_ranks.local(tensor)):
                raise RuntimeError(f"{what}{name} has no memory: its storage was freed, or it is a ZeroTensor")

    def _refuse_shared(self, tensors: list[torch.Tensor], params: list[torch.Tensor]) -> None:
        """Raise RuntimeError where two parameters share memory, of which each would update its part of the other."""
        if shared := first_shared(tensors, addresses(tensors)):
            names = self._parameter_names()
            first, second = (names[id(params[i])] for i in sorted(shared))
            raise RuntimeError(f"{second} shares memory with {first}: use one Parameter in both places")

    def _sync_external_writes(self, plan: StepPlan) -> None:
        """Take over what others wrote since our last step: a skipped one must not leave a copy behind its weight."""
        versions = plan.versions_now()
        for i in plan.written_by_others(versions):
            master_weights.take_over(plan.masters[i], plan.local_params[i])
        plan.versions = versions
        for held in plan.compute_copies.values():
            if not held.is_fresh():
                held.write(cast(held.weight, held.tensor.dtype))

    def _after_update(self, plan: StepPlan) -> None:
        plan.checked, plan.versions = True, plan.versions_now()
        for held in plan.compute_copies.values():
            held.stamp = compute_copy.stamp(held.weight)

    def _master_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self.master_dtype or torch.promote_types(parameter.dtype, torch.float32)

    def _moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self.state_dtype or self._master_dtype(parameter)

    def _init_state(self, group: dict, parameter: torch.Tensor, name: str) -> None:
        """Make what is missing of the state: all of it at first, later what a changed hyperparameter asks for; or nothing.

        What the user has put in counts; raises RuntimeError where it is not of this parameter's shape.
        """
        dtype, state, new = self._master_dtype(parameter), self.state.get(parameter, {}), {}
        for key in self._group_state_names(group):
            value = state.get(key)
            if value is None:
                new[key] = torch.zeros_like(parameter, dtype=self._moment_dtype(parameter), memory_format=torch.preserve_format)
            elif not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise RuntimeError(
                    f"{name} changed shape since its state was made: {key} has {got}, the parameter {tuple(parameter.shape)}: "
                    "resize the state with it, or take it away with optimizer.state.pop(parameter)"
                )
            elif _ranks.placement(value) != _ranks.placement(parameter):
                new[key] = _ranks.laid_out_as(value, parameter)
        if not _is_count(parameter, step := state.get("step")):
            new["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            if step is not None:
                new["step"].copy_(step.reshape(())) if isinstance(step, torch.Tensor) else new["step"].fill_(step)
        if dtype == parameter.dtype:
            state.pop("master", None)
        elif not _is_master_of(parameter, master := state.get("master"), dtype):
            new["master"] = parameter.detach().to(dtype, copy=True)
        elif _ranks.placement(master) != _ranks.placement(parameter):
            new["master"] = _ranks.laid_out_as(master, parameter)
        if new:
            self.state.setdefault(parameter, {}).update(new)  # a user may have put a plain dict there

    _optional_states: tuple[str, ...] = ()  # those that a hyperparameter asks for, now or at other times

    def _group_state_names(self, group: dict) -> tuple[str, ...]:
        raise NotImplementedError

    # ----- masters ------------------------------------------------------------------------------

    @torch.no_grad()
    def sync_masters_(self) -> None:
        """Take over into masters and compute copies what was written to the parameters without moving their versions.

        So do writes through `.data`, numpy and DLPack views, and collectives (`dist.broadcast(p, 0)`, all_reduce, scatter).
        """
        for parameter, master in master_weights.pairs(self.state):
            master_weights.take_over(master, parameter)
        for plan in self._plans:
            for held in plan.compute_copies.values():
                held.stamp = None

    @torch.no_grad()
    def check_masters(self) -> list[str]:
        """The names of the parameters that are not their masters rounded, or whose compute copy is not them, rounded.

        They were written without moving their versions, and the next step would undo that: `sync_masters_`. Waits for the
        device. Of DTensors each rank looks at what it holds.
        """
        self._take_over_visible_writes()
        named = [(p, master_weights.pairs({p: self.state.get(p)})) for p in self._parameters()]
        looked_at = [(p, p, masters[0][1]) for p, masters in named if masters]
        copies = {id(c): c for plan in self._plans for c in plan.compute_copies.values() if c.is_fresh()}
        looked_at += [(c.weight, c.tensor, c.weight) for c in copies.values()]
        strayed = master_weights.strays((narrow, wide) for _, narrow, wide in looked_at)
        found = {id(p) for (p, _, _), stray in zip(looked_at, strayed, strict=True) if stray}
        return [name for key, name in self._parameter_names().items() if key in found]

    def _take_over_visible_writes(self) -> None:
        """Every reader of masters does so first: what moved a version or an address since our last write."""
        self._save_stamps()
        for parameter, master in master_weights.pairs(self.state):
            if _ranks.is_dtensor(parameter) or self._stamps.get(id(parameter)) != _stamp(parameter):
                master_weights.take_over(master, parameter)

    @contextlib.contextmanager
    def master_weights(self) -> Iterator[None]:
        """Put the masters in the parameters' place: inside, each parameter that has one holds it, in its dtype.

        Afterwards it holds its own 16 bits again. For evaluation, an EMA and saving; nothing is copied. Gradients, hooks and
        versions of the parameters are put aside and come back. A write to a parameter inside that torch can see is one to
        its master, rounded to 16 bits at the end.
        Raises RuntimeError for a DTensor that has a master (use `master_state_dict`) and, inside, for what would step,
        load or copy the optimizer.
        """
        self._refuse_while_swapped("master_weights")
        masters = master_weights.pairs(self.state)
        if any(_ranks.is_dtensor(p) for p, _ in masters):
            raise RuntimeError("master_weights cannot put masters in the place of DTensors: use master_state_dict")
        with torch.no_grad():
            for parameter, master in masters:
                master_weights.take_over(master, parameter)
        with contextlib.ExitStack() as swaps:
            self._swapped = True
            swaps.callback(setattr, self, "_swapped", False)
            for parameter, master in masters:
                swaps.enter_context(master_weights.swapped_in(parameter, master))
            yield

    def _refuse_while_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} is not possible inside master_weights(): the parameters are the masters there")

    @torch.no_grad()
    def master_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """`model.state_dict()` with the master in place of every parameter that has one.

        What was written to a parameter so that torch sees it, as `model.load_state_dict` does, is taken over first. Whoever
        reads `state[p]["master"]` itself gets it as of the last step.
        """
        self._take_over_visible_writes()
        masters = {id(p): master for p, master in master_weights.pairs(self.state)}
        result = model.state_dict()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in masters and name in result:
                result[name] = masters[id(parameter)].detach()
        return result

    # ----- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, all live; 16-bit parameters have a `master` besides, up to date with what torch sees written to them."""
        with torch.no_grad():
            self._take_over_visible_writes()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ours or torch's. A 16-bit parameter without a saved master gets one of its own value.

        Where a 16-bit parameter is not its loaded master rounded, the next step starts from the parameter.
        Raises ValueError for groups, keys, shapes or values that do not fit; nothing is loaded then.
        """
        self._refuse_while_swapped("load_state_dict")
        state_dict = copy.copy(state_dict)  # keeps what class it is, and any attributes
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            returned = hook(self, state_dict)
            state_dict = state_dict if returned is None else returned
        loaded = _checkpoints.checked_state(self, state_dict)
        groups = copy.deepcopy(state_dict["param_groups"])
        for group, new in zip(self.param_groups, groups, strict=True):
            group.update({**new, **_checkpoints.identity(group)})
        self.state.clear()
        self.state.update(loaded)
        self._plans.clear()
        # The weights may be loaded after this: masters that were read meanwhile must not be those of the weights before.
        self._stamps = {id(p): _stamp(p) for p, _ in master_weights.pairs(self.state)}
        self._remember_dtypes()
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


def _by_value(hyperparameter):
    """What groups are compared by; tensors by being the same one, which needs no look at the device."""
    if isinstance(hyperparameter, torch.Tensor):
        return torch.Tensor, id(hyperparameter)
    return tuple(hyperparameter) if isinstance(hyperparameter, list) else hyperparameter


def _is_count(parameter: torch.Tensor, step) -> bool:
    """Whether it is what the op advances; a number, or a tensor on another device as torch keeps it, is made one."""
    return isinstance(step, torch.Tensor) and (step.shape, step.dtype, step.device) == ((), torch.float32, parameter.device)


def _is_master_of(parameter: torch.Tensor, master, dtype: torch.dtype) -> bool:
    wanted = parameter.shape, dtype, parameter.device
    return isinstance(master, torch.Tensor) and (master.shape, master.dtype, master.device) == wanted


def _stamp(parameter: torch.Tensor) -> tuple:
    """As StepPlan.stamps has it. The address: `p.data = ...`, as vector_to_parameters writes, moves no version."""
    local = _ranks.local(parameter)
    version = (local._version, parameter._version) if _ranks.is_dtensor(parameter) else parameter._version
    return version, *addresses([local])
