# SPDX-License-Identifier: Apache-2.0
"""Tensors kept for backward in eight bits, with a scale for each row: x is about q * scale."""

import torch

from mpkernels.ops import quantize


def encode(x: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(q, scale) of x (*, K); where a row is not finite its scale is NaN."""
    if x is None:
        return None, None
    return quantize.op.run(quantize.QuantizeCall(x, dtype, -1))


def encode_preactivation(z: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(q, scale) of what an activation was applied to. Where it overflowed fp16 it is the largest number, whose slope is the
    limit, as that of inf is in 16 bits: the NaN of a scale would take its row along."""
    if z is not None and z.dtype == torch.float16:
        largest = torch.finfo(z.dtype).max
        z = z.clamp(-largest, largest)
    return encode(z, dtype)


def decode(q: torch.Tensor | None, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """q * scale in `dtype`, and q itself where there is no scale.

    Exact in bf16 and fp32, but for their subnormals. In fp16 what x cannot have been is the nearest that it can: 65504 may be
    65536 in eight bits, and below 2**-14 fp16 has fewer of them.
    """
    if q is None or scale is None:
        return q
    if dtype != torch.float16:
        return q.to(dtype) * scale.to(dtype)
    largest = torch.finfo(dtype).max
    return (q.to(torch.float32) * scale).clamp_(-largest, largest).to(dtype)  # round: fp32 -> fp16
