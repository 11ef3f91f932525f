# SPDX-License-Identifier: Apache-2.0
"""Cases of linear_act with 8-bit operands and their scales: around the edges of tiles, NaN scales, exact sums."""

import functools
import itertools
import math
from collections.abc import Iterator

import torch

from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.testing import bounds, linear_act_cases
from mpkernels.testing.case import Case
from mpkernels.testing.linear_act_cases import check_saved_mask, named, vector

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
# M, N, K; rows that descriptors take have multiples of 16 bytes.
SHAPES = ((1, 16, 16), (129, 80, 272), (257, 528, 528), (1000, 144, 1040), linear_act_cases.UNEVEN)
FEW = (linear_act_cases.UNEVEN, (9, 32, 48))
KINDS = ("plain", "exact", "special", "strided", "misaligned", "batch_invariant")
PAIRS = ((e4m3, e4m3), (e5m2, e4m3), (e4m3, e5m2))  # the formats of x and weight


def roundoff(device: torch.device, length: int) -> float:
    """v of a sum of `length` products of 8-bit floats.

    Where tensor cores add them in 14 bits and truncate, a block of 128 is added in fp32: it is the v with which sqrt(length)
    roundings of a sum are sqrt(128) of a block, those of other blocks being independent.
    """
    if device.type != "cuda":
        return 2.0**-24
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9) or major == 10:
        return 2.0**-23
    return 2.0**-13 * math.sqrt(min(length, 128) / max(length, 1))


def forward(few: bool, full: bool) -> Iterator[Case]:
    """Each kind of each shape, with a pair of formats, scales, a dtype of the result, a bias and an activation in turn."""
    turns = itertools.cycle(itertools.product((Activation.NONE, Activation.RELU), (bf16, f32, f16), (True, False), PAIRS))
    for (M, N, K), kind in itertools.product(FEW if few else SHAPES, KINDS):
        activation, out_dtype, by_row, pair = next(turns)
        if kind == "exact":
            activation, out_dtype = Activation.NONE, f32
        if kind == "batch_invariant":
            out_dtype = f32
        arguments = functools.partial(_arguments, (M, N, K), pair, by_row, out_dtype, activation, kind)
        check = _check_exact if kind == "exact" else _check
        name = f"{named(M, N, K, pair[0], kind)}, weight {pair[1]}, scales by {'row' if by_row else 'tensor'}"
        parts = _row_by_row if kind == "batch_invariant" else None
        yield Case(name, arguments, check, call=(pair[0], out_dtype, activation, N, K), parts=parts)


def _row_by_row(arguments: tuple) -> Iterator[tuple]:
    x, *others, x_scale, weight_scale = arguments
    for i in range(x.shape[0]):
        yield x[i : i + 1], *others, x_scale[i : i + 1] if x_scale.dim() else x_scale, weight_scale


def _arguments(shape, pair, by_row, out_dtype, activation, kind, memory, random) -> tuple:
    (M, N, K), shift = shape, int(kind == "misaligned")
    x, weight = (_float8(rows, K, dtype, random, kind) for rows, dtype in zip((M, N), pair, strict=True))
    x_scale, weight_scale = (_powers((rows, 1) if by_row else (), random) for rows in (M, N))
    if kind == "special":  # what quantize makes of an overflow; by one scale nothing else would be left
        (x_scale[0], weight_scale[-1]) = (torch.nan, torch.nan) if by_row else (1, 1)
        x.view(torch.uint8)[-1, 0], x.view(torch.uint8)[M // 2] = 0x7F, 0x80
    if kind == "strided":  # as dgrad has its weight
        weight = weight.view(torch.uint8).t().contiguous().t().view(pair[1])
    bias = None if kind == "exact" or not by_row else memory.put(vector(N, f32, random) * weight_scale[:, 0].nan_to_num(1))
    return (
        memory.put(x, shift=shift), memory.put(weight, shift=shift), bias, None, int(activation), pair[0], out_dtype,
        int(activation == Activation.RELU), kind == "batch_invariant", None, False, None, 0, None,
        memory.put(x_scale), memory.put(weight_scale),
    )  # fmt: skip


def _float8(rows: int, columns: int, dtype: torch.dtype, random: torch.Generator, kind: str) -> torch.Tensor:
    """Numbers over 12 binades, or integers whose sums tensor cores that keep 14 bits have exactly."""
    size = {"size": (rows, columns), "generator": random, "device": "cpu"}
    if kind == "exact":
        return torch.randint(-2, 3, dtype=torch.int64, **size).to(f32).to(dtype)
    binades = torch.exp2(torch.randint(-8, 5, dtype=torch.int64, **size).to(f32))
    return (torch.randn(dtype=f32, **size) * binades).to(dtype)


def _powers(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.exp2(torch.randint(-6, 7, shape, generator=random, dtype=torch.int64, device="cpu").to(f32))


def _check(before, after, results, device) -> None:
    """As a call of the bf16 operands that 8-bit ones times their scales are exactly."""
    x, weight, bias, _, activation, *_, x_scale, weight_scale = before
    out, saved, _ = results
    operands = ((q.to(f32) * scale).to(bf16) for q, scale in ((x, x_scale), (weight, weight_scale)))
    v = roundoff(device, x.shape[1])
    bounds.check_forward(out, *operands, bias, activation, bf16, v, random_sign=True)
    check_saved_mask(out, saved)


def _check_exact(before, after, results, device) -> None:
    x, weight, *_, x_scale, weight_scale = before
    exact = (x.double() @ weight.double().T) * x_scale.double() * weight_scale.double().expand(weight.shape[0], 1).T
    assert torch.equal(results[0].double(), exact), "sums of small integers are not exact"
