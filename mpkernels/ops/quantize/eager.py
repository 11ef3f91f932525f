# SPDX-License-Identifier: Apache-2.0
"""quantize in plain torch: scale = the least 2^k with max |x| / 2^k <= the format's largest, q = round(x / scale)."""

import torch

from mpkernels.ops.quantize import FORMATS, NAN, Format, QuantizeCall, empty

INF = 0x7F800000  # the bits of fp32's
ABOVE_LARGEST = 0x1FFFFF  # carries into the exponent from 0x600001 on: of a mantissa above 1.75, the largest number's


def quantize(call: QuantizeCall):
    x, format = call.x, FORMATS[call.dtype]
    if not x.numel():
        q, scale = empty(call)
        return q, scale.fill_(1)
    over = {} if call.axis is None else {"dim": call.axis, "keepdim": True}
    amax = torch.maximum(x.amax(**over), -x.amin(**over))  # of |x|, which is not written
    scale = scale_of(amax.float(), format)
    inv_scale = scale.reciprocal().view(scale.shape if scale.dim() else (1,) * x.dim())  # 0-d would not make fp32 of 16 bits
    y = x * inv_scale  # exact, or so small that q is 0
    q = y.to(call.dtype).contiguous()  # round: fp32 -> 8 bits; torch's cast, whose versions differ beyond the largest alone
    q.view(torch.uint8).masked_fill_(scale.isnan(), NAN)
    return q, scale


def scale_of(amax: torch.Tensor, format: Format) -> torch.Tensor:
    """The scale of what has such a largest magnitude, in fp32."""
    bits = amax.abs().view(torch.int32)  # NOTE: amax may return a NaN with its sign set
    exponent = ((bits + ABOVE_LARGEST) >> 23) - format.max_exponent
    scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    return torch.where(bits >= INF, torch.nan, torch.where(bits == 0, 1.0, scale))
