# SPDX-License-Identifier: Apache-2.0
"""The derivatives of linear_act: one autograd.Function for eager mode and torch.func, and the rules of the ops themselves.

Two doors lead to an op. `LinearAct` is that of eager mode and of torch.func, which cannot differentiate an op that has
`register_autograd` alone: `grad` raises there, and `jvp` is silently zero. torch.compile, torch.export and callers of
torch.ops.mpkernels differentiate the ops. Both keep the same and take the same way back.
"""

import torch

from mpkernels.ops.linear_act import accumulate, eight_bits
from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall, check_backward
from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.ops.linear_act.schema import backward_op, forward_op
from mpkernels.runtime.op import Op, move_versions
from mpkernels.runtime.resolve import Kernel


class LinearAct(torch.autograd.Function):
    """out of a call. The first four arguments are those of the call that have a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, prev_bias, call: ForwardCall, kernel: Kernel | None):
        """(out, what autograd need not see). kernel: where it is known that nothing but eager execution goes on."""
        out, saved, x_compute = forward_op.run(call) if kernel is None else forward_op.execute(call, kernel)
        return out, (saved, x_compute)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _bias, _prev_bias, call, _ = inputs
        out, kept = output
        _keep(ctx, call._replace(x=x, weight=weight) if call.x is not x else call, ctx.needs_input_grad[1], out, *kept)

    @staticmethod
    def backward(ctx, grad_out, _):
        return *_grads(ctx, ctx.needs_input_grad[:4], grad_out), None, None


# What `LinearAct.apply` calls where no transform is active. It itself first takes the signature of `forward` apart, for
# defaults that there are none of, which costs as much as the rest of a small layer.
apply_in_eager = super(torch.autograd.Function, LinearAct).apply


def _keep(ctx, call: ForwardCall, wants_weight: bool, out, saved, x_compute) -> None:
    """What `_grads` needs of a call."""
    x, weight, bias, prev_bias, grad_dtype = call.x, call.weight, call.bias, call.prev_bias, call.grad_dtype
    activation, kept, kept_x = 0 if call.activation_grad_fused else call.activation, None, None
    if activation:
        kept = saved if call.save else out if activation == Activation.RELU else None
    if wants_weight:
        kept_x = x if x.dtype == call.compute_dtype else x_compute
    scales = ()
    if call.saved_dtype is not None:
        kept_x, x_scale = eight_bits.encode(kept_x, call.saved_dtype)
        scale = None
        if activation > Activation.RELU:
            kept, scale = eight_bits.encode_preactivation(kept, call.saved_dtype)
        scales = x_scale, scale
    ctx.save_for_backward(kept_x, call.operand, kept, call.prev_saved, *scales)
    ctx.set_materialize_grads(False)
    ctx.activation, ctx.prev_activation = activation, call.prev_activation
    ctx.activation_grad_fused = call.activation_grad_fused
    ctx.dtypes = (
        call.compute_dtype, x.dtype, grad_dtype or weight.dtype, grad_dtype or (weight if bias is None else bias).dtype,
    )  # fmt: skip
    ctx.grad_prev_bias_dtype = None if prev_bias is None else grad_dtype or prev_bias.dtype
    ctx.accumulate_grad = False  # whether `_grads` may add to weight.grad itself
    ctx.on_grads = None  # what is given the gradients of x and weight when they are computed: a watch's


def _grads(ctx, wanted, grad_out) -> tuple:
    """The gradients of x, weight, bias and prev_bias; wanted: of which. None for the others."""
    wants_x, wants_weight, wants_bias, wants_prev_bias = wanted
    grad_prev_bias_dtype = ctx.grad_prev_bias_dtype if wants_prev_bias else None
    wants_x = wants_x or grad_prev_bias_dtype is not None
    wants_bias = wants_bias and not ctx.activation_grad_fused
    if grad_out is None or not (wants_x or wants_weight or wants_bias):
        return None, None, None, None
    x, weight, saved, prev_saved, *scales = ctx.saved_tensors
    if scales:
        x, saved = (eight_bits.decode(t, s, ctx.dtypes[0]) for t, s in zip((x, saved), scales, strict=True))
    fused = (prev_saved, ctx.prev_activation, grad_prev_bias_dtype) if wants_x else ()
    output_mask = [wants_x, wants_weight, wants_bias]
    call = BackwardCall(grad_out, x, weight, None, saved, ctx.activation, *ctx.dtypes, output_mask, *fused)
    if ctx.accumulate_grad and wants_weight:
        call = call._replace(grad_weight_sum=accumulate.weight_grad(ctx, call))
    if torch.is_grad_enabled():
        grad_x, grad_weight, grad_bias, grad_prev_bias = once_differentiable(_run_backward, *call)
    else:
        grad_x, grad_weight, grad_bias, grad_prev_bias = run_backward(call)
    grad_x, grad_weight = grad_x if wants_x else None, grad_weight if wants_weight else None
    if ctx.on_grads is not None:
        ctx.on_grads(grad_x, grad_weight)
    return grad_x, grad_weight, grad_bias if wants_bias else None, None if grad_prev_bias_dtype is None else grad_prev_bias


def run_backward(call: BackwardCall) -> tuple:
    """The results of `linear_act_backward`."""
    if not Op.is_tracing() and check_backward(call):
        grads = backward_op.execute(call, backward_op.resolve(call))
    else:
        grads = backward_op.dispatch(call)
    if call.grad_weight_sum is not None:
        move_versions([call.grad_weight_sum])
    return grads


def _run_backward(*fields):
    return run_backward(BackwardCall(*fields))


def once_differentiable(backward, *args):
    """backward(*args), which refuses to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _OnceDifferentiable.apply(backward, *args)
    return backward(*args)


class _OnceDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backward, *args):
        return backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        _refuse_double_backward(ctx, *grads)


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError("linear_act: double backward is not supported")


# ----- the ops ---------------------------------------------------------------

_ARGUMENTS = len(torch.ops.mpkernels.linear_act.default._schema.arguments)  # of the op, with which a call begins
_NO_GRADS = ForwardCall(*[None] * len(ForwardCall._fields))


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    call = ForwardCall(*inputs)
    ctx.is_scaled = call.is_scaled
    if not call.is_scaled:
        _keep(ctx, call, _needs_grad(ctx).weight, *output)


def _backward(ctx, grad_out, grad_saved, grad_x_compute):
    if ctx.is_scaled:
        raise RuntimeError(
            "linear_act: a call with scales is not differentiable, a layer whose Policy computes in eight bits is, where it "
            "was not exported or traced"
        )
    needs = _needs_grad(ctx)
    x, weight, bias, prev_bias = _grads(ctx, (needs.x, needs.weight, needs.bias, needs.prev_bias), grad_out)
    return _NO_GRADS._replace(x=x, weight=weight, bias=bias, prev_bias=prev_bias)[:_ARGUMENTS]


def _needs_grad(ctx) -> ForwardCall:
    """ctx.needs_input_grad by name; what torch.library adds to the arguments comes after them."""
    return ForwardCall(*ctx.needs_input_grad[:_ARGUMENTS])


torch.library.register_autograd("mpkernels::linear_act", _backward, setup_context=_setup_context)
torch.library.register_autograd("mpkernels::linear_act_backward", _refuse_double_backward)


def _refusing_forward_mode(op):
    """`register_autograd` drops tangents without a word. This refuses all of forward mode: it cannot see which have one."""

    def kernel(keyset, *args):
        if torch.autograd.forward_ad._current_level >= 0:
            raise NotImplementedError(f"{op._opname}: forward mode (jvp) is not supported")
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return kernel


_library = torch.library.Library("mpkernels", "FRAGMENT")
for _op in (torch.ops.mpkernels.linear_act.default, torch.ops.mpkernels.linear_act_backward.default):
    _library.impl(_op._opname, _refusing_forward_mode(_op), "ADInplaceOrView", with_keyset=True)


# ----- vmap ---------------------------------------------------------------


def _each(op, info, in_dims, args):
    """The op once per sample, results stacked."""

    def sample(i):
        return [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]

    return tuple(map(torch.stack, zip(*(op(*sample(i)) for i in range(info.batch_size)), strict=True)))


@torch.library.register_vmap("mpkernels::linear_act")
def _vmap(info, in_dims, *args):
    call, dims = ForwardCall(*args), ForwardCall(*in_dims)
    if call.is_scaled or any(dim is not None for dim in (dims.weight, dims.bias, dims.weight_copy)):
        return _each(torch.ops.mpkernels.linear_act, info, in_dims[: len(args)], args), (0, 0, 0)
    call = call._replace(
        x=call.x.movedim(dims.x, 0), activation_grad_fused=False, prev_saved=None, prev_activation=0, prev_bias=None
    )  # which are for backward
    out, saved, x_compute = forward_op.dispatch(call)
    x_dim = 0 if x_compute.dim() > 1 else None
    if saved.dim() == 1:
        return (out, saved, x_compute), (0, None, x_dim)
    return (out, saved.unflatten(0, (info.batch_size, -1)), x_compute), (0, 0, x_dim)


@torch.library.register_vmap("mpkernels::linear_act_backward")
def _vmap_backward(info, in_dims, *args):
    return _each(torch.ops.mpkernels.linear_act_backward, info, in_dims[: len(args)], args), (0, 0, 0, 0)
