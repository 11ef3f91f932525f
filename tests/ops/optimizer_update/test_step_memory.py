# SPDX-License-Identifier: Apache-2.0
"""What the step ops write has memory of its own: all that shares or overlaps is refused before anything is written."""

import pytest
import torch

from tests.ops.optimizer_update.rules import RULES
from tests.steps import check_raises_unchanged, counts, scalar, step_counts, taken

ops = torch.ops.mpkernels
f64, i32, i64 = torch.float64, torch.int32, torch.int64


def update(name) -> dict:
    masters, grads = [torch.ones(6), torch.full((4,), 2.0)], [torch.ones(6), torch.ones(4).half()]
    return RULES[name].arguments(masters, grads, **RULES[name].busy)


def grad_stats() -> dict:
    outputs = dict(amax=torch.ones(2, dtype=f64), nonfinite=counts(2), grad_norm=scalar(0.0, dtype=f64))
    return dict(grads=[torch.ones(6), torch.ones(4, dtype=f64)], grad_scale=scalar(2.0), found_inf=scalar(7.0), **outputs)


def update_scale() -> dict:
    state = dict(growth_tracker=scalar(1, dtype=i32), hysteresis_tracker=scalar(1, dtype=i32), skipped=counts(2))
    options = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=3, hysteresis=1, min_scale=0.0, max_scale=1e30)
    return dict(grad_scale=scalar(8.0), **state, found_inf=scalar(0.0), **options)


def replaced(args, name, *values) -> dict:
    """The list `name` with these in it; None: what stands there."""
    return {name: [old if new is None else new for old, new in zip(args[name], values, strict=True)]}


def two(size, second) -> list[torch.Tensor]:
    """Tensors of 6 and 4 elements in one of `size`."""
    whole = torch.ones(size)
    return [whole[:6], whole[second : second + 4]]


SHARED = {
    "masters": (lambda a, m: {"masters": two(9, 5)}, r"masters\[\d\] shares memory with masters\[\d\]"),
    "moments": (lambda a, m: {m: two(9, 5)}, "{m}.* shares memory with {m}"),
    "moment and master": (lambda a, m: replaced(a, m, a["masters"][0], None), "shares memory"),
    "moment and copy": (lambda a, m: replaced(a, "copies", None, a[m][1]), "shares memory"),
    "copy and its master": (lambda a, m: replaced(a, "copies", a["masters"][0], None), "shares memory"),
    "copy and another master": (lambda a, m: replaced(a, "copies", None, a["masters"][0][1:5]), "shares memory"),
    "copy of another dtype": (lambda a, m: replaced(a, "copies", a["masters"][0].view(torch.half)[3:9], None), "shares"),
    "gradient and master": (lambda a, m: replaced(a, "grads", a["masters"][0], None), r"masters\[0\] .* with grads\[0\]"),
    "gradient and moment": (lambda a, m: replaced(a, "grads", None, a[m][1]), r"{m}\[1\] .* with grads\[1\]"),
    "gradient and count": (lambda a, m: replaced(a, "grads", a["steps"][1].expand(6), None), r"steps\[1\] .* with grads\[0\]"),
    "counts": (lambda a, m: {"steps": step_counts(1) * 2}, r"steps\[\d\] .* with steps\[\d\]"),
    "count and master": (lambda a, m: replaced(a, "steps", None, a["masters"][0][3]), "shares memory"),
    "lr and count": (lambda a, m: {"lr": a["steps"][1]}, r"steps\[1\] .* with lr"),
    "lr and master": (lambda a, m: {"lr": a["masters"][1][2]}, r"masters\[1\] .* with lr"),
    "scale and count": (lambda a, m: {"grad_scale": a["steps"][0]}, r"steps\[0\] .* with grad_scale"),
    "verdict and moment": (lambda a, m: {"found_inf": a[m][0][0]}, r"{m}\[0\] .* with found_inf"),
    "norm and master": (
        lambda a, m: {"max_norm": 1.0, "grad_norm": a["masters"][0][2:4].view(f64)[0]}, r"masters\[0\] .* with grad_norm"
    ),
    "every second, shifted by two": (
        lambda a, m: (lambda whole: {m: [whole[:12:2], whole[4:12:2]]})(torch.ones(16)), "{m}.* shares memory with {m}"
    ),
    "every second, shifted by one": (lambda a, m: (lambda whole: {m: [whole[:12:2], whole[5:13:2]]})(torch.ones(16)), None),
    "a master itself": (lambda a, m: replaced(a, "masters", None, torch.ones(1).expand(4)), r"masters\[1\] overlaps itself"),
    "a moment itself": (lambda a, m: replaced(a, m, torch.ones(1).expand(6), None), r"{m}\[0\] overlaps itself"),
    "a copy itself": (lambda a, m: replaced(a, "copies", torch.ones(1).expand(6), None), r"copies\[0\] overlaps itself"),
}  # fmt: skip
CASES = [(name, moment, what) for name, rule in RULES.items() for moment in rule.states for what in SHARED]


@pytest.mark.parametrize("name, moment, what", CASES, ids=[" ".join(c) for c in CASES])
def test_update_refuses_shared_memory(name, moment, what):
    """And takes what only looks shared, such as the columns of one matrix."""
    args, call = update(name), RULES[name].call
    change, message = SHARED[what]
    change = change(args, moment)
    if message is not None:
        return check_raises_unchanged(call, args, change, message.replace("{m}", moment))
    call(**args | change)
    assert taken(args["steps"]) == [1, 1]


def overlapping(n, dtype):
    return torch.ones(1, dtype=dtype).expand(n)


@pytest.mark.parametrize("change, message", [
    (lambda a: {"amax": overlapping(2, f64)}, "amax overlaps itself"),
    (lambda a: {"nonfinite": overlapping(2, i64)}, "nonfinite overlaps itself"),
    (lambda a: {"nonfinite": a["amax"].view(i64)}, r"amax shares memory with nonfinite|nonfinite shares memory with amax"),
    (lambda a: {"amax": a["grads"][1][1:3]}, r"amax shares memory with grads\[1\]"),
    (lambda a: {"grad_norm": a["amax"][1]}, "shares memory"),
    (lambda a: {"grad_norm": a["grads"][1][3]}, r"grad_norm shares memory with grads\[1\]"),
    (lambda a: {"found_inf": a["grads"][0][5]}, r"found_inf shares memory with grads\[0\]"),
    (lambda a: {"found_inf": a["grad_scale"]}, "found_inf shares memory with grad_scale"),
    (lambda a: {"found_inf": a["grad_norm"].view(1).view(torch.float32)[1]}, "shares memory"),
])  # fmt: skip
def test_grad_stats_refuses_shared_memory(change, message):
    args = grad_stats()
    check_raises_unchanged(ops.grad_stats_, args, change(args), message)


@pytest.mark.parametrize("change, message", [
    (lambda a: {"skipped": overlapping(2, i64)}, "skipped overlaps itself"),
    (lambda a: {"growth_tracker": a["hysteresis_tracker"]}, "shares memory"),
    (lambda a: {"found_inf": a["grad_scale"]}, "grad_scale shares memory with found_inf"),
    (lambda a: {"growth_tracker": a["skipped"].view(i32)[3]}, "shares memory"),
    (lambda a: {"hysteresis": 2**31}, "hysteresis must fit the tracker's int32, got 2147483648"),
])  # fmt: skip
def test_update_scale_refuses_shared_memory(change, message):
    args = update_scale()
    check_raises_unchanged(ops.update_scale_, args, change(args), message)


def test_shared_gradients_are_read():
    """Of what is only read anything may share: one gradient of all, expanded, as tied inputs give."""
    args = update("adamw")
    one = torch.ones(1)
    args["grads"] = [one.expand(6), one.expand(4)]
    ops.adamw_(**args)
    out = grad_stats() | dict(grads=[one.expand(6), one.expand(4), one[:0]], amax=torch.ones(3, dtype=f64), nonfinite=counts(3))
    ops.grad_stats_(**out)
    assert out["amax"].tolist() == [1, 1, 0]
