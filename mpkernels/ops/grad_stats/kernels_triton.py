# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of grad_stats_: each chunk of each gradient, then each gradient, then the verdict and the norm.

Sums and their order do not depend on scheduling: the same bits every time.
"""

import triton
import triton.language as tl

from mpkernels.ops.common.kernels_triton import chunk_of, double, inv_scale, pointer

HUGE, SHRINK = tl.constexpr(2.0**480), tl.constexpr(2.0**-600)
TINY, GROW = tl.constexpr(2.0**-480), tl.constexpr(2.0**600)


@triton.jit
def square_scale(amax):
    """The power of 2 that a sum of squares is taken of gradients times: as in csrc/grad_stats/update.h."""
    return tl.where(amax >= HUGE, double(SHRINK), tl.where(amax < TINY, double(GROW), double(1.0)))


@triton.jit
def squares_for(squares, amax, largest):
    """Sums of squares of gradients of which the largest are `amax`, as they are where it is `largest`."""
    ratio = square_scale(largest) / square_scale(amax)
    return tl.where(ratio == 1, squares, squares * ratio * ratio)


@triton.jit
def chunk_kernel(
    addresses_ptr, layout_ptr, tensors_ptr, count, starts_ptr, amax_ptr, nonfinite_ptr, squares_ptr,
    grad_type: tl.constexpr, NORM: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest finite |grad|, count of non-finite and (NORM) sum of squares, fp64, int64, fp64, of every chunk.

    starts: int64, where the chunks of each place of the call's list begin in the three outputs.
    """
    # ----- map program to chunk
    tensor, place, start, end = chunk_of(tensors_ptr, layout_ptr, count, CHUNK)
    grad_ptr = pointer(addresses_ptr, tensor, grad_type, ALIGNED)
    acc_type: tl.constexpr = tl.float64 if grad_type == tl.float64 else tl.float32
    largest = tl.zeros((BLOCK,), acc_type)
    bad = tl.zeros((BLOCK,), tl.int32)
    squares = tl.zeros((BLOCK,), tl.float64)
    # ----- NOTE: a mask would keep the loads of whole chunks from being 16 bytes wide
    if end - start == CHUNK:
        for first in range(start, end, BLOCK):
            grad = tl.load(grad_ptr + first + tl.arange(0, BLOCK)).to(acc_type)
            largest, bad, squares = stats_formula(grad, largest, bad, squares, NORM)
    else:
        for first in range(start, end, BLOCK):
            index = first + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + index, mask=index < end, other=0.0).to(acc_type)
            largest, bad, squares = stats_formula(grad, largest, bad, squares, NORM)
    # ----- store
    out = tl.load(starts_ptr + place) + start // CHUNK
    amax = tl.max(largest, 0).to(tl.float64)
    tl.store(amax_ptr + out, amax)
    tl.store(nonfinite_ptr + out, tl.sum(bad, 0).to(tl.int64))
    if NORM:
        if grad_type == tl.float64:  # whose squares can over- and underflow
            scale = square_scale(amax)
            if scale != 1:
                squares = tl.zeros((BLOCK,), tl.float64)
                for first in range(start, end, BLOCK):
                    index = first + tl.arange(0, BLOCK)
                    grad = tl.load(grad_ptr + index, mask=index < end, other=0.0) * scale
                    squares += grad * grad
        tl.store(squares_ptr + out, tl.sum(squares, 0))


@triton.jit
def stats_formula(grad, largest, bad, squares, NORM: tl.constexpr):
    """(largest, bad, squares) with `grad` among them."""
    size = tl.abs(grad)
    finite = size < float("inf")  # NaN is not below inf
    largest = tl.maximum(largest, tl.where(finite, size, 0.0))
    bad += tl.where(finite, 0, 1)
    if NORM:
        wide = grad.to(tl.float64)
        squares += wide * wide
    return largest, bad, squares


@triton.jit
def tensor_kernel(
    starts_ptr, is_double_ptr, partial_amax_ptr, partial_nonfinite_ptr, partial_squares_ptr, grad_scale_ptr,
    amax_ptr, amax_stride, nonfinite_ptr, nonfinite_stride, bad_ptr, squares_ptr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One gradient: amax, nonfinite, its squares, and bad: whether a value is not finite, or not once it is unscaled."""
    # ----- map program to gradient
    place = tl.program_id(0)
    start, end = tl.load(starts_ptr + place), tl.load(starts_ptr + place + 1)
    largest = tl.zeros((BLOCK,), tl.float64)
    nonfinite = tl.zeros((BLOCK,), tl.int64)
    for first in range(start, end, BLOCK):
        # ----- load, accumulate
        index = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(partial_amax_ptr + index, mask=index < end, other=0.0))
        nonfinite += tl.load(partial_nonfinite_ptr + index, mask=index < end, other=0)
    amax, total = tl.max(largest, 0), tl.sum(nonfinite, 0)
    if NORM:
        squares = tl.zeros((BLOCK,), tl.float64)
        for first in range(start, end, BLOCK):
            index = first + tl.arange(0, BLOCK)
            some = tl.load(partial_squares_ptr + index, mask=index < end, other=0.0)
            squares += squares_for(some, tl.load(partial_amax_ptr + index, mask=index < end, other=0.0), amax)
        tl.store(squares_ptr + place, tl.sum(squares, 0))
    # ----- epilogue: a gradient is unscaled in fp32, and must be finite there too
    inv = inv_scale(grad_scale_ptr)
    in_fp32 = (amax.to(tl.float32) * inv.to(tl.float32)).to(tl.float64)
    unscaled = tl.where(tl.load(is_double_ptr + place) != 0, amax * inv, in_fp32)
    bad = (total > 0) | ~(unscaled < float("inf"))
    # ----- store
    tl.store(amax_ptr + place * amax_stride, amax)
    tl.store(nonfinite_ptr + place * nonfinite_stride, total)
    tl.store(bad_ptr + place, bad.to(tl.int32))


@triton.jit
def verdict_kernel(
    bad_ptr, squares_ptr, amax_ptr, amax_stride, n, grad_scale_ptr, found_inf_ptr, grad_norm_ptr,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """found_inf and grad_norm from what was found of n gradients; one program."""
    # ----- load, accumulate
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        index = first + tl.arange(0, BLOCK)
        bad |= tl.load(bad_ptr + index, mask=index < n, other=0)
    # ----- epilogue: 1 / grad_scale is positive and finite exactly where grad_scale is; NaN compares false
    inv = inv_scale(grad_scale_ptr)
    found = (tl.max(bad, 0) != 0) | ~((inv > 0) & (inv < float("inf")))
    # ----- store
    tl.store(found_inf_ptr, found.to(tl.float32))
    if NORM:
        largest = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, n, BLOCK):
            index = first + tl.arange(0, BLOCK)
            largest = tl.maximum(largest, tl.load(amax_ptr + index * amax_stride, mask=index < n, other=0.0))
        amax = tl.max(largest, 0)
        squares = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, n, BLOCK):
            index = first + tl.arange(0, BLOCK)
            some = tl.load(squares_ptr + index, mask=index < n, other=0.0)
            squares += squares_for(some, tl.load(amax_ptr + index * amax_stride, mask=index < n, other=0.0), amax)
        tl.store(grad_norm_ptr, tl.sqrt(tl.sum(squares, 0)) * inv / square_scale(amax))
