# SPDX-License-Identifier: Apache-2.0
"""grad_stats_ in Triton: amax, count of non-finite, found_inf and norm in one read of all gradients and two small launches.

Under TRITON_INTERPRET=1 it runs on the CPU.
"""

import torch

from mpkernels.ops.common import triton_table as table
from mpkernels.ops.common.kernels_triton import TYPES
from mpkernels.ops.common.layout import is_dense
from mpkernels.ops.grad_stats import StatsCall
from mpkernels.ops.grad_stats.kernels_triton import chunk_kernel, tensor_kernel, verdict_kernel

REDUCE_BLOCK = 256


def grad_stats_(call: StatsCall) -> None:
    grads, grad_scale, found_inf, amax, nonfinite, grad_norm = call
    grads = [grad if is_dense(grad) else grad.contiguous() for grad in grads]
    norm, n = grad_norm is not None, len(grads)
    starts = table.chunk_starts((g.numel() for g in grads), amax.device)
    is_double = table.numbers((g.dtype == torch.float64 for g in grads), amax.device)
    chunks = sum(-(-g.numel() // table.CHUNK) for g in grads)
    partial_amax, partial_squares = amax.new_empty(chunks), amax.new_empty(chunks if norm else 0)
    partial_nonfinite, squares = nonfinite.new_empty(chunks), amax.new_empty(n if norm else 0)
    bad = nonfinite.new_empty(n, dtype=torch.int32)
    options = dict(NORM=norm, BLOCK=REDUCE_BLOCK)
    with torch.cuda.device_of(amax):
        for launch in table.launches([grads]):
            chunk_kernel[launch.grid](
                **launch.arguments, starts_ptr=starts, amax_ptr=partial_amax, nonfinite_ptr=partial_nonfinite,
                squares_ptr=partial_squares, grad_type=TYPES[launch.dtypes[0]], NORM=norm,
            )  # fmt: skip
        tensor_kernel[(n,)](
            starts, is_double, partial_amax, partial_nonfinite, partial_squares, grad_scale,
            amax, amax.stride(0), nonfinite, nonfinite.stride(0), bad, squares, **options,
        )  # fmt: skip
        verdict_kernel[(1,)](bad, squares, amax, amax.stride(0), n, grad_scale, found_inf, grad_norm, **options)
