# SPDX-License-Identifier: Apache-2.0
"""linear_act in C++: out = round(act(x @ weight.T + bias)), on a CPU, and in one kernel by TMA and WGMMA on sm_90 (Hopper).

On a CPU the products read operands as they lie and round, widen and multiply them in registers; no copy in fp32 is written,
whose pages cost as much as a small product. What is around the products is torch's, as in eager.

On Hopper backward is one streaming pass (select, grad_bias) and two launches of the same GEMM, in whose epilogue dgrad can
do that pass for the layer below. Same inputs, same bits: no atomics; where the sum over M is split, the parts are fp32 and
are added in order.

What TMA asks of a matrix: rows that are contiguous and start at multiples of 16 bytes. So K and N are multiples of 8 (else
the call is refused: that is Triton's), and an operand that lies otherwise is copied once.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import Activation, empty_mask, passes
from mpkernels.runtime import native

BLOCK_M, BLOCK_K = 128, 64
SELECT_ROWS, SUM_ROWS = 128, 64  # that one row of column sums stands for, of the select pass and of dgrad
INVARIANT_M = 1024  # whose tile batch_invariant takes for every M
STEPS_PER_SPLIT = 8  # of BLOCK_K, at least: a part costs the write and the read of an fp32 tile
MOST_SPLITS = 8


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        return native.why_not() or ("has no float64" if dtype == torch.float64 else None)
    reason = native.cuda_why_not(device)
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"needs sm90, got sm{major}{minor}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16 to compute in, got {dtype}"
    return None


def why_not_call(N: int, K: int, activation: int, compute_dtype: torch.dtype, out_dtype: torch.dtype) -> str | None:
    """One sentence why a layer of N outputs and K inputs cannot be served on a GPU, or None."""
    if activation not in (Activation.NONE, Activation.RELU):
        return f"has no {Activation(activation).name.lower()}"
    if N % 8 or K % 8:
        return f"needs in_features and out_features in multiples of 8 (16 bytes), got {K} and {N}"
    if out_dtype not in (compute_dtype, torch.float32):
        return f"needs an output in {compute_dtype} or torch.float32, got {out_dtype}"
    return None


def linear_act(x, *args):
    return passes.linear_act(_multiply, x, *args) if x.is_cpu else linear_act_hopper(x, *args)


def linear_act_backward(grad_out, *args):
    return _backward(grad_out, *args) if grad_out.is_cpu else linear_act_backward_hopper(grad_out, *args)


# ----- on Hopper ---------------------------------------------------------------


def linear_act_hopper(
    x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, batch_invariant=False, *_
):  # fmt: skip
    (N, K), M = weight.shape, x.shape[:-1].numel()
    _serve("linear_act", N, K, activation, compute_dtype, out_dtype)
    x_compute = cast(x, compute_dtype) if x.dtype != compute_dtype else x.new_empty(0)
    operand = x_compute if x.dtype != compute_dtype else x
    relu = activation == Activation.RELU
    mask = empty_mask(x, M, N) if save and relu else None
    out = x.new_empty((M, N), dtype=out_dtype)
    if out.numel():
        a, b = _matrix(_rows(operand, M, K)), _weight(weight, weight_copy, compute_dtype)
        if K == 0:  # an empty sum: one step of zeros
            a, b = a.new_zeros((M, 8)), b.new_zeros((N, 8))
        cut = choose(INVARIANT_M if batch_invariant else M, N, _multiprocessors(x.device))
        torch.ops.mpkernels_C.linear_act_fprop(a, b, bias, relu, out, mask, *cut)
    out = out if x.dim() == 2 else out.view(*x.shape[:-1], N)
    return out, x.new_empty(0, dtype=torch.int32) if mask is None else mask, x_compute


def linear_act_backward_hopper(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=Activation.NONE, grad_bias_below_dtype=None,
):  # fmt: skip
    (N, K), M = weight.shape, grad_out.shape[:-1].numel()
    _serve("linear_act_backward", N, K, activation, compute_dtype, grad_out.dtype)
    _serve("linear_act_backward", N, K, activation_below, compute_dtype, grad_out.dtype)
    grad_z, grad_bias = _select(
        _rows(grad_out, M, N),
        _mask(saved, activation, M, N),
        compute_dtype,
        output_mask[0] or output_mask[1],
        grad_bias_dtype if output_mask[2] else None,
    )
    grad_x = grad_weight = grad_bias_below = None
    if output_mask[0]:
        weight = _weight(weight, weight_copy, compute_dtype)
        mask_below = _mask(saved_below, activation_below, M, K)
        grad_x, grad_bias_below = _dgrad(grad_z, weight, mask_below, grad_x_dtype, grad_bias_below_dtype)
        grad_x = grad_x if grad_out.dim() == 2 else grad_x.view(*grad_out.shape[:-1], K)
    if output_mask[1]:
        grad_weight = _wgrad(grad_z, _matrix(_rows(x, M, K)), grad_weight_dtype)
    dtypes = (grad_x_dtype, grad_weight_dtype, grad_bias_dtype, grad_bias_below_dtype)
    grads = (grad_x, grad_weight, grad_bias, grad_bias_below)
    return tuple(g if g is not None else grad_out.new_empty(0, dtype=d) for g, d in zip(grads, dtypes, strict=True))


# ----- on a CPU ---------------------------------------------------------------


def _multiply(a, b, compute_dtype, out_dtype, *, bias=None, activation=Activation.NONE, pre=None, batch_invariant=False):
    """round(act(a @ b.T + bias)) as passes.py has it."""
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    torch.ops.mpkernels_C.linear_act_multiply.default(
        _readable(a, compute_dtype), _readable(b, compute_dtype), bias, compute_dtype, activation, batch_invariant, out, pre
    )
    return out


def _backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=Activation.NONE, grad_bias_below_dtype=None,
):  # fmt: skip
    args = (grad_out, x, weight, weight_copy, saved, activation, compute_dtype)
    dtypes, below = (grad_weight_dtype, grad_bias_dtype), (saved_below, activation_below, grad_bias_below_dtype)
    if torch.float64 in (grad_out.dtype, None if saved is None else saved.dtype):  # fp32 takes its least numbers for 0
        return passes.linear_act_backward(_multiply, *args, grad_x_dtype, *dtypes, output_mask, *below)
    if activation_below == Activation.NONE and grad_bias_below_dtype is None:
        return _gradients(*args, grad_x_dtype, *dtypes, output_mask)
    grad_x, grad_weight, grad_bias, none = _gradients(*args, torch.float32, *dtypes, output_mask)
    grad_z, grad_bias_below = passes.below_of(passes.rows(grad_x), *below, compute_dtype)
    grad_z = cast(grad_z, grad_x_dtype).view(grad_x.shape)
    return grad_z, grad_weight, grad_bias, none if grad_bias_below is None else grad_bias_below


def _gradients(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype,
    grad_x_dtype, grad_weight_dtype, grad_bias_dtype, output_mask,
):  # fmt: skip
    """Backward in one call: one pass for grad_z and grad_bias, and the products."""
    N, K = weight.shape
    x_wanted, weight_wanted, bias_wanted = output_mask
    grad = passes.rows(grad_out)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    if activation == Activation.NONE:
        saved = None
    elif saved.dtype == torch.int32:
        saved = passes.unpack_mask(saved, N).to(grad.dtype)
    else:
        saved = passes.rows(saved).contiguous()
    rounds = saved is not None or (grad.dtype != compute_dtype and grad.dtype != torch.float32)
    grad_z = grad.new_empty(grad.shape, dtype=compute_dtype) if rounds and (x_wanted or weight_wanted) else None
    grad_x = grad.new_empty((grad.shape[0], K) if x_wanted else 0, dtype=grad_x_dtype)
    grad_weight = grad.new_empty((N, K) if weight_wanted else 0, dtype=grad_weight_dtype)
    grad_bias = grad.new_empty(N if bias_wanted else 0, dtype=grad_bias_dtype)
    torch.ops.mpkernels_C.linear_act_gradients.default(
        grad, saved, activation, _readable(passes.rows(x), compute_dtype) if weight_wanted else None,
        _readable(weight if weight_copy is None else weight_copy, compute_dtype), compute_dtype, grad_z,
        grad_x if x_wanted else None, grad_weight if weight_wanted else None, grad_bias if bias_wanted else None,
    )  # fmt: skip
    if x_wanted and grad_out.dim() != 2:
        grad_x = grad_x.view(*grad_out.shape[:-1], K)
    return grad_x, grad_weight, grad_bias, grad_out.new_empty(0)


def _readable(matrix: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """`matrix`, cast where the kernel does not round it to compute_dtype itself, copied where rows and columns have gaps."""
    dtype = matrix.dtype
    if dtype != compute_dtype and dtype != torch.float32 and (compute_dtype != torch.float32 or dtype == torch.float64):
        matrix = cast(matrix, compute_dtype)
    return matrix if 1 in matrix.stride() else matrix.contiguous()


# ----- what a GPU is refused ---------------------------------------------------------------


def _serve(op: str, N: int, K: int, activation: int, compute_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    reason = why_not_call(N, K, activation, compute_dtype, out_dtype)
    if reason is not None:
        raise RuntimeError(f"{op}: native {reason}; Triton's kernels take any size")


# ----- how a GEMM is cut ---------------------------------------------------------------


class Cut(NamedTuple):
    """Columns of a tile (rows are BLOCK_M), blocks of a cluster that share their columns, and the most blocks of a launch."""

    block_n: int
    cluster: int
    blocks: int


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


def _rows(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`tensor` as a matrix."""
    return tensor if tensor.dim() == 2 else tensor.reshape(rows, columns)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied where TMA cannot read it as it lies."""
    return tensor if tma_why_not(tensor) is None else tensor.clone(memory_format=torch.contiguous_format)


def tma_why_not(tensor: torch.Tensor) -> str | None:
    """Why TMA cannot read a matrix of 16-bit elements as it lies, or None; its rows are those of the matrix."""
    pitch, step = tensor.stride()
    if step != 1:
        return f"needs contiguous rows, got a stride of {step}"
    if pitch < tensor.shape[1]:
        return f"needs rows that do not overlap, got a pitch of {pitch} for {tensor.shape[1]} elements"
    if pitch % 8 or tensor.data_ptr() % 16:
        return (
            f"needs rows at multiples of 16 bytes, got a pitch of {2 * pitch} and an address {tensor.data_ptr() % 16} past one"
        )
    return None


def _mask(saved, activation, rows, columns):
    """The mask that `saved` is, or that of the output that it is; None where nothing is selected."""
    if activation == Activation.NONE:
        return None
    if saved.dtype == torch.int32:
        return saved if saved.stride(1) == 1 else saved.contiguous()
    mask = empty_mask(saved, rows, columns)
    bits = F.pad(~(saved.reshape(rows, columns) <= 0), (0, mask.shape[1] * 32 - columns)).view(rows, mask.shape[1], 32)
    places = torch.arange(32, dtype=torch.int32, device=saved.device)
    return mask.copy_((bits.int() << places).sum(-1, dtype=torch.int32))


# ----- backward ---------------------------------------------------------------


def _select(grad_out, mask, compute_dtype, wants_grad_z, grad_bias_dtype):
    """(grad_z in compute_dtype, grad_bias), None where not wanted; grad_out itself where it already is grad_z."""
    M, N = grad_out.shape
    is_grad_z = mask is None and grad_out.dtype == compute_dtype and _matrix(grad_out) is grad_out
    grad_z = grad_out.new_empty((M, N), dtype=compute_dtype) if wants_grad_z and not is_grad_z else None
    sums = None if grad_bias_dtype is None else grad_out.new_empty((-(-M // SELECT_ROWS), N), dtype=torch.float32)
    if grad_out.numel() and (grad_z is not None or sums is not None):
        torch.ops.mpkernels_C.linear_act_select(grad_out, mask, grad_z, sums)
    grad_bias = None if sums is None else _sum(sums, grad_bias_dtype)
    return grad_out if is_grad_z else grad_z, grad_bias


def _sum(parts, dtype):
    """parts.sum(0), rounded once to `dtype`."""
    if parts.numel() == 0:
        return parts.new_zeros(parts.shape[1:], dtype=dtype)
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    torch.ops.mpkernels_C.linear_act_sum(parts, out)
    return out


def _dgrad(grad_z, weight, mask_below, dtype, grad_bias_below_dtype):
    """(grad_z @ weight, selected by `mask_below` where it is given, in `dtype`; its column sums unrounded, or None)."""
    M, (N, K) = grad_z.shape[0], weight.shape
    parts = -(-M // SUM_ROWS) if N else 0
    sums = None if grad_bias_below_dtype is None else grad_z.new_empty((parts, K), dtype=torch.float32)
    if N and M and K:
        grad_x = grad_z.new_empty((M, K), dtype=_stored(dtype, grad_z.dtype))
        torch.ops.mpkernels_C.linear_act_dgrad(
            grad_z, weight, mask_below, grad_x, sums, *choose(M, K, _multiprocessors(grad_z.device))
        )
    else:
        grad_x = grad_z.new_zeros((M, K), dtype=dtype)
    return cast(grad_x, dtype), None if sums is None else _sum(sums, grad_bias_below_dtype)


def _wgrad(grad_z, x, dtype):
    """grad_z.T @ x in `dtype`."""
    M, N, K = *grad_z.shape, x.shape[1]
    if not (M and N and K):
        return grad_z.new_zeros((N, K), dtype=dtype)
    cut = choose(N, K, _multiprocessors(grad_z.device))
    splits = choose_splits(N, K, M, cut)
    if splits == 1:
        grad_weight = grad_z.new_empty((N, K), dtype=_stored(dtype, grad_z.dtype))
        torch.ops.mpkernels_C.linear_act_wgrad(grad_z, x, grad_weight, 1, *cut)
        return cast(grad_weight, dtype)
    rows = -(-N // (2 * BLOCK_M)) * 2 * BLOCK_M  # of whole tiles, so that one part's last does not touch the next part
    parts = grad_z.new_empty((splits, rows, K), dtype=torch.float32)
    torch.ops.mpkernels_C.linear_act_wgrad(grad_z, x, parts.view(-1, K), splits, *cut)
    return _sum(parts[:, :N], dtype)


def _stored(dtype: torch.dtype, compute_dtype: torch.dtype) -> torch.dtype:
    """What the GEMM stores: the accumulator itself where it cannot store `dtype`, so that it is rounded once."""
    return dtype if dtype == compute_dtype else torch.float32
