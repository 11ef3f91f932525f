# SPDX-License-Identifier: Apache-2.0
"""GradScaler: torch's, whose step on our optimizers is one read of the gradients and one pass, without a host sync."""

import inspect
from collections import abc, defaultdict
from typing import Any, overload

import torch
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from mpkernels.amp import overflow_report, values
from mpkernels.amp.scale_state import ScaleState
from mpkernels.ops import update_scale
from mpkernels.optim.grad_reading import scalar
from mpkernels.optim.optimizer import Optimizer, not_compiled
from mpkernels.runtime.op import move_versions

_FUSED = "_step_supports_amp_scaling"  # torch's sign of an optimizer that takes the scale as an attribute


class GradScaler(ScaleState):
    """`torch.amp.GradScaler` with bounds, hysteresis and counters on the device.

    device: where the scale lives; None: where the first scaled loss is. init_scale, growth_factor, backoff_factor,
    growth_interval, enabled: as torch. min_scale, max_scale: the scale never leaves them. hysteresis: back off at the
    k-th overflow since the scale last grew, and at each one after it; 1 is what torch does.

    NOTE: `.grad` stays scaled after `step` of one of our optimizers, which read it and do not write it: a norm taken of it
    then is that of the scaled gradients. See `step` for what to log instead (`write_grads=True` unscales it, as torch does).

    `last_step_skipped`, `skipped_steps`, `skipped_in_a_row`: 0-d tensors on the device, as of the last `update()`.
    Only `get_scale`, `state_dict` (and with it a copy of the scaler), `overflow_report` and the step of an optimizer that is
    not ours wait for the device. After 20 skipped steps in a row one warning says so, without waiting.
    Under torch.compile what steps, unscales, clips or updates is a graph break: dynamo loses what is recorded between these
    calls.
    On many ranks each has a scaler, and our optimizers agree on the overflow, so that all scales stay the same.
    Raises ValueError for values that make no scale, RuntimeError for a device that is not there.
    """

    # ----- scale, unscale, step, update ---------------------------------------------------------

    @overload
    def scale(self, outputs: torch.Tensor) -> torch.Tensor: ...

    @overload
    def scale(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]: ...

    @overload
    def scale(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]: ...

    @overload
    def scale(self, outputs: abc.Iterable[torch.Tensor]) -> abc.Iterable[torch.Tensor]: ...

    def scale(self, outputs):
        """`outputs` times the scale: a tensor or nested iterables of tensors.

        Raises ValueError for a float16 tensor: it and its gradient, the scale itself, would be rounded; bfloat16 passes.
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            if outputs.dtype == torch.float16:
                values.refuse_float16(outputs, self._init_scale)
            if self._scale is None:
                self._lazy_init_scale_growth_tracker(outputs.device)
            return outputs * scalar(self._scale, outputs.device)
        values.refuse_float16(outputs, self._init_scale)
        if isinstance(outputs, abc.Iterable):
            scaled = map(self.scale, outputs)
            return type(outputs)(scaled) if isinstance(outputs, list | tuple) else scaled
        raise ValueError(f"outputs must be a Tensor or an iterable of Tensors, got {type(outputs).__name__}: pass the loss")

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        """As torch's; our optimizers unscale by themselves, in fp32."""
        if isinstance(optimizer, Optimizer):
            return optimizer._unscale_grads(self._scale)
        params = (p for group in optimizer.param_groups for p in group["params"])
        if not allow_fp16 and any(p.grad is not None and p.grad.dtype == torch.float16 for p in params):
            raise ValueError(
                "Attempting to unscale FP16 gradients. They would be rounded: keep the parameters in float32 (policy "
                '"mixed_float16"), or step an optimizer of mpkernels.optim itself, no wrapper of one'
            )
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)

    def _stage(self, optimizer) -> OptState:
        state = self._per_optimizer_states.get(id(optimizer)) if self._enabled else None
        return OptState.READY if state is None else state["stage"]

    @not_compiled
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale; those of our optimizers become fp32 where they have 16 bits."""
        _check_is_optimizer("unscale_", optimizer)
        stage = self._stage(optimizer)
        if stage is OptState.UNSCALED:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update(): its gradients are unscaled, "
                "call step() and update() next"
            )
        if stage is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step(): call it between backward and step()")
        super().unscale_(optimizer)

    @not_compiled
    def clip_grad_norm_(self, optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
        """Clip the global norm of the unscaled gradients to `max_norm`; returns the norm, on the device.

        That is the norm to log (`optimizer.grad_norm` has it too): `.grad` is scaled. `math.inf` clips nothing.
        For one of our optimizers the gradients are read once and the factor is left to `step`, which reads them again where
        they were written since, and on many ranks always. Where all of them are gone, or written since, as zeroed and
        accumulated into, the clip is dropped: torch, which clips at the call, does not clip what comes after it. Code that
        writes to all gradients clips afterwards. For another optimizer, or after `unscale_`, it is torch's (not with a
        `process_group`, of which that knows nothing).
        Raises ValueError for an optimizer with its own `max_norm`, TypeError for what is no optimizer, as its parameters.
        """
        _check_is_optimizer("clip_grad_norm_", optimizer)
        if getattr(optimizer, "max_norm", None) is not None:
            raise ValueError(
                f"the optimizer clips by itself: it was made with max_norm={optimizer.max_norm}; leave one of the two out"
            )
        max_norm = values.number("max_norm", max_norm)
        if not max_norm > 0:
            raise ValueError(f"Invalid max_norm: {max_norm}; it must be greater than 0")
        stage = self._stage(optimizer)
        if stage is OptState.STEPPED:
            raise RuntimeError("clip_grad_norm_() is being called after step(): call it between backward and step()")
        if isinstance(optimizer, Optimizer) and (stage is OptState.READY or optimizer.process_group is not None):
            is_scaled = self._enabled and stage is OptState.READY
            scale = self._check_scale_growth_tracker("clip_grad_norm_")[0] if is_scaled else None
            norm = optimizer._clip_at_next_step(scale, max_norm)
            return torch.zeros((), dtype=torch.float64, device="cpu") if norm is None else norm
        if stage is OptState.READY:
            self.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, max_norm)

    @not_compiled
    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step the optimizer unless a gradient is inf or NaN, before or after unscaling; decided on the device.

        NOTE: one of our optimizers unscales what it reads and writes no gradient: `.grad` is as scaled afterwards as before.
        To look at gradients or log norms, `unscale_` before, make the optimizer with `write_grads=True`, or read
        `optimizer.grad_norm`, which is unscaled (there with `max_norm`, or after `clip_grad_norm_`).
        Raises RuntimeError for a second step before `update()` and for a closure, as torch, and inside a backward, whose
        gradients are not all there yet. After an exception in the optimizer's step it can be taken again or left out.
        """
        _check_is_optimizer("step", optimizer)
        if not self._enabled:
            return super().step(optimizer, *args, **kwargs)
        ours = isinstance(optimizer, Optimizer)
        arguments = (*args, *kwargs.values())
        if arguments and any(argument is not None if ours else callable(argument) for argument in arguments):
            raise RuntimeError(
                "Closure use is not currently supported if GradScaler is enabled: call scaler.scale(loss).backward() and then "
                "scaler.step(optimizer) without a closure; an optimizer that needs one (LBFGS) works in float32 or bfloat16, "
                "by optimizer.step(closure) without a scaler"
            )
        if self._stage(optimizer) is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update(): call update() after each step")
        if not ours:
            return self._step_other(optimizer, *args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "step() is being called inside backward: its gradients are not all there yet; call it after backward()"
            )
        scale, _ = self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        is_unscaled = state["stage"] is OptState.UNSCALED

        def on_taken(found_inf: dict[torch.device, torch.Tensor]) -> None:
            if not is_unscaled:
                state["found_inf_per_device"] = found_inf
            state["stage"] = OptState.STEPPED

        found = list(state["found_inf_per_device"].values()) if is_unscaled else []
        found_inf = _any(found, scale.device) if found else None
        try:
            return optimizer._scaled_step(None if is_unscaled else scale, found_inf, on_taken)
        except BaseException:
            if state["stage"] is OptState.READY:  # nothing was written: as if it had not been called
                self._per_optimizer_states.pop(id(optimizer), None)
            raise

    def _step_other(self, optimizer, *args, **kwargs):
        """As torch's, of an optimizer that is not ours; after an exception its attributes are what they were."""
        names = ("grad_scale", "found_inf")
        if getattr(optimizer, _FUSED, False) and not inspect.getattr_static(optimizer, _FUSED, False):
            # NOTE: a wrapper that hands attributes out of an optimizer, not into it: what the scaler sets would be lost.
            self._check_scale_growth_tracker("step")
            if self._stage(optimizer) is OptState.READY:
                self.unscale_(optimizer)
            state = self._per_optimizer_states[id(optimizer)]
            loss = self._maybe_opt_step(optimizer, state, *args, **kwargs)
            state["stage"] = OptState.STEPPED
            return loss
        before = {name: vars(optimizer)[name] for name in names if name in vars(optimizer)}
        try:
            return super().step(optimizer, *args, **kwargs)
        except BaseException:
            for name in names:
                vars(optimizer).pop(name, None)
            vars(optimizer).update(before)
            raise

    @not_compiled
    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Grow, keep or back off the scale, on the device; count skipped steps. A step without any gradient changes nothing.

        new_scale: set this scale instead and count. Raises ValueError for one that is not between min_scale and max_scale.
        """
        if not self._enabled:
            return
        scale, growth_tracker = self._check_scale_growth_tracker("update")
        found, is_stepped, updated = [], False, [scale, growth_tracker, self._hysteresis_tracker]
        for state in self._per_optimizer_states.values():
            is_stepped |= state["stage"] is not OptState.READY
            found += state["found_inf_per_device"].values()
        if new_scale is None and not is_stepped:
            raise AssertionError(
                "No inf checks were recorded prior to update: call step() of an optimizer first, and update() once after it"
            )
        if new_scale is not None and not isinstance(new_scale, torch.Tensor):
            new_scale = values.scale("new_scale", new_scale, self._min_scale, self._max_scale)
        restored = None if self._layer_watch is None else self._layer_watch._end_step(scale)
        if new_scale is not None:
            super().update(new_scale)
            updated = [tensor.clone() for tensor in updated]  # copies of no effect: the op is to count
        if found:
            updated.append(self._skipped)
            update_scale.op.run_checked(update_scale.ScaleCall(
                *updated, _any(found, scale.device),
                self._growth_factor, self._backoff_factor, self._growth_interval,
                self._hysteresis, self._min_scale, self._max_scale,
            ))  # fmt: skip
            move_versions(updated)
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        if found:
            self._watch.after_update(self._skipped, scale)
        if restored is not None and new_scale is None:
            scale.fill_(restored)
            growth_tracker.zero_()

    def overflow_report(self, optimizer: torch.optim.Optimizer) -> str:
        """Which gradients of the last step were not finite; "" if it was taken. Waits for the device.

        A line each, in order of backward, with the largest of the (scaled) elements that are finite:
        `step 1204 skipped at scale 65536: blocks.7.fc2.weight has 3 non-finite of 4194304, amax 65472 of the finite ones`
        Where all of them are, or nearly all, it began before backward: one line says so. With a watch (`mpk.watch`) the first
        line says which layer it began in:
        `step 1204 skipped at scale 65536: first in backward: blocks.7.fc2 (grad_x reaches inf); its output was fine (amax 35)`
        Of DTensors and other shards each rank names and counts its own.
        Raises TypeError for an optimizer that is not of mpkernels.optim.
        """
        watch, has_ended = self._layer_watch, self._stage(optimizer) is not OptState.STEPPED
        return overflow_report.report(optimizer, None if watch is None else lambda: watch._sentence(has_ended))


def _check_is_optimizer(name: str, optimizer: object) -> None:
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"{name}: optimizer must be an optimizer, whose gradients these are, got {type(optimizer).__name__}")


def _any(found: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Whether one of these flags, of whatever devices, is set."""
    if len(found) == 1:
        return scalar(found[0], device)
    return torch.stack([scalar(flag, device) for flag in found]).amax()
