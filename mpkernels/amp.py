# SPDX-License-Identifier: Apache-2.0
"""GradScaler: torch's, whose step on our optimizers is one read of the gradients and one pass, without a host sync."""

import inspect
from collections import abc, defaultdict
from typing import Any, overload

import torch
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from mpkernels import _overflow, _scaler_values
from mpkernels._overflow import SkipWatch
from mpkernels.ops.update_scale import update_scale_
from mpkernels.optim import _stats
from mpkernels.optim._base import Optimizer
from mpkernels.runtime.dispatch import move_versions

_FUSED = "_step_supports_amp_scaling"  # torch's sign of an optimizer that takes the scale as an attribute


class GradScaler(torch.amp.GradScaler):
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

    def __init__(
        self, device: torch.device | str | None = None, init_scale: float = 2.0**16, growth_factor: float = 2.0,
        backoff_factor: float = 0.5, growth_interval: int = 2000, enabled: bool = True,
        *, min_scale: float = 2.0**-126, max_scale: float = 2.0**127, hysteresis: int = 1,
    ) -> None:  # fmt: skip
        if enabled and device is not None:
            _scaler_values.check_device(device)
        self._min_scale, self._max_scale = (
            _scaler_values.bound("min_scale", min_scale),
            _scaler_values.bound("max_scale", max_scale),
        )
        self._hysteresis = _scaler_values.hysteresis(hysteresis)
        super().__init__(
            "cpu",
            _scaler_values.scale("init_scale", init_scale, self._min_scale, self._max_scale),
            _scaler_values.growth_factor(growth_factor),
            _scaler_values.backoff_factor(backoff_factor),
            _scaler_values.growth_interval(growth_interval),
            enabled,
        )
        self._placed = None if device is None else torch.device(device)
        self._hysteresis_tracker: torch.Tensor | None = None
        self._skipped: torch.Tensor | None = None
        self._loaded = {"hysteresis_tracker": self._hysteresis, "skipped": [0, 0]}  # what the two start from
        self._watch = SkipWatch()

    def set_growth_factor(self, new_factor: float) -> None:
        """Set what the scale grows by."""
        super().set_growth_factor(_scaler_values.growth_factor(new_factor))

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set what the scale backs off by."""
        super().set_backoff_factor(_scaler_values.backoff_factor(new_factor))

    def set_growth_interval(self, new_interval: int) -> None:
        """Set after how many steps without an overflow the scale grows."""
        super().set_growth_interval(_scaler_values.growth_interval(new_interval))

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        dev = self._placed or dev
        super()._lazy_init_scale_growth_tracker(dev)
        self._device = dev.type
        self._hysteresis_tracker = torch.full((), self._loaded["hysteresis_tracker"], dtype=torch.int32, device=dev)
        self._skipped = torch.tensor(self._loaded["skipped"], dtype=torch.int64, device=dev)

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
        _scaler_values.refuse_float16(outputs, self._init_scale)
        if isinstance(outputs, torch.Tensor):
            return super().scale(outputs)
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

    @torch._disable_dynamo
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale; those of our optimizers become fp32 where they have 16 bits."""
        stage = self._stage(optimizer)
        if stage is OptState.UNSCALED:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update(): its gradients are unscaled, "
                "call step() and update() next"
            )
        if stage is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step(): call it between backward and step()")
        super().unscale_(optimizer)

    @torch._disable_dynamo
    def clip_grad_norm_(self, optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
        """Clip the global norm of the unscaled gradients to `max_norm`; returns the norm, on the device.

        That is the norm to log (`optimizer.grad_norm` has it too): `.grad` is scaled. `math.inf` clips nothing.
        For one of our optimizers the gradients are read once and the factor is left to `step`, which reads them again where
        they were written since, and on many ranks always. Where all of them are gone, or written since, as zeroed and
        accumulated into, the clip is dropped: torch, which clips at the call, does not clip what comes after it. So whoever
        writes to all gradients clips afterwards. For another optimizer, or after `unscale_`, it is torch's (not with a
        `process_group`, of which that knows nothing).
        Raises ValueError for an optimizer with its own `max_norm`.
        """
        if getattr(optimizer, "max_norm", None) is not None:
            raise ValueError(
                f"the optimizer clips by itself: it was made with max_norm={optimizer.max_norm}; leave one of the two out"
            )
        max_norm = _scaler_values.number("max_norm", max_norm)
        if not max_norm > 0:
            raise ValueError(f"Invalid max_norm: {max_norm}; it must be greater than 0")
        stage = self._stage(optimizer)
        if stage is OptState.STEPPED:
            raise RuntimeError("clip_grad_norm_() is being called after step(): call it between backward and step()")
        if isinstance(optimizer, Optimizer) and (stage is OptState.READY or optimizer.process_group is not None):
            grad_scale = self._grad_scale(optimizer, "clip_grad_norm_")
            if stage is not OptState.READY:  # only what the user has set is left to divide by
                grad_scale = getattr(optimizer, "grad_scale", None)
            norm = optimizer._clip_at_next_step(grad_scale, max_norm)
            return torch.zeros((), dtype=torch.float64, device="cpu") if norm is None else norm
        if stage is OptState.READY:
            self.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, max_norm)

    def _grad_scale(self, optimizer: Optimizer, caller: str) -> torch.Tensor | None:
        """What the gradients are divided by: the scale times a `grad_scale` that the user has set on the optimizer."""
        preset = getattr(optimizer, "grad_scale", None)
        if not self._enabled:
            return preset
        scale, _ = self._check_scale_growth_tracker(caller)
        return scale if preset is None else scale * preset

    @torch._disable_dynamo
    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step the optimizer unless a gradient is inf or NaN, before or after unscaling; decided on the device.

        NOTE: one of our optimizers unscales what it reads and writes no gradient: `.grad` is as scaled afterwards as before.
        To look at gradients or log norms, `unscale_` before, make the optimizer with `write_grads=True`, or read
        `optimizer.grad_norm`, which is unscaled (there with `max_norm`, or after `clip_grad_norm_`).
        Raises RuntimeError for a second step before `update()` and for a closure, as torch, and inside a backward, whose
        gradients are not all there yet. After an exception in the optimizer's step it can be taken again or left out.
        """
        if not self._enabled:
            return super().step(optimizer, *args, **kwargs)
        ours = isinstance(optimizer, Optimizer)
        if any(argument is not None if ours else callable(argument) for argument in (*args, *kwargs.values())):
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
        unscaled = None if state["stage"] is OptState.READY else optimizer._stats
        preset, calls = getattr(optimizer, "grad_scale", None), optimizer.steps_called
        if unscaled is None:
            optimizer.grad_scale = self._grad_scale(optimizer, "step")
        elif unscaled:
            optimizer.found_inf = _any(list(state["found_inf_per_device"].values()), scale.device)
        try:
            return optimizer.step()
        finally:
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
            if unscaled is not None:
                optimizer._stats = unscaled  # for the report: the step has read no more than the norm
            if optimizer.steps_called > calls:  # also where a hook raised after it
                if unscaled is None:
                    state["found_inf_per_device"] = {s.found_inf.device: s.found_inf for s in optimizer._stats.values()}
                state["stage"] = OptState.STEPPED
            else:  # nothing was written: the step can be taken again
                if preset is not None:
                    optimizer.grad_scale = preset
                if state["stage"] is OptState.READY:
                    self._per_optimizer_states.pop(id(optimizer), None)  # as if it had not been called

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

    @torch._disable_dynamo
    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Grow, keep or back off the scale, on the device; count skipped steps. A step without any gradient changes nothing.

        new_scale: set this scale instead and count. Raises ValueError for one that is not between min_scale and max_scale.
        """
        if not self._enabled:
            return
        scale, growth_tracker = self._check_scale_growth_tracker("update")
        states, updated = self._per_optimizer_states.values(), [scale, growth_tracker, self._hysteresis_tracker]
        if new_scale is not None:
            if not isinstance(new_scale, torch.Tensor):
                new_scale = _scaler_values.scale("new_scale", new_scale, self._min_scale, self._max_scale)
            super().update(new_scale)
            updated = [tensor.clone() for tensor in updated]  # nobody's: the op is to count
        elif not any(state["stage"] is not OptState.READY for state in states):
            raise AssertionError(
                "No inf checks were recorded prior to update: call step() of an optimizer first, and update() once after it"
            )
        found = [found for state in states for found in state["found_inf_per_device"].values()]
        if found:
            updated.append(self._skipped)
            update_scale_(
                *updated, _any(found, scale.device),
                self._growth_factor, self._backoff_factor, self._growth_interval,
                self._hysteresis, self._min_scale, self._max_scale, checked=True,
            )  # fmt: skip
            move_versions(updated)
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        if found:
            self._watch.after_update(self._skipped, scale)

    # ----- what happened --------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> torch.Tensor:
        """How many steps were skipped: 0-d int64 on the device."""
        return self._counters().select(0, 0)

    @property
    def skipped_in_a_row(self) -> torch.Tensor:
        """How many of the last steps were skipped without one taken between: 0-d int64 on the device."""
        return self._counters().select(0, 1)

    @property
    def last_step_skipped(self) -> torch.Tensor:
        """Whether the last step was skipped: 0-d bool on the device."""
        return self._counters().select(0, 1) > 0

    def _counters(self) -> torch.Tensor:
        if self._skipped is not None:
            return self._skipped
        return torch.tensor(self._loaded["skipped"], dtype=torch.int64, device="cpu")

    def overflow_report(self, optimizer: torch.optim.Optimizer) -> str:
        """Which gradients of the last step were not finite; "" if it was taken. Waits for the device.

        A line each, in order of backward, with the largest of the (scaled) elements that are finite:
        `step 1204 skipped at scale 65536: blocks.7.fc2.weight has 3 non-finite of 4194304, amax 65472 of the finite ones`
        Where all of them are, or nearly all, it began before backward: one line says so. Of DTensors and other shards each
        rank names and counts its own. Raises TypeError for an optimizer that is not of mpkernels.optim.
        """
        return _overflow.report(optimizer)

    # ----- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's five entries, `hysteresis_tracker` and `skipped`; waits for the device."""
        return {**super().state_dict(), **self._counts()} if self._enabled else {}

    def _counts(self) -> dict:
        if self._skipped is None:
            return {**self._loaded, "skipped": list(self._loaded["skipped"])}
        return {"hysteresis_tracker": self._hysteresis_tracker.item(), "skipped": self._skipped.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ours or torch's. Raises ValueError for values that make no scaler, or not this one; nothing is loaded then."""
        if not self._enabled:
            return
        if not state_dict:
            super().load_state_dict(state_dict)  # which says why it may be empty
        loaded = _scaler_values.state(state_dict, self._hysteresis, self._min_scale, self._max_scale)
        super().load_state_dict(loaded)
        self._loaded = {name: loaded[name] for name in ("hysteresis_tracker", "skipped")}
        self._watch = SkipWatch()
        if self._scale is not None:
            self._hysteresis_tracker.fill_(self._loaded["hysteresis_tracker"])
            self._skipped.copy_(torch.tensor(self._loaded["skipped"], dtype=torch.int64, device="cpu"))

    def __getstate__(self) -> dict:
        fresh = {"_hysteresis_tracker": None, "_skipped": None, "_watch": SkipWatch()}
        return {**super().__getstate__(), "_loaded": self._counts(), **fresh}


def _any(found: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Whether one of these flags, of whatever devices, is set."""
    found = [_stats.scalar(flag, device) for flag in found]
    return found[0] if len(found) == 1 else torch.stack(found).amax()
