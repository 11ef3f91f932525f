# SPDX-License-Identifier: Apache-2.0
"""Cases of the step's ops: one tensor and 300, at odd addresses, every dtype of gradients, skipped, clipped, amsgrad."""

import functools
import math

import numpy as np
import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.common.multi_tensor import CLIP_EPS
from mpkernels.testing import bounds

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SCALE, NORM, MAX_NORM = 1024.0, 4.0, 1.0  # loss scale, norm of the gradients and what it is clipped to
SIZES = {  # numbers of elements, by name
    "one tensor": (100_003,),
    "several tensors": (1, 7, 0, 31, 1000, 4097),
    "300 tensors": tuple(1 + 37 * i % 601 for i in range(300)),
}
_RACES = {True: (1_000, 10_000), False: (100_000, 1_000_000, 4_000_000, 10_000_000)}  # in 1 GB
_RACING_TENSORS = 30


def _variants(few: bool):
    names = ("several tensors",) if few else ("one tensor", "several tensors")
    found = [(name, SIZES[name], dtype) for name in names for dtype in (f16, bf16, f32)]
    return found if few else [*found, ("300 tensors", SIZES["300 tensors"], f16)]


def _values(lengths, random, scale: float = 1.0) -> list[torch.Tensor]:
    return [torch.randn((n,), generator=random, dtype=f32, device="cpu") * scale for n in lengths]


def _put(memory, tensors, shift: int = 1) -> list[torch.Tensor]:
    """Every second one at an odd multiple of its element's size."""
    return [memory.put(tensor, shift=shift * (i % 2)) for i, tensor in enumerate(tensors)]


def _scalar(memory, value: float, dtype: torch.dtype = f32) -> torch.Tensor:
    return memory.put(torch.full((), value, dtype=dtype, device="cpu"))


# ----- grad_stats_ ---------------------------------------------------------------


def grad_stats(few: bool, full: bool):
    for name, lengths, dtype in _variants(few):
        for bad in (None, math.inf, math.nan):
            yield (
                f"{name}, {dtype}, {'finite' if bad is None else bad}",
                {
                    "arguments": functools.partial(_stats_arguments, lengths, dtype, bad),
                    "check": _check_stats,
                    "written": (2, 3, 4, 5),
                },
            )
    if full:
        yield (
            "more than 2^31 elements",
            {
                "arguments": _large_stats_arguments,
                "check": _check_large_stats,
                "written": (2, 3, 4, 5),
            },
        )


def _stats_arguments(lengths, dtype, bad, memory, random) -> tuple:
    grads = [value.to(dtype) for value in _values(lengths, random)]
    if bad is not None:
        grads[-1][-1] = bad
    return _put(memory, grads), _scalar(memory, SCALE), *_answers(memory, len(grads))


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
    return [grad], _scalar(memory, 1.0), *_answers(memory, 1)


def _check_large_stats(before, after, results, device) -> None:
    _, _, found_inf, amax, nonfinite, grad_norm = after
    assert (bool(found_inf), amax.tolist(), nonfinite.tolist()) == (False, [3.0], [0]), "elements behind 2^31 are not read"
    bounds.check_norm(grad_norm.item(), math.sqrt((2**31 + 7) * 0.25 + 9), 2**31 + 8)


# ----- adamw_ and sgd_ ---------------------------------------------------------------


def _update_variants(few: bool):
    """Sizes, dtypes of gradients, masters and moments, and how the step ends."""
    found = [(f"{name}, {dtype}", lengths, (dtype, f32, f32)) for name, lengths, dtype in _variants(few)]
    lengths = SIZES["several tensors"]
    found += [("fp64 masters", lengths, (f32, f64, f64)), ("bf16 moments", lengths, (f16, f32, bf16))]
    for i, (name, lengths, dtypes) in enumerate(found):
        for ending in ("plain", "clipped", "skipped"):
            yield f"{name}, {ending}", lengths, dtypes, ending, i


def _endings(ending: str, memory) -> tuple:
    """grad_scale, found_inf, grad_norm, max_norm."""
    found = math.nan if ending == "skipped" else 0.0
    norm, max_norm = (_scalar(memory, NORM, f64), MAX_NORM) if ending == "clipped" else (None, None)
    return _scalar(memory, SCALE), _scalar(memory, found), norm, max_norm


def _factor(ending: str) -> float:
    return (MAX_NORM / (NORM + CLIP_EPS) if ending == "clipped" else 1.0) / SCALE


def _lists(lengths, dtypes, i: int, memory, random):
    """Masters, gradients times the loss scale, and copies: 16-bit, or none where the gradient is fp32."""
    grad_dtype, master_dtype, _ = dtypes
    masters = [value.to(master_dtype) / 3 for value in _values(lengths, random)]
    grads = [(g * SCALE).to(grad_dtype) for g in _values(lengths, random)]
    none = torch.empty(0, dtype=f16, device="cpu")
    copies = [cast(w, f16 if i % 2 else bf16) if grad_dtype != f32 else none for w in masters]
    return _put(memory, masters), _put(memory, grads), _put(memory, copies)


def _states(lengths, dtypes, memory, random, squared: bool = False) -> list[torch.Tensor]:
    values = _values(lengths, random)
    return _put(memory, [(value.square() if squared else value).to(dtypes[2]) for value in values])


def _check_copies(masters, copies) -> None:
    for master, copy in zip(masters, copies, strict=True):
        assert not copy.numel() or torch.equal(copy, cast(master, copy.dtype)), "a copy is not its master rounded"


def _wide(tensors) -> np.ndarray:
    """In fp64, or wider where they are fp64 themselves."""
    values = torch.cat([tensor.flatten() for tensor in tensors]).double().numpy(force=True)
    return values.astype(np.longdouble) if tensors[0].dtype == f64 else values


def _check_state(got, exact, magnitude, nearest: bool, arithmetic: torch.dtype) -> None:
    """A moment: rounded once where it is bf16."""
    if got[0].dtype == bf16:
        bounds.check_moment(_wide(got), exact, magnitude, nearest, arithmetic)
    else:
        bounds.check_stepped(_wide(got), exact, magnitude, arithmetic)


STEP = 3.0  # taken before
ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}
LR = 2.0**-6


def adamw(few: bool, full: bool):
    for name, lengths, dtypes, ending, i in _update_variants(few):
        options = {"decoupled": i % 3 != 2, "maximize": i % 3 == 1, "amsgrad": i % 2 == 1}
        yield (
            name,
            {
                "arguments": functools.partial(_adamw_arguments, lengths, dtypes, ending, i, options),
                "check": functools.partial(_check_adamw, ending, options),
                "written": (0, 2, 3, 4, 5, 6),
            },
        )


def _adamw_arguments(lengths, dtypes, ending, i, options, memory, random) -> tuple:
    masters, grads, copies = _lists(lengths, dtypes, i, memory, random)
    exp_avgs = _states(lengths, dtypes, memory, random)
    exp_avg_sqs, largest = (_states(lengths, dtypes, memory, random, squared=True) for _ in range(2))
    steps = [_scalar(memory, STEP) for _ in lengths]
    lr = _scalar(memory, LR, f64)
    values = (*ADAM.values(), options["decoupled"], options["maximize"])
    return (
        masters, grads, exp_avgs, exp_avg_sqs, largest if options["amsgrad"] else [], copies, steps, lr, *values,
        *_endings(ending, memory),
    )  # fmt: skip


def _check_adamw(ending, options, before, after, results, device) -> None:
    if ending == "skipped":
        return _check_skipped(before, after)
    from mpkernels.ops.adamw import reference

    w, g, m, v, vmax = (_wide(tensors) if tensors else None for tensors in before[:5])
    g = g * _factor(ending)
    how = {"decoupled": options["decoupled"], "maximize": options["maximize"]}
    exact = reference.adamw(w, g, m, v, vmax, STEP + 1, lr=LR, **ADAM, **how)
    size = np.abs(g) + (0 if options["decoupled"] else ADAM["weight_decay"] * np.abs(w))
    largest = exact[3] if options["amsgrad"] else exact[2]
    root = np.sqrt(largest) / math.sqrt(1 - ADAM["beta2"] ** (STEP + 1)) + ADAM["eps"]
    moved = LR / (1 - ADAM["beta1"] ** (STEP + 1)) * (np.abs(m) + size) / root
    arithmetic = after[0][0].dtype
    bounds.check_stepped(_wide(after[0]), exact[0], np.abs(w) + moved, arithmetic)
    _check_state(after[2], exact[1], np.abs(m) + size, True, arithmetic)
    _check_state(after[3], exact[2], v + size**2, False, arithmetic)
    if vmax is not None:
        _check_state(after[4], exact[3], np.maximum(vmax, v + size**2), True, arithmetic)
    _check_copies(after[0], after[5])
    _check_counted(after[6])


def _check_counted(steps) -> None:
    assert all(step.item() == STEP + 1 for step in steps), "a step was not counted"
    return None


def _check_skipped(before, after) -> None:
    for a, b in zip(before, after, strict=True):
        if isinstance(a, list):
            assert all(map(torch.equal, a, b)), "a skipped step wrote"


def sgd(few: bool, full: bool):
    for name, lengths, dtypes, ending, i in _update_variants(few):
        options = {"nesterov": i % 2 == 1, "maximize": i % 3 == 1, "momentum": 0.9 if i % 3 != 2 else 0.0}
        options["dampening"] = 0.0 if options["nesterov"] or not options["momentum"] else 0.25
        options["nesterov"] &= options["momentum"] > 0
        yield (
            name,
            {
                "arguments": functools.partial(_sgd_arguments, lengths, dtypes, ending, i, options),
                "check": functools.partial(_check_sgd, ending, options),
                "written": (0, 2, 3, 4),
            },
        )


def _sgd_arguments(lengths, dtypes, ending, i, options, memory, random) -> tuple:
    masters, grads, copies = _lists(lengths, dtypes, i, memory, random)
    buffers = _states(lengths, dtypes, memory, random) if options["momentum"] else []
    steps = [_scalar(memory, STEP) for _ in lengths]
    values = (options["momentum"], options["dampening"], ADAM["weight_decay"], options["nesterov"], options["maximize"])
    return masters, grads, buffers, copies, steps, _scalar(memory, LR, f64), *values, *_endings(ending, memory)


def _check_sgd(ending, options, before, after, results, device) -> None:
    if ending == "skipped":
        return _check_skipped(before, after)
    from mpkernels.ops.sgd import reference

    w, g, buffer = (_wide(tensors) if tensors else None for tensors in before[:3])
    g = g * _factor(ending)
    exact = reference.sgd(w, g, buffer, STEP + 1, lr=LR, weight_decay=ADAM["weight_decay"], **options)
    size = np.abs(g) + ADAM["weight_decay"] * np.abs(w) + (0 if buffer is None else np.abs(buffer))
    arithmetic = after[0][0].dtype
    bounds.check_stepped(_wide(after[0]), exact[0], np.abs(w) + LR * 2 * size, arithmetic)
    if buffer is not None:
        _check_state(after[2], exact[1], size, True, arithmetic)
    _check_copies(after[0], after[3])
    _check_counted(after[4])


# ----- update_scale_ ---------------------------------------------------------------

SCALING = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=2, hysteresis=2, min_scale=2.0**-2, max_scale=2.0**6)


def update_scale(few: bool, full: bool):
    for scale in (2.0**-2, 2.0**5, 2.0**6):
        for tracker in (0, 1):
            for left in (1, 2):
                for found in (0.0, 1.0, math.nan):
                    state = (scale, tracker, left, 5, 1)
                    yield (
                        f"scale {scale}, {tracker} good steps, {left} left, found_inf {found}",
                        {
                            "arguments": functools.partial(_scale_arguments, state, found),
                            "check": functools.partial(_check_scale, state, found),
                            "written": (0, 1, 2, 3),
                        },
                    )


def _scale_arguments(state, found, memory, random) -> tuple:
    scale, tracker, left, *skipped = state
    counts = (_scalar(memory, tracker, torch.int32), _scalar(memory, left, torch.int32))
    skipped = memory.put(torch.tensor(skipped, dtype=torch.int64, device="cpu"))
    return _scalar(memory, scale), *counts, skipped, _scalar(memory, found), *SCALING.values()


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
    from mpkernels.testing.memory import Memory

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
    ending = (scalar(SCALE), scalar(0.0), scalar(NORM, f64), MAX_NORM)
    lr = scalar(2.0**-20, f64)
    if op == "sgd_":
        return masters, grads, first, copies, steps, lr, 0.9, 0.0, 0.0, False, False, *ending
    second = [value.square() for value in first]
    return masters, grads, first, second, [], copies, steps, lr, *ADAM.values(), True, False, *ending
