# SPDX-License-Identifier: Apache-2.0
"""linear_act in CUDA C++ for sm_90a (Hopper): out = round(act(x @ weight.T + bias)) in one kernel by TMA and WGMMA.

Backward is one streaming pass (select, grad_bias) and two launches of the same GEMM, in whose epilogue dgrad can do that pass
for the previous layer. Same inputs, same bits: no atomics; where a sum is split, the parts are fp32 and are added in order, in
fprop by a pass that has its epilogue. With `batch_invariant` fprop's is not.

8-bit operands are Triton's: WGMMA keeps about 14 bits of their sums, which have to be added in fp32 every 128 of K. That takes
a second set of accumulators, for which a 128 x 256 tile has no registers, and a wait for each k-block where this pipeline
keeps a group in flight: another main loop.

What TMA asks of a matrix: rows that are contiguous and start at multiples of 16 bytes. So K and N are multiples of 8 (else
the call is refused: that is Triton's), and an operand that lies otherwise is copied once.
"""

import functools
from typing import NamedTuple

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import epilogues, passes
from mpkernels.ops.linear_act.call import BackwardCall, CallKey, ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation, empty_mask, pack_mask
from mpkernels.ops.linear_act.tile_config import INVARIANT_M, Operand, rows_why_not
from mpkernels.runtime import native

_RELU = int(Activation.RELU)
BLOCK_M, BLOCK_K = 128, 64
SELECT_ROWS, SUM_ROWS = 128, 64  # that one row of column sums stands for, of the select pass and of dgrad
K_BLOCKS_PER_SPLIT = 8  # at least: a part costs the write and the read of an fp32 tile
MAX_SPLITS = 8
# Clocks of an SM by the columns of a tile and whether by ping-pong: for a k-block of 64, for what of a tile no product hides,
# and for the epilogue where it runs under the next tile's main loop, but behind the last tile. NOTE: reckoned, from 4096
# operations a clock, more bytes per operation in smaller tiles, the bytes of shared memory that an epilogue takes from the
# products meanwhile (of ping-pong), and instructions counted; not measured.
CLOCKS = {
    (256, False): (1024, 2700, 0),
    (192, False): (800, 2150, 0),
    (192, True): (800, 1000, 3500),
    (128, False): (600, 1600, 0),
}
SUM_ELEMENTS, SUM_CLOCKS = 300, 4000  # of the sum of split parts: fp32 written and read in a clock; a launch, reckoned too


def why_not(key: CallKey) -> str | None:
    if key.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16 to compute in, got {key.dtype}"
    if key.N % 8 or key.K % 8:
        return f"needs in_features and out_features in multiples of 8 (16 bytes), got {key.K} and {key.N}"
    if key.out_dtype not in (key.dtype, torch.float32, None):
        return f"needs an output in {key.dtype} or torch.float32, got {key.out_dtype}"
    return epilogues.why_not("sm90", key.activation)


def linear_act(call: ForwardCall):
    x, compute_dtype, (N, K) = call.x, call.compute_dtype, call.weight.shape
    x_compute = None if x.dtype == compute_dtype else cast(x, compute_dtype)
    rows = passes.rows(x if x_compute is None else x_compute)
    M = rows.shape[0]
    relu = call.activation == _RELU
    mask = empty_mask(x, M, N) if relu and call.save else None
    out = _empty(x, M, N, call.out_dtype)
    if M and N:
        a, b = _matrix(rows), _weight(call)
        if K == 0:  # an empty sum: one step of zeros
            a, b = a.new_zeros((M, 8)), b.new_zeros((N, 8))
        invariant = call.batch_invariant
        config, splits = choose(INVARIANT_M if invariant else M, N, K, _num_sms(x.device), not invariant)
        if splits == 1:
            native.ops.linear_act_fprop(a, b, call.bias, relu, out, mask, *config, 1)
        else:
            parts = _empty_parts(a, splits, M, N)
            native.ops.linear_act_fprop(a, b, None, False, parts.view(-1, N), None, *config, splits)
            native.ops.linear_act_sum(parts[:, :M], out, call.bias, relu, mask)
    return passes.shaped(out, x), mask, x_compute


def linear_act_backward(call: BackwardCall):
    wants_x, wants_weight, wants_bias = call.output_mask
    grad_z, grad_bias = _select(
        passes.rows(call.grad_out),
        _mask(call.saved, call.activation),
        call.compute_dtype,
        wants_x or wants_weight,
        call.grad_bias_dtype if wants_bias else None,
    )
    grad_x = grad_weight = grad_prev_bias = None
    if wants_x:
        prev_mask = _mask(call.prev_saved, call.prev_activation)
        grad_x, grad_prev_bias = _dgrad(grad_z, _weight(call), prev_mask, call.grad_x_dtype, call.grad_prev_bias_dtype)
        grad_x = passes.shaped(grad_x, call.grad_out)
    if wants_weight:
        grad_weight = _wgrad(grad_z, _matrix(passes.rows(call.x)), call.grad_weight_dtype, call.grad_weight_sum)
        grad_weight = passes.add_to_sum(call, grad_weight)
    return grad_x, grad_weight, grad_bias, grad_prev_bias


# ----- tiles of a GEMM ---------------------------------------------------------------


class TileConfig(NamedTuple):
    """Columns of a tile (rows are BLOCK_M), blocks of a cluster that share their columns, and the SMs of the GPU.

    ping_pong: each consumer warpgroup of a block has tiles of its own; both have half of each otherwise.
    """

    block_n: int
    cluster: int
    num_sms: int
    ping_pong: bool = False


@functools.lru_cache(maxsize=4096)
def choose(rows: int, columns: int, K: int, num_sms: int, may_split: bool = True) -> tuple[TileConfig, int]:
    """The tile, and into how many parts the sum over K is split, with which all is done first by `clocks`.

    Pairs of tiles where few of them lack their second one.
    """
    tiles_m = -(-rows // BLOCK_M)
    cluster = 2 if tiles_m % 2 == 0 or tiles_m >= 16 else 1
    most = max(1, min(-(-K // BLOCK_K) // K_BLOCKS_PER_SPLIT, MAX_SPLITS)) if may_split else 1
    tiles = [TileConfig(n, cluster, num_sms, ping_pong) for n, ping_pong in CLOCKS]
    candidates = [(config, splits) for splits in range(1, most + 1) for config in tiles]
    return min(candidates, key=lambda candidate: clocks(rows, columns, K, *candidate))


def clocks(rows: int, columns: int, K: int, config: TileConfig, splits: int = 1) -> float:
    """Clocks of a GEMM by the waves of its tiles; the parts of a split sum are written and read once more."""
    tiles = -(-rows // (BLOCK_M * config.cluster)) * -(-columns // config.block_n) * splits
    waves = -(-tiles // max(config.num_sms // config.cluster, 1))
    per_k_block, per_tile, epilogue = CLOCKS[config.block_n, config.ping_pong]
    k_blocks = -(-K // (BLOCK_K * splits))
    gemm = waves * max(k_blocks * per_k_block + per_tile, epilogue) + epilogue
    return gemm + (splits > 1) * (splits * rows * columns / SUM_ELEMENTS + SUM_CLOCKS)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# ----- operands ---------------------------------------------------------------


def _empty(like: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized matrix on the device of `like`. NOTE: torch's other ways to one take the host longer."""
    return torch.empty_strided((rows, columns), (columns or 1, 1), dtype=dtype, device=like.device)


def _weight(call: ForwardCall | BackwardCall) -> torch.Tensor:
    return _matrix(cast(call.operand, call.compute_dtype))


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, whose columns are a multiple of 8, copied where TMA cannot read it as it lies."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:  # nearly always, and soon said
        return tensor
    return tensor if tma_why_not(tensor) is None else tensor.clone(memory_format=torch.contiguous_format)


def tma_why_not(tensor: torch.Tensor) -> str | None:
    """Why TMA cannot read a matrix of 16-bit elements as it lies, or None; its rows are those of the matrix."""
    if tensor.stride(1) != 1:
        return f"needs contiguous rows, got a stride of {tensor.stride(1)}"
    return rows_why_not(Operand(tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16))


def _mask(saved, activation):
    """The mask that `saved` is, or that of the output that it is; None where nothing is selected."""
    if not activation:
        return None
    if saved.dtype == torch.int32:
        return saved if saved.stride(1) == 1 else saved.contiguous()
    return pack_mask(passes.rows(saved))


# ----- backward ---------------------------------------------------------------


def _select(grad_out, mask, compute_dtype, wants_grad_z, grad_bias_dtype):
    """(grad_z in compute_dtype, grad_bias), None where not wanted; grad_out itself where it already is grad_z."""
    M, N = grad_out.shape
    is_grad_z = mask is None and grad_out.dtype == compute_dtype and _matrix(grad_out) is grad_out
    grad_z = _empty(grad_out, M, N, compute_dtype) if wants_grad_z and not is_grad_z else None
    sums = None if grad_bias_dtype is None else _empty(grad_out, -(-M // SELECT_ROWS), N, torch.float32)
    if M and N and (grad_z is not None or sums is not None):
        native.ops.linear_act_select(grad_out, mask, grad_z, sums)
    grad_bias = None if sums is None else _sum_rows(sums, M, N, grad_bias_dtype)
    return grad_out if is_grad_z else grad_z, grad_bias


def _sum_rows(sums, rows, columns, dtype):
    """sums.sum(0), rounded once to `dtype`, of column sums of so many `rows`."""
    if not (rows and columns):
        return sums.new_zeros(columns, dtype=dtype)
    out = torch.empty_strided((columns,), (1,), dtype=dtype, device=sums.device)
    native.ops.linear_act_sum(sums, out)
    return out


def _sum_parts(parts, rows, dtype, added_to=None):
    """The sum of split parts, of `rows` rows each, rounded once to `dtype`; or `added_to`, to which it was added."""
    out = _empty(parts, rows, parts.shape[2], dtype) if added_to is None else added_to
    native.ops.linear_act_sum(parts[:, :rows], out, None, False, None, added_to is not None)
    return out


def _dgrad(grad_z, weight, prev_mask, dtype, grad_prev_bias_dtype):
    """(grad_z @ weight, selected by `prev_mask` where it is given, in `dtype`; its column sums unrounded, or None)."""
    (M, N), K = grad_z.shape, weight.shape[1]
    sums = None if grad_prev_bias_dtype is None else _empty(grad_z, -(-M // SUM_ROWS), K, torch.float32)
    if not (N and M and K):
        return grad_z.new_zeros((M, K), dtype=dtype), None if sums is None else _sum_rows(sums, 0, K, grad_prev_bias_dtype)
    has_epilogue = prev_mask is not None or sums is not None
    config, splits = choose(M, K, N, _num_sms(grad_z.device), not has_epilogue)
    if splits > 1:
        parts = _empty_parts(grad_z, splits, M, K)
        native.ops.linear_act_dgrad(grad_z, weight, None, parts.view(-1, K), None, *config, splits)
        return _sum_parts(parts, M, dtype), None
    grad_x = _empty(grad_z, M, K, dtype if dtype == grad_z.dtype else torch.float32)
    native.ops.linear_act_dgrad(grad_z, weight, prev_mask, grad_x, sums, *config, 1)
    return cast(grad_x, dtype), None if sums is None else _sum_rows(sums, M, K, grad_prev_bias_dtype)


def _wgrad(grad_z, x, dtype, added_to=None):
    """grad_z.T @ x in `dtype`; or `added_to` (N, K), fp32, where it was added to that: not to one that TMA cannot write."""
    (M, N), K = grad_z.shape, x.shape[1]
    if not (M and N and K):
        return grad_z.new_zeros((N, K), dtype=dtype)
    config, splits = choose(N, K, M, _num_sms(grad_z.device), True)
    if splits > 1:
        parts = _empty_parts(grad_z, splits, N, K)
        native.ops.linear_act_wgrad(grad_z, x, parts.view(-1, K), splits, *config)
        return _sum_parts(parts, N, dtype, added_to)
    if added_to is not None and added_to.data_ptr() % 16 == 0:
        native.ops.linear_act_wgrad(grad_z, x, added_to, 1, *config, True)
        return added_to
    grad_weight = _empty(grad_z, N, K, dtype if dtype == grad_z.dtype else torch.float32)
    native.ops.linear_act_wgrad(grad_z, x, grad_weight, 1, *config)
    return cast(grad_weight, dtype)


def _empty_parts(like, splits, rows, columns):
    """Memory for the parts of a split sum, of whole tiles, so that one part's last does not touch the next part."""
    rows = -(-rows // (2 * BLOCK_M)) * 2 * BLOCK_M
    return like.new_empty((splits, rows, columns), dtype=torch.float32)
