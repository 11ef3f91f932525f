# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of quantize: the largest magnitude of every group that has a scale, then all numbers.

x is (outer, n, inner), contiguous; a group is one of the outer * inner, and has n numbers. Largest magnitudes are compared as
the bits of fp32, by integer atomics: the same bits every time, and what is not finite is above the rest.
"""

import triton
import triton.language as tl

INF = tl.constexpr(0x7F800000)  # the bits of fp32's
ABOVE_LARGEST = tl.constexpr(0x1FFFFF)  # carries into the exponent from 0x600001 on: a mantissa above 1.75
NAN = tl.constexpr(0x7F)


@triton.jit
def tile(groups, n, inner, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr):
    """(groups of this program, places of its numbers, which of them there are, whether it has the groups' first)."""
    program, per_group = tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK_N)
    group = program // per_group * BLOCK_G + tl.arange(0, BLOCK_G)
    number = program % per_group * BLOCK_N + tl.arange(0, BLOCK_N)
    place = (group // inner * n * inner + group % inner)[:, None] + (number * inner)[None, :]
    return group, place, (group < groups)[:, None] & (number < n)[None, :], program % per_group == 0


@triton.jit
def amax_kernel(x_ptr, amax_ptr, groups, n, inner, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr):
    """amax: int32, zeros before."""
    group, place, there, _ = tile(groups, n, inner, BLOCK_G, BLOCK_N)
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(amax_ptr + group, tl.max(magnitude, 1), mask=group < groups)


@triton.jit
def encode_kernel(
    x_ptr, amax_ptr, q_ptr, scale_ptr, groups, n, inner,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, MAX_EXPONENT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ----- map program to tile
    group, place, there, is_first = tile(groups, n, inner, BLOCK_G, BLOCK_N)
    # ----- load
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    amax = tl.load(amax_ptr + group, mask=group < groups, other=0)
    # ----- scale and its reciprocal
    exponent = tl.maximum(((amax + ABOVE_LARGEST) >> 23) - MAX_EXPONENT, 1)
    exponent = tl.where(amax == 0, 127, exponent)
    inv_scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scale_bits = tl.where(amax >= INF, 0x7FC00000, exponent << 23)
    # ----- encode: the product is exact, or so small that it becomes 0
    code = encode(x * inv_scale[:, None], MANTISSA, BIAS)
    code = tl.where((amax >= INF)[:, None], NAN, code)
    # ----- store
    tl.store(q_ptr + place, code.to(tl.uint8), mask=there)
    tl.store(scale_ptr + group, scale_bits.to(tl.float32, bitcast=True), mask=(group < groups) & is_first)


@triton.jit
def encode(y, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The bits of the nearest number of the format, of ties the even one; y: fp32, not beyond the largest."""
    CUT: tl.constexpr = 23 - MANTISSA
    UNIT: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23  # of what a sum with ends in the format's least subnormal
    signed_bits = y.to(tl.int32, bitcast=True)
    bits = signed_bits & 0x7FFFFFFF
    to_even = ((bits >> CUT) & 1) + ((1 << (CUT - 1)) - 1)
    normal = ((bits + to_even) >> CUT) - ((127 - BIAS) << MANTISSA)  # round: fp32 -> 8 bits
    unit = tl.full((), UNIT, tl.int32).to(tl.float32, bitcast=True)
    total = bits.to(tl.float32, bitcast=True) + unit  # round: fp32 -> 8 bits
    subnormal = total.to(tl.int32, bitcast=True) - UNIT
    code = tl.where(bits < ((128 - BIAS) << 23), subnormal, normal)
    return code | ((signed_bits >> 24) & 0x80)
