# SPDX-License-Identifier: Apache-2.0
"""linear_act in C++ on a CPU: out = round(act(x @ weight.T + bias)).

The products read operands as they lie, 8-bit ones too, and round, widen and multiply them in registers; no copy in fp32 is
written, whose pages cost as much as a small product. What is around the products is torch's, as in eager. Large products of
bf16 with a result in bf16 are oneDNN's, which packs less.
"""

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import epilogues, onednn, passes
from mpkernels.ops.linear_act.call import BackwardCall, CallKey, ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.runtime import native

# From so many rows and columns, and products of two numbers, oneDNN is faster, the look at its operands included.
ONEDNN_SIZE, ONEDNN_PRODUCTS = 256, 1 << 28


def why_not(key: CallKey) -> str | None:
    return "has no float64" if key.dtype == torch.float64 else epilogues.why_not("cpu", key.activation)


def linear_act(call: ForwardCall):
    if onednn.seen:  # backward may be eager's
        onednn.forget(call)
    x, (N, K), compute_dtype, activation = call.x, call.weight.shape, call.compute_dtype, call.activation
    a, x_compute, saved = x, None, None
    if x.dtype is not compute_dtype and (call.keeps_x or call.out_dtype is torch.bfloat16):  # what oneDNN may multiply
        # Tensor.type is Tensor.to with less to parse, which is as much as a small product
        a = x_compute = cast(x, compute_dtype) if x.dtype is torch.float64 else x.type(compute_dtype)  # round: x -> compute
    is_matrix = x.dim() == 2
    if not is_matrix:
        a = a.reshape(x.shape[:-1].numel(), K)
    if call.save and activation > Activation.RELU:
        saved = a.new_empty(a.shape[0], N, dtype=call.preactivation_dtype)
    scales = (_each(call.x_scale, a.shape[0]), _each(call.weight_scale, N)) if call.x_scale is not None else ()
    weight = call.weight if call.weight_copy is None else call.weight_copy
    out = _multiply(a, weight, compute_dtype, call.out_dtype, call.bias, activation, saved, call.batch_invariant, scales)
    if call.save and activation == Activation.RELU:
        saved = epilogues.pack_mask(out)
    return out if is_matrix else out.view(*x.shape[:-1], N), saved, x_compute


def linear_act_backward(call: BackwardCall):
    saved = call.saved
    if call.grad_out.dtype is torch.float64 or (saved is not None and saved.dtype is torch.float64):
        return passes.backward(_multiply, call)  # fp32 takes its smallest numbers for 0
    if not call.is_fused:
        return _gradients(call, call.grad_x_dtype)
    grad_x, grad_weight, grad_bias, _ = _gradients(call, torch.float32)
    grad_z, grad_prev_bias = passes.prev_backward(call, passes.rows(grad_x))
    return cast(grad_z, call.grad_x_dtype).view(grad_x.shape), grad_weight, grad_bias, grad_prev_bias


def _multiply(
    a, b, compute_dtype, out_dtype, bias=None, activation=Activation.NONE, preactivation=None, batch_invariant=False, scales=(),
    again=(False, False),
):  # fmt: skip
    """round(act(a @ b.T + bias)) for a (M, K) and b (N, K), rounded to compute_dtype. again: of passes.py, not looked at."""
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    may_be_onednn = out_dtype is torch.bfloat16 and activation <= Activation.RELU and not batch_invariant
    if may_be_onednn and _is_for_onednn(a, b, compute_dtype):
        wide = bias if bias is None or bias.dtype == torch.float32 else cast(bias, torch.float32)
        if native.ops.linear_act_products_stay_normal(a, b, wide):
            return onednn.multiply(a, b, wide, activation)
    out = a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)
    if a.dtype is not compute_dtype or 1 not in a.stride():
        a = _readable(a, compute_dtype)
    if b.dtype is not compute_dtype or 1 not in b.stride():
        b = _readable(b, compute_dtype)
    native.ops.linear_act_multiply(a, b, bias, compute_dtype, activation, batch_invariant, out, preactivation, *scales)
    return out


def _each(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """A scale (*, 1) or () as one of each row."""
    return (scale.reshape(rows) if scale.dim() else scale.expand(rows)).contiguous()


def _is_for_onednn(a: torch.Tensor, b: torch.Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies a @ b.T into bf16 faster, their values aside."""
    if not (compute_dtype is a.dtype is b.dtype is torch.bfloat16):
        return False
    (M, K), N = a.shape, b.shape[0]
    return (
        min(M, N) >= ONEDNN_SIZE
        and M * N * K >= ONEDNN_PRODUCTS
        and K % onednn.AMX_K == 0
        and all(t.is_contiguous() or t.t().is_contiguous() for t in (a, b))
        and onednn.has_bf16_instructions()
    )


def _gradients(call: BackwardCall, grad_x_dtype: torch.dtype):
    """grad_x, grad_weight, grad_bias and None: one pass for grad_z and grad_bias, and the products."""
    grad, x, weight, compute_dtype, activation = call.grad_out, call.x, call.weight, call.compute_dtype, call.activation
    (N, K), (wants_x, wants_weight, wants_bias), adds = weight.shape, call.output_mask, call.grad_weight_sum is not None
    weight = weight if call.weight_copy is None else call.weight_copy
    is_matrix, saved, dtype = grad.dim() == 2, None, grad.dtype
    if not is_matrix:
        grad = passes.rows(grad)
    if not (grad.is_contiguous() or grad.stride(1) == 1):
        grad = grad.contiguous()
    if activation != Activation.NONE:
        saved = _saved(call, grad)
    grad_z = grad_x = grad_weight = grad_bias = None
    if (wants_x or wants_weight) and (saved is not None or (dtype is not compute_dtype and dtype is not torch.float32)):
        grad_z = grad.new_empty(*grad.shape, dtype=compute_dtype)
    z = grad if grad_z is None else grad_z
    weight = weight if weight.dtype is compute_dtype and weight.is_contiguous() else _readable(weight, compute_dtype)
    later = wants_x and grad_x_dtype is torch.bfloat16 and _is_for_onednn(z, weight.t(), compute_dtype)
    if wants_x and not later:
        grad_x = grad.new_empty(grad.shape[0], K, dtype=grad_x_dtype)
    if wants_weight:
        x = x if is_matrix else passes.rows(x)
        x = x if x.is_contiguous() else _readable(x, compute_dtype)
        grad_weight = call.grad_weight_sum if adds else grad.new_empty(N, K, dtype=call.grad_weight_dtype)
    if wants_bias:
        grad_bias = grad.new_empty(N, dtype=call.grad_bias_dtype)
    native.ops.linear_act_gradients(
        grad, saved, activation, x if wants_weight else None, weight, compute_dtype,
        grad_z, grad_x, grad_weight, grad_bias, adds,
    )  # fmt: skip
    if later:
        grad_x = _multiply(z, weight.t(), compute_dtype, grad_x_dtype)
    if grad_x is not None and not is_matrix:
        grad_x = passes.shaped(grad_x, call.grad_out)
    return grad_x, None if adds else grad_weight, grad_bias, None


def _saved(call: BackwardCall, grad: torch.Tensor) -> torch.Tensor | None:
    """What `call` saved, as the pass over grad_out reads it: numbers, of which a ReLU's select by being positive."""
    if call.activation == Activation.NONE:
        return None
    if call.saved.dtype == torch.int32:
        return epilogues.unpack_mask(call.saved, grad.shape[1]).to(grad.dtype)
    return passes.rows(call.saved).contiguous()


def _readable(matrix: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """`matrix`, cast where the kernel does not round it to compute_dtype itself, copied where rows and columns have gaps."""
    dtype = matrix.dtype
    is_read = dtype in (compute_dtype, torch.float32) or dtype.itemsize == 1
    if not is_read and (compute_dtype != torch.float32 or dtype == torch.float64):
        matrix = cast(matrix, compute_dtype)
    return matrix if 1 in matrix.stride() else matrix.contiguous()
