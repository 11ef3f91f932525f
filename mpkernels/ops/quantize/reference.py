# SPDX-License-Identifier: Apache-2.0
"""quantize in fp64 on the host: scale = the least 2^k with max |x| / 2^k <= the format's largest, q = round(x / scale)."""

import functools
import math

import torch

from mpkernels.ops.quantize import FORMATS


@functools.cache
def scale(amax: float, dtype: torch.dtype) -> float:
    """Of what has such a largest magnitude, NaN included; at least 2**-126."""
    if amax == 0:
        return 1.0
    if not math.isfinite(amax):
        return math.nan
    k = max(-126, math.frexp(amax)[1] - 20)  # too small for either format, or the least
    while amax / 2.0**k > torch.finfo(dtype).max:
        k += 1
    return 2.0**k


def quantize(x: torch.Tensor, dtype: torch.dtype, axis: int | None = None):
    """(q, scale), as values in fp64."""
    x = x.double().cpu()
    rows = x.flatten().unsqueeze(0) if axis is None or not x.dim() else x.movedim(axis, -1)
    amax = rows.abs().amax(-1, keepdim=True) if rows.numel() else rows.new_zeros(*rows.shape[:-1], 1)
    scales = [scale(value, dtype) for value in amax.flatten().tolist()]
    wide = torch.tensor(scales, dtype=torch.float64, device="cpu").view(amax.shape)
    q = rounded(rows / wide, dtype)
    if axis is None or not x.dim():
        return q.view(x.shape), wide.view(())
    return q.movedim(-1, axis), wide.movedim(-1, axis)


def rounded(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers of the format, of ties the even one; y: fp64, none beyond the largest."""
    mantissa, bias, _ = FORMATS[dtype]
    exponent = torch.frexp(y)[1].clamp(min=2 - bias) - 1  # of a number in [1, 2) times 2**exponent, or the least normal's
    unit = torch.ldexp(torch.ones_like(y), exponent - mantissa)
    return torch.copysign((y / unit).round() * unit, y)
