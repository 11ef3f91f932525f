# SPDX-License-Identifier: Apache-2.0
"""GradScaler: torch's, whose step on our optimizers is one read of the gradients and one pass, without a host sync."""

import math
from collections import abc, defaultdict

import torch
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from mpkernels.ops.update_scale import update_scale_
from mpkernels.optim._base import Optimizer


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` with bounds, hysteresis and counters on the device.

    device: where the scale lives; None: where the first scaled loss is. init_scale, growth_factor, backoff_factor,
    growth_interval, enabled: as torch. min_scale, max_scale: the scale never leaves them. hysteresis: back off at the
    k-th overflow since the scale last grew, and at each one after it; 1 is what torch does.

    `last_step_skipped`, `skipped_steps`, `skipped_in_a_row`: 0-d tensors on the device, as of the last `update()`.
    Only `get_scale`, `state_dict` and `overflow_report` wait for the device. Under this scaler `.grad` stays scaled after
    `step` of one of our optimizers (`write_grads=True` unscales it, as torch does).
    Raises ValueError for values that make no scale, RuntimeError for a device that is not there.
    """

    def __init__(
        self, device=None, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, enabled=True,
        *, min_scale=2.0**-126, max_scale=2.0**127, hysteresis=1,
    ):  # fmt: skip
        if device is not None:
            torch.empty(0, device=device)  # raises for a device that is not there
        scales = {"init_scale": init_scale, "min_scale": min_scale, "max_scale": max_scale}
        for name, value in scales.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not min_scale <= init_scale <= max_scale:
            raise ValueError(f"init_scale {init_scale} is not between min_scale {min_scale} and max_scale {max_scale}")
        if not 1 < growth_factor < math.inf:
            raise ValueError(f"growth_factor must be greater than 1, got {growth_factor}")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor must be between 0 and 1, got {backoff_factor}")
        for name, value in (("growth_interval", growth_interval), ("hysteresis", hysteresis)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of 1 or more, got {value}")
        super().__init__("cpu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._device = None if device is None else torch.device(device)
        self._min_scale, self._max_scale, self._hysteresis = min_scale, max_scale, hysteresis
        self._hysteresis_tracker: torch.Tensor | None = None
        self._skipped: torch.Tensor | None = None
        self._loaded = {"hysteresis_tracker": hysteresis, "skipped": [0, 0]}

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        dev = self._device or dev
        super()._lazy_init_scale_growth_tracker(dev)
        self._hysteresis_tracker = torch.full((), self._loaded["hysteresis_tracker"], dtype=torch.int32, device=dev)
        self._skipped = torch.tensor(self._loaded["skipped"], dtype=torch.int64).to(dev)

    # ----- scale, unscale, step, update ---------------------------------------------------------

    def scale(self, outputs):
        """`outputs` times the scale: a tensor or nested iterables of tensors.

        Raises ValueError for a float16 tensor, whose gradient (the scale) would not fit; bfloat16 passes.
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            _refuse_float16(outputs, self._init_scale)
            return super().scale(outputs)
        if isinstance(outputs, list | tuple):
            for output in outputs:
                if isinstance(output, torch.Tensor):
                    _refuse_float16(output, self._init_scale)
            return type(outputs)(map(self.scale, outputs))
        if isinstance(outputs, abc.Iterable):
            return map(self.scale, outputs)
        raise ValueError("outputs must be a Tensor or an iterable of Tensors")

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        """As torch's; a 16-bit gradient of one of our optimizers becomes fp32 first: nothing is rounded or lost."""
        if not isinstance(optimizer, Optimizer):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        found = {}
        rows = optimizer._all_rows()
        with torch.no_grad():
            for (_, device), group_rows in rows.items():
                inv = inv_scale.to(device, non_blocking=True)
                for parameter in group_rows.params:
                    if parameter.grad.dtype.itemsize == 2:
                        parameter.grad_dtype = None
                        parameter.grad = parameter.grad.float()
                    parameter.grad.mul_(inv)
            optimizer._read_grads(rows, None, norm=False)
        for device, stats in optimizer._stats.items():
            inv = inv_scale.to(device, non_blocking=True)
            bad_scale = ~(inv.isfinite() & (inv > 0))
            found[device] = torch.maximum(stats.found_inf, bad_scale.float())
            stats.grad_scale = self._scale.to(device, copy=True)
        return found

    def clip_grad_norm_(self, optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
        """Clip the global norm of the unscaled gradients to `max_norm`; returns the norm, on the device.

        For one of our optimizers the gradients are read once and the factor is left to `step`. For another it is
        `unscale_` and `torch.nn.utils.clip_grad_norm_`. Raises ValueError for an optimizer with its own `max_norm`.
        """
        if getattr(optimizer, "max_norm", None) is not None:
            raise ValueError(f"the optimizer clips by itself: it was made with max_norm={optimizer.max_norm}")
        if not max_norm > 0:
            raise ValueError(f"Invalid max_norm: {max_norm}")
        stage = self._per_optimizer_states[id(optimizer)]["stage"] if self._enabled else OptState.UNSCALED
        if stage is OptState.STEPPED:
            raise RuntimeError("clip_grad_norm_() is being called after step().")
        if isinstance(optimizer, Optimizer) and stage is OptState.READY:
            scale, _ = self._check_scale_growth_tracker("clip_grad_norm_")
            norm = optimizer._clip_at_next_step(scale, max_norm)
            return torch.zeros((), dtype=torch.float64, device=scale.device) if norm is None else norm
        if stage is OptState.READY:
            self.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, max_norm)

    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs):
        """Step the optimizer unless a gradient is inf or NaN, before or after unscaling; decided on the device.

        Raises RuntimeError for a second step before `update()` and for a closure, as torch.
        """
        if not self._enabled or not isinstance(optimizer, Optimizer):
            return super().step(optimizer, *args, **kwargs)
        if args or kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        scale, _ = self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        preset = getattr(optimizer, "grad_scale", None)
        if state["stage"] is OptState.READY:
            optimizer.grad_scale = scale if preset is None else scale * preset
        else:
            found = [f.to(scale.device, non_blocking=True) for f in state["found_inf_per_device"].values()]
            optimizer.found_inf = torch.stack(found).amax() if found else None
        try:
            result = optimizer.step()
            if state["stage"] is OptState.READY:
                state["found_inf_per_device"] = {s.found_inf.device: s.found_inf for s in optimizer._stats.values()}
        finally:
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
        state["stage"] = OptState.STEPPED
        return result

    def update(self, new_scale=None) -> None:
        """Grow, keep or back off the scale, on the device; count skipped steps. A step without any gradient changes nothing."""
        if not self._enabled:
            return
        if new_scale is not None:
            super().update(new_scale)
            return
        scale, growth_tracker = self._check_scale_growth_tracker("update")
        states = self._per_optimizer_states.values()
        if not any(state["stage"] is not OptState.READY for state in states):
            raise AssertionError("No inf checks were recorded prior to update.")
        found = [f.to(scale.device, non_blocking=True) for s in states for f in s["found_inf_per_device"].values()]
        if found:
            update_scale_(
                scale, growth_tracker, self._hysteresis_tracker, self._skipped, torch.stack(found).amax(),
                self._growth_factor, self._backoff_factor, self._growth_interval,
                self._hysteresis, self._min_scale, self._max_scale,
            )  # fmt: skip
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
        return torch.tensor(self._loaded["skipped"]) if self._skipped is None else self._skipped

    def overflow_report(self, optimizer: torch.optim.Optimizer) -> str:
        """Which gradients of the last step were not finite, a line each; "" if it was taken. Waits for the device.

        `step 1204 skipped at scale 65536: blocks.7.fc2.weight has 3 non-finite of 4194304, amax inf`
        """
        names = {
            id(parameter): name
            for group in optimizer.param_groups
            for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        order = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        lines = []
        for stats in optimizer._stats.values():
            if not stats.found_inf.item():
                continue
            scale = "none" if stats.grad_scale is None else f"{stats.grad_scale.item():g}"
            rows = zip(stats.params, stats.nonfinite.tolist(), stats.amax.tolist(), strict=True)
            bad = [
                f"{names.get(id(p), f'parameter {order.index(id(p))} {tuple(p.shape)}')} "
                f"has {count} non-finite of {p.numel()}, amax {amax:g}"
                for p, count, amax in rows
                if count
            ] or ["every gradient is finite, but not once it is unscaled"]
            lines += [f"step {optimizer.steps_called} skipped at scale {scale}: {line}" for line in bad]
        return "\n".join(lines)

    # ----- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """torch's five entries, `hysteresis_tracker` and `skipped`; waits for the device."""
        result = super().state_dict()
        if result:
            tracker, skipped = self._hysteresis_tracker, self._skipped
            result["hysteresis_tracker"] = self._loaded["hysteresis_tracker"] if tracker is None else tracker.item()
            result["skipped"] = self._loaded["skipped"] if skipped is None else skipped.tolist()
        return result

    def load_state_dict(self, state_dict: dict) -> None:
        """Load ours or torch's. Raises ValueError for a scale that is not between min_scale and max_scale."""
        if self._enabled and state_dict and not self._min_scale <= state_dict.get("scale", math.nan) <= self._max_scale:
            raise ValueError(
                f"state_dict: scale must be between {self._min_scale} and {self._max_scale}, got {state_dict.get('scale')}"
            )
        super().load_state_dict(state_dict)
        if not self._enabled:
            return
        defaults = {"hysteresis_tracker": self._hysteresis, "skipped": [0, 0]}
        self._loaded = {name: state_dict.get(name, default) for name, default in defaults.items()}
        if self._scale is not None:
            self._hysteresis_tracker.fill_(self._loaded["hysteresis_tracker"])
            self._skipped.copy_(torch.tensor(self._loaded["skipped"]))


def _refuse_float16(output: torch.Tensor, scale: float) -> None:
    """Deciding by the value would wait for the device: a float16 loss is refused whatever the scale is by then."""
    if output.dtype == torch.float16:
        raise ValueError(f"loss is float16 and a scale of {scale:g} does not fit: compute the loss in float32")
