# SPDX-License-Identifier: Apache-2.0
"""The base of the optimizers: what a new one declares, and a step that is one read of the gradients and one pass."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch.autograd import profiler
from torch.optim import optimizer as torchs

from mpkernels.optim import distributed, external_writes, hyperparameters
from mpkernels.optim.format_checks import check_gradient, check_not_shared, check_parameter, names_of, with_gradient
from mpkernels.optim.grad_reading import GradReader, LastRead, Unscaling, scalar
from mpkernels.optim.stateful import StatefulOptimizer
from mpkernels.optim.step_plan import GroupValues, Signature, StepPlan
from mpkernels.optim.update_lists import UpdateLists
from mpkernels.runtime.op import Op, agree_on_backends, move_versions

Loss = TypeVar("Loss")
Returned = TypeVar("Returned")
P = ParamSpec("P")
Params = Iterable[torch.Tensor | tuple[str, torch.Tensor] | dict[str, Any]]  # of a union of Iterables mypy infers nothing
Scalar = torch.Tensor | None

_SWITCHES = {name: hyperparameters.flag(name) for name in ("write_grads", "skip_nonfinite")}


# What torch.compile compiles frames by; None: nothing is compiled.
_frame_compiler = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)


def not_compiled(function: Callable[P, Returned]) -> Callable[P, Returned]:
    """What `torch.compiler.disable` makes of a function, at no cost where nothing is compiled.

    NOTE: that itself would import dynamo when this file is imported; `_disable_dynamo` does so at the first call of `disabled`.
    """
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Returned:
        return (function if _frame_compiler() is None else disabled)(*args, **kwargs)

    wrapper._torchdynamo_disable = True
    return wrapper


def _without_grad(function: Callable[P, Returned]) -> Callable[P, Returned]:
    """`torch.no_grad()` of a function, which is nine calls of Python."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Returned:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return wrapper


def _hooked(step):
    """What torch wraps steps in, hooks and a range of profilers, where there are any.

    A range takes as long as a step of small tensors, whether a profiler is on or not.
    """
    wrapped = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self, *args, **kwargs):
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or torchs._global_optimizer_pre_hooks
        after, ours = torchs._global_optimizer_post_hooks, external_writes.hook  # which is for other optimizers
        others = len(after) > (ours is not None and ours.id in after)
        is_watched = hooks or others or profiler._is_profiler_enabled or args or kwargs  # a closure may register hooks
        return (wrapped if is_watched else step)(self, *args, **kwargs)

    return wrapper


class Optimizer(StatefulOptimizer):
    """Base of AdamW, Adam, Lion and SGD.

    master_dtype: fp32 or fp64, what 16-bit parameters are updated in (None: fp32). state_dtype: of the moments: None, the
    master's, or bf16, for 2 bytes less per moment and parameter than fp32, of memory and of traffic each way; the arithmetic
    stays the master's, see mpkernels.ops.optimizer_update for what is lost.
    max_norm: clip the global norm over all groups inside the step. write_grads: leave `.grad` unscaled after a step
    under a scaler, as torch does. skip_nonfinite: without a scaler, skip a step with inf or NaN gradients.
    process_group: needed where plain tensors are sharded by hand: the ranks that share one found_inf and whose gradients
    one norm sums; every one of them calls each step. DTensors (FSDP2) need none, nor does DDP, whose ranks have the same
    gradients.

    A new optimizer is a subclass with torch's arguments that declares
        _op             the op of its update, with a call of (masters, grads, *moments, copies, steps, lr, *options,
                        grad_scale=, found_inf=, grad_norm=, max_norm=): see mpkernels.ops.optimizer_update
        _moments        the names of its moments in the state of a parameter, in the order of the op
        _optional       of these the ones that only some groups have: name -> the hyperparameter that asks for it
        _requirements   what each hyperparameter must be; groups in which these are equal are one call of the op
        _default_step   the step count of a loaded state that has none; None: it is refused
        _options(group) the op's options, from the hyperparameters of a group
    and may extend `_init_state` and `_check_hyperparameters`. mpkernels.GradScaler calls `_scaled_step`, `_unscale_grads`,
    `_clip_at_next_step` and `_last_read`, and nothing else that is not public.
    """

    _op: Op
    _step_supports_amp_scaling = True  # torch.amp.GradScaler then passes grad_scale and found_inf as attributes

    def _options(self, group: dict) -> tuple:
        raise NotImplementedError

    def __init__(
        self, params: Params, defaults: dict[str, Any], *, master_dtype: torch.dtype | None, state_dtype: torch.dtype | None,
        max_norm: float | None, write_grads: bool, skip_nonfinite: bool, process_group: "torch.distributed.ProcessGroup | None",
    ) -> None:  # fmt: skip
        if max_norm is not None and not hyperparameters.as_float(max_norm) > 0:
            raise ValueError(f"Invalid max_norm: {max_norm!r}: it must be a number greater than 0, or None")
        if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
            raise TypeError(f"process_group must be a ProcessGroup that this rank is in, got {process_group!r}")
        hyperparameters.check(_SWITCHES, {"write_grads": write_grads, "skip_nonfinite": skip_nonfinite})
        self.max_norm, self.process_group = max_norm, process_group
        self.write_grads, self.skip_nonfinite = bool(write_grads), bool(skip_nonfinite)
        super().__init__(params, defaults, master_dtype, state_dtype)
        agree_on_backends()

    def _forget(self) -> None:
        super()._forget()
        self.steps_called = 0
        self._values, self._reader = GroupValues(self._requirements, self._kept), GradReader()
        self._scaling: tuple[Scalar, Scalar, Callable] | None = None  # inside _scaled_step

    # ----- the step ---------------------------------------------------------------------------

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The global norm of the last step that clipped, 0-d fp64 on the device, unscaled, before clipping."""
        return self._reader.norm

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    # NOTE: under torch.compile the step is a graph break: it is one or two kernels already, and dynamo would trace our
    # bookkeeping in nine graphs.
    @not_compiled
    @_without_grad
    def step(self, closure=None):
        """Take a step, or skip it on the device where a scaler or `skip_nonfinite` asks for it. Returns the closure's loss.

        torch's scaler sets `grad_scale` (the gradients are divided by it) and, when it has checked already, `found_inf`.
        Raises RuntimeError for a gradient that is sparse or wider than its master, a parameter whose dtype or shape changed, a
        closure under a scaler.
        After an exception, out of a hook too, the step can be taken again or left out: what can fail, or allocates, comes
        before the first write. (Not so where the op itself fails to allocate: `eager`, and layouts that differ.)
        """
        if self._is_swapped:
            self._refuse_while_swapped("step")
        if self._scaling is not None:
            grad_scale, found_inf, on_taken = self._scaling
        else:
            grad_scale, found_inf, on_taken = getattr(self, "grad_scale", None), getattr(self, "found_inf", None), None
            if isinstance(found_inf, int):  # torch's GradScaler where it saw no gradient: 0, the sum of no tensors
                found_inf = None
            _check_scalars(grad_scale=grad_scale, found_inf=found_inf)
        loss = None
        if closure is not None:
            if grad_scale is not None:
                raise RuntimeError("a closure cannot be used with loss scaling: run it before, and call step() without it")
            with torch.enable_grad():
                loss = closure()
        try:
            plan = self._current_plan()
            calls = self._prepare_calls(plan, grad_scale, found_inf, are_ours=on_taken is not None)
            unscale = self.write_grads and grad_scale is not None
            unscalings = [Unscaling(call.grads, call.grad_scale, call.found_inf) for _, call in calls] if unscale else ()
        except BaseException:
            self._reader.forget()
            self._plans.release_grads()
            raise
        for lists, call in calls:
            self._op.run_checked(call)
            move_versions(lists.written)
        if plan.with_master:
            self._writes.record()
        plan.stamp_copies()
        self.steps_called += 1
        self._reader.drop_clip()
        for unscaling in unscalings:
            unscaling.write()
        plan.release_grads()
        if on_taken is not None:
            for name in ("grad_scale", "found_inf"):  # what the user has set was for this step
                vars(self).pop(name, None)
            on_taken(self._reader.found_inf_by_device())
        return loss

    profile_hook_step = staticmethod(_hooked)  # torch calls it of each class

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, without its range of profilers where none is on."""
        if not set_to_none or profiler._is_profiler_enabled:
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _prepare_calls(
        self, plan: StepPlan, grad_scale: Scalar, found_inf: Scalar, *, are_ours: bool
    ) -> list[tuple[UpdateLists, Any]]:
        """The lists of each call of the op, and the call; gradients are read where it needs that.

        are_ours: the scalars are our scaler's. What fails here, or allocates, has written nothing.
        """
        is_foreign = found_inf is not None and not are_ours
        check = found_inf is None and (grad_scale is not None or self.skip_nonfinite)
        read, norm, max_norm = self._reader.read_for_step(plan, grad_scale, self.max_norm, check=check)
        found_inf, result = read if check else found_inf, []
        for lists in plan.updates:
            scaling = [value if value is None else scalar(value, lists.device) for value in (grad_scale, found_inf, norm)]
            call = self._op.call(*lists.arguments, *scaling, max_norm)
            if is_foreign or lists.has_lr_tensor:
                self._op.check(call)
            result.append((lists, call))
        return result

    def _current_plan(self) -> StepPlan:
        """The plan of a step that finds these gradients; external writes are taken over."""
        groups, values, plans = self.param_groups, self._values, self._plans
        if not values.is_current(groups):
            values.look(groups)
        signature = Signature(groups, values.partition)
        plan = plans.find(signature)
        is_current = plan is not None and plan.is_current(self.state, values)
        ranks = plan.ranks if is_current else distributed.Ranks(signature.params, self.process_group)
        grads = signature.local_grads(ranks.dtensors)
        is_bound = is_current and plan.rebind(grads)
        if not is_bound or ranks.dtensors or not plan.has_memory():  # or it may be only that a tensor has no elements
            self._check_formats(ranks)
        if not is_current:
            plan = self._make_plan(signature, ranks)
        if plan.values_generation != values.generation:
            plan.take_options(values, groups, self._options, self._moments)
        if not is_bound:
            plan.rebuild_grads(grads, self._op)
        if plan.with_master:
            self._writes.take_over(plan)
        plan.refresh_copies()
        return plan

    def _make_plan(self, signature: Signature, ranks: distributed.Ranks) -> StepPlan:
        """State is made where it is missing."""
        check_not_shared(signature.params_with_gradient(), self.param_groups)
        for group, parameter, name in with_gradient(self.param_groups):
            self._init_state(group, parameter, name)
        self._dtypes.record(self.state)
        external_writes.watch_other_optimizers(self)
        plan = StepPlan(signature, self.state, self._values, ranks)
        self._plans.add(plan)
        self._writes.forget(plan.params, self.state)
        return plan

    def _check_formats(self, ranks: distributed.Ranks) -> None:
        """Raise RuntimeError for a parameter or gradient that is not what it should be."""
        for _, parameter, name in with_gradient(self.param_groups):
            check_parameter(parameter, name, self._kept, RuntimeError)
            self._dtypes.check(parameter, self.state.get(parameter), name)
            check_gradient(parameter, parameter.grad, name, self._kept, ranks.dtensors)

    # ----- what GradScaler calls ----------------------------------------------------------------

    def _scaled_step(self, grad_scale: Scalar, found_inf: Scalar, on_taken: Callable[[dict], None]):
        """`step()` under a scaler; `found_inf` only where `_unscale_grads` came before, which has divided by the scale.

        on_taken: called with found_inf by device when the update is under way: a hook that raises then does not undo it.
        """
        read = self._reader.stats
        self._scaling = self._times_preset(grad_scale), found_inf, on_taken
        try:
            return self.step()
        finally:
            self._scaling = None
            if found_inf is not None:
                self._reader.stats = read  # for the report: the step has read no more than the norm

    def _times_preset(self, grad_scale: Scalar) -> Scalar:
        """What the gradients are divided by: the scaler's scale times a `grad_scale` that the user has set on the optimizer."""
        preset = getattr(self, "grad_scale", None)
        return grad_scale if preset is None else preset if grad_scale is None else grad_scale * preset

    @torch.no_grad()
    def _unscale_grads(self, grad_scale: torch.Tensor) -> dict[torch.device, torch.Tensor]:
        """Divide the gradients by `grad_scale`; found_inf by device. 16-bit ones become fp32: nothing is rounded or lost."""
        self._refuse_while_swapped("a scaler's unscale_")
        plan = self._current_plan()
        self._reader.unscale(plan, grad_scale, self._op)
        self._plans.release_grads()
        return self._reader.found_inf_by_device()

    @torch.no_grad()
    def _clip_at_next_step(self, grad_scale: Scalar, max_norm: float) -> torch.Tensor | None:
        """Read the gradients now and clip them to max_norm in the next step; the norm, or None without gradients."""
        self._refuse_while_swapped("a scaler's clip_grad_norm_")
        plan = self._current_plan()
        self._reader.clip_at_next_step(plan, self._times_preset(grad_scale), max_norm)
        self._plans.release_grads()
        return self.grad_norm if self._reader.stats else None

    def _last_read(self) -> LastRead:
        """What `overflow_report` reads."""
        many_ranks = any(plan.ranks.many for plan in self._plans.plans[:1])
        return LastRead(list(self._reader.stats.values()), self.steps_called, names_of(self.param_groups), many_ranks)


def _check_scalars(**scalars: torch.Tensor | None) -> None:
    for name, tensor in scalars.items():
        if tensor is None:
            continue
        is_tensor = isinstance(tensor, torch.Tensor)
        if not is_tensor or tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.is_meta:
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" if is_tensor else repr(tensor)
            raise RuntimeError(f"{name} must be a 1-element float32 tensor, got {got}")
