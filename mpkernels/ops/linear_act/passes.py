# SPDX-License-Identifier: Apache-2.0
"""linear_act around its products, in plain torch: what implementations share that have no kernel for more.

They differ in `multiply(a, b, compute_dtype, out_dtype, *, bias=None, activation=NONE, preactivation=None,
batch_invariant=False)`: round(act(a @ b.T + bias)) for a (M, K) in compute_dtype and b (N, K). preactivation: None, or filled
with what the activation is applied to. Of 8-bit operands it is also given `scales`, theirs. Backward says of a and of b whether
a product of the same came before: `again`.
"""

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import onednn
from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation, acc_dtype, activation_backward, empty_saved, pack_mask


def forward(multiply, call: ForwardCall):
    if onednn.seen:
        onednn.forget(call)
    x, N, activation, compute_dtype = call.x, call.weight.shape[0], call.activation, call.compute_dtype
    x_compute = None if x.dtype == compute_dtype else cast(x, compute_dtype)
    multiplies = call.save and activation not in (Activation.NONE, Activation.RELU)
    saved = empty_saved(x, N, activation, call.preactivation_dtype) if multiplies else None
    scales = {"scales": (_column(call.x_scale), call.weight_scale)} if call.is_scaled else {}
    out = multiply(
        rows(x if x_compute is None else x_compute), call.operand, compute_dtype, call.out_dtype,
        bias=call.bias, activation=activation, preactivation=saved, batch_invariant=call.batch_invariant, **scales,
    )  # fmt: skip
    if call.save and activation == Activation.RELU:
        saved = pack_mask(out)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], N), saved, x_compute


def backward(multiply, call: BackwardCall, wgrad=None):
    """wgrad: `multiply` for grad_weight, which may add to the sum of `call` itself, and returns that then."""
    compute_dtype, acc = call.compute_dtype, acc_dtype(call.compute_dtype)
    wants_x, wants_weight, wants_bias = call.output_mask
    grad_z = rows(call.grad_out)
    if call.activation != Activation.NONE:
        grad_z = activation_backward(call.activation, call.saved, grad_z, compute_dtype)
    grad_x = grad_weight = grad_bias = grad_prev_bias = None
    if wants_bias:
        grad_bias = cast(grad_z.sum(0, dtype=acc), call.grad_bias_dtype)
    grad_z = cast(grad_z, compute_dtype)
    if wants_x:
        dtype = acc if call.is_fused else call.grad_x_dtype
        grad_x = multiply(grad_z, call.operand.t(), compute_dtype, dtype, again=(False, True))
        if call.is_fused:
            grad_x, grad_prev_bias = prev_backward(call, grad_x)
        grad_x = as_grad_x(call, cast(grad_x, call.grad_x_dtype))
    if wants_weight:
        a, b = grad_z.t(), rows(call.x).t()
        grad_weight = (wgrad or multiply)(a, b, compute_dtype, call.grad_weight_dtype, again=(wants_x, True))
        grad_weight = add_to_sum(call, grad_weight)
    return grad_x, grad_weight, grad_bias, grad_prev_bias


def prev_backward(call: BackwardCall, grad_x):
    """(grad_z, grad_bias) of the previous layer from grad_x in the accumulator's dtype; the second may be None."""
    if call.prev_activation != Activation.NONE:
        grad_x = activation_backward(call.prev_activation, call.prev_saved, grad_x, call.compute_dtype).contiguous()
    return grad_x, None if call.grad_prev_bias_dtype is None else cast(grad_x.sum(0), call.grad_prev_bias_dtype)


def add_to_sum(call: BackwardCall, grad_weight: torch.Tensor) -> torch.Tensor | None:
    """grad_weight, or None where `call` has a sum for it: there it is added, where it is not that sum itself."""
    if call.grad_weight_sum is None:
        return grad_weight
    if grad_weight is not call.grad_weight_sum:
        call.grad_weight_sum.add_(grad_weight)
    return None


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` (*, K) as a matrix; a view of one that is a matrix costs as much as a small product."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _column(scale: torch.Tensor) -> torch.Tensor:
    """A scale by row (*, 1) as a matrix; one for all () as it is."""
    return rows(scale) if scale.dim() else scale


def as_grad_x(call: BackwardCall, grad_x):
    """A matrix in the shape of x."""
    grad_out = call.grad_out
    return grad_x if grad_out.dim() == 2 else grad_x.view(*grad_out.shape[:-1], call.weight.shape[1])
