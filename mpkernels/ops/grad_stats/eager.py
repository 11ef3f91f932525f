# SPDX-License-Identifier: Apache-2.0
"""grad_stats_ in plain torch: amax, count of non-finite, found_inf and norm; no gradient is written.

On a GPU many tensors a launch; on a CPU, where `_foreach_norm` of inf is ten times slower, a segment of a tensor at a time,
which is still in the cache when its norm is computed.
"""

import math
from collections import defaultdict

import torch

from mpkernels.ops.common.multi_tensor import count_nonfinite, inv_scale, skip_flag, values_are_here
from mpkernels.ops.grad_stats import StatsCall
from mpkernels.runtime.fake import copy_

SEGMENT = 1 << 18  # elements


def grad_stats_(call: StatsCall) -> None:
    grads, grad_scale, grad_norm, device = call.grads, call.grad_scale, call.grad_norm, call.grads[0].device
    inv = inv_scale(grad_scale, device)
    bad = torch.zeros((), dtype=torch.bool, device=device) if grad_scale is None else skip_flag(None, grad_scale)
    alike = defaultdict(list)
    for i, grad in enumerate(grads):
        if grad.numel():
            alike[grad.dtype].append(i)
    by_dtype = [[grads[i].detach() for i in indices] for indices in alike.values()]
    read = _read_here if values_are_here(device) else _read_there
    largest, norm = read(by_dtype, grad_norm is not None, device)
    for values in largest:
        bad = bad | (values * inv.to(values.dtype)).isfinite().all().logical_not()
    copy_(call.found_inf, bad)
    if grad_norm is not None:
        copy_(grad_norm, norm * inv)
    values = _in_order(largest, list(alike.values()), len(grads), device)
    finite = values.isfinite()
    copy_(call.amax, torch.where(finite, values, math.nan))
    copy_(call.nonfinite, torch.where(finite, 0, -1))
    if values_are_here(device) and not finite.all():  # elsewhere a count would be a second pass in every step
        for i in (~finite).nonzero().flatten().tolist():
            call.nonfinite[i], call.amax[i] = count_nonfinite(grads[i])


def _in_order(largest: list[torch.Tensor], indices: list[list[int]], n: int, device) -> torch.Tensor:
    """The values (n,) in fp64 from those of each dtype; 0 for a gradient without elements."""
    if len(indices) == 1 and len(indices[0]) == n:
        return largest[0].double()
    values = [torch.zeros((), dtype=torch.float64, device=device)] * n
    for group, found in zip(indices, largest, strict=True):
        for i, value in zip(group, found.double().unbind(), strict=True):
            values[i] = value
    return torch.stack(values)


# ----- on a GPU: nothing waits ---------------------------------------------------------------


def _read_there(by_dtype: list[list[torch.Tensor]], with_norm: bool, device) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """(the largest magnitude of each gradient, in fp32 or fp64, dtype by dtype; the norm of all, fp64).

    NaN and inf come through.
    """
    largest = []
    for grads in by_dtype:
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        largest.append(torch.stack(torch._foreach_norm(grads, math.inf, dtype=dtype)))
    return largest, _norm(by_dtype, largest, device) if with_norm else None


def _norm(by_dtype: list[list[torch.Tensor]], largest: list[torch.Tensor], device) -> torch.Tensor:
    """Squares of fp64 could over- or underflow: they are scaled by the largest of all."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    most, norms = torch.stack([zero, *(values.max().double() for values in largest)]).max(), [zero]
    scale = torch.ones_like(most).masked_fill(most >= 2.0**480, 2.0**-600).masked_fill(most < 2.0**-480, 2.0**600)
    for grads in by_dtype:
        if grads[0].dtype == torch.float64:
            norms += torch._foreach_norm(torch._foreach_mul(grads, scale), 2)
        else:
            norms += (torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64)) * scale).unbind()
    return torch.stack(norms).square().sum().sqrt() / scale


# ----- on a CPU ---------------------------------------------------------------


def _read_here(by_dtype: list[list[torch.Tensor]], with_norm: bool, device) -> tuple[list[torch.Tensor], float | None]:
    """The same; the values of each segment can be looked at."""
    largest, norms = [], []
    for grads in by_dtype:
        values = []
        for grad in grads:
            of_segments = []
            for segment in _segments(grad):
                low, high = torch.aminmax(segment)
                of_segments.append(max(-low.item(), high.item()))  # NaN is both
                if with_norm:
                    norms.append(_norm_of(segment, of_segments[-1]))
            values.append(of_segments[0] if len(of_segments) == 1 else max(of_segments, key=_nan_last))
        largest.append(torch.tensor(values, dtype=torch.promote_types(grads[0].dtype, torch.float32), device=device))
    norm = math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)  # of inf and NaN hypot makes inf
    return largest, norm if with_norm else None


def _nan_last(value: float) -> tuple[bool, float]:
    return value != value, value


def _segments(grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All of it, a few elements at a time; views where it is dense."""
    if grad.numel() <= SEGMENT:
        return (grad,)
    grad = grad.t() if grad.dim() == 2 and grad.stride(0) == 1 else grad
    return grad.reshape(-1).split(SEGMENT)


def _norm_of(segment: torch.Tensor, largest: float) -> float:
    """In fp64; of 16-bit elements, whose squares fp32 holds exactly, by torch's cascade in fp32: `bounds.check_norm`.

    Elements are scaled where their squares would over- or underflow.
    """
    if largest == 0 or not math.isfinite(largest):
        return largest
    if segment.dtype == torch.float32:
        return torch.linalg.vector_norm(segment, dtype=torch.float64).item()
    narrow, exponent = segment.dtype.itemsize == 2, math.frexp(largest)[1]
    safe, most = (30, 100) if narrow else (480, 1000)
    scale = 1.0 if abs(exponent) <= safe else 2.0 ** min(-exponent, most)
    if narrow:
        segment = segment.float()
        segment = segment if scale == 1 else segment.mul_(scale)
        return math.sqrt(segment.square_().sum().item()) / scale
    return torch.linalg.vector_norm(segment if scale == 1 else segment * scale).item() / scale
