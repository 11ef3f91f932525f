# SPDX-License-Identifier: Apache-2.0
"""The Triton GEMM of linear_act with tensor descriptors: round(act(a @ b + bias)), persistent, tiles moved by TMA from sm_90.

A descriptor fills what lies behind an edge with zeros and clips what is stored there, so nothing is masked but the mask.
"""

import triton
import triton.language as tl

from mpkernels.ops.linear_act.kernels_triton import multiply, select, store_mask


@triton.jit
def gemm_tma_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, mask_ptr, prev_ptr, partial_ptr, M, N, K,
    stride_a, stride_b, stride_as, stride_bs, stride_bias, stride_mask, stride_sm, stride_sn,
    A_IS_KM: tl.constexpr, B_IS_NK: tl.constexpr, RELU: tl.constexpr, ACCUMULATE: tl.constexpr,
    FLOAT8: tl.constexpr, SPECIALIZE: tl.constexpr, SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (M, N), contiguous, = round(act(a (M, K) @ b (K, N) + bias)): fprop, dgrad and wgrad, as gemm_kernel.

    a and b are of one 16-bit dtype or 8-bit floats, rows of 16-byte pitch. A_IS_KM: a lies in memory as (K, M), wgrad's grad_z;
    B_IS_NK: b lies there as (N, K), fprop's weight. bias_ptr and mask_ptr may be None.
    dgrad for the previous layer: out is selected by the mask at prev_ptr, and partial_ptr (tiles of M, N) takes the unrounded
    sums of each tile's columns; both may be None. ACCUMULATE: wgrad is added to what is in out.
    SPECIALIZE: a producer warp loads while consumer warps multiply. SUBTILES: parts (1 or 2) in which a tile is stored; the
    half of its staging memory that two save holds one more stage of operands.
    """
    a_desc = _operand(a_ptr, M, K, stride_a, A_IS_KM, BLOCK_M, BLOCK_K)
    b_desc = _operand(b_ptr, N, K, stride_b, not B_IS_NK, BLOCK_N, BLOCK_K)
    PART_N: tl.constexpr = BLOCK_N // SUBTILES
    out_desc = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BLOCK_M, PART_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False, warp_specialize=SPECIALIZE):
        # ----- map program to tile: GROUP_M rows of tiles share columns of b in L2
        group = tile // (GROUP_M * tiles_n)
        group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        row = (group * GROUP_M + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M
        column = tile % (GROUP_M * tiles_n) // group_m * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            # ----- load
            a = a_desc.load([k, row]).T if A_IS_KM else a_desc.load([row, k])
            b = b_desc.load([column, k]).T if B_IS_NK else b_desc.load([k, column])
            # ----- multiply-accumulate
            acc = multiply(a, b, acc, FLOAT8)
        # ----- epilogue, store
        parts = (acc,) if SUBTILES == 1 else tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, PART_N)), (0, 2, 1)))
        for i in tl.static_range(SUBTILES):
            _finish(
                parts[i], a_scale_ptr, b_scale_ptr, bias_ptr, out_desc, mask_ptr, prev_ptr, partial_ptr, M, N, row,
                column + i * PART_N, stride_as, stride_bs, stride_bias, stride_mask, stride_sm, stride_sn, RELU, ACCUMULATE,
            )  # fmt: skip


@triton.jit
def _operand(ptr, rows, K, stride, IS_TRANSPOSED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The descriptor of an operand that lies in memory as (rows, K), or as (K, rows)."""
    if IS_TRANSPOSED:
        return tl.make_tensor_descriptor(ptr, [K, rows], [stride, 1], [BLOCK_K, BLOCK_ROWS])
    else:  # one return per branch: Triton knows the branch when it compiles, not what follows it
        return tl.make_tensor_descriptor(ptr, [rows, K], [stride, 1], [BLOCK_ROWS, BLOCK_K])


@triton.jit
def _finish(
    acc, a_scale_ptr, b_scale_ptr, bias_ptr, out_desc, mask_ptr, prev_ptr, partial_ptr, M, N, row, column,
    stride_as, stride_bs, stride_bias, stride_mask, stride_sm, stride_sn, RELU: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Scales, bias, activation, selection, sums, rounding and stores of a part of a tile that begins at (row, column)."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    if a_scale_ptr is not None:
        acc *= tl.load(a_scale_ptr + rows.to(tl.int64) * stride_as, mask=rows < M, other=0.0)[:, None]
        acc *= tl.load(b_scale_ptr + columns.to(tl.int64) * stride_bs, mask=columns < N, other=0.0)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, mask=columns < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if prev_ptr is not None:
        acc = select(acc, prev_ptr, rows.to(tl.int64), column, rows < M, N, stride_sm, stride_sn)
    if partial_ptr is not None:
        sums = tl.sum(tl.where((rows < M)[:, None], acc, 0.0), axis=0)  # behind the edge 0 * inf is NaN
        tl.store(partial_ptr + (row // BLOCK_M).to(tl.int64) * N + columns, sums, mask=columns < N)
    out = acc.to(out_desc.dtype)  # round: accumulator -> out_dtype
    if ACCUMULATE:
        out += out_desc.load([row, column])
    out_desc.store([row, column], out)
    if mask_ptr is not None:
        store_mask(out, mask_ptr, rows.to(tl.int64), column, rows < M, N, stride_mask)
