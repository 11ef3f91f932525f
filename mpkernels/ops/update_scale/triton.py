# SPDX-License-Identifier: Apache-2.0
"""update_scale_ in Triton: scale * backoff at an overflow, * growth after growth_interval good steps, in one launch."""

import torch

from mpkernels.ops.update_scale import ScaleCall
from mpkernels.ops.update_scale.kernels_triton import update_scale_kernel


def update_scale_(call: ScaleCall) -> None:
    with torch.cuda.device_of(call.grad_scale):
        update_scale_kernel[(1,)](*call[:4], call.skipped.stride(0), *call[4:], num_warps=1)
