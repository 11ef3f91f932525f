# SPDX-License-Identifier: Apache-2.0
"""update_scale_ as a state machine on the host: scale * backoff at an overflow, * growth after growth_interval good steps."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Scale:
    """The state and its one transition."""

    scale: float
    growth_tracker: int
    hysteresis_left: int
    skipped: int = 0
    in_a_row: int = 0

    def update(self, overflow, *, growth_factor, backoff_factor, growth_interval, hysteresis, min_scale, max_scale):
        """Source: torch.amp.GradScaler; hysteresis as in Megatron-LM's DynamicGradScaler."""
        if overflow:
            self.growth_tracker, self.hysteresis_left = 0, max(self.hysteresis_left - 1, 0)
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.hysteresis_left == 0:
                self.scale = max(float(np.float32(self.scale * backoff_factor)), min_scale)
            return
        self.growth_tracker, self.in_a_row = self.growth_tracker + 1, 0
        if self.growth_tracker >= growth_interval:
            self.growth_tracker, self.hysteresis_left = 0, hysteresis
            self.scale = min(float(np.float32(self.scale * growth_factor)), max_scale)
