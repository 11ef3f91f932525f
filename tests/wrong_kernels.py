# SPDX-License-Identifier: Apache-2.0
"""Kernels that are wrong on purpose, each in one way that a loose tolerance accepts: the bounds must reject every one.

Forward: (x, weight, bias, activation, compute_dtype, out_dtype) -> out for x (M, K), weight (N, K), operands already in
compute_dtype. Backward: (grad_z, x, weight, grad_dtype) -> (grad_x, grad_weight, grad_bias). `sound` and
`sound_backward` are their right versions, which the bounds must accept on the same data.
"""

import torch

SPLITS = 4  # of K


def sound(x, weight, bias, activation, compute_dtype, out_dtype):
    return _store(_acc(x, weight) + _wide(bias), activation, out_dtype)


def accumulator_16_bit(x, weight, bias, activation, compute_dtype, out_dtype):
    acc = torch.zeros(x.shape[0], weight.shape[0])
    for k in range(x.shape[1]):
        acc = (acc + torch.outer(x[:, k].float(), weight[:, k].float())).to(compute_dtype).float()
    return _store(acc + _wide(bias), activation, out_dtype)


def split_k_partials_16_bit(x, weight, bias, activation, compute_dtype, out_dtype):
    parts = zip(x.tensor_split(SPLITS, 1), weight.tensor_split(SPLITS, 1), strict=True)
    acc = sum(_acc(a, b).to(compute_dtype).float() for a, b in parts)
    return _store(acc + _wide(bias), activation, out_dtype)


def rounded_before_bias(x, weight, bias, activation, compute_dtype, out_dtype):
    return _store(_acc(x, weight).to(compute_dtype).float() + _wide(bias), activation, out_dtype)


def rounded_through_bfloat16(x, weight, bias, activation, compute_dtype, out_dtype):
    return _store((_acc(x, weight) + _wide(bias)).bfloat16(), activation, out_dtype)


def rounded_through_float16(x, weight, bias, activation, compute_dtype, out_dtype):
    return _store((_acc(x, weight) + _wide(bias)).half(), activation, out_dtype)


def bias_in_compute_dtype(x, weight, bias, activation, compute_dtype, out_dtype):
    return sound(x, weight, bias.to(compute_dtype), activation, compute_dtype, out_dtype)


def operands_truncated(x, weight, bias, activation, compute_dtype, out_dtype):
    """As TF32: 10 bits of the significand, the rest cut."""
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, weight)]
    return sound(*cut, bias, activation, compute_dtype, out_dtype)


def truncated_at_the_store(x, weight, bias, activation, compute_dtype, out_dtype):
    """bf16 made by cutting the bits of fp32, as Triton's interpreter does."""
    z = sound(x, weight, bias, activation, compute_dtype, torch.float32)
    return (z.view(torch.int32) & ~0xFFFF).view(torch.float32).to(out_dtype)


def float32_inside(x, weight, bias, activation, compute_dtype, out_dtype):
    return _store(x.float() @ weight.float().T + _wide(bias), activation, out_dtype)


def nan_dropped(x, weight, bias, activation, compute_dtype, out_dtype):
    """As `fmaxf(z, 0)` and `tl.maximum(z, 0)` do."""
    z = _acc(x, weight) + _wide(bias)
    return torch.fmax(z, torch.zeros(())).to(out_dtype) if activation else z.to(out_dtype)


def saturated(x, weight, bias, activation, compute_dtype, out_dtype):
    """Overflow stored as the largest finite number."""
    top = torch.finfo(out_dtype).max
    return sound(x, weight, bias, activation, compute_dtype, torch.float32).clamp(-top, top).to(out_dtype)


def last_row_missing(x, weight, bias, activation, compute_dtype, out_dtype):
    out = sound(x, weight, bias, activation, compute_dtype, out_dtype)
    out[-1] = 0
    return out


def sound_scaled(x, x_scale, weight, weight_scale, bias, activation, out_dtype):
    return _store(_scaled(_acc(x, weight), x_scale, weight_scale) + _wide(bias), activation, out_dtype)


def scaled_rounded_before_bias(x, x_scale, weight, weight_scale, bias, activation, out_dtype):
    z = _scaled(_acc(x, weight), x_scale, weight_scale).to(out_dtype).float()
    return _store(z + _wide(bias), activation, out_dtype)


def scaled_through_bfloat16(x, x_scale, weight, weight_scale, bias, activation, out_dtype):
    """The result of a library that gives 16 bits, cast to fp32."""
    return sound_scaled(x, x_scale, weight, weight_scale, bias, activation, torch.bfloat16).to(out_dtype)


def scaled_accumulator_14_bits(x, x_scale, weight, weight_scale, bias, activation, out_dtype):
    """As tensor cores of sm_90 add where nothing is promoted to fp32."""
    acc = torch.zeros(x.shape[0], weight.shape[0])
    for k in range(x.shape[1]):
        acc += torch.outer(x[:, k].float(), weight[:, k].float())
        acc = (acc.view(torch.int32) & ~0x3FF).view(torch.float32)
    return _store(_scaled(acc, x_scale, weight_scale) + _wide(bias), activation, out_dtype)


def scaled_saturating(x, x_scale, weight, weight_scale, bias, activation, out_dtype):
    """A NaN, what is left of an overflow, is a large number."""
    x_scale, x = x_scale.nan_to_num(1.0), x.float().nan_to_num(448.0)
    return sound_scaled(x, x_scale, weight, weight_scale.nan_to_num(1.0), bias, activation, out_dtype)


def scaled_as_another_format(x, x_scale, weight, weight_scale, bias, activation, out_dtype):
    other = {torch.float8_e4m3fn: torch.float8_e5m2, torch.float8_e5m2: torch.float8_e4m3fn}
    return sound_scaled(x.view(other[x.dtype]), x_scale, weight, weight_scale, bias, activation, out_dtype)


def scaled_by_one_scale(x, x_scale, weight, weight_scale, bias, activation, out_dtype):
    one = weight_scale[:1] if weight_scale.dim() else weight_scale
    return sound_scaled(x, x_scale, weight, one, bias, activation, out_dtype)


def scaled_bias_too(x, x_scale, weight, weight_scale, bias, activation, out_dtype):
    """The bias is scaled with the sum."""
    return _store(_scaled(_acc(x, weight) + _wide(bias), x_scale, weight_scale), activation, out_dtype)


def sound_backward(grad_z, x, weight, grad_dtype):
    grad_bias = grad_z.float().sum(0)
    return _acc(grad_z, weight.T).to(x.dtype), _acc(grad_z.T, x.T).to(grad_dtype), grad_bias.to(grad_dtype)


def gradient_through_16_bit(grad_z, x, weight, grad_dtype):
    """An fp32 weight gradient that was 16-bit on the way, as under torch.autocast."""
    grad_x, grad_weight, grad_bias = sound_backward(grad_z, x, weight, x.dtype)
    return grad_x, grad_weight.to(grad_dtype), grad_bias.to(grad_dtype)


def bias_gradient_in_16_bit(grad_z, x, weight, grad_dtype):
    grad_x, grad_weight, _ = sound_backward(grad_z, x, weight, grad_dtype)
    acc = torch.zeros_like(grad_z[0])
    for row in grad_z:
        acc = acc + row
    return grad_x, grad_weight, acc.to(grad_dtype)


def split_rows_16_bit(grad_z, x, weight, grad_dtype):
    """wgrad split over rows into 16-bit partials."""
    grad_x, _, grad_bias = sound_backward(grad_z, x, weight, grad_dtype)
    parts = zip(grad_z.T.tensor_split(SPLITS, 1), x.T.tensor_split(SPLITS, 1), strict=True)
    return grad_x, sum(_acc(a, b).to(x.dtype).float() for a, b in parts).to(grad_dtype), grad_bias


def mask_multiplied(grad_out, positive):
    """grad_z where the mask multiplies: an inf behind a 0 becomes NaN."""
    return grad_out * positive


def sound_backward_below(grad_z, x, weight, grad_dtype):
    """(grad_x, grad_bias_below) where x is the output of a ReLU."""
    grad_x = torch.where(x > 0, _acc(grad_z, weight.T), 0)
    return grad_x.to(x.dtype), grad_x.sum(0).to(grad_dtype)


def below_not_selected(grad_z, x, weight, grad_dtype):
    grad_x = _acc(grad_z, weight.T)
    return grad_x.to(x.dtype), torch.where(x > 0, grad_x, 0).sum(0).to(grad_dtype)


def below_summed_unselected(grad_z, x, weight, grad_dtype):
    """The sums are taken before the mask."""
    grad_x, _ = sound_backward_below(grad_z, x, weight, grad_dtype)
    return grad_x, _acc(grad_z, weight.T).sum(0).to(grad_dtype)


def below_summed_in_16_bit(grad_z, x, weight, grad_dtype):
    """The sums are of what was rounded at the store."""
    grad_x, _ = sound_backward_below(grad_z, x, weight, grad_dtype)
    return grad_x, grad_x.float().sum(0).to(grad_dtype)


def below_by_row(grad_z, x, weight, grad_dtype):
    """The last row's mask is another row's."""
    return sound_backward_below(grad_z, torch.cat([x[:-1], -x[-1:]]), weight, grad_dtype)


def _scaled(acc, x_scale, weight_scale):
    return acc * x_scale * weight_scale.expand(acc.shape[1], 1).T


def _acc(a, b):
    return a.float() @ b.float().T if a.dtype != torch.float64 else a @ b.T


def _wide(bias):
    return 0 if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))


def _store(z, activation, out_dtype):
    return (z.relu() if activation else z).to(out_dtype)
