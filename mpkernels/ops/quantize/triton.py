# SPDX-License-Identifier: Apache-2.0
"""quantize in Triton: scale = the least 2^k with max |x| / 2^k <= the format's largest, q = round(x / scale).

q is stored as bytes, so that GPUs without 8-bit floats serve too. Under TRITON_INTERPRET=1 it runs on the CPU.
"""

import torch
import triton

from mpkernels.ops.quantize import FORMATS, QuantizeCall, empty
from mpkernels.ops.quantize.kernels_triton import amax_kernel, encode_kernel

TILE = 2048  # numbers
MOST_GROUPS = 64  # of a tile, where the numbers of one group do not lie side by side


def blocks(groups: int, n: int, inner: int) -> dict[str, int]:
    """A tile of up to TILE numbers, the longest side along memory."""
    if inner == 1:
        block_n = min(triton.next_power_of_2(n), TILE)
        return dict(BLOCK_G=min(triton.next_power_of_2(groups), TILE // block_n), BLOCK_N=block_n)
    block_g = min(triton.next_power_of_2(groups), MOST_GROUPS)
    return dict(BLOCK_G=block_g, BLOCK_N=min(triton.next_power_of_2(n), TILE // block_g))


def quantize(call: QuantizeCall):
    q, scale = empty(call)
    if not q.numel():
        return q, scale.fill_(1)
    x, (outer, n, inner) = call.x.contiguous(), call.matrix
    tile = blocks(outer * inner, n, inner)
    sizes = (outer * inner, n, inner)
    programs = triton.cdiv(outer * inner, tile["BLOCK_G"]) * triton.cdiv(n, tile["BLOCK_N"])
    mantissa, bias, max_exponent = FORMATS[call.dtype]
    amax = torch.zeros(scale.shape, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        amax_kernel[(programs,)](x, amax, *sizes, **tile)
        encode_kernel[(programs,)](
            x, amax, q.view(torch.uint8), scale, *sizes, MANTISSA=mantissa, BIAS=bias, MAX_EXPONENT=max_exponent, **tile
        )
    return q, scale
