# SPDX-License-Identifier: Apache-2.0
"""Cases of quantize: every layout of a scale, numbers of many magnitudes, what is not finite; the bits of the reference."""

import functools
import itertools
import math
from collections.abc import Iterator

import torch

from mpkernels.testing.case import Case

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = ((), (7,), (1, 2500), (130, 1), (33, 70), (3, 5, 66))
LARGE = ((1000, 3000), (3000, 70, 5))
_RACES = {True: ((256, 1024),), False: ((4096, 1024), (4096, 4096), (16384, 4096))}


def quantize(few: bool, full: bool) -> Iterator[Case]:
    kinds = itertools.cycle(itertools.product((None, math.inf, math.nan), FORMATS, (f16, bf16, f32)))
    for shape in SHAPES if few else (*SHAPES, *LARGE):
        for axis in (None, *range(len(shape))):
            for bad, dtype, source in itertools.islice(kinds, 3):  # every dtype of x
                name = f"{shape}, axis {axis}, {source} to {dtype}, {'finite' if bad is None else bad}"
                yield Case(name, functools.partial(_arguments, shape, axis, source, dtype, bad), _check)
    if full:
        yield Case("more than 2^31 elements", _large_arguments, _check_large)


def _arguments(shape, axis, source, dtype, bad, memory, random) -> tuple:
    """Magnitudes over 40 binades, at an odd address, transposed; one number is 0."""
    x = torch.randn(shape, generator=random, dtype=f32, device="cpu")
    x = x * torch.exp2(torch.randint(-30, 11, shape, generator=random, dtype=torch.int64, device="cpu").float())
    x = x.to(source)
    x.view(-1)[-1] = 0
    if bad is not None:
        x.view(-1)[0] = bad
    if x.dim() > 1:
        x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    return memory.put(x, shift=1), dtype, axis


def _check(before, after, results, device) -> None:
    from mpkernels.ops.quantize import NAN, reference

    x, dtype, axis = after
    q, scale = (result.cpu() for result in results)
    expected, scales = reference.quantize(x, dtype, axis)
    assert torch.equal(scale.double().nan_to_num(-1), scales.nan_to_num(-1)), "a scale is not the least power of two that fits"
    bits = expected.to(f32).to(dtype).view(torch.uint8)  # exact
    bits = torch.where(expected.isnan(), NAN, bits)
    assert torch.equal(q.view(torch.uint8), bits), "a number is not that of x / scale rounded once"


def _large_arguments(memory, random) -> tuple:
    count = 2**31 + 8
    x = memory.allocate((count,), (1,), f16).fill_(0.5)
    x[-1] = 3.0
    return x, torch.float8_e4m3fn, None


def _check_large(before, after, results, device) -> None:
    q, scale = results
    assert scale.item() == 2.0**-7, "elements behind 2^31 are not read"
    assert (q[:1].float().item(), q[-1:].float().item()) == (64.0, 384.0), "elements behind 2^31 are not written"


# ----- the race ---------------------------------------------------------------


def sizes(op: str, few: bool):
    """By rows, and by one scale."""
    return {
        f"{rows} x {columns}, {'one scale' if axis is None else 'by rows'}": functools.partial(_racing, rows, columns, axis)
        for rows, columns in _RACES[few]
        for axis in (-1, None)
    }


def _racing(rows: int, columns: int, axis: int | None, backend, device) -> tuple:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn((rows, columns), generator=generator, dtype=f32, device=device), torch.float8_e4m3fn, axis
