# SPDX-License-Identifier: Apache-2.0
"""grad_stats_ in plain torch, many tensors a launch: amax, count of non-finite, found_inf and norm; no gradient is written."""

import math
from collections import defaultdict

import torch

from mpkernels.ops.common.multi_tensor import count_nonfinite, inv_scale, skip_flag, values_are_here
from mpkernels.runtime.fake import copy_


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def grad_stats_(grads, grad_scale, found_inf, amax, nonfinite, grad_norm=None):
    device = grads[0].device
    inv = inv_scale(grad_scale, device)
    bad = torch.zeros((), dtype=torch.bool, device=device) if grad_scale is None else skip_flag(None, grad_scale)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    values, alike = [zero] * len(grads), defaultdict(list)
    for i, grad in enumerate(grads):
        if grad.numel():
            alike[grad.dtype].append(i)
    for indices in alike.values():
        largest = _largest([grads[i].detach() for i in indices])
        bad = bad | (largest * inv.to(largest.dtype)).isfinite().all().logical_not()
        for i, value in zip(indices, largest.double().unbind(), strict=True):
            values[i] = value
    copy_(found_inf, bad)
    values = torch.stack(values)
    if grad_norm is not None:
        by_dtype = [[grads[i].detach() for i in indices] for indices in alike.values()]
        copy_(grad_norm, _norm(by_dtype, values, zero) * inv)
    finite = values.isfinite()
    copy_(amax, torch.where(finite, values, math.nan))
    copy_(nonfinite, torch.where(finite, 0, -1))
    if values_are_here(device):  # elsewhere a count would be a second pass in every step
        for i in (~finite).nonzero().flatten().tolist():
            nonfinite[i], amax[i] = count_nonfinite(grads[i])


def _largest(grads: list[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude of each, in fp32 or fp64; NaN and inf come through."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    if values_are_here(grads[0].device):  # on a CPU, where _foreach_norm of inf is ten times slower
        lows, highs = zip(*map(torch.aminmax, grads), strict=True)
        return torch.maximum(-torch.stack(lows), torch.stack(highs)).to(dtype)
    return torch.stack(torch._foreach_norm(grads, math.inf, dtype=dtype))


def _norm(alike: list[list[torch.Tensor]], values: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Of all gradients, which come by dtype; squares of fp64 could over- or underflow."""
    largest, norms = values.max(), [zero]
    scale = torch.ones_like(largest).masked_fill(largest >= 2.0**480, 2.0**-600).masked_fill(largest < 2.0**-480, 2.0**600)
    for grads in alike:
        if grads[0].dtype == torch.float64:
            norms += torch._foreach_norm(torch._foreach_mul(grads, scale), 2)
        else:
            norms += (torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)) * scale).unbind()
    return torch.stack(norms).square().sum().sqrt() / scale
