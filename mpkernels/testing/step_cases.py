# SPDX-License-Identifier: Apache-2.0
"""Cases of grad_stats_ and update_scale_: one tensor and 300, at odd addresses, every dtype of gradients."""

import functools
import itertools
import math
from collections.abc import Iterator

import torch

from mpkernels.testing import bounds
from mpkernels.testing.case import Case
from mpkernels.testing.memory import Memory

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SCALE, NORM, MAX_NORM = 1024.0, 4.0, 1.0  # loss scale, norm of the gradients and what it is clipped to
SIZES = {  # numbers of elements, by name
    "one tensor": (100_003,),
    "several tensors": (1, 7, 0, 31, 1000, 4097),
    "300 tensors": tuple(1 + 37 * i % 601 for i in range(300)),
}
STEP = 3.0  # taken before
ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
_RACES = {True: (1_000, 10_000), False: (100_000, 1_000_000, 4_000_000, 10_000_000)}  # in 1 GB
_RACING_TENSORS = 30


def variants(few: bool):
    names = ("several tensors",) if few else ("one tensor", "several tensors")
    found = [(name, SIZES[name], dtype) for name in names for dtype in (f16, bf16, f32)]
    return found if few else [*found, ("300 tensors", SIZES["300 tensors"], f16)]


def values(lengths, random, scale: float = 1.0) -> list[torch.Tensor]:
    return [torch.randn((n,), generator=random, dtype=f32, device="cpu") * scale for n in lengths]


def put(memory, tensors, shift: int = 1) -> list[torch.Tensor]:
    """Every second one at an odd multiple of its element's size."""
    return [memory.put(tensor, shift=shift * (i % 2)) for i, tensor in enumerate(tensors)]


def scalar(memory, value: float, dtype: torch.dtype = f32) -> torch.Tensor:
    return memory.put(torch.full((), value, dtype=dtype, device="cpu"))


# ----- grad_stats_ ---------------------------------------------------------------


def grad_stats(few: bool, full: bool) -> Iterator[Case]:
    for name, lengths, dtype in variants(few):
        for bad in (None, math.inf, math.nan):
            arguments = functools.partial(_stats_arguments, lengths, dtype, bad)
            yield Case(f"{name}, {dtype}, {'finite' if bad is None else bad}", arguments, _check_stats, (2, 3, 4, 5))
    if full:
        yield Case("more than 2^31 elements", _large_stats_arguments, _check_large_stats, (2, 3, 4, 5))


def _stats_arguments(lengths, dtype, bad, memory, random) -> tuple:
    grads = [value.to(dtype) for value in values(lengths, random)]
    if bad is not None:
        grads[-1][-1] = bad
    return put(memory, grads), scalar(memory, SCALE), *_answers(memory, len(grads))


def _answers(memory, count: int) -> tuple:
    """Poisoned: found_inf, amax, nonfinite, grad_norm."""
    shapes = (((), f32), ((count,), f64), ((count,), torch.int64), ((), f64))
    return tuple(memory.allocate(shape, (1,) * len(shape), dtype) for shape, dtype in shapes)


def _check_stats(before, after, results, device) -> None:
    from mpkernels.ops.grad_stats import reference

    grads, grad_scale, found_inf, amax, nonfinite, grad_norm = after
    exact = reference.grad_stats([grad.cpu() for grad in grads], grad_scale.item())
    values, counts = amax.tolist(), nonfinite.tolist()
    for i, count in enumerate(counts):
        if device.type == "cuda" and count == -1 and math.isnan(values[i]) and exact[2][i]:  # as the op says of eager
            values[i], counts[i] = exact[1][i], exact[2][i]
    got = (bool(found_inf), values, counts)
    assert got == exact[:3], f"found_inf, amax, nonfinite are {got!s:.200}, in fp64 {exact[:3]!s:.200}"
    if not exact[0]:
        in_fp32 = any(grad.is_cpu and grad.dtype.itemsize == 2 for grad in grads)  # as eager sums there
        bounds.check_norm(grad_norm.item(), exact[3], sum(map(torch.Tensor.numel, grads)), in_fp32)


def _large_stats_arguments(memory, random) -> tuple:
    count = 2**31 + 8
    grad = memory.allocate((count,), (1,), f16).fill_(0.5)
    grad[-1] = 3.0
    return [grad], scalar(memory, 1.0), *_answers(memory, 1)


def _check_large_stats(before, after, results, device) -> None:
    _, _, found_inf, amax, nonfinite, grad_norm = after
    assert (bool(found_inf), amax.tolist(), nonfinite.tolist()) == (False, [3.0], [0]), "elements behind 2^31 are not read"
    bounds.check_norm(grad_norm.item(), math.sqrt((2**31 + 7) * 0.25 + 9), 2**31 + 8)


# ----- update_scale_ ---------------------------------------------------------------

SCALING = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=2, hysteresis=2, min_scale=2.0**-2, max_scale=2.0**6)


def update_scale(few: bool, full: bool) -> Iterator[Case]:
    for scale, tracker, left, found in itertools.product((2.0**-2, 2.0**5, 2.0**6), (0, 1), (1, 2), (0.0, 1.0, math.nan)):
        given = ((scale, tracker, left, 5, 1), found)
        yield Case(
            f"scale {scale}, {tracker} good steps, {left} left, found_inf {found}",
            functools.partial(_scale_arguments, *given), functools.partial(_check_scale, *given), (0, 1, 2, 3),
        )  # fmt: skip


def _scale_arguments(state, found, memory, random) -> tuple:
    scale, tracker, left, *skipped = state
    counts = (scalar(memory, tracker, torch.int32), scalar(memory, left, torch.int32))
    skipped = memory.put(torch.tensor(skipped, dtype=torch.int64, device="cpu"))
    return scalar(memory, scale), *counts, skipped, scalar(memory, found), *SCALING.values()


def _check_scale(state, found, before, after, results, device) -> None:
    from mpkernels.ops.update_scale.reference import Scale

    scale = Scale(*state)
    scale.update(found != 0, **SCALING)
    got = [tensor.tolist() for tensor in after[:4]]
    expected = [scale.scale, scale.growth_tracker, scale.hysteresis_left, [scale.skipped, scale.in_a_row]]
    assert got == expected, f"the state is {got}, expected {expected}"


# ----- the race ---------------------------------------------------------------


def sizes(op: str, few: bool):
    if op == "update_scale_":
        return {"one scale": _racing_scale}
    return {f"{n:.0e} elements".replace("e+0", "e"): functools.partial(_racing, op, n) for n in _RACES[few]}


def _racing_scale(backend, device) -> tuple:
    return _scale_arguments((2.0**5, 0, 2, 0, 0), 0.0, Memory(device), None)


def _racing(op: str, n: int, backend, device) -> tuple:
    """fp16 gradients and copies, fp32 masters, without an overflow."""
    generator = torch.Generator(device).manual_seed(0)
    lengths = [n // _RACING_TENSORS] * _RACING_TENSORS

    def values(dtype=f32):
        return [torch.randn((k,), generator=generator, dtype=f32, device=device).to(dtype) for k in lengths]

    def scalar(value, dtype=f32):
        return torch.full((), value, dtype=dtype, device=device)

    grads = values(f16)
    if op == "grad_stats_":
        amax = torch.zeros((len(grads),), dtype=f64, device=device)
        return grads, scalar(SCALE), scalar(0.0), amax, amax.long(), scalar(0.0, f64)
    masters, first = values(), values()
    copies = [master.to(f16) for master in masters]
    steps = [scalar(STEP) for _ in masters]
    states, numbers = {
        "adamw_": ((first, [value.square() for value in first], []), (*ADAM.values(), True, False)),
        "sgd_": ((first,), (0.9, 0.0, 0.0, False, False)),
        "lion_": ((first,), (0.9, 0.99, 0.0, False)),
    }[op]
    ending = (scalar(SCALE), scalar(0.0), scalar(NORM, f64), MAX_NORM)
    return masters, grads, *states, copies, steps, scalar(2.0**-20, f64), *numbers, *ending
