# SPDX-License-Identifier: Apache-2.0
"""GradScaler: torch's, whose step on our optimizers is one read of the gradients and one pass, without a host sync."""

import math
from collections import abc, defaultdict

import torch
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from mpkernels._dispatch import move_versions
from mpkernels.ops.update_scale import update_scale_
from mpkernels.optim import _ranks, _stats
from mpkernels.optim._base import Optimizer

_FLOAT32 = torch.finfo(torch.float32)


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` with bounds, hysteresis and counters on the device.

    device: where the scale lives; None: where the first scaled loss is. init_scale, growth_factor, backoff_factor,
    growth_interval, enabled: as torch. min_scale, max_scale: the scale never leaves them. hysteresis: back off at the
    k-th overflow since the scale last grew, and at each one after it; 1 is what torch does.

    `last_step_skipped`, `skipped_steps`, `skipped_in_a_row`: 0-d tensors on the device, as of the last `update()`.
    Only `get_scale`, `state_dict` (and with it a copy of the scaler), `overflow_report` and the step of an optimizer that is
    not ours wait for the device. Under this scaler `.grad` stays scaled after `step` of one of our optimizers
    (`write_grads=True` unscales it, as torch does). Under torch.compile what steps, unscales, clips or updates is a graph
    break: dynamo loses what is recorded between these calls.
    On many ranks each has a scaler, and our optimizers agree on the overflow, so that all scales stay the same.
    Raises ValueError for values that make no scale, RuntimeError for a device that is not there.
    """

    def __init__(
        self, device=None, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, enabled=True,
        *, min_scale=2.0**-126, max_scale=2.0**127, hysteresis=1,
    ):  # fmt: skip
        if enabled and device is not None:
            _check_there(device)
        self._min_scale, self._max_scale, self._hysteresis = min_scale, max_scale, hysteresis
        for name, value in (("min_scale", min_scale), ("max_scale", max_scale)):
            if not _FLOAT32.tiny <= value <= _FLOAT32.max:
                raise ValueError(f"{name} must be a normal positive float32, got {value}")
        if isinstance(hysteresis, bool) or not isinstance(hysteresis, int) or hysteresis < 1:
            raise ValueError(f"hysteresis must be an int of 1 or more, got {hysteresis}")
        self._check_scale("init_scale", init_scale)
        _check_factors(growth_factor, backoff_factor, growth_interval)
        super().__init__("cpu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._placed = None if device is None else torch.device(device)
        self._hysteresis_tracker: torch.Tensor | None = None
        self._skipped: torch.Tensor | None = None
        self._loaded = {"hysteresis_tracker": hysteresis, "skipped": [0, 0]}  # what the two start from

    def _check_scale(self, name: str, scale: float) -> None:
        if not self._min_scale <= scale <= self._max_scale:
            raise ValueError(f"{name} must be between min_scale {self._min_scale} and max_scale {self._max_scale}, got {scale}")

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        dev = self._placed or dev
        super()._lazy_init_scale_growth_tracker(dev)
        self._device = dev.type
        self._hysteresis_tracker = torch.full((), self._loaded["hysteresis_tracker"], dtype=torch.int32, device=dev)
        self._skipped = torch.tensor(self._loaded["skipped"], dtype=torch.int64, device=dev)

    # ----- scale, unscale, step, update ---------------------------------------------------------

    def scale(self, outputs):
        """`outputs` times the scale: a tensor or nested iterables of tensors.

        Raises ValueError for a float16 tensor, whose gradient (the scale) would not fit; bfloat16 passes.
        """
        if not self._enabled:
            return outputs
        _refuse_float16(outputs, self._init_scale)
        if isinstance(outputs, torch.Tensor):
            return super().scale(outputs)
        if isinstance(outputs, abc.Iterable):
            scaled = map(self.scale, outputs)
            return type(outputs)(scaled) if isinstance(outputs, list | tuple) else scaled
        raise ValueError("outputs must be a Tensor or an iterable of Tensors")

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        """As torch's; our optimizers unscale by themselves, in fp32."""
        if isinstance(optimizer, Optimizer):
            return optimizer._unscale_grads(self._scale)
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)

    @torch._disable_dynamo
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale; those of our optimizers become fp32 where they have 16 bits."""
        super().unscale_(optimizer)

    @torch._disable_dynamo
    def clip_grad_norm_(self, optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
        """Clip the global norm of the unscaled gradients to `max_norm`; returns the norm, on the device.

        For one of our optimizers the gradients are read once and the factor is left to `step`, which reads them again where
        they were written since (on many ranks then on all) and does not clip where all of them are gone. For another, or
        after `unscale_`, it is torch's (not with a `process_group`, of which that knows nothing).
        Raises ValueError for an optimizer with its own `max_norm`.
        """
        if getattr(optimizer, "max_norm", None) is not None:
            raise ValueError(f"the optimizer clips by itself: it was made with max_norm={optimizer.max_norm}")
        if not max_norm > 0:
            raise ValueError(f"Invalid max_norm: {max_norm}")
        stage = self._per_optimizer_states[id(optimizer)]["stage"] if self._enabled else OptState.READY
        if stage is OptState.STEPPED:
            raise RuntimeError("clip_grad_norm_() is being called after step().")
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
    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs):
        """Step the optimizer unless a gradient is inf or NaN, before or after unscaling; decided on the device.

        Raises RuntimeError for a second step before `update()` and for a closure, as torch, and inside a backward, whose
        gradients are not all there yet.
        """
        if not self._enabled or not isinstance(optimizer, Optimizer):
            return super().step(optimizer, *args, **kwargs)
        if any(argument is not None for argument in (*args, *kwargs.values())):  # accelerate passes a closure of None
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError("step() is being called inside backward: its gradients are not all there yet.")
        scale, _ = self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
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
            elif preset is not None:  # nothing was written: the step can be taken again
                optimizer.grad_scale = preset

    @torch._disable_dynamo
    def update(self, new_scale=None) -> None:
        """Grow, keep or back off the scale, on the device; count skipped steps. A step without any gradient changes nothing.

        new_scale: set this scale instead and count. Raises ValueError for one that is not between min_scale and max_scale.
        """
        if not self._enabled:
            return
        scale, growth_tracker = self._check_scale_growth_tracker("update")
        states, updated = self._per_optimizer_states.values(), [scale, growth_tracker, self._hysteresis_tracker]
        if new_scale is not None:
            if not isinstance(new_scale, torch.Tensor):
                new_scale = float(new_scale)
                self._check_scale("new_scale", new_scale)
            super().update(new_scale)
            updated = [tensor.clone() for tensor in updated]  # nobody's: the op is to count
        elif not any(state["stage"] is not OptState.READY for state in states):
            raise AssertionError("No inf checks were recorded prior to update.")
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

    # ----- what happened --------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> torch.Tensor:
        """How many steps were skipped: 0-d int64 on the device."""
        return self._counters()[0]

    @property
    def skipped_in_a_row(self) -> torch.Tensor:
        """How many of the last steps were skipped without one taken between: 0-d int64 on the device."""
        return self._counters()[1]

    @property
    def last_step_skipped(self) -> torch.Tensor:
        """Whether the last step was skipped: 0-d bool on the device."""
        return self._counters()[1] > 0

    def _counters(self) -> torch.Tensor:
        if self._skipped is not None:
            return self._skipped
        return torch.tensor(self._loaded["skipped"], dtype=torch.int64, device="cpu")

    def overflow_report(self, optimizer: torch.optim.Optimizer) -> str:
        """Which gradients of the last step were not finite, a line each; "" if it was taken. Waits for the device.

        Of DTensors and other shards each rank names and counts its own.
        `step 1204 skipped at scale 65536: blocks.7.fc2.weight has 3 non-finite of 4194304, amax inf`
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"overflow_report needs an optimizer of mpkernels.optim, got {type(optimizer).__name__}")
        all_stats = list(optimizer._stats.values())
        if not any(stats.found_inf.item() for stats in all_stats):
            return ""
        names = optimizer._parameter_names()
        grad_scale = all_stats[0].grad_scale
        scale = "none" if grad_scale is None else f"{grad_scale.item():.9g}"
        lines = [
            f"{names[id(parameter)]} has {count} non-finite of {_ranks.local(parameter).numel()}, amax {amax:g}"
            for stats in all_stats
            for parameter, count, amax in zip(stats.params, stats.nonfinite.tolist(), stats.amax.tolist(), strict=True)
            if count
        ] or [
            "every gradient of this rank is finite: another rank's is not, or it is not once it is unscaled"
            if optimizer._ranks.many
            else "every gradient is finite, but not once it is unscaled"
        ]
        return "\n".join(f"step {optimizer.steps_called} skipped at scale {scale}: {line}" for line in lines)

    # ----- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """torch's five entries, `hysteresis_tracker` and `skipped`; waits for the device."""
        return {**super().state_dict(), **self._counts()} if self._enabled else {}

    def _counts(self) -> dict:
        if self._skipped is None:
            return self._loaded
        return {"hysteresis_tracker": self._hysteresis_tracker.item(), "skipped": self._skipped.tolist()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load ours or torch's. Raises ValueError for values that make no scaler; nothing is loaded then."""
        if not self._enabled:
            return
        if state_dict:
            names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
            if missing := [name for name in names if name not in state_dict]:
                raise ValueError(f"state_dict lacks {', '.join(missing)}")
            self._check_scale("scale", _number("scale", state_dict["scale"]))
            _check_factors(*(_number(name, state_dict[name]) for name in names[1:3]), state_dict["growth_interval"])
            _check_counts(*map(state_dict.get, ("_growth_tracker", "hysteresis_tracker", "skipped"), (0, 0, [0, 0])))
        super().load_state_dict(state_dict)
        defaults = {"hysteresis_tracker": self._hysteresis, "skipped": [0, 0]}
        self._loaded = {name: state_dict.get(name, default) for name, default in defaults.items()}
        if self._scale is not None:
            self._hysteresis_tracker.fill_(self._loaded["hysteresis_tracker"])
            self._skipped.copy_(torch.tensor(self._loaded["skipped"], dtype=torch.int64, device="cpu"))

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_loaded": self._counts(), "_hysteresis_tracker": None, "_skipped": None}


def _any(found: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Whether one of these flags, of whatever devices, is set."""
    found = [_stats.scalar(flag, device) for flag in found]
    return found[0] if len(found) == 1 else torch.stack(found).amax()


def _check_factors(growth_factor, backoff_factor, growth_interval) -> None:
    if not 1 < growth_factor < math.inf:
        raise ValueError(f"growth_factor must be greater than 1, got {growth_factor}")
    if not 0 < backoff_factor < 1:
        raise ValueError(f"backoff_factor must be between 0 and 1, got {backoff_factor}")
    if isinstance(growth_interval, bool) or not isinstance(growth_interval, int) or growth_interval < 1:
        raise ValueError(f"growth_interval must be an int of 1 or more, got {growth_interval}")


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return value


def _check_counts(growth_tracker, hysteresis_tracker, skipped) -> None:
    if not isinstance(skipped, list) or len(skipped) != 2:
        raise ValueError(f"skipped must be two counts, got {skipped!r}")
    counts = ("_growth_tracker", growth_tracker), ("hysteresis_tracker", hysteresis_tracker), *(("skipped", n) for n in skipped)
    for name, count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} must be a count, got {count!r}")


def _check_there(device) -> None:
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch was built without it
        raise RuntimeError(f"GradScaler: device {device} is not there: {error}") from error


def _refuse_float16(outputs, scale: float) -> None:
    """Deciding by the value would wait for the device: a float16 loss is refused whatever the scale is by then."""
    if isinstance(outputs, list | tuple):
        for output in outputs:
            _refuse_float16(output, scale)
    elif isinstance(outputs, torch.Tensor) and outputs.dtype == torch.float16:
        raise ValueError(f"loss is float16 and a scale of {scale:.9g} does not fit: compute the loss in float32")
