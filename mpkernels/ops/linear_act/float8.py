# SPDX-License-Identifier: Apache-2.0
"""A linear layer in eight bits, made of ops that are there: quantize, linear_act of operands with scales, its backward.

    out    = linear_act(q(x), q(weight), bias)         x and weight quantized along K, which is summed over
    grad_x = linear_act(q(grad_z), q(weight).T)        grad_z and weight quantized along N
    grad_weight, grad_bias                             linear_act_backward of grad_z and of x as it was kept, q * scale

Kept for backward are q(x) and its scale, a ReLU's mask or the preactivation in bf16, and the weight as it is. A row with a
scale of its own has another along N than along K, so that the weight is quantized twice; with one scale for a tensor the two
are the same. Where x, weight or grad_z is not finite its scale is NaN, and so is all that is computed from it.
"""

import functools
from typing import NamedTuple

import torch

from mpkernels.ops import quantize
from mpkernels.ops.linear_act import accumulate, eight_bits, passes
from mpkernels.ops.linear_act.autograd import once_differentiable, run_backward
from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall, check_tensors
from mpkernels.ops.linear_act.epilogues import Activation, activation_backward
from mpkernels.ops.linear_act.schema import forward_op
from mpkernels.ops.quantize import QuantizeCall
from mpkernels.runtime.op import is_direct, is_dtensor


class Recipe(NamedTuple):
    """dtype: of x and weight; dgrad_dtype: of grad_z in dgrad; wgrad_dtype: of wgrad's operands; by_row: or one scale each."""

    dtype: torch.dtype
    dgrad_dtype: torch.dtype
    wgrad_dtype: torch.dtype
    by_row: bool

    def quantize(self, tensor: torch.Tensor, dtype: torch.dtype, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, scale) of an operand that is summed over `axis`."""
        return quantize.op.run(QuantizeCall(tensor, dtype, axis if self.by_row else None))


def linear_act(
    x, weight, bias, *, activation: Activation, recipe: Recipe, out_dtype, grad_dtype=None, batch_invariant=False,
    accumulate_grad=False,
):  # fmt: skip
    """`out` (*, N) in `out_dtype`. Differentiable once in x, weight and bias; x and weight are fp16, bf16 or fp32.

    grad_dtype: dtype of the gradients of weight and bias; None means their own. accumulate_grad: see accumulate.py.
    """
    if is_dtensor(x) or is_dtensor(weight):
        raise RuntimeError("linear_act: DTensors cannot be computed in eight bits: use a policy of 16 bits, or shard by FSDP2")
    if not (x.dtype in quantize.INPUTS and weight.dtype in quantize.INPUTS) or x.is_nested:
        check_tensors("linear_act", {"x": quantize.INPUTS, "weight": quantize.INPUTS}, x=x, weight=weight)
    # By torch.jit.trace and torch.export, which see ops alone: those refuse a backward.
    is_traced = torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()
    run = _LinearAct.forward if is_traced else _LinearAct.apply
    save = int(activation != Activation.NONE and torch.is_grad_enabled() and not is_traced)
    out, _ = run(x, weight, bias, int(activation), save, recipe, out_dtype, grad_dtype, batch_invariant)
    if accumulate_grad and out.requires_grad and is_direct((x, weight, bias)):
        out.grad_fn.accumulate_grad = True
    return out


class _LinearAct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, activation, save, recipe, out_dtype, grad_dtype, batch_invariant):
        """(out, what autograd need not see)."""
        q_x, x_scale = recipe.quantize(x, recipe.dtype, -1)
        q_weight, weight_scale = recipe.quantize(weight, recipe.dtype, 1)
        call = ForwardCall(q_x, q_weight, bias, None, activation, recipe.dtype, out_dtype, save, batch_invariant)
        out, saved, _ = forward_op.run(call._replace(x_scale=x_scale, weight_scale=weight_scale))
        return out, (q_x, x_scale, saved)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.activation, _, ctx.recipe, _, grad_dtype, _ = inputs
        q_x, x_scale, saved = output[1]
        if not ctx.needs_input_grad[1]:
            q_x = x_scale = None
        ctx.save_for_backward(q_x, x_scale, saved if ctx.activation else None, weight)
        ctx.set_materialize_grads(False)
        ctx.accumulate_grad, ctx.on_grads = False, None  # see autograd.py
        ctx.dtypes = x.dtype, grad_dtype or weight.dtype, grad_dtype or (weight if bias is None else bias).dtype

    @staticmethod
    def backward(ctx, grad_out, _):
        wanted = ctx.needs_input_grad[:3]
        if grad_out is None or not any(wanted):
            return (None,) * 9
        sum_of = functools.partial(accumulate.weight_grad, ctx) if ctx.accumulate_grad and wanted[1] else None
        arguments = (grad_out, *ctx.saved_tensors, ctx.activation, ctx.recipe, ctx.dtypes, wanted, sum_of)
        grad_x, grad_weight, grad_bias = once_differentiable(_gradients, *arguments)
        if ctx.on_grads is not None:
            ctx.on_grads(grad_x, grad_weight)
        return grad_x, grad_weight, grad_bias, *(None,) * 6


def _gradients(grad_out, q_x, x_scale, saved, weight, activation, recipe: Recipe, dtypes, wanted, sum_of):
    """grad_x, grad_weight and grad_bias, None where it is not wanted. sum_of: of a call, what grad_weight is added to."""
    (wants_x, wants_weight, wants_bias), (grad_x_dtype, *grad_dtypes) = wanted, dtypes
    grad_x = grad_weight = grad_bias = None
    grad_z = grad_out
    if activation != Activation.NONE:
        grad_z = activation_backward(activation, saved, passes.rows(grad_out), recipe.wgrad_dtype).view(grad_out.shape)
    if wants_x:
        q_grad, grad_scale = recipe.quantize(grad_z, recipe.dgrad_dtype, -1)
        q_weight, weight_scale = recipe.quantize(weight, recipe.dtype, 0)
        scales = {"x_scale": grad_scale, "weight_scale": weight_scale.t()}
        call = ForwardCall(q_grad, q_weight.t(), None, None, Activation.NONE, recipe.dgrad_dtype, grad_x_dtype, 0, **scales)
        grad_x, _, _ = forward_op.run(call)
    if wants_weight or wants_bias:
        x = eight_bits.decode(q_x, x_scale, recipe.wgrad_dtype)
        mask = [False, wants_weight, wants_bias]
        call = BackwardCall(
            grad_z, x, weight, None, None, Activation.NONE, recipe.wgrad_dtype, grad_x_dtype, *grad_dtypes, mask
        )
        if sum_of is not None:
            call = call._replace(grad_weight_sum=sum_of(call))
        _, grad_weight, grad_bias, _ = run_backward(call)
    return grad_x, grad_weight if wants_weight else None, grad_bias if wants_bias else None
