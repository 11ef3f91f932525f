# SPDX-License-Identifier: Apache-2.0
"""linear_act: a linear layer with its activation, one rounding at the end.

    out = round(act(x @ weight.T + bias))              acc in fp32 (fp64 for fp64)
    grad_z = grad_out * act'(saved)                    grad_bias = grad_z.sum(0)
    grad_x = grad_z @ weight                           grad_weight = grad_z.T @ x

Backward can do the streaming pass of the previous layer, whose output is x, in the epilogue of its own grad_x:

    prev_grad_z = grad_x * act'(prev_saved)            grad_prev_bias = prev_grad_z.sum(0)

Then prev_grad_z stands where grad_x does, and the previous layer, called with `activation_grad_fused`, takes it as it is.

With `saved_dtype` x and the preactivation are kept for backward in eight bits with a scale for each row, as quantize makes
them, and are decoded there; of a ReLU its mask is kept. out is what it is without, grad_x too but for those activations.

Operands may be 8-bit floats, q, with scales, powers of two, as quantize makes them. A scaled call has a forward alone:

    out = round(act((x @ weight.T) * x_scale * weight_scale + bias))            everything before the rounding in fp32

Shapes and dtypes
    | tensor      | shape                | dtype                                                       |
    | x           | (*, K)               | any; cast once to compute_dtype where it differs            |
    | weight      | (N, K)               | any; cast to compute_dtype in the kernel, or weight_copy    |
    | bias        | (N,)                 | any; added in the accumulator's dtype, never rounded before |
    | weight_copy | (N, K)               | compute_dtype: the weight already cast (read in its place)  |
    | out         | (*, N)               | out_dtype                                                   |
    | saved       | (M, ceil(N/32)) or 0 | ReLU: int32, bit j of word w is column 32w+j, tail bits 0   |
    |             | (M, N) or 0          | other activations: x @ weight.T + bias in compute_dtype, or |
    |             |                      | in bf16 of a scaled call                                    |
    | x_compute   | (*, K) or 0          | compute_dtype: x as it was cast, kept for backward          |
    | prev_saved  | as saved, of x       | what the previous layer's forward saved, or x itself        |
    | prev_bias   | (K,)                 | any; the previous layer's: its values are not read          |
    | x_scale     | (*, 1) or ()         | fp32; x is then float8_e4m3fn or float8_e5m2, and that is   |
    |             |                      | compute_dtype; both operands have a scale, or neither       |
    | weight_scale| (N, 1) or ()         | fp32; weight is then float8_e4m3fn or float8_e5m2           |
    "any" is fp16, bf16, fp32, fp64. M is the product of the leading dimensions. Any stride, any size, 0 included.

Numerics
    Operands are rounded to compute_dtype once; products and sums are fp32 (fp64 for fp64), no partial sum is narrower;
    out, grad_x, grad_weight and grad_bias are rounded once, to their own dtype. grad_z is rounded to compute_dtype for
    the two GEMMs; grad_bias sums it unrounded, grad_prev_bias the accumulator. Bounds: tests/bounds.py.
    Of 8-bit operands the unscaled products are summed; the sum is multiplied by x_scale, then by weight_scale, which is exact
    within fp32's range: the sum times x_scale is to fit it too. Then the bias is added. A scale that is NaN makes its row or
    column NaN.
    With `batch_invariant` a row of out has the same bits whatever the other rows are and however many: one order of the
    sum, by K and N alone. On a CPU M=1 pays for it, and in bf16 every M where dot-product instructions multiply (AMX).

Activations, and what they save for backward, besides x
    | activation | act(z)                                                        | saved, bits per element        |
    | none       | z                                                             | 0                              |
    | relu       | z where not (z <= 0), else 0                                  | 1, or out (the next layer's x) |
    | relu2      | relu(z) ** 2                                                  | those of compute_dtype: z      |
    | gelu       | z * (1 + erf(z / sqrt(2))) / 2                                | those of compute_dtype: z      |
    | gelu_tanh  | z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3))) / 2      | those of compute_dtype: z      |
    | silu       | z / (1 + exp(-z))                                             | those of compute_dtype: z      |
    ReLU: `save=1` writes the mask of `not (out <= 0)`, taken from the rounded output: 0 at zeros and at underflow, 1 at NaN.
    With `save=0` backward selects by `out` itself, which autograd keeps. It selects and never multiplies.
    The others need `save=1` where there is a backward, and multiply in the accumulator's dtype. z is rounded once for it,
    which moves grad_z by at most 0.34 unit roundoffs of compute_dtype times grad_out (gelu and silu; relu2: as grad_z's own
    rounding). NaN and inf go through as in torch, but for one case: where z is infinite, which it also is where it overflowed
    float16 when it was saved, the slope is the limit (0 or 1, relu2: inf), and torch's formula gives NaN.

Raises
    RuntimeError for shapes, dtypes, devices or layouts that do not fit, as torch does, before anything is computed.
    TypeError for what is not a tensor. RuntimeError for double backward.

Source: torch.nn.functional.linear, torch.relu, ATen threshold_backward.
"""

import torch

from mpkernels.ops.linear_act import autograd
from mpkernels.ops.linear_act.call import ForwardCall, FusedBackwardLink, check_forward
from mpkernels.ops.linear_act.epilogues import Activation, ActivationName, activation_of, name_of
from mpkernels.ops.linear_act.schema import backward_op, forward_op, op_of
from mpkernels.runtime.op import PLAIN, Op, is_dtensor, without_defaults

__all__ = [
    "Activation", "ActivationName", "FusedBackwardLink", "activation_of", "backward_op", "forward_op", "linear_act", "name_of",
    "op_of", "saves_mask",
]  # fmt: skip


def linear_act(
    x, weight, bias=None, weight_copy=None, *, activation, compute_dtype, out_dtype, grad_dtype=None,
    batch_invariant=False, accumulate_grad=False, saved_dtype=None,
    prev: FusedBackwardLink | None = None, next: FusedBackwardLink | None = None,
):  # fmt: skip
    """`out` (*, N) in `out_dtype`; see the module. Differentiable once in x, weight and bias.

    activation: an Activation. grad_dtype: dtype of the gradients of weight and bias; None means their own.
    accumulate_grad: whether backward may add to `weight.grad` in place, see accumulate.py. saved_dtype: see the module.
    next: filled, and then has to be the `prev` of the one call that reads `out`; gradients are wrong otherwise.
    """
    if type(weight) not in PLAIN and is_dtensor(weight):
        from mpkernels.ops.linear_act import sharding

        sharding.check(weight, bias, activation, out_dtype)
    with_grad = torch.is_grad_enabled()
    requires_grad = weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    has_node = (with_grad and (requires_grad or prev is not None)) or torch.autograd.forward_ad._current_level >= 0
    save, fused = int(with_grad and activation > Activation.RELU), (None, 0, None)
    if prev is not None and prev.activation_grad_fused:
        fused = prev.saved, prev.activation, prev.bias
    call = ForwardCall(
        x, weight, bias, weight_copy, int(activation), compute_dtype, out_dtype, save, batch_invariant, grad_dtype, False,
        *fused, saved_dtype=saved_dtype, keeps_x=has_node and weight.requires_grad,
    )  # fmt: skip
    direct, transforms = not Op.is_tracing() and check_forward(call), False
    if not direct:
        call = call._replace(keeps_x=True)
        if torch.compiler.is_compiling():
            return _by_dispatcher(call, next, saves_mask(x.device, compute_dtype), with_grad)
        if torch._C._get_tracing_state() is not None:  # of torch.jit.trace, whose check wants the same graph without gradients
            return _by_dispatcher(call, None, forward_op.resolve(call).saves_mask, True)
        transforms = torch._C._are_functorch_transforms_active()
    kernel = forward_op.resolve(call)
    if with_grad and (kernel.saves_mask or saved_dtype is not None):
        call = _saving(call, next, kernel.saves_mask)
    if has_node or transforms:
        apply = autograd.LinearAct.apply if transforms else autograd.apply_in_eager
        out, (saved, _) = apply(x, weight, bias, call.prev_bias, call, kernel if direct else None)
        if accumulate_grad and not transforms and out.requires_grad:
            out.grad_fn.accumulate_grad = True
    else:
        out, saved, _ = forward_op.execute(call, kernel) if direct else forward_op.dispatch(call)
    if call.activation_grad_fused:
        next.fill(call, saved)
    return out


def _by_dispatcher(call: ForwardCall, next: FusedBackwardLink | None, saves_mask: bool, with_grad: bool):
    """`out` of the op itself, which what traces can see. with_grad: whether there may be a backward."""
    if with_grad:
        call = _saving(call, next, saves_mask)
    op = torch.ops.mpkernels.linear_act
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        op = _in_aten(call.batch_invariant)
    out, saved, _ = op(*without_defaults(call))
    if call.activation_grad_fused:
        next.fill(call, saved)
    return out


def _in_aten(batch_invariant: bool):
    """What torch.compile traces below a transform of torch.func, where it can take neither the op nor a Function."""
    from mpkernels.ops.linear_act import decomposition

    if batch_invariant:
        raise RuntimeError("linear_act: batch_invariant does not hold where torch.compile traces a torch.func transform")
    return decomposition.linear_act


def _saving(call: ForwardCall, next: FusedBackwardLink | None, saves_mask: bool) -> ForwardCall:
    """`call`, of which there may be a backward. Only kernels write a ReLU's mask: torch selects faster by `out` itself, which
    in eight bits would have to be kept beside what is kept."""
    in_eight_bits = call.saved_dtype is not None
    save = call.activation != Activation.NONE and (call.activation != Activation.RELU or saves_mask or in_eight_bits)
    fused = next is not None and saves_mask and not (in_eight_bits and call.activation > Activation.RELU)
    return call._replace(save=int(save), activation_grad_fused=fused) if save or fused else call


def saves_mask(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Whether the plainest forward there writes a ReLU's mask, and its dgrad has an epilogue: kernels for GPUs."""
    return forward_op.plainest(device, compute_dtype).saves_mask


# torch.compiler.assume_constant_result does just this, and loads the compiler, seconds long, to do it.
saves_mask._dynamo_marked_constant = True
