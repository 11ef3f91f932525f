# SPDX-License-Identifier: Apache-2.0
"""Cases of the updates: one tensor and 300, at odd addresses, every dtype of gradients, skipped, clipped, amsgrad."""

import functools
import math

import numpy as np
import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.common.multi_tensor import CLIP_EPS
from mpkernels.ops.optimizer_update import reference
from mpkernels.testing import bounds
from mpkernels.testing.step_cases import (
    ADAM,
    MAX_NORM,
    NORM,
    SCALE,
    SIZES,
    STEP,
    bf16,
    f16,
    f32,
    f64,
    put,
    scalar,
    values,
    variants,
)

LR = 2.0**-6


def _update_variants(few: bool):
    """Sizes, dtypes of gradients, masters and moments, and how the step ends."""
    found = [(f"{name}, {dtype}", lengths, (dtype, f32, f32)) for name, lengths, dtype in variants(few)]
    lengths = SIZES["several tensors"]
    found += [("fp64 masters", lengths, (f32, f64, f64)), ("bf16 moments", lengths, (f16, f32, bf16))]
    for i, (name, lengths, dtypes) in enumerate(found):
        for ending in ("plain", "clipped", "skipped"):
            yield f"{name}, {ending}", lengths, dtypes, ending, i


def _endings(ending: str, memory) -> tuple:
    """grad_scale, found_inf, grad_norm, max_norm."""
    found = math.nan if ending == "skipped" else 0.0
    norm, max_norm = (scalar(memory, NORM, f64), MAX_NORM) if ending == "clipped" else (None, None)
    return scalar(memory, SCALE), scalar(memory, found), norm, max_norm


def _factor(ending: str) -> float:
    return (MAX_NORM / (NORM + CLIP_EPS) if ending == "clipped" else 1.0) / SCALE


def _lists(lengths, dtypes, i: int, memory, random):
    """Masters, gradients times the loss scale, and copies: 16-bit, or none where the gradient is fp32."""
    grad_dtype, master_dtype, _ = dtypes
    masters = [value.to(master_dtype) / 3 for value in values(lengths, random)]
    grads = [(g * SCALE).to(grad_dtype) for g in values(lengths, random)]
    none = torch.empty(0, dtype=f16, device="cpu")
    copies = [cast(w, f16 if i % 2 else bf16) if grad_dtype != f32 else none for w in masters]
    return put(memory, masters), put(memory, grads), put(memory, copies)


def _states(lengths, dtypes, memory, random, squared: bool = False) -> list[torch.Tensor]:
    moments = values(lengths, random)
    return put(memory, [(value.square() if squared else value).to(dtypes[2]) for value in moments])


def _check_copies(masters, copies) -> None:
    for master, copy in zip(masters, copies, strict=True):
        assert not copy.numel() or torch.equal(copy, cast(master, copy.dtype)), "a copy is not its master rounded"


def _wide(tensors) -> np.ndarray:
    """In fp64, or wider where they are fp64 themselves."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).double().numpy(force=True)
    return flat.astype(np.longdouble) if tensors[0].dtype == f64 else flat


def _check_state(got, exact, magnitude, nearest: bool, arithmetic: torch.dtype) -> None:
    """A moment: rounded once where it is bf16."""
    if got[0].dtype == bf16:
        bounds.check_moment(_wide(got), exact, magnitude, nearest, arithmetic)
    else:
        bounds.check_stepped(_wide(got), exact, magnitude, arithmetic)


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
    steps = [scalar(memory, STEP) for _ in lengths]
    lr = scalar(memory, LR, f64)
    numbers = (*ADAM.values(), options["decoupled"], options["maximize"])
    return (
        masters, grads, exp_avgs, exp_avg_sqs, largest if options["amsgrad"] else [], copies, steps, lr, *numbers,
        *_endings(ending, memory),
    )  # fmt: skip


def _check_adamw(ending, options, before, after, results, device) -> None:
    if ending == "skipped":
        return _check_skipped(before, after)
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
    steps = [scalar(memory, STEP) for _ in lengths]
    numbers = (options["momentum"], options["dampening"], ADAM["weight_decay"], options["nesterov"], options["maximize"])
    return masters, grads, buffers, copies, steps, scalar(memory, LR, f64), *numbers, *_endings(ending, memory)


def _check_sgd(ending, options, before, after, results, device) -> None:
    if ending == "skipped":
        return _check_skipped(before, after)
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


def lion(few: bool, full: bool):
    for name, lengths, dtypes, ending, i in _update_variants(few):
        yield (
            name,
            {
                "arguments": functools.partial(_lion_arguments, lengths, dtypes, ending, i),
                "check": functools.partial(_check_lion, ending, i % 3 == 1),
                "written": (0, 2, 3, 4),
            },
        )


def _lion_arguments(lengths, dtypes, ending, i, memory, random) -> tuple:
    masters, grads, copies = _lists(lengths, dtypes, i, memory, random)
    exp_avgs, steps = _states(lengths, dtypes, memory, random), [scalar(memory, STEP) for _ in lengths]
    numbers = (ADAM["beta1"], ADAM["beta2"], ADAM["weight_decay"], i % 3 == 1)
    return masters, grads, exp_avgs, copies, steps, scalar(memory, LR, f64), *numbers, *_endings(ending, memory)


def _check_lion(ending, maximize, before, after, results, device) -> None:
    if ending == "skipped":
        return _check_skipped(before, after)
    w, g, m = map(_wide, before[:3])
    g, beta1, beta2 = g * _factor(ending) * (-1 if maximize else 1), ADAM["beta1"], ADAM["beta2"]
    arithmetic, decay = after[0][0].dtype, 1 - LR * ADAM["weight_decay"]
    direction, size = beta1 * m + (1 - beta1) * g, beta1 * np.abs(m) + (1 - beta1) * np.abs(g)
    bounds.check_sign_step(_wide(after[0]), w, direction, size, LR, decay, arithmetic)
    _check_state(after[2], beta2 * m + (1 - beta2) * g, np.abs(m) + np.abs(g), False, arithmetic)
    _check_copies(after[0], after[3])
    _check_counted(after[4])
