# SPDX-License-Identifier: Apache-2.0
"""grad_stats_ in C++: amax, count of non-finite, found_inf and norm, every gradient read once."""

import torch

from mpkernels.ops.common.layout import Tensors, described, is_dense, why_not_native


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return why_not_native(device)


def grad_stats_(grads, grad_scale, found_inf, amax, nonfinite, grad_norm=None):
    grads = described(grads)
    if not grads.contiguous:
        grads = Tensors(grad if is_dense(grad) else grad.contiguous() for grad in grads)
    torch.ops.mpkernels_C.grad_stats_(grads.table, grad_scale, found_inf, amax, nonfinite, grad_norm)
