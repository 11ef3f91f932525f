# SPDX-License-Identifier: Apache-2.0
"""Weight gradients that accumulate: where wgrad adds to `weight.grad` itself, and autograd has nothing left to add.

Autograd's own sum is a pass after a wgrad that wrote its product: 4 bytes written, 8 read and 4 written for each element of
fp32. An epilogue that adds reads the old sum and writes the new one, 8 bytes, and no product takes up memory. Each element is
added once, after the whole sum over M: the bits are those of the two passes.
"""

import torch

from mpkernels.ops.linear_act.call import BackwardCall
from mpkernels.runtime.op import is_direct

_AccumulateGrad = torch._C._functions.AccumulateGrad


def weight_grad(ctx, call: BackwardCall) -> torch.Tensor | None:
    """`weight.grad` where adding to it leaves all that returning a gradient would have left; else None.

    ctx: the node of linear_act, in its backward, about to make `call`. The weight is a leaf that this backward reaches, in
    eager execution, and nothing looks at its gradient on the way: no hook, watch, anomaly mode or graph.
    """
    node = ctx.next_functions[1][0]
    if type(node) is not _AccumulateGrad:  # a view of a parameter, or what a parametrization makes of one
        return None
    weight = node.variable
    grad = weight.grad
    if not weight.requires_grad or type(grad) is not torch.Tensor or not is_direct(call):
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks or ctx.on_grads is not None:
        return None
    if torch.is_grad_enabled() or torch.is_anomaly_enabled():
        return None
    if call.grad_weight_dtype != torch.float32 or not _holds_sums(grad, call):
        return None
    return grad if _is_reached(node) else None


def _holds_sums(grad: torch.Tensor, call: BackwardCall) -> bool:
    """Whether the kernels of `call` can add to it here and now."""
    if grad.dtype != torch.float32 or grad.layout is not torch.strided or not grad.is_contiguous():
        return False
    if grad.requires_grad or grad.is_neg():
        return False
    weight = call.weight
    if grad.shape != weight.shape or grad.device != weight.device:  # weight.data may have been replaced
        return False
    if any(torch._C._is_alias_of(grad, operand) for operand in (call.grad_out, call.x)):  # which wgrad reads meanwhile
        return False
    # On another stream than the default one nothing would make the reader of `grad` wait for what is added here.
    return not grad.is_cuda or torch.cuda.current_stream(grad.device) == torch.cuda.default_stream(grad.device)


def _is_reached(node) -> bool:
    """Whether this backward adds to the leaf; torch says so with an error where `torch.autograd.grad` asks for its gradient."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return False
