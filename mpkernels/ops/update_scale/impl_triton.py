# SPDX-License-Identifier: Apache-2.0
"""update_scale_ in Triton: scale * backoff at an overflow, * growth after growth_interval good steps, in one launch."""

import torch

from mpkernels.runtime.resolve import triton_why_not

try:
    from mpkernels.ops.update_scale.kernels_triton import update_scale_kernel
except ImportError:  # without Triton there is still `why_not`, which says so
    update_scale_kernel = None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_why_not(device)


def update_scale_(
    grad_scale, growth_tracker, hysteresis_tracker, skipped, found_inf, growth_factor, backoff_factor, growth_interval,
    hysteresis, min_scale, max_scale,
):  # fmt: skip
    with torch.cuda.device_of(grad_scale):
        update_scale_kernel[(1,)](
            grad_scale, growth_tracker, hysteresis_tracker, skipped, skipped.stride(0), found_inf,
            growth_factor, backoff_factor, growth_interval, hysteresis, min_scale, max_scale, num_warps=1,
        )  # fmt: skip
