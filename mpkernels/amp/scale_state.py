# SPDX-License-Identifier: Apache-2.0
"""The state of a scaler: the scale with its bounds and factors, the counters on the device, and both in checkpoints."""

from typing import Any

import torch

from mpkernels.amp import values
from mpkernels.amp.skip_watch import SkipWatch


class ScaleState(torch.amp.GradScaler):
    """torch's scaler with bounds, hysteresis and counters of skipped steps; `GradScaler` scales, steps and updates."""

    def __init__(
        self, device: torch.device | str | None = None, init_scale: float = 2.0**16, growth_factor: float = 2.0,
        backoff_factor: float = 0.5, growth_interval: int = 2000, enabled: bool = True,
        *, min_scale: float = 2.0**-126, max_scale: float = 2.0**127, hysteresis: int = 1,
    ) -> None:  # fmt: skip
        if enabled and device is not None:
            values.check_device(device)
        self._min_scale, self._max_scale = values.checked("min_scale", min_scale), values.checked("max_scale", max_scale)
        self._hysteresis = values.checked("hysteresis", hysteresis)
        super().__init__(
            "cpu",
            values.scale("init_scale", init_scale, self._min_scale, self._max_scale),
            values.checked("growth_factor", growth_factor),
            values.checked("backoff_factor", backoff_factor),
            values.checked("growth_interval", growth_interval),
            enabled,
        )
        self._placed = None if device is None else torch.device(device)
        self._hysteresis_tracker: torch.Tensor | None = None
        self._skipped: torch.Tensor | None = None
        self._loaded = {"hysteresis_tracker": self._hysteresis, "skipped": [0, 0]}  # what the two start from
        self._watch = SkipWatch()
        self._layer_watch: Any = None  # of mpk.watch, which is told where a step ends

    def set_growth_factor(self, new_factor: float) -> None:
        """Set what the scale grows by."""
        super().set_growth_factor(values.checked("growth_factor", new_factor))

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set what the scale backs off by."""
        super().set_backoff_factor(values.checked("backoff_factor", new_factor))

    def set_growth_interval(self, new_interval: int) -> None:
        """Set after how many steps without an overflow the scale grows."""
        super().set_growth_interval(values.checked("growth_interval", new_interval))

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        dev = self._placed or dev
        super()._lazy_init_scale_growth_tracker(dev)
        self._device = dev.type
        self._hysteresis_tracker = torch.full((), self._loaded["hysteresis_tracker"], dtype=torch.int32, device=dev)
        self._skipped = torch.tensor(self._loaded["skipped"], dtype=torch.int64, device=dev)

    # ----- counters -------------------------------------------------------------------------------

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
        loaded = values.state(state_dict, self._hysteresis, self._min_scale, self._max_scale)
        super().load_state_dict(loaded)
        self._loaded = {name: loaded[name] for name in ("hysteresis_tracker", "skipped")}
        self._watch = SkipWatch()
        if self._scale is not None:
            self._hysteresis_tracker.fill_(self._loaded["hysteresis_tracker"])
            self._skipped.copy_(torch.tensor(self._loaded["skipped"], dtype=torch.int64, device="cpu"))

    def __getstate__(self) -> dict:
        fresh = {"_hysteresis_tracker": None, "_skipped": None, "_watch": SkipWatch(), "_layer_watch": None}
        return {**super().__getstate__(), "_loaded": self._counts(), **fresh}
