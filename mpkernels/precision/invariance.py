# SPDX-License-Identifier: Apache-2.0
"""check_batch_invariant: whether a row has the same bits whatever the other rows are and however many."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mpkernels.precision.capture import check_is_module, hooked, mapped, tensors_of
from mpkernels.precision.report import Report
from mpkernels.precision.tables import described, shown
from mpkernels.runtime.untouched import call, untouched

SIZES = (1, 2, 3, 7, 17, 33)


def check_batch_invariant(model: nn.Module, x: Any, *, sizes: Iterable[int] = SIZES) -> Report:
    """Run `model` on all rows of `x` and on the first M of them, for each M, and compare the rows bit for bit.

    x: a tensor (n, ...), a tuple of arguments or a dict of keyword arguments; tensors whose first dimension is that of the
    first tensor are cut to M rows, others given whole. sizes: natural numbers; those of n rows and more are left out.
    The report names the first module, in the order in which modules ended, of which a row has other bits, and the smallest
    such M. A result is compared along the one dimension that grows with the rows; what has none (a mean) is not.
    The model runs in its own mode, without gradients, and stays what it was: buffers, hooks, random numbers.
    Raises TypeError for what is no module, ValueError for `sizes` and for an `x` of one row or nested, RuntimeError where a
    dropout is on, which no two runs agree under, and where no result has rows.
    """
    check_is_module("check_batch_invariant", model)
    x = dict(x) if isinstance(x, Mapping) else x  # a tokenizer's is of another class
    n = _rows(x)
    given, sizes = sizes, tuple(sizes) if isinstance(sizes, Iterable) else ()
    if not isinstance(given, Iterable) or not all(isinstance(m, int) and not isinstance(m, bool) and m > 0 for m in sizes):
        raise ValueError(f"check_batch_invariant: sizes must be several natural numbers, got {given!r}")
    chosen = sorted(m for m in set(sizes) if m < n)
    if not chosen:
        raise ValueError(f"check_batch_invariant: x has {n} rows, and none of the sizes {sizes} is smaller")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise RuntimeError(f"check_batch_invariant: {shown(name)} is a dropout that is on: call model.eval() first")
    most = chosen[-1]
    with untouched(model), torch.no_grad():
        whole = _first_rows(call(model, x), n, most)
        inside = _run_hooked(model, x, n, most)
        for m in chosen:
            part = _cut(x, n, m)
            seen = _run_hooked(model, part, m, m)
            for (name, expected), (_, found) in zip(inside, seen, strict=False):
                if False in map(_same_rows, expected, found):
                    return _differs(model, name, m, n)
            compared = list(map(_same_rows, whole, _first_rows(call(model, part), m, m)))
            if False in compared:
                return _differs(model, "", m, n)
            if True not in compared:
                raise RuntimeError("check_batch_invariant: no tensor that the model returns has a dimension of rows")
    listed = ", ".join(map(str, chosen))
    return Report(True, f"batch invariant: the first {listed} of {n} rows alone have the bits that they have among all")


def _differs(model: nn.Module, name: str, m: int, n: int) -> Report:
    module = model.get_submodule(name)
    policy = getattr(module, "policy", None)
    remedy = ""
    if isinstance(module, nn.Linear) and not (policy is not None and policy.batch_invariant):
        remedy = '; mpk.convert(model, "<policy>,batch_invariant") makes linears so'
    what = described(name, module)
    message = f"not batch invariant: {what} gives the first {m} of {n} rows other bits than alone{remedy}"
    return Report(False, message, name, "forward", m)


def _run_hooked(model: nn.Module, x: Any, n: int, most: int) -> list[tuple[str, list]]:
    """(name, first rows of what it returned) of each call of a module, in the order in which they ended."""
    found: list[tuple[str, list]] = []

    def register(name: str, module: nn.Module) -> list:
        return [module.register_forward_hook(lambda _, __, out: found.append((name, _first_rows(out, n, most))))]

    with hooked(model, register):
        call(model, x)
    return found


def _rows(x: Any) -> int:
    for tensor in tensors_of(x):
        if tensor.is_nested:
            raise ValueError("check_batch_invariant: x is a nested tensor, which cannot be cut to fewer rows: give a dense one")
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError("check_batch_invariant: x has no tensor with a dimension")


def _cut(x: Any, n: int, m: int) -> Any:
    return mapped(lambda t: t[:m] if t.dim() and t.shape[0] == n else t, x)


def _first_rows(out: Any, n: int, most: int) -> list[tuple[tuple[int, ...], list | None]]:
    """Of each tensor of a result for n rows: its shape, and for each dimension that they may lie in the first `most`."""
    found = []
    for t in tensors_of(out):
        dims = [d for d, size in enumerate(t.shape) if size and size % n == 0]
        rows = [(d, t.narrow(d, 0, t.shape[d] // n * most).clone()) for d in dims]
        found.append(((n, *t.shape), rows or None))
    return found


def _same_rows(expected: tuple, found: tuple) -> bool | None:
    """Whether the rows of a result for fewer rows have the bits that they have among all; None where there are none."""
    (n, *shape), (m, *part) = expected[0], found[0]
    if len(shape) != len(part):
        return None
    grown = [d for d in range(len(shape)) if shape[d] * m == part[d] * n and shape[d] != part[d]]
    if len(grown) != 1 or any(shape[d] != part[d] for d in range(len(shape)) if d not in grown):
        return None
    d, ours, theirs = grown[0], dict(expected[1] or ()), dict(found[1] or ())
    if d not in ours:  # nor is it in theirs
        return None
    a, b = ours[d].narrow(d, 0, part[d]), theirs[d]
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(t: torch.Tensor) -> torch.Tensor:
    """Its bits as integers: -0 is not 0, and a NaN is itself."""
    return t.contiguous().view(_INTEGERS[t.dtype.itemsize]) if t.dtype.is_floating_point else t
