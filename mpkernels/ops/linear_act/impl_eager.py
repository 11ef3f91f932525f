# SPDX-License-Identifier: Apache-2.0
"""linear_act in plain torch: out = round(act(x @ weight.T + bias)), the sums in fp32 (fp64 for fp64).

On a CPU 16-bit operands are upcast and multiplied by oneDNN in fp32: without AVX-512 FP16 torch's own fp16 GEMM is a loop
of dot products. Weights are upcast a block of rows at a time, into memory that stays in the cache.
"""

import functools

import torch
import torch.nn.functional as F

from mpkernels.ops._cast import cast
from mpkernels.ops.linear_act import Activation, acc_dtype, empty_mask, empty_saved

BLOCK_ELEMENTS = 1 << 20  # of a weight, upcast at a time: 4 MB, a fresh larger buffer costs page faults
SMALL_GEMM = 1 << 20  # M * N * K up to which oneDNN's own set-up costs more than it saves
INVARIANT_ROWS = 16  # of a GEMM under batch_invariant: more make M=1 dearer, fewer a large M
FEW_ROWS = 2  # up to here reading the weight costs more than multiplying with it


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def linear_act(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, batch_invariant=False, *_):
    lead, (N, K) = x.shape[:-1], weight.shape
    x_compute = cast(x, compute_dtype) if x.dtype != compute_dtype else x.new_empty(0)
    operand = x_compute if x.dtype != compute_dtype else x
    smooth = save and activation not in (Activation.NONE, Activation.RELU)
    pre = empty_saved(x, N, activation, compute_dtype) if smooth else None
    out = _matmul_nt(
        operand.reshape(lead.numel(), K), weight if weight_copy is None else weight_copy, compute_dtype, out_dtype,
        bias=bias, activation=activation, pre=pre, batch_invariant=batch_invariant,
    )  # fmt: skip
    if pre is None:
        pre = pack_mask(out) if save and activation == Activation.RELU else x.new_empty(0, dtype=torch.int32)
    return out.view(*lead, N), pre, x_compute


def linear_act_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=Activation.NONE, grad_bias_below_dtype=None,
):  # fmt: skip
    lead, (N, K) = grad_out.shape[:-1], weight.shape
    M = lead.numel()
    grad_z = grad_out.reshape(M, N)
    if activation != Activation.NONE:
        grad_z = _through(activation, saved, grad_z, compute_dtype)
    grad_x = grad_weight = grad_bias = grad_bias_below = None
    if output_mask[2]:
        grad_bias = cast(grad_z.sum(0, dtype=acc_dtype(compute_dtype)), grad_bias_dtype)
    grad_z = cast(grad_z, compute_dtype)
    if output_mask[0]:
        operand = weight if weight_copy is None else weight_copy
        below = activation_below != Activation.NONE or grad_bias_below_dtype is not None
        acc = acc_dtype(compute_dtype)
        grad_x = _matmul_nt(grad_z, operand.t(), compute_dtype, acc if below else grad_x_dtype)
        if activation_below != Activation.NONE:
            grad_x = _through(activation_below, saved_below, grad_x, compute_dtype).contiguous()
        if grad_bias_below_dtype is not None:
            grad_bias_below = cast(grad_x.sum(0), grad_bias_below_dtype)
        grad_x = cast(grad_x, grad_x_dtype).view(*lead, K)
    if output_mask[1]:
        grad_weight = _matmul_nt(grad_z.t(), x.reshape(M, K).t(), compute_dtype, grad_weight_dtype)
    dtypes = (grad_x_dtype, grad_weight_dtype, grad_bias_dtype, grad_bias_below_dtype)
    grads = (grad_x, grad_weight, grad_bias, grad_bias_below)
    return tuple(g if g is not None else grad_out.new_empty(0, dtype=d) for g, d in zip(grads, dtypes, strict=True))


def _matmul_nt(
    a, b, compute_dtype, out_dtype, *, bias=None, activation=Activation.NONE, pre=None, batch_invariant=False
):  # fmt: skip
    """round(act(a @ b.T + bias)) for a (M, K) and b (N, K); b is cast and multiplied a block of rows at a time.

    pre: filled with what the activation is applied to, where it is given.
    """
    acc = acc_dtype(compute_dtype)
    linear = _linear_batch_invariant if batch_invariant else _linear
    if a.device.type != "cpu" and compute_dtype.itemsize == 2:
        z = _matmul_nt_tensor_cores(a, cast(b, compute_dtype).t(), bias, batch_invariant)
        return _finish(z, activation, pre, out_dtype)
    dtypes = {a.dtype, b.dtype, out_dtype, b.dtype if bias is None else bias.dtype}
    few = a.shape[0] <= FEW_ROWS and not batch_invariant and activation in (Activation.NONE, Activation.RELU)
    if few and b.stride(1) == 1 and dtypes == {compute_dtype} and acc != compute_dtype:
        # torch's dot-product loop: sums and adds the bias in fp32, rounds once, and reads 16 bits of a weight, not 32.
        return _finish(F.linear(a, b, bias), activation, None, out_dtype)
    a = a.to(acc).contiguous()
    bias = None if bias is None else bias.to(acc).contiguous()  # oneDNN reads a bias as if its stride were 1
    K, N = b.shape[1], b.shape[0]
    rows = max(64, BLOCK_ELEMENTS // max(K, 1))
    if b.dtype == acc or rows >= N:
        z = linear(a, cast(b, compute_dtype).to(acc), bias)
        return _finish(z, activation, pre, out_dtype)
    out = a.new_empty((a.shape[0], N), dtype=out_dtype)
    for n in range(0, N, rows):
        block = _rows(b, n, rows, compute_dtype, acc)
        z = linear(a, block, None if bias is None else bias[n : n + rows])
        out[:, n : n + rows] = _finish(z, activation, None if pre is None else pre[:, n : n + rows], out_dtype)
    return out


def _rows(b, start, rows, compute_dtype, acc):
    """b[start : start + rows] rounded to compute_dtype, in the accumulator's dtype; b's memory order is kept."""
    block = b[start : start + rows]
    transposed = block.stride(0) == 1
    block = block.t() if transposed else block
    block = cast(block, compute_dtype).to(acc, memory_format=torch.contiguous_format)
    return block.t() if transposed else block


def _linear(a, b, bias):
    """a @ b.T + bias in the dtype of all three. oneDNN where it is there: on AMD CPUs MKL leaves AVX-512 unused.

    NOTE: oneDNN's own ReLU turns NaN into 0, so the activation is applied afterwards.
    """
    large = a.shape[0] * b.numel() > SMALL_GEMM
    if large and a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


def _linear_batch_invariant(a, b, bias):
    """`_linear`, a row's bits whatever its place and the other rows. oneDNN gives all rows of a block the same bits, as a
    GPU does where a block fits in a tile; other CPU libraries do not, they get one row at a time, always at one address."""
    if a.device.type != "cpu":
        return _by_blocks(lambda block: F.linear(block, b, bias), a, b.shape[0])
    if a.dtype == torch.float32 and b.numel() and torch.backends.mkldnn.is_available():
        return _by_blocks(lambda block: torch.ops.mkldnn._linear_pointwise(block, b, bias, "none", [], ""), a, b.shape[0])
    return _by_blocks(lambda block: F.linear(block, b, bias), a, b.shape[0], rows=1)


def _by_blocks(multiply, a, columns, rows=INVARIANT_ROWS):
    """multiply(a) in fp32 or wider, `rows` rows at a time: every call has one shape, whatever lies in the rows left over."""
    out, block = a.new_empty((a.shape[0], columns), dtype=acc_dtype(a.dtype)), a.new_zeros(rows, a.shape[1])
    for m in range(0, a.shape[0], rows):
        here = min(rows, a.shape[0] - m)
        block[:here] = a[m : m + here]
        out[m : m + here] = multiply(block)[:here]
    return out


def _matmul_nt_tensor_cores(a, b, bias, batch_invariant):
    """a @ b + bias in fp32 on a GPU: 16-bit operands, fp32 result, so that no split of K is reduced in 16 bits."""
    multiply = lambda a: torch.mm(a, b, out_dtype=torch.float32)
    z = _by_blocks(multiply, a, b.shape[1]) if batch_invariant else multiply(a)
    if bias is not None:
        z += bias.to(torch.float32)
    return z


# ----- activations ---------------------------------------------------------------

_ACTIVATE = {
    Activation.NONE: lambda z: z,
    Activation.RELU: torch.relu_,
    Activation.RELU2: lambda z: z.relu_().square_(),
    Activation.GELU: lambda z: _gelu(z),
    Activation.GELU_TANH: functools.partial(F.gelu, approximate="tanh"),
    Activation.SILU: functools.partial(F.silu, inplace=True),
}
_GRADIENT = {  # of grad and z
    Activation.RELU2: lambda grad, z: torch.where(z <= 0, 0, 2 * z * grad),
    Activation.GELU: torch.ops.aten.gelu_backward,
    Activation.GELU_TANH: functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    Activation.SILU: torch.ops.aten.silu_backward,
}
STEEP = 1000.0  # from here on slopes of gelu and silu are 0 or 1 in fp64 too, and at infinity their formulas are NaN


def _gelu(z):
    """NOTE: torch's own has NaN at inf on a CPU in fp32, where it has inf in fp64 and on a GPU."""
    out = F.gelu(z)
    return out.masked_fill_(z == torch.inf, torch.inf) if z.device.type == "cpu" else out


def _finish(z, activation, pre, out_dtype):
    """round(act(z)); z is overwritten, and is rounded into `pre` where that is given."""
    if pre is not None:
        pre.copy_(cast(z, pre.dtype))
    return cast(_ACTIVATE[activation](z), out_dtype)


def _through(activation, saved, grad, compute_dtype):
    """The gradient before the activation: `grad` selected by a ReLU's mask or output, else times the slope at `saved`."""
    if activation == Activation.RELU:
        return _select(saved, grad)
    acc = acc_dtype(compute_dtype)
    z, grad = saved.to(acc), grad.to(acc)
    return _GRADIENT[activation](grad, z if activation == Activation.RELU2 else z.clamp(-STEEP, STEEP))


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
    weights = torch.ones((), dtype=torch.int64, device=out.device) << torch.arange(32, device=out.device)
    words = (bits * weights).sum(-1)
    mask.copy_(torch.where(words >= 1 << 31, words - (1 << 32), words))
    return mask


def unpack_mask(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """(M, columns) bool from the mask."""
    bits = (mask.unsqueeze(-1) >> torch.arange(32, device=mask.device, dtype=torch.int32)) & 1
    return bits.bool().flatten(1)[:, :columns]
