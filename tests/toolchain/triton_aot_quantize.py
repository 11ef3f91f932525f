# SPDX-License-Identifier: Apache-2.0
"""The kernels of quantize as they are launched, for triton_aot.py: dtypes, formats, rows, columns and single numbers."""

import itertools

from mpkernels.ops.quantize import FORMATS
from mpkernels.ops.quantize.kernels_triton import amax_kernel, encode_kernel
from mpkernels.ops.quantize.triton import blocks

SHAPES = ((4096, 4096, 1), (1, 1 << 24, 1), (1, 4096, 4096), (4096, 1, 1))  # outer, n, inner


def cases(sm: int, every: bool):
    """(kernel, signature, constexprs, options); with every=False rows and columns of fp32 in e4m3fn."""
    shapes, types, formats = SHAPES[::2], ("fp32",), list(FORMATS)[:1]
    if every:
        shapes, types, formats = SHAPES, ("fp16", "bf16", "fp32"), list(FORMATS)
    for (outer, n, inner), type in itertools.product(shapes, types):
        sizes = {name: _kind(size) for name, size in (("groups", outer * inner), ("n", n), ("inner", inner))}
        signature = dict(x_ptr=f"*{type}:16", amax_ptr="*i32:16") | sizes
        tile = blocks(outer * inner, n, inner)
        yield amax_kernel, signature, tile, {}
        for dtype in formats:
            mantissa, bias, max_exponent = FORMATS[dtype]
            format = dict(MANTISSA=mantissa, BIAS=bias, MAX_EXPONENT=max_exponent)
            yield encode_kernel, signature | dict(q_ptr="*u8:16", scale_ptr="*fp32:16"), tile | format, {}


def _kind(size: int) -> str:
    """As Triton would find an argument at launch."""
    return "i32:1" if size == 1 else "i32:16" if size % 16 == 0 else "i32"
