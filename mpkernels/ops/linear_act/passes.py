# SPDX-License-Identifier: Apache-2.0
"""linear_act around its products, in plain torch: what implementations share that have no kernel for more.

They differ in `multiply(a, b, compute_dtype, out_dtype, *, bias=None, activation=NONE, pre=None, batch_invariant=False)`:
round(act(a @ b.T + bias)) for a (M, K) in compute_dtype and b (N, K). pre: None, or filled with what the activation is
applied to.
"""

import functools

import torch
import torch.nn.functional as F

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import Activation, acc_dtype, empty_mask, empty_saved


def linear_act(multiply, x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, batch_invariant=False, *_):
    N = weight.shape[0]
    narrowed = x if x.dtype == compute_dtype else cast(x, compute_dtype)
    smooth = save and activation not in (Activation.NONE, Activation.RELU)
    saved = empty_saved(x, N, activation, compute_dtype) if smooth else None
    out = multiply(
        rows(narrowed), weight if weight_copy is None else weight_copy, compute_dtype, out_dtype,
        bias=bias, activation=activation, pre=saved, batch_invariant=batch_invariant,
    )  # fmt: skip
    if saved is None:
        saved = pack_mask(out) if save and activation == Activation.RELU else x.new_empty(0, dtype=torch.int32)
    x_compute = x.new_empty(0) if narrowed is x else narrowed
    return out if x.dim() == 2 else out.view(*x.shape[:-1], N), saved, x_compute


def linear_act_backward(
    multiply, grad_out, x, weight, weight_copy, saved, activation, compute_dtype,
    grad_x_dtype, grad_weight_dtype, grad_bias_dtype, output_mask,
    saved_below=None, activation_below=Activation.NONE, grad_bias_below_dtype=None,
):  # fmt: skip
    grad_z = rows(grad_out)
    if activation != Activation.NONE:
        grad_z = _through(activation, saved, grad_z, compute_dtype)
    grad_x = grad_weight = grad_bias = grad_bias_below = None
    if output_mask[2]:
        grad_bias = cast(grad_z.sum(0, dtype=acc_dtype(compute_dtype)), grad_bias_dtype)
    grad_z = cast(grad_z, compute_dtype)
    if output_mask[0]:
        operand = weight if weight_copy is None else weight_copy
        below = activation_below != Activation.NONE or grad_bias_below_dtype is not None
        grad_x = multiply(grad_z, operand.t(), compute_dtype, acc_dtype(compute_dtype) if below else grad_x_dtype)
        if below:
            grad_x, grad_bias_below = below_of(grad_x, saved_below, activation_below, grad_bias_below_dtype, compute_dtype)
        grad_x = cast(grad_x, grad_x_dtype)
        if grad_out.dim() != 2:
            grad_x = grad_x.view(*grad_out.shape[:-1], weight.shape[1])
    if output_mask[1]:
        grad_weight = multiply(grad_z.t(), rows(x).t(), compute_dtype, grad_weight_dtype)
    dtypes = (grad_x_dtype, grad_weight_dtype, grad_bias_dtype, grad_bias_below_dtype)
    grads = (grad_x, grad_weight, grad_bias, grad_bias_below)
    return tuple(g if g is not None else grad_out.new_empty(0, dtype=d) for g, d in zip(grads, dtypes, strict=True))


def below_of(grad_x, saved_below, activation_below, grad_bias_below_dtype, compute_dtype):
    """(grad_z, grad_bias) of the layer below from grad_x in the accumulator's dtype; the second may be None."""
    if activation_below != Activation.NONE:
        grad_x = _through(activation_below, saved_below, grad_x, compute_dtype).contiguous()
    return grad_x, None if grad_bias_below_dtype is None else cast(grad_x.sum(0), grad_bias_below_dtype)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` (*, K) as a matrix; a view of one that is a matrix costs as much as a small product."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


# ----- activations ---------------------------------------------------------------

# torch's fused GELU and SiLU have other bits in the vectors of a tensor than in what is left over behind them. So they are
# given whole vectors, a piece at a time, which stays in the cache; what is left over is padded.

_PIECE = 1 << 15  # elements of a thread
_ALONE = 1 << 14  # elements that torch does not share among threads
_VECTORS = 64  # elements: a multiple of what any CPU takes at once
STEEP = 1000.0  # from here on slopes of gelu and silu are 0 or 1 in fp64 too, and at infinity their formulas are NaN

_ACTIVATE_ = {  # in place
    Activation.RELU2: lambda z: z.relu_().square_(),
    Activation.GELU: torch.ops.aten.gelu_,
    Activation.GELU_TANH: functools.partial(torch.ops.aten.gelu_, approximate="tanh"),
    Activation.SILU: torch.ops.aten.silu_,
}
_BACKWARD_ = {  # in place of the gradient, from what the activation is applied to
    Activation.RELU2: lambda grad, z: grad.mul_(2 * z).masked_fill_(z <= 0, 0),
    Activation.GELU: lambda grad, z: torch.ops.aten.gelu_backward(grad, _not_steep(z), grad_input=grad),
    Activation.GELU_TANH: lambda grad, z: torch.ops.aten.gelu_backward(
        grad, _not_steep(z), approximate="tanh", grad_input=grad
    ),
    Activation.SILU: lambda grad, z: torch.ops.aten.silu_backward(grad, _not_steep(z), grad_input=grad),
}


def _not_steep(z):
    return z.clamp(-STEEP, STEEP)


def finish(z, activation, pre, out_dtype):
    """round(act(z)); z is overwritten, and is rounded into `pre` where that is given."""
    if pre is not None:
        pre.copy_(cast(z, pre.dtype))
    if activation == Activation.RELU:
        z.relu_()
    elif activation != Activation.NONE:
        _by_vectors(_ACTIVATE_[activation], z)
    return cast(z, out_dtype)


def _by_vectors(function_, written, *others):
    """function_(written, *others) of contiguous tensors, elements of one place together, in pieces of whole vectors."""
    if not written.is_cpu:
        function_(written, *others)
        return
    flat, begin, n = [tensor.view(-1) for tensor in (written, *others)], 0, written.numel()
    for size in (_PIECE * torch.get_num_threads(), _ALONE, n % _ALONE // _VECTORS * _VECTORS):
        while size and begin + size <= n:
            function_(*(tensor.narrow(0, begin, size) for tensor in flat))
            begin += size
    if begin < n:
        padded = [F.pad(tensor.narrow(0, begin, n - begin), (0, _VECTORS - n + begin)) for tensor in flat]
        function_(*padded)
        flat[0].narrow(0, begin, n - begin).copy_(padded[0].narrow(0, 0, n - begin))


def _through(activation, saved, grad, compute_dtype):
    """The gradient before the activation: `grad` selected by a ReLU's mask or output, else times the slope at `saved`."""
    if activation == Activation.RELU:
        return _select(saved, grad)
    acc = acc_dtype(compute_dtype)
    out = torch.empty(grad.shape, dtype=acc, device=grad.device).copy_(grad)
    _by_vectors(lambda grad, z: _BACKWARD_[activation](grad, z.to(acc)), out, saved.contiguous())
    return out


def _select(saved, grad_z):
    """grad_z where the output was positive or NaN, else 0; selects, so that an inf behind a 0 does not become NaN."""
    if saved.dtype == torch.int32:
        return torch.where(unpack_mask(saved, grad_z.shape[1]), grad_z, 0)
    saved = saved.reshape(grad_z.shape)
    if saved.dtype == grad_z.dtype:
        return torch.ops.aten.threshold_backward(grad_z, saved, 0)
    return torch.where(saved <= 0, 0, grad_z)


def pack_mask(out: torch.Tensor) -> torch.Tensor:
    """The mask of `not (out <= 0)` for out (M, N)."""
    M, N = out.shape
    mask = empty_mask(out, M, N)
    bits = F.pad(~(out <= 0), (0, mask.shape[1] * 32 - N)).view(M, mask.shape[1], 32).long()
    weights = torch.ones((), dtype=torch.int64, device=out.device) << torch.arange(32, dtype=torch.int64, device=out.device)
    words = (bits * weights).sum(-1)
    mask.copy_(torch.where(words >= 1 << 31, words - (1 << 32), words))
    return mask


def unpack_mask(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """(M, columns) bool from the mask."""
    bits = (mask.unsqueeze(-1) >> torch.arange(32, device=mask.device, dtype=torch.int32)) & 1
    return bits.bool().flatten(1)[:, :columns]
