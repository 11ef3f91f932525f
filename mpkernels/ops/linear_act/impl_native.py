# SPDX-License-Identifier: Apache-2.0
"""linear_act in CUDA C++ for Hopper: out = round(act(x @ weight.T + bias)) in one kernel, by TMA and WGMMA, on sm_90.

Backward is one streaming pass (select, grad_bias) and two launches of the same GEMM. Same inputs, same bits: no atomics;
where the sum over M is split, the parts are fp32 and are added in order.

What TMA asks of a matrix: rows that are contiguous and start at multiples of 16 bytes. So K and N are multiples of 8 (else
the call is refused: that is Triton's), and an operand that lies otherwise is copied once.
"""

import functools
from dataclasses import dataclass

import torch

from mpkernels import _native
from mpkernels.ops._cast import cast
from mpkernels.ops.linear_act import Activation, empty_mask

BLOCK_M, BLOCK_K = 128, 64
WARPGROUP_ROWS = 64  # that one row of dgrad's column sums stands for
SELECT_ROWS = 128  # that one row of the select pass's column sums stands for
STEPS_PER_SPLIT = 8  # of BLOCK_K, at least: a part costs the write and the read of an fp32 tile
MOST_SPLITS = 8
INVARIANT_M = 1024  # of the cut that batch_invariant takes for every M


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _native.cuda_why_not(device)
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"needs sm90, got sm{major}{minor}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16 to compute in, got {dtype}"
    return None


def why_not_call(N: int, K: int, activation: int, compute_dtype: torch.dtype, out_dtype: torch.dtype) -> str | None:
    """One sentence why a layer of N outputs and K inputs cannot be served, or None."""
    if activation not in (Activation.NONE, Activation.RELU):
        return f"has no {Activation(activation).name.lower()}"
    if N % 8 or K % 8:
        return f"needs in_features and out_features in multiples of 8 (16 bytes), got {K} and {N}"
    if out_dtype not in (compute_dtype, torch.float32):
        return f"needs an output in {compute_dtype} or torch.float32, got {out_dtype}"
    return None


def linear_act(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, batch_invariant=False, *_):
    lead, (N, K) = x.shape[:-1], weight.shape
    _serve("linear_act", N, K, activation, compute_dtype, out_dtype)
    x_compute = cast(x, compute_dtype) if x.dtype != compute_dtype else x.new_empty(0)
    operand = x_compute if x.dtype != compute_dtype else x
    relu = activation == Activation.RELU
    mask = empty_mask(x, lead.numel(), N) if save and relu else None
    out = x.new_empty((lead.numel(), N), dtype=out_dtype)
    if out.numel():
        a, b = _matrix(operand.reshape(lead.numel(), K)), _weight(weight, weight_copy, compute_dtype)
        if K == 0:  # an empty sum: one step of zeros
            a, b = a.new_zeros((lead.numel(), 8)), b.new_zeros((N, 8))
        cut = choose(INVARIANT_M if batch_invariant else lead.numel(), N, _multiprocessors(x.device))
        torch.ops.mpkernels_C.linear_act_fprop(a, b, bias, relu, out, mask, *cut)
    return out.view(*lead, N), x.new_empty(0, dtype=torch.int32) if mask is None else mask, x_compute


def linear_act_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=Activation.NONE, grad_bias_below_dtype=None,
):  # fmt: skip
    lead, (N, K) = grad_out.shape[:-1], weight.shape
    M = lead.numel()
    _serve("linear_act_backward", N, K, activation, compute_dtype, grad_out.dtype)
    if activation_below != Activation.NONE and (activation_below != Activation.RELU or saved_below.dtype != torch.int32):
        raise RuntimeError("linear_act_backward: native does the pass of a layer below by the mask of its ReLU only")
    grad_z, grad_bias = _select(
        grad_out.reshape(M, N),
        None if activation == Activation.NONE else saved if saved.dtype == torch.int32 else saved.reshape(M, N),
        compute_dtype,
        output_mask[0] or output_mask[1],
        grad_bias_dtype if output_mask[2] else None,
    )
    grad_x = grad_weight = grad_bias_below = None
    if output_mask[0]:
        mask = saved_below if activation_below == Activation.RELU else None
        weight = _weight(weight, weight_copy, compute_dtype)
        grad_x, grad_bias_below = _dgrad(grad_z, weight, grad_x_dtype, mask, grad_bias_below_dtype)
        grad_x = grad_x.view(*lead, K)
    if output_mask[1]:
        grad_weight = _wgrad(grad_z, _matrix(x.reshape(M, K)), grad_weight_dtype)
    dtypes = (grad_x_dtype, grad_weight_dtype, grad_bias_dtype, grad_bias_below_dtype)
    grads = (grad_x, grad_weight, grad_bias, grad_bias_below)
    return tuple(g if g is not None else grad_out.new_empty(0, dtype=d) for g, d in zip(grads, dtypes, strict=True))


def _serve(op: str, N: int, K: int, activation: int, compute_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    reason = why_not_call(N, K, activation, compute_dtype, out_dtype)
    if reason is not None:
        raise RuntimeError(f"{op}: native {reason}; Triton's kernels take any size")


# ----- how a GEMM is cut ---------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Columns of a tile (rows are BLOCK_M), blocks of a cluster that share their columns, and the most blocks of a launch."""

    block_n: int
    cluster: int
    blocks: int

    def __iter__(self):
        return iter((self.block_n, self.cluster, self.blocks))


@functools.lru_cache(maxsize=4096)
def choose(rows: int, columns: int, blocks: int) -> Cut:
    """The larger tile where it keeps three quarters of the chip busy; pairs where few of them lack their second tile."""
    tiles_m = -(-rows // BLOCK_M)
    block_n = 256 if 4 * tiles_m * -(-columns // 256) >= 3 * blocks else 128
    cluster = 2 if tiles_m % 2 == 0 or tiles_m >= 16 else 1
    return Cut(block_n, cluster, blocks)


def choose_splits(rows: int, columns: int, depth: int, cut: Cut) -> int:
    """Parts of the sum over `depth`, so that the tiles of a small result do not leave the chip idle."""
    tiles = -(-rows // BLOCK_M) * -(-columns // cut.block_n)
    return max(1, min(cut.blocks // tiles, -(-depth // BLOCK_K) // STEPS_PER_SPLIT, MOST_SPLITS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# ----- operands ---------------------------------------------------------------


def _weight(weight, weight_copy, compute_dtype):
    return _matrix(cast(weight, compute_dtype) if weight_copy is None else weight_copy)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied where TMA cannot read it as it lies."""
    aligned = tensor.stride(0) % 8 == 0 and tensor.stride(0) >= tensor.shape[1] and tensor.data_ptr() % 16 == 0
    return tensor if tensor.stride(1) == 1 and aligned else tensor.clone(memory_format=torch.contiguous_format)


# ----- backward ---------------------------------------------------------------


def _select(grad_out, saved, compute_dtype, wants_grad_z, grad_bias_dtype):
    """(grad_z in compute_dtype, grad_bias), None where not wanted; grad_out itself where it already is grad_z."""
    M, N = grad_out.shape
    is_grad_z = saved is None and grad_out.dtype == compute_dtype and _matrix(grad_out) is grad_out
    grad_z = grad_out.new_empty((M, N), dtype=compute_dtype) if wants_grad_z and not is_grad_z else None
    sums = grad_bias = None
    if grad_bias_dtype is not None:
        sums = grad_out.new_empty((-(-M // SELECT_ROWS), N), dtype=torch.float32)
        grad_bias = grad_out.new_zeros(N, dtype=grad_bias_dtype)
    if grad_out.numel():
        if grad_z is not None or sums is not None:
            torch.ops.mpkernels_C.linear_act_select(grad_out, saved, grad_z, sums)
        if sums is not None:
            torch.ops.mpkernels_C.linear_act_sum(sums, grad_bias)
    return grad_out if is_grad_z else grad_z, grad_bias


def _dgrad(grad_z, weight, dtype, mask, grad_bias_below_dtype):
    """(grad_z @ weight in `dtype`, selected by `mask` where it is given; the sums of its columns, None where not wanted)."""
    M, (N, K) = grad_z.shape[0], weight.shape
    sums = grad_bias_below = None
    if grad_bias_below_dtype is not None:
        sums = grad_z.new_empty((-(-M // WARPGROUP_ROWS), K), dtype=torch.float32)
        grad_bias_below = grad_z.new_zeros(K, dtype=grad_bias_below_dtype)
    grad_x = grad_z.new_empty((M, K), dtype=_stored(dtype, grad_z.dtype))
    if N == 0:
        grad_x.zero_()
    elif grad_x.numel():
        cut = choose(M, K, _multiprocessors(grad_z.device))
        torch.ops.mpkernels_C.linear_act_dgrad(grad_z, weight, mask, grad_x, sums, *cut)
        if sums is not None:
            torch.ops.mpkernels_C.linear_act_sum(sums, grad_bias_below)
    return cast(grad_x, dtype), grad_bias_below


def _wgrad(grad_z, x, dtype):
    """grad_z.T @ x in `dtype`."""
    M, N, K = *grad_z.shape, x.shape[1]
    grad_weight = grad_z.new_empty((N, K), dtype=_stored(dtype, grad_z.dtype))
    if M == 0:
        grad_weight.zero_()
    elif grad_weight.numel():
        cut = choose(N, K, _multiprocessors(grad_z.device))
        splits = choose_splits(N, K, M, cut)
        if splits == 1:
            torch.ops.mpkernels_C.linear_act_wgrad(grad_z, x, grad_weight, 1, *cut)
        else:
            rows = -(-N // (2 * BLOCK_M)) * 2 * BLOCK_M  # of whole tiles, so that one part's last does not touch the next part
            parts = grad_z.new_empty((splits, rows, K), dtype=torch.float32)
            torch.ops.mpkernels_C.linear_act_wgrad(grad_z, x, parts.view(-1, K), splits, *cut)
            torch.ops.mpkernels_C.linear_act_sum(parts[:, :N], grad_weight)
    return cast(grad_weight, dtype)


def _stored(dtype: torch.dtype, compute_dtype: torch.dtype) -> torch.dtype:
    """What the GEMM stores: the accumulator itself where it cannot store `dtype`, so that it is rounded once."""
    return dtype if dtype == compute_dtype else torch.float32
