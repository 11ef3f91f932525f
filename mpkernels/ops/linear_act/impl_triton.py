# SPDX-License-Identifier: Apache-2.0
"""linear_act in Triton: out = round(act(x @ weight.T + bias)) in one kernel, by pointers, for GPUs from sm_80.

Backward is one streaming pass (select, grad_bias) and two launches of the same GEMM. Same inputs, same bits: no atomics,
no split of K. Under TRITON_INTERPRET=1 the kernels run on the CPU.
"""

from dataclasses import asdict

import torch

from mpkernels._dispatch import triton_why_not
from mpkernels.ops._cast import cast
from mpkernels.ops.linear_act import Activation, acc_dtype, empty_mask
from mpkernels.ops.linear_act.tiles import choose

try:
    from mpkernels.ops.linear_act import kernels_triton as kernels
except ImportError:  # without Triton there is still `why_not`, which says so
    kernels = None

SELECT = {"BLOCK_M": 32, "BLOCK_N": 128}
SELECT_ROWS = 256  # summed by one program of the select pass


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_why_not(device)


def linear_act(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, grad_dtype=None):
    lead, (N, K) = x.shape[:-1], weight.shape
    x_compute = cast(x, compute_dtype) if x.dtype != compute_dtype else x.new_empty(0)
    operand = x_compute if x.dtype != compute_dtype else x
    relu = activation == Activation.RELU
    mask = empty_mask(x, lead.numel(), N) if save and relu else None
    out = _gemm(
        operand.reshape(lead.numel(), K), _operand(weight, weight_copy).t(), out_dtype, bias=bias, relu=relu, mask=mask
    )  # fmt: skip
    return out.view(*lead, N), x.new_empty(0, dtype=torch.int32) if mask is None else mask, x_compute


def linear_act_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask,
):  # fmt: skip
    lead, (N, K) = grad_out.shape[:-1], weight.shape
    M = lead.numel()
    grad_z, grad_bias = _select(
        grad_out.reshape(M, N),
        None if activation == Activation.NONE else saved if saved.dtype == torch.int32 else saved.reshape(M, N),
        compute_dtype,
        output_mask[0] or output_mask[1],
        grad_bias_dtype if output_mask[2] else None,
    )
    grad_x = grad_weight = None
    if output_mask[0]:
        grad_x = _gemm(grad_z, _operand(weight, weight_copy), grad_x_dtype).view(*lead, K)
    if output_mask[1]:
        grad_weight = _gemm(grad_z.t(), x.reshape(M, K), grad_weight_dtype)
    dtypes = (grad_x_dtype, grad_weight_dtype, grad_bias_dtype)
    grads = (grad_x, grad_weight, grad_bias)
    return tuple(g if g is not None else grad_out.new_empty(0, dtype=d) for g, d in zip(grads, dtypes, strict=True))


def _operand(weight, weight_copy):
    return weight if weight_copy is None else weight_copy


def _gemm(a, b, out_dtype, *, bias=None, relu=False, mask=None):
    """round(act(a @ b + bias)) for a (M, K) and b (K, N) of any stride; `mask` is filled where it is given."""
    M, K, N = *a.shape, b.shape[1]
    out = a.new_empty((M, N), dtype=out_dtype)
    if out.numel() == 0:
        return out
    tile = choose(M, N, _sm(a.device), a.dtype, b.dtype, all(map(_vectors, (a, b, out))))
    grid = (-(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N),)
    with torch.cuda.device_of(a):
        kernels.gemm_kernel[grid](
            a, b, bias, out, mask, M, N, K, *a.stride(), *b.stride(),
            0 if bias is None else bias.stride(0), 0 if mask is None else mask.stride(0),
            RELU=relu, **asdict(tile),
        )  # fmt: skip
    return out


def _select(grad_out, saved, compute_dtype, wants_grad_z, grad_bias_dtype):
    """(grad_z in compute_dtype, grad_bias), None where not wanted; grad_out itself where it already is grad_z."""
    M, N = grad_out.shape
    is_grad_z = saved is None and grad_out.dtype == compute_dtype
    grad_z = grad_out.new_empty((M, N), dtype=compute_dtype) if wants_grad_z and not is_grad_z else None
    partial = grad_bias = None
    if grad_bias_dtype is not None:
        partial = grad_out.new_empty((-(-M // SELECT_ROWS), N), dtype=acc_dtype(compute_dtype))
        grad_bias = grad_out.new_empty(N, dtype=grad_bias_dtype)
    with torch.cuda.device_of(grad_out):
        tiles_n = -(-N // SELECT["BLOCK_N"])
        if grad_out.numel() and (grad_z is not None or partial is not None):
            strides = (*grad_out.stride(), *((0, 0) if saved is None else saved.stride()))
            kernels.select_kernel[(-(-M // SELECT_ROWS) * tiles_n,)](
                grad_out, saved, grad_z, partial, M, N, *strides, ROWS=SELECT_ROWS, **SELECT
            )
        if partial is not None and N:
            kernels.sum_kernel[(tiles_n,)](partial, grad_bias, partial.shape[0], N, **SELECT)
    return grad_out if is_grad_z else grad_z, grad_bias


def _vectors(tensor: torch.Tensor) -> bool:
    """Whether Triton finds, by what it knows of arguments (divisible by 16 or not), that 16 bytes may move at once."""
    inner = int(tensor.stride(1) == 1)
    along, across = tensor.stride(inner), tensor.stride(1 - inner)
    return along == 1 and across % 16 == 0 and tensor.shape[inner] % 16 == 0 and tensor.data_ptr() % 16 == 0


def _sm(device: torch.device) -> int:
    """Compute capability as 90 for 9.0; 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
