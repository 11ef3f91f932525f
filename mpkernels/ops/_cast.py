# SPDX-License-Identifier: Apache-2.0
"""Cast to another floating-point dtype with one rounding, to nearest even."""

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what every op here works on


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`, rounded once. NOTE: torch itself casts fp64 to 16 bits through fp32, in two roundings."""
    if tensor.dtype == dtype:
        return tensor
    if tensor.dtype == torch.float64 and dtype.itemsize == 2:
        tensor = _to_float32_odd(tensor)
    return tensor.to(dtype)  # round: wide -> dtype


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
