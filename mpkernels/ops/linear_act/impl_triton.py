# SPDX-License-Identifier: Apache-2.0
"""linear_act in Triton: out = round(act(x @ weight.T + bias)) in one kernel, for GPUs from sm_80.

The GEMM is there twice: by tensor descriptors (TMA) on sm_90 and sm_100, and by pointers for every GPU and for what no
descriptor takes, which `tiles.tma_why_not` tells. Backward is one streaming pass (select, grad_bias) and two launches of
the same GEMM; by pointers, dgrad's epilogue can be that pass for the layer below. Same inputs, same bits: no atomics, no
split of K. Under TRITON_INTERPRET=1 the kernels run on the CPU.
"""

import contextvars
import functools

import torch

from mpkernels import _table
from mpkernels._dispatch import triton_why_not
from mpkernels.ops._cast import cast
from mpkernels.ops.linear_act import Activation, acc_dtype, empty_saved
from mpkernels.ops.linear_act.tiles import TMA_SMS, Operand, plan

try:
    import triton

    from mpkernels.ops.linear_act import kernels_triton as kernels
    from mpkernels.ops.linear_act import kernels_triton_tma as tma
except ImportError:  # without Triton there is still `why_not`, which says so
    triton = kernels = tma = None

CAST_FIRST = 128  # rows from which a cast weight is worth the pass that makes it: the descriptor kernel reads no other
INTERPRETED_PROGRAMS = 3  # few, so that each works on several tiles
SELECT = {"BLOCK_M": 32, "BLOCK_N": 128}
SELECT_FP64 = SELECT | {"BLOCK_M": 4}  # slopes in fp64 spill with more
SELECT_ROWS = 256  # summed by one program of the select pass


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_why_not(device)


def linear_act(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, batch_invariant=False, *_):
    lead, (N, K) = x.shape[:-1], weight.shape
    x_compute = cast(x, compute_dtype) if x.dtype != compute_dtype else x.new_empty(0)
    operand = x_compute if x.dtype != compute_dtype else x
    saved = empty_saved(x, N, activation if save else Activation.NONE, compute_dtype)
    M, b = lead.numel(), _operand(weight, weight_copy)
    tile = None if batch_invariant else _tuned(x.device, "fprop", M, N, K, activation, compute_dtype, b.dtype, out_dtype)
    out = _gemm(
        operand.reshape(M, K), b.t(), out_dtype, tile,
        bias=bias, activation=activation, saved=saved if save else None, batch_invariant=batch_invariant,
    )  # fmt: skip
    return out.view(*lead, N), saved, x_compute


def linear_act_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=Activation.NONE, grad_bias_below_dtype=None,
):  # fmt: skip
    lead, (N, K) = grad_out.shape[:-1], weight.shape
    M = lead.numel()
    grad_z, grad_bias = _select(
        grad_out.reshape(M, N),
        _matrix(saved, activation, M, N),
        activation,
        compute_dtype,
        output_mask[0] or output_mask[1],
        grad_bias_dtype if output_mask[2] else None,
    )
    grad_x = grad_weight = grad_bias_below = None
    if output_mask[0]:
        operand, saved_below = _operand(weight, weight_copy), _matrix(saved_below, activation_below, M, K)
        if saved_below is None and grad_bias_below_dtype is None:
            tile = _tuned(weight.device, "dgrad", M, N, K, 0, compute_dtype, operand.dtype, grad_x_dtype)
            grad_x = _gemm(grad_z, operand, grad_x_dtype, tile)
        else:
            args = (grad_z, operand, grad_x_dtype, saved_below, activation_below, compute_dtype, grad_bias_below_dtype)
            grad_x, grad_bias_below = _dgrad_below(*args)
        grad_x = grad_x.view(*lead, K)
    if output_mask[1]:
        tile = _tuned(weight.device, "wgrad", M, N, K, 0, compute_dtype, grad_weight_dtype)
        grad_weight = _gemm(grad_z.t(), x.reshape(M, K), grad_weight_dtype, tile)
    dtypes = (grad_x_dtype, grad_weight_dtype, grad_bias_dtype, grad_bias_below_dtype)
    grads = (grad_x, grad_weight, grad_bias, grad_bias_below)
    return tuple(g if g is not None else grad_out.new_empty(0, dtype=d) for g, d in zip(grads, dtypes, strict=True))


def _operand(weight, weight_copy):
    return weight if weight_copy is None else weight_copy


def _matrix(saved, activation, rows, columns):
    """`saved` as a matrix: a mask, an output, a pre-activation; None where there is no activation."""
    if activation == Activation.NONE:
        return None
    return saved if saved.dtype == torch.int32 else saved.reshape(rows, columns)


def _tuned(device, *question):
    """The tile that a tuned table has for a GEMM, or None."""
    table = _table.of(device)
    entry = table.get(_table.problem(*question)) if table else None
    return None if entry is None else entry.tile


def _gemm(a, b, out_dtype, tile=None, *, bias=None, activation=Activation.NONE, saved=None, batch_invariant=False):
    """round(act(a @ b + bias)) for a (M, K) and b (K, N) of any stride; `saved` is filled where it is given."""
    M, K, N = *a.shape, b.shape[1]
    out = a.new_empty((M, N), dtype=out_dtype)
    if out.numel() == 0:
        return out
    device = _device(a.device)
    if b.dtype != a.dtype and a.dtype.itemsize == 2 and (M >= CAST_FIRST or batch_invariant) and device[0] in TMA_SMS:
        b = cast(b, a.dtype)
    if batch_invariant and (a.stride() != (K, 1) or a.data_ptr() % 16):
        a = a.clone(memory_format=torch.contiguous_format)  # so that how it lies does not decide, either
    relu = activation == Activation.RELU
    mask, pre = (saved, None) if relu else (None, saved if activation else None)
    smooth = activation not in (Activation.NONE, Activation.RELU)
    operands = (Operand.of(a), Operand.of(b), Operand.of(out))
    chosen = plan(*device, *operands, tile, rich=smooth, batch_invariant=batch_invariant)
    stride_bias, stride_mask = 0 if bias is None else bias.stride(0), 0 if mask is None else mask.stride(0)
    with torch.cuda.device_of(a):
        if not chosen.by_tma:
            kernels.gemm_kernel[chosen.grid](
                a, b, bias, out, mask, pre, None, None, M, N, K, *a.stride(), *b.stride(), stride_bias, stride_mask, 0, 0,
                ACTIVATION=int(activation), ACTIVATION_BELOW=0, **chosen.options,
            )  # fmt: skip
            return out
        contextvars.copy_context().run(
            _launch_tma, chosen, a, b, bias, out, mask, M, N, K, max(a.stride()), max(b.stride()),
            stride_bias, stride_mask, relu,
        )  # fmt: skip
    return out


def _dgrad_below(grad_z, weight, grad_x_dtype, saved, activation, compute_dtype, grad_bias_dtype):
    """(grad_x before the activation of the layer below, which kept `saved`; its sums unrounded, None where not wanted)."""
    M, N, K = grad_z.shape[0], *weight.shape
    grad_x = grad_z.new_empty((M, K), dtype=grad_x_dtype)
    operands = (Operand.of(grad_z), Operand.of(weight), Operand.of(grad_x))
    chosen = plan(*_device(grad_z.device), *operands, rich=True)
    partial = None
    if grad_bias_dtype is not None:
        partial = grad_z.new_empty((-(-M // chosen.options["BLOCK_M"]), K), dtype=acc_dtype(compute_dtype))
    if grad_x.numel():
        with torch.cuda.device_of(grad_z):
            kernels.gemm_kernel[chosen.grid](
                grad_z, weight, None, grad_x, None, None, saved, partial, M, K, N, *grad_z.stride(), *weight.stride(), 0, 0,
                *((0, 0) if saved is None else saved.stride()), ACTIVATION=0, ACTIVATION_BELOW=int(activation),
                **chosen.options,
            )  # fmt: skip
    return grad_x, None if partial is None else _sum(partial, grad_bias_dtype)


def _launch_tma(chosen, *arguments):
    """Launch in a context of its own: the allocator is a ContextVar, which autograd's threads do not have, and is not ours."""
    triton.set_allocator(_allocate)
    *arguments, relu = arguments
    tma.gemm_tma_kernel[chosen.grid](*arguments, RELU=relu, **chosen.options)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the tensor maps that a kernel makes; stream-ordered, so it may go when the launch is queued."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _select(grad_out, saved, activation, compute_dtype, wants_grad_z, grad_bias_dtype):
    """(grad_z in compute_dtype, grad_bias), None where not wanted; grad_out itself where it already is grad_z."""
    M, N = grad_out.shape
    is_grad_z = saved is None and grad_out.dtype == compute_dtype
    grad_z = grad_out.new_empty((M, N), dtype=compute_dtype) if wants_grad_z and not is_grad_z else None
    partial = None
    if grad_bias_dtype is not None:
        partial = grad_out.new_empty((-(-M // SELECT_ROWS), N), dtype=acc_dtype(compute_dtype))
    with torch.cuda.device_of(grad_out):
        tiles_n = -(-N // SELECT["BLOCK_N"])
        if grad_out.numel() and (grad_z is not None or partial is not None):
            strides = (*grad_out.stride(), *((0, 0) if saved is None else saved.stride()))
            tile = SELECT_FP64 if compute_dtype == torch.float64 else SELECT
            kernels.select_kernel[(-(-M // SELECT_ROWS) * tiles_n,)](
                grad_out, saved, grad_z, partial, M, N, *strides, ACTIVATION=int(activation), ROWS=SELECT_ROWS, **tile
            )
    grad_bias = None if partial is None else _sum(partial, grad_bias_dtype)
    return grad_out if is_grad_z else grad_z, grad_bias


def _sum(partial, dtype):
    """The sum of partial (P, N) over its rows, rounded once to `dtype`."""
    out = partial.new_empty(partial.shape[1], dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(partial):
            grid = (-(-out.shape[0] // SELECT["BLOCK_N"]),)
            kernels.sum_kernel[grid](partial, out, *partial.shape, **SELECT)
    return out


@functools.cache
def _device(device: torch.device) -> tuple[int, int, bool]:
    """(compute capability as 90 for 9.0, 0 interpreted; programs, one per multiprocessor; whether Triton specializes)."""
    if device.type != "cuda":
        return 0, INTERPRETED_PROGRAMS, specializes()
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count, specializes()


def specializes() -> bool:
    """Whether this Triton specializes warps of the descriptor kernel: 3.6 fails to compile its epilogue then."""
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
