# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of linear_act: round(act(a @ b + bias)) with pointers and any stride, and the pass that selects grad_z.

NOTE: every load is masked on every edge, K on BOTH operands: 0 times the NaN behind an edge is NaN.
"""

import triton
import triton.language as tl

from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.ops.linear_act.tile_config import Float8

NONE, RELU, RELU2, GELU, GELU_TANH, SILU = (tl.constexpr(int(a)) for a in Activation)
NO_FLOAT8, PLAIN, PROMOTED, DECODED = (tl.constexpr(int(how)) for how in Float8)
STEEP = tl.constexpr(1000.0)  # from here on slopes of gelu and silu are 0 or 1, and at infinity their formulas are NaN
SQRT_HALF = tl.constexpr(0.7071067811865476)
ONE_OVER_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)
# NOTE: in a product the tensor stands first; the interpreter makes a constexpr of a constexpr times a tensor.


@triton.jit
def gemm_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, mask_ptr, preactivation_ptr, saved_ptr, partial_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_as, stride_bs, stride_bias, stride_mask, stride_sm, stride_sn,
    ACTIVATION: tl.constexpr, PREV_ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr, FLOAT8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (M, N), contiguous, = round(act(a (M, K) @ b (K, N) + bias)): fprop with weight.T as b, dgrad, wgrad.

    b is rounded to a's dtype as it is loaded. bias_ptr, mask_ptr (of the op's contract) and preactivation_ptr (M, N) may be
    None.
    FLOAT8: of tile_config; a and b are 8-bit floats, the bytes of e4m3fn where they are decoded, and a_scale (M,) and
    b_scale (N,) their scales; None otherwise.
    dgrad for the previous layer: out is times the slope of its activation at saved_ptr, and partial_ptr (tiles of M, N) takes
    the unrounded sums of each tile's columns; both may be None. ACCUMULATE: wgrad is added to what is in out.
    """
    # ----- map program to tile: GROUP_M rows of tiles share columns of b in L2
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + pid % (GROUP_M * tiles_n) % group_m
    pid_n = pid % (GROUP_M * tiles_n) // group_m
    first_row, first_column = pid_m.to(tl.int64) * BLOCK_M, pid_n.to(tl.int64) * BLOCK_N
    rows, columns = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    # NOTE: compared in 32 bits; in 64 the largest tiles spill.
    row_inside = tl.arange(0, BLOCK_M) < tl.minimum(M - first_row, BLOCK_M).to(tl.int32)
    column_inside = tl.arange(0, BLOCK_N) < tl.minimum(N - first_column, BLOCK_N).to(tl.int32)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)  # int64: a stride times BLOCK_K can pass 2^31
    a_ptrs = a_ptr + rows[:, None] * stride_am + depth[None, :] * stride_ak
    b_ptrs = b_ptr + depth[:, None] * stride_bk + columns[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(0, K, BLOCK_K):
        # ----- load
        inside = depth < K - start
        a = tl.load(a_ptrs, mask=row_inside[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & column_inside[None, :], other=0.0)
        # ----- multiply-accumulate
        if FLOAT8 == NO_FLOAT8:
            b = b.to(a.dtype)  # round: weight's dtype -> compute dtype
        acc = multiply(a, b, acc, FLOAT8)
        a_ptrs += step * stride_ak
        b_ptrs += step * stride_bk
    # ----- epilogue
    if a_scale_ptr is not None:
        acc *= tl.load(a_scale_ptr + rows * stride_as, mask=row_inside, other=0.0)[:, None]
        acc *= tl.load(b_scale_ptr + columns * stride_bs, mask=column_inside, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns * stride_bias, mask=column_inside, other=0.0)
        acc += bias.to(acc.dtype)[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    if preactivation_ptr is not None:
        preactivation = acc.to(preactivation_ptr.dtype.element_ty)  # round: accumulator -> compute dtype
        tl.store(preactivation_ptr + rows[:, None] * N + columns[None, :], preactivation, mask=inside)
    acc = activate(acc, ACTIVATION)
    if saved_ptr is not None:
        acc = activation_backward(acc, saved_ptr, rows, first_column, row_inside, N, stride_sm, stride_sn, PREV_ACTIVATION)
    if partial_ptr is not None:
        sums = tl.sum(tl.where(row_inside[:, None], acc, 0.0), axis=0)  # behind the edge 0 * inf is NaN
        tl.store(partial_ptr + pid_m.to(tl.int64) * N + columns, sums, mask=column_inside)
    out = acc.to(out_ptr.dtype.element_ty)  # round: accumulator -> out_dtype
    out_ptrs = out_ptr + rows[:, None] * N + columns[None, :]
    if ACCUMULATE:
        out += tl.load(out_ptrs, mask=inside, other=0.0)
    # ----- store
    tl.store(out_ptrs, out, mask=inside)
    if mask_ptr is not None:
        store_mask(out, mask_ptr, rows, first_column, row_inside, N, stride_mask)


@triton.jit
def multiply(a, b, acc, FLOAT8: tl.constexpr):
    """acc + a @ b."""
    if FLOAT8 == DECODED:
        a, b = as_fp16(a), as_fp16(b)
    if FLOAT8 == PROMOTED:
        acc += tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def as_fp16(q):
    """An 8-bit float as fp16, exactly: e5m2 is the upper byte of one; the bits of e4m3fn are 2**-8 times the number there."""
    # NOTE: one return: Triton compiles what follows a return.
    bits = q.to(tl.uint8, bitcast=True).to(tl.uint16)
    if q.dtype == tl.uint8:
        number = (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
        result = tl.where((bits & 0x7F) == 0x7F, float("nan"), number)
    else:
        result = (bits << 8).to(tl.float16, bitcast=True)
    return result


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) in the dtype of z."""
    if ACTIVATION == NONE:
        return z
    if ACTIVATION == RELU:
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == RELU2:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return z * z
    if ACTIVATION == GELU:
        return z * (0.5 * (1.0 + tl.erf(z * SQRT_HALF)))
    if ACTIVATION == GELU_TANH:
        return z * _sigmoid((z + z * z * z * CUBIC) * TWO_SQRT_TWO_OVER_PI)
    return z * _sigmoid(z)


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """act'(z) in the dtype of z, of what is not selected."""
    if ACTIVATION == RELU2:
        return 2.0 * tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    z = tl.where(z > STEEP, STEEP, tl.where(z < -STEEP, -STEEP, z))  # NaN stays
    if ACTIVATION == GELU:
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * ONE_OVER_SQRT_TWO_PI * tl.exp(z * z * -0.5)
    if ACTIVATION == GELU_TANH:
        t = (z + z * z * z * CUBIC) * TWO_SQRT_TWO_OVER_PI
        return _sigmoid(t) * (1.0 + z * _sigmoid(-t) * (1.0 + z * z * 3.0 * CUBIC) * TWO_SQRT_TWO_OVER_PI)
    return _sigmoid(z) * (1.0 + z * _sigmoid(-z))


@triton.jit
def _sigmoid(t):
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def activation_backward(grad, saved_ptr, rows, first_column, row_inside, N, stride_sm, stride_sn, ACTIVATION: tl.constexpr):
    """The gradient before the activation: selected by a ReLU's mask or output, else times the slope at the preactivation.

    grad is (rows, columns) from first_column on, a multiple of 32.
    """
    # NOTE: one return: Triton compiles what follows a return, and its type would have to be the same.
    if saved_ptr.dtype.element_ty == tl.int32:
        result = select(grad, saved_ptr, rows, first_column, row_inside, N, stride_sm, stride_sn)
    else:
        BLOCK_N: tl.constexpr = grad.shape[1]
        columns = first_column + tl.arange(0, BLOCK_N)
        inside = row_inside[:, None] & (columns < N)[None, :]
        z = tl.load(saved_ptr + rows[:, None] * stride_sm + columns[None, :] * stride_sn, mask=inside, other=0.0)
        if ACTIVATION == RELU:
            result = tl.where(z <= 0, 0.0, grad)
        else:
            z = z.to(tl.float64 if z.dtype == tl.float64 else tl.float32)
            result = grad.to(z.dtype) * slope(z, ACTIVATION)
            if ACTIVATION == RELU2:
                result = tl.where(z <= 0, 0.0, result)
    return result


@triton.jit
def select(grad, mask_ptr, rows, first_column, row_inside, N, stride_sm, stride_sn):
    """grad where the mask has a 1, else 0. A word is read once, and not by each of its 32 columns."""
    BLOCK_M: tl.constexpr = grad.shape[0]
    BLOCK_N: tl.constexpr = grad.shape[1]
    word = first_column // 32 + tl.arange(0, BLOCK_N // 32)
    inside = row_inside[:, None] & (word * 32 < N)[None, :]
    words = tl.load(mask_ptr + rows[:, None] * stride_sm + word[None, :] * stride_sn, mask=inside, other=0)
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_N)) == 0, 0.0, grad)


@triton.jit
def store_mask(out, mask_ptr, rows, first_column, row_inside, N, stride_mask):
    """The mask of out (rows, columns) from first_column on: int32, bit j of word w is column 32w+j, 1 at NaN, tail bits 0."""
    BLOCK_M: tl.constexpr = out.shape[0]
    BLOCK_N: tl.constexpr = out.shape[1]
    bits = tl.reshape(tl.where(out <= 0, 0, 1), (BLOCK_M, BLOCK_N // 32, 32)) << tl.arange(0, 32)[None, None, :]
    words = tl.sum(bits, axis=2)
    word = first_column // 32 + tl.arange(0, BLOCK_N // 32)
    count = tl.maximum(tl.minimum(N - word * 32, 32), 0)  # of this word that are columns
    words &= ((1 << count.to(tl.int64)) - 1).to(tl.int32)[None, :]  # the others may be NaN's
    inside = row_inside[:, None] & (count > 0)[None, :]
    tl.store(mask_ptr + rows[:, None] * stride_mask + word[None, :], words, mask=inside)


@triton.jit
def select_kernel(
    grad_out_ptr, saved_ptr, grad_z_ptr, partial_ptr, M, N, stride_gm, stride_gn, stride_sm, stride_sn,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_z (M, N), contiguous, = grad_out * act'(saved), and the sums of each ROWS rows of it, unrounded.

    saved: a ReLU's mask (int32) or output, else the preactivation, or None. grad_z_ptr and partial_ptr (M / ROWS, N) may
    be None.
    """
    # ----- map program to tile
    tiles_n = tl.cdiv(N, BLOCK_N)
    chunk = (tl.program_id(0) // tiles_n).to(tl.int64)
    first_column = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    if partial_ptr is not None:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=partial_ptr.dtype.element_ty)
    for start in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, M), BLOCK_M):
        # ----- load
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        grad_z = tl.load(grad_out_ptr + rows[:, None] * stride_gm + columns[None, :] * stride_gn, mask=inside, other=0.0)
        if saved_ptr is not None:
            grad_z = activation_backward(grad_z, saved_ptr, rows, first_column, rows < M, N, stride_sm, stride_sn, ACTIVATION)
        # ----- store
        if grad_z_ptr is not None:
            rounded = grad_z.to(grad_z_ptr.dtype.element_ty)  # round: grad_out's dtype -> compute dtype
            tl.store(grad_z_ptr + rows[:, None] * N + columns[None, :], rounded, mask=inside)
        # ----- accumulate
        if partial_ptr is not None:
            acc += grad_z.to(acc.dtype)
    # ----- epilogue
    if partial_ptr is not None:
        tl.store(partial_ptr + chunk * N + columns, tl.sum(acc, axis=0), mask=columns < N)


@triton.jit
def transpose_kernel(x_ptr, out_ptr, M, N, stride_xm, BLOCK: tl.constexpr):
    """out (N, M), contiguous, = x.T of x (M, N) in rows of bytes: what a copy by torch reads or writes a byte at a time."""
    # ----- map program to tile
    tiles_n = tl.cdiv(N, BLOCK)
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = (tl.program_id(0) % tiles_n).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # ----- load
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :], mask=inside, other=0)
    # ----- store
    inside = (columns < N)[:, None] & (rows < M)[None, :]
    tl.store(out_ptr + columns[:, None] * M + rows[None, :], tl.trans(x), mask=inside)


@triton.jit
def sum_kernel(partial_ptr, out_ptr, P, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (N,) = round(the sum of partial (P, N) over its rows), in a fixed order."""
    # ----- map program to tile
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=partial_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_M):
        # ----- load
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = (rows < P)[:, None] & (columns < N)[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * N + columns[None, :], mask=inside, other=0.0)
    # ----- store
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)  # round: accumulator -> grad_bias's dtype
    tl.store(out_ptr + columns, out, mask=columns < N)
