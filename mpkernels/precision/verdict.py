# SPDX-License-Identifier: Apache-2.0
"""What the numbers of one layer under one policy mean: whether it stays in range, and the sentence that says why not."""

import math

import torch

from mpkernels.policy import dtype_name
from mpkernels.precision.layer import BACKWARD, FORWARD, PolicyRow
from mpkernels.precision.ranges import Range

MOST_NORM_LOST = 0.01  # of a gradient's norm, rounded to 0


def problem(row: PolicyRow, loss_scale: float) -> str | None:
    """What leaves the range of its format, the first in the order of forward and backward; None where nothing does."""
    for name in (*FORWARD, *BACKWARD):
        if (found := row.range.get(name)) is not None and (sentence := _problem(name, found, row, loss_scale)) is not None:
            return sentence
    return None


def _problem(name: str, found: Range, row: PolicyRow, loss_scale: float) -> str | None:
    backward = name in BACKWARD
    where = f"in backward at loss scale {loss_scale:g}" if backward else "in forward"
    if math.isnan(found.amax):
        return f"{name} has NaN {where}, which no format mends"
    if found.amax == math.inf:
        return f"{name} has inf {where} in the dtype that the model is stored in, which no format mends"
    if found.overflows:
        safe = row.max_loss_scale
        remedy = f"; a loss scale of {safe:g} is safe for it" if backward and safe is not None else ""
        return f"{name} reaches {found.amax:.3g} {where}, {dtype_name(found.format)} ends at {_end(found.format)}{remedy}"
    if backward and found.norm_lost >= MOST_NORM_LOST:
        info = torch.finfo(found.format)
        safe = row.max_loss_scale
        remedy = (
            f"; its gradients stay in range up to a loss scale of {safe:g}" if safe is not None and safe > loss_scale else ""
        )
        lost = f"loses {100 * found.norm_lost:.3g} % of its norm to 0 {where} (amax {found.amax:.3g})"
        if found.scaling is not None:
            return f"{name} {lost}, below what {dtype_name(found.format)} holds with {_scales(found)}"
        return f"{name} {lost}, {dtype_name(found.format)} begins at {info.tiny * info.eps:.3g}{remedy}"
    return None


def addition(row: PolicyRow) -> str:
    """What the layer adds to the loss."""
    if row.noise is None or row.loss_change is None:
        return "no gradient came to it, so that what it adds to the loss is unknown"
    adds = f"adds {row.loss_change:.1e} to the loss, give or take {row.noise:.1e}"
    if not row.policy.float8:
        return adds
    errors = ", ".join(f"{name} {100 * error:.2g} %" for name, error in row.error.items())
    return f"{adds}; errors with {_scales(row.range['x'])}: {errors}"


def tightest(row: PolicyRow) -> str:
    """The tensor that has the least room in its format."""
    name, found = min(row.range.items(), key=lambda item: item[1].margin_bits)
    where = "backward" if name in BACKWARD else "forward"
    ends = f"has {_scales(found)}" if found.scaling is not None else f"ends at {_end(found.format)}"
    return f"{name} reaches {found.amax:.3g} in {where}, {dtype_name(found.format)} {ends}"


def _scales(found: Range) -> str:
    return "a scale per row" if found.scaling == "row" else "one scale for the tensor"


def _end(dtype: torch.dtype) -> str:
    largest = torch.finfo(dtype).max
    return f"{largest:.0f}" if largest < 1e6 else f"{largest:.3g}"
