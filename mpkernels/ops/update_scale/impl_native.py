# SPDX-License-Identifier: Apache-2.0
"""update_scale_ in C++: scale * backoff at an overflow, * growth after growth_interval good steps."""

import torch

from mpkernels.ops.common.layout import why_not_native


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return why_not_native(device)


def update_scale_(
    grad_scale, growth_tracker, hysteresis_tracker, skipped, found_inf, growth_factor, backoff_factor, growth_interval,
    hysteresis, min_scale, max_scale,
):  # fmt: skip
    torch.ops.mpkernels_C.update_scale_(
        grad_scale, growth_tracker, hysteresis_tracker, skipped, found_inf, growth_factor, backoff_factor, growth_interval,
        hysteresis, min_scale, max_scale,
    )  # fmt: skip
