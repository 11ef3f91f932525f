# SPDX-License-Identifier: Apache-2.0
"""linear_act in bf16 by oneDNN, where the CPU has instructions for it: out = round(act(a @ b.T + bias)), the sums in fp32."""

import functools

import torch
import torch.nn.functional as F

from mpkernels.ops.linear_act.epilogues import Activation

AMX_K = 32  # bf16 of a row that AMX takes at once
SEGMENT = 1 << 17  # elements looked at at a time: what is made of them stays in the cache


@functools.cache
def has_bf16_instructions() -> bool:
    """AVX-512 BF16 or AMX. NOTE: private names, without which fp32 serves."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(ask is not None and ask() for ask in asked)


def multiply(a, b, bias, activation):
    """round(act(a @ b.T + bias)): sums in fp32, to which oneDNN adds a bias in fp32, rounded once.

    NOTE: where AMX's blocks of K are not whole it reads on into the next row and multiplies by 0, so that an inf or NaN there
    reaches this one, in F.linear too.
    """
    missing = -a.shape[1] % AMX_K
    if missing:
        a, b = (F.pad(t, (0, missing)) for t in (a, b))
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    z = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return z.relu_() if activation == Activation.RELU else z  # NOTE: oneDNN's own turns NaN into 0


def products_stay_normal(a, b, bias) -> bool:
    """Whether nothing but 0 can come up that is below 2^-126, which these instructions take for 0.

    From 2^-50 on products of bf16, of 8 bits each, are multiples of 2^-114, from 2^-100 on a bias in fp32 of 2^-123, and so
    are all sums. Empty operands are for others.
    """
    if not (a.numel() and b.numel()) or (bias is not None and bias.dtype == torch.float64):
        return False
    if not (_is_none_below(b, 2.0**-50) and _is_none_below(a, 2.0**-50)):
        return False
    return bias is None or _is_none_below(bias.float(), 2.0**-100)


def _is_none_below(tensor, limit: float) -> bool:
    """Whether every element is 0, NaN or at least `limit` in magnitude."""
    tensor = tensor.t() if tensor.dim() == 2 and tensor.stride(0) == 1 else tensor
    bits, most = (torch.int16, 0x7FFF) if tensor.dtype.itemsize == 2 else (torch.int32, 0x7FFFFFFF)
    least = torch.tensor(limit, dtype=tensor.dtype, device="cpu").view(bits).item()
    for segment in tensor.reshape(-1).view(bits).split(SEGMENT):
        magnitude = segment.bitwise_and(most)  # integers in the order of what they stand for
        smallest = magnitude.amin().item()
        if smallest == 0:  # without the zeros: less one, they are the largest of all
            smallest = magnitude.sub_(1).bitwise_and_(most).amin().item() + 1
        if smallest < least:
            return False
    return True
