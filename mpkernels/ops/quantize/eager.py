# SPDX-License-Identifier: Apache-2.0
"""quantize in plain torch: scale = the least 2^k with max |x| / 2^k <= the format's largest, q = round(x / scale)."""

import torch

from mpkernels.ops.quantize import FORMATS, NAN, Format, QuantizeCall, empty
from mpkernels.runtime.resolve import Key

INF = 0x7F800000  # the bits of fp32's
ABOVE_LARGEST = 0x1FFFFF  # carries into the exponent from 0x600001 on: of a mantissa above 1.75, the largest number's


def why_not(key: Key) -> str | None:
    return None


def quantize(call: QuantizeCall):
    x, format = call.x, FORMATS[call.dtype]
    if not x.numel():
        q, scale = empty(call)
        return q, scale.fill_(1)
    amax = x.abs().amax() if call.axis is None else x.abs().amax(call.axis, keepdim=True)
    scale = scale_of(amax.float(), format)
    codes = encode(x.float() * scale.reciprocal(), format)  # the product is exact, or so small that q is 0
    return codes.masked_fill_(scale.isnan(), NAN).to(torch.uint8).contiguous().view(call.dtype), scale


def scale_of(amax: torch.Tensor, format: Format) -> torch.Tensor:
    """The scale of what has such a largest magnitude, in fp32."""
    bits = amax.abs().view(torch.int32)  # NOTE: amax may return a NaN with its sign set
    exponent = ((bits + ABOVE_LARGEST) >> 23) - format.max_exponent
    scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    return torch.where(bits >= INF, torch.nan, torch.where(bits == 0, 1.0, scale))


def encode(y: torch.Tensor, format: Format) -> torch.Tensor:
    """The bits of the nearest number of the format, int32; y: fp32, none beyond its largest. Its memory is used."""
    mantissa, bias, _ = format
    magnitude, cut = y.abs(), 23 - mantissa
    bits = magnitude.view(torch.int32)
    normal = (bits >> cut).bitwise_and_(1).add_((1 << (cut - 1)) - 1).add_(bits)  # ties go to the even one
    normal.bitwise_right_shift_(cut).sub_((127 - bias) << mantissa)  # round: fp32 -> 8 bits
    is_subnormal = magnitude < 2.0 ** (1 - bias)
    unit = 24 - bias - mantissa  # a sum with 2**unit ends in the format's least subnormal
    magnitude.add_(2.0**unit)  # round: fp32 -> 8 bits
    code = torch.where(is_subnormal, bits.sub_((127 + unit) << 23), normal)
    return code.bitwise_or_(y.view(torch.int32).bitwise_right_shift_(24).bitwise_and_(0x80))
