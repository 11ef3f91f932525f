# SPDX-License-Identifier: Apache-2.0
"""Cases of the updates: one tensor and 300, at odd addresses, every dtype of gradients, skipped, clipped, amsgrad."""

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.common.multi_tensor import CLIP_EPS
from mpkernels.ops.optimizer_update import reference
from mpkernels.testing import bounds
from mpkernels.testing.case import Case
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
)  # fmt: skip

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


def wide(tensors) -> np.ndarray:
    """In fp64, or wider where they are fp64 themselves."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).double().numpy(force=True)
    return flat.astype(np.longdouble) if tensors[0].dtype == f64 else flat


def _check_state(got, exact, magnitude, nearest: bool, arithmetic: torch.dtype) -> None:
    """A moment: rounded once where it is bf16."""
    if got[0].dtype == bf16:
        bounds.check_moment(wide(got), exact, magnitude, nearest, arithmetic)
    else:
        bounds.check_stepped(wide(got), exact, magnitude + bounds.least_subnormal(arithmetic), arithmetic)


def _case(name, lengths, dtypes, ending, i, check: Callable, states: tuple[bool | None, ...], options: dict) -> Case:
    """states: whether the values of each list are squares, None where it is empty. options: the numbers of the op, in order."""
    arguments = functools.partial(_arguments, lengths, dtypes, ending, i, states, options)
    checked = functools.partial(_check, ending, check, len(states), options)
    return Case(name, arguments, checked, (0, *range(2, 4 + len(states))))


def _arguments(lengths, dtypes, ending, i, states, options, memory, random) -> tuple:
    masters, grads, copies = _lists(lengths, dtypes, i, memory, random)
    moments = []
    for squared in states:
        values_of = [value.square() if squared else value for value in values(lengths, random)]
        moments.append([] if squared is None else put(memory, [value.to(dtypes[2]) for value in values_of]))
    steps, lr = [scalar(memory, STEP) for _ in lengths], scalar(memory, LR, f64)
    return masters, grads, *moments, copies, steps, lr, *options.values(), *_endings(ending, memory)


def _check(ending, check, count, options, before, after, results, device) -> None:
    if ending == "skipped":
        for a, b in zip(before, after, strict=True):
            assert not isinstance(a, list) or all(map(torch.equal, a, b)), "a skipped step wrote"
        return
    w, g, *states = (wide(tensors) if tensors else None for tensors in before[: 2 + count])
    check({"lr": LR, **options}, w, g * _factor(ending), states, after)
    for master, copy in zip(after[0], after[2 + count], strict=True):
        assert not copy.numel() or torch.equal(copy, cast(master, copy.dtype)), "a copy is not its master rounded"
    assert all(step.item() == STEP + 1 for step in after[3 + count]), "a step was not counted"


# ----- the rules ---------------------------------------------------------------
#
# check(options, w, g, states, after): AssertionError where the step after STEP others is wrong. w, g, states: `wide` before it,
# g unscaled and clipped, None for an empty list. after: masters, gradients and states.


def adamw(few: bool, full: bool) -> Iterator[Case]:
    for *variant, i in _update_variants(few):
        options = ADAM | {"decoupled": i % 3 != 2, "maximize": i % 3 == 1}
        yield _case(*variant, i, check_adamw, (False, True, True if i % 2 else None), options)


def check_adamw(options, w, g, states, after) -> None:
    m, v, vmax = states
    exact = reference.adamw(w, g, m, v, vmax, STEP + 1, **options)
    size = np.abs(g) + (0 if options["decoupled"] else options["weight_decay"] * np.abs(w))
    root = np.sqrt(exact[2] if vmax is None else exact[3]) / math.sqrt(1 - options["beta2"] ** (STEP + 1)) + options["eps"]
    moved = options["lr"] / (1 - options["beta1"] ** (STEP + 1)) * (np.abs(m) + size) / root
    arithmetic = after[0][0].dtype
    bounds.check_stepped(wide(after[0]), exact[0], np.abs(w) + moved, arithmetic)
    _check_state(after[2], exact[1], np.abs(m) + size, True, arithmetic)
    _check_state(after[3], exact[2], v + size**2, False, arithmetic)
    if vmax is not None:
        _check_state(after[4], exact[3], np.maximum(vmax, v + size**2), True, arithmetic)


def sgd(few: bool, full: bool) -> Iterator[Case]:
    for *variant, i in _update_variants(few):
        momentum = 0.9 if i % 3 != 2 else 0.0
        dampening, nesterov = 0.0 if i % 2 or not momentum else 0.25, bool(i % 2 and momentum)
        options = dict(momentum=momentum, dampening=dampening, weight_decay=ADAM["weight_decay"], nesterov=nesterov)
        yield _case(*variant, i, check_sgd, (False if momentum else None,), options | {"maximize": i % 3 == 1})


def check_sgd(options, w, g, states, after) -> None:
    (buffer,), arithmetic = states, after[0][0].dtype
    exact = reference.sgd(w, g, buffer, STEP + 1, **options)
    size = np.abs(g) + options["weight_decay"] * np.abs(w) + (0 if buffer is None else np.abs(buffer))
    bounds.check_stepped(wide(after[0]), exact[0], np.abs(w) + options["lr"] * 2 * size, arithmetic)
    if buffer is not None:
        _check_state(after[2], exact[1], size, True, arithmetic)


def lion(few: bool, full: bool) -> Iterator[Case]:
    for *variant, i in _update_variants(few):
        options = {name: ADAM[name] for name in ("beta1", "beta2", "weight_decay")} | {"maximize": i % 3 == 1}
        yield _case(*variant, i, check_lion, (False,), options)


def check_lion(options, w, g, states, after) -> None:
    (m,), lr, beta1, beta2 = states, options["lr"], options["beta1"], options["beta2"]
    g = -g if options["maximize"] else g
    arithmetic, decay = after[0][0].dtype, 1 - lr * options["weight_decay"]
    direction, size = beta1 * m + (1 - beta1) * g, beta1 * np.abs(m) + (1 - beta1) * np.abs(g)
    bounds.check_sign_step(wide(after[0]), w, direction, size, lr, decay, arithmetic)
    _check_state(after[2], beta2 * m + (1 - beta2) * g, np.abs(m) + np.abs(g), False, arithmetic)
