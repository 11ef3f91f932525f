# SPDX-License-Identifier: Apache-2.0
"""Cast to another floating-point dtype with one rounding, to nearest even."""

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what every op here works on
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)  # of operands that have a scale


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`, rounded once. NOTE: torch itself casts fp64 to 16 bits through fp32, in two roundings."""
    if tensor.dtype == dtype:
        return tensor
    if tensor.dtype == torch.float64 and dtype.itemsize == 2:
        tensor = _to_float32_odd(tensor)
    return tensor.to(dtype)  # round: wide -> dtype


def stochastic_round(tensor: torch.Tensor, dtype: torch.dtype, step: torch.Tensor) -> torch.Tensor:
    """`tensor` in its own dtype, or in bf16 rounded up or down with the probability that makes it the mean.

    An average that moves by less than half a last place a step is followed so, where rounding to nearest would hold it
    still. Random in appearance only: a function of the step's number and the element's place, in 64-bit integers, which
    torch has everywhere, with 32 of them used. csrc/optimizer_update/round.h is the same in C++.
    """
    if tensor.dtype == dtype:
        return tensor
    wide = _to_float32_odd(tensor) if tensor.dtype == torch.float64 else tensor
    place = torch.arange(tensor.numel(), dtype=torch.int64, device=tensor.device).view(tensor.shape)
    low = hash32((place & 0xFFFFFFFF) ^ hash32(step.view(torch.int32).long())) >> 16
    bits = ((wide.view(torch.int32) + low) >> 16) << 16  # round: fp32 -> bf16
    return torch.where(wide.isnan(), wide, bits.to(torch.int32).view(torch.float32)).to(dtype)


def hash32(x: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits. Source: Wellons, hash-prospector, "lowbias32"."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _to_float32_odd(tensor: torch.Tensor) -> torch.Tensor:
    """fp64 -> fp32 rounded to odd: the last bit records that something was cut, so that a second rounding is right.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".
    """
    nearest = tensor.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    bits = bits - (back.abs() > tensor.abs()).int()  # towards zero: sign and magnitude, so one less is one nearer 0
    bits = bits | ((back != tensor) & ~tensor.isnan()).int()
    return bits.view(torch.float32)
