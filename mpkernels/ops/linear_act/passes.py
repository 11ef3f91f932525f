# SPDX-License-Identifier: Apache-2.0
"""The backward of linear_act around its products, in plain torch: what implementations share that have no kernel for more.

They differ in `multiply(a, b, compute_dtype, out_dtype, again=(False, False))`: round(a @ b.T) for a (M, K) in compute_dtype
and b (N, K). again: whether a product of the same a came before, and of the same b.
"""

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act.call import BackwardCall
from mpkernels.ops.linear_act.epilogues import Activation, acc_dtype, activation_backward


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
        grad_x = shaped(cast(grad_x, call.grad_x_dtype), call.grad_out)
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


def shaped(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A matrix with the leading dimensions of `like`, of which it has the rows."""
    return matrix if like.dim() == 2 else matrix.view(*like.shape[:-1], matrix.shape[1])
