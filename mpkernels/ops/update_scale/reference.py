# SPDX-License-Identifier: Apache-2.0
"""update_scale_ as a state machine on the host: scale * backoff at an overflow, * growth after growth_interval good steps."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Scale:
    """The state and its one transition."""

    scale: float
    growth_tracker: int
    lives: int
    skipped: int = 0
    in_a_row: int = 0

    def update(self, overflow, *, growth_factor, backoff_factor, growth_interval, hysteresis, min_scale, max_scale):
        """Source: torch.amp.GradScaler; hysteresis as in Megatron-LM's DynamicGradScaler."""
        if overflow:
            self.growth_tracker, self.lives = 0, max(self.lives - 1, 0)
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.lives == 0:
                self.scale = max(float(np.float32(self.scale * backoff_factor)), min_scale)
            return
        self.growth_tracker, self.in_a_row = self.growth_tracker + 1, 0
        if self.growth_tracker >= growth_interval:
            self.growth_tracker, self.lives = 0, hysteresis
            self.scale = min(float(np.float32(self.scale * growth_factor)), max_scale)


def self_check(backend: str, device: torch.device) -> str | None:
    """Twelve updates, overflows among them: None, or what came out wrong."""
    from mpkernels.ops.update_scale import op

    options = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=2, hysteresis=2, min_scale=2.0**-2, max_scale=2.0**6)
    state = Scale(2.0**5, 0, 2)
    tensors = (
        torch.full((), state.scale, dtype=torch.float32, device=device),
        torch.zeros((), dtype=torch.int32, device=device),
        torch.full((), 2, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    for found in (0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, float("nan")):
        op.function(backend)(*tensors, torch.tensor(float(found), dtype=torch.float32, device=device), **options)
        state.update(found != 0, **options)
        got = [t.tolist() for t in tensors]
        expected = [state.scale, state.growth_tracker, state.lives, [state.skipped, state.in_a_row]]
        if got != expected:
            return f"update_scale_ says {got}, expected {expected}"
    return None
