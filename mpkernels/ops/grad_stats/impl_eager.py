# SPDX-License-Identifier: Apache-2.0
"""grad_stats_ in plain torch: amax, count of non-finite, found_inf and norm, without writing a gradient."""

import torch

from mpkernels.ops._multi_tensor import inv_scale


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def grad_stats_(grads, grad_scale, found_inf, amax, nonfinite, grad_norm=None):
    inv = inv_scale(grad_scale, grads[0].device)
    bad = ~inv.isfinite() | (inv <= 0)
    norm = torch.zeros((), dtype=torch.float64, device=inv.device)
    for i, grad in enumerate(grads):
        work = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
        finite = work.isfinite()
        size = work.abs()
        nonfinite[i] = (~finite).sum()
        largest = torch.where(finite, size, 0).max() if grad.numel() else work.new_zeros(())
        amax[i] = largest
        bad |= (nonfinite[i] > 0) | ~(largest * inv.to(work.dtype)).isfinite()
        if grad_norm is not None:
            wide = largest.double()  # squares of fp64 could over- or underflow
            scale = torch.ones_like(wide).masked_fill(wide >= 2.0**480, 2.0**-600).masked_fill(wide < 2.0**-480, 2.0**600)
            squares = (work.double() * scale).square().sum()
            norm = torch.hypot(norm, squares.sqrt() * inv / scale)
    found_inf.copy_(bad)
    if grad_norm is not None:
        grad_norm.copy_(norm)
