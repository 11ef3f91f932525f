# SPDX-License-Identifier: Apache-2.0
"""What a watch says of a step: a line per layer, and the layer in which inf or NaN began."""

import math
from dataclasses import dataclass

import torch

from mpkernels.precision.adapt import Change
from mpkernels.precision.report import Report
from mpkernels.precision.tables import shown, table
from mpkernels.precision.taps import GRAD_X, NOTHING, OUT, SCALE, Tap, first_fault


@dataclass(frozen=True)
class LayerAmax:
    """A layer in the report of a watch, in one step.

    out, grad_x: the largest magnitudes, of gradients times the loss scale; inf or NaN where one is, None where nothing came.
    room: how often the larger of the two may double before it leaves the format that the layer computes in. note: why the
    layer cannot be converted, "" where it can.
    """

    name: str
    policy: str
    out: float | None
    grad_x: float | None
    room: float | None
    note: str


@dataclass(frozen=True)
class WatchReport(Report):
    """Printed, a table with a line per layer.

    module, direction: of the first inf or NaN of the step; amax: of that layer's out, where it is in backward. loss_scale: None
    without a scaler. changes: all that adapt has made.
    """

    layers: tuple[LayerAmax, ...] = ()
    step: int = 0
    loss_scale: float | None = None
    changes: tuple[Change, ...] = ()


def sentence(taps: list[Tap], rows: list[list[float]], order: list[int]) -> str | None:
    """Where the first inf or NaN is; None where there is none."""
    fault = first_fault(rows, order)
    if fault is None:
        return None
    if fault.direction == "data":
        return f"in the data: {fault}"
    name = shown(taps[fault.row - 1].name)
    if fault.direction == "forward":
        return f"first in forward: {name} ({fault})"
    return f"first in backward: {name} ({fault}); its output was fine (amax {rows[fault.row][OUT]:.3g})"


def report(
    taps: list[Tap], rows: list[list[float]], order: list[int], step: int, changes: tuple[Change, ...]
) -> WatchReport:  # fmt: skip
    """rows: of step `step`, or of what has run where that is 0."""
    fault, layers = first_fault(rows, order), tuple(_layer(tap, rows[tap.row]) for tap in taps)
    scale = None if rows[0][SCALE] == NOTHING else rows[0][SCALE]
    head = (f"step {step}" if step else "so far") + ("" if scale is None else f" at loss scale {scale:g}")
    lines = [
        [shown(layer.name), layer.policy, _number(layer.out), _number(layer.grad_x), _bits(layer.room), layer.note]
        for layer in layers
    ]
    text = [f"{head}: {sentence(taps, rows, order) or 'every out and gradient is finite'}"]
    text.append(table(["layer", "policy", "out", "grad_x", "room", ""], lines, 2))
    text += [f"step {c.step}: {shown(c.layer)} from {c.before} to {c.after}: {c.why}" for c in changes]
    tap = taps[fault.row - 1] if fault is not None and fault.row else None
    return WatchReport(
        ok=fault is None,
        message="\n".join(text),
        module=None if tap is None else tap.name,
        direction=None if fault is None else fault.direction,
        amax=rows[tap.row][OUT] if tap is not None and fault.direction == "backward" else None,
        layers=layers,
        step=step,
        loss_scale=scale,
        changes=changes,
    )


def _layer(tap: Tap, row: list[float]) -> LayerAmax:
    out, grad_x = (None if value == NOTHING else value for value in (row[OUT], row[GRAD_X]))
    policy = getattr(tap.module, "policy", None)
    largest, room = max((v for v in (out, grad_x) if v is not None), default=0.0), None
    if 0 < largest < math.inf:
        dtype = (tap.dtype or next(tap.module.parameters()).dtype) if policy is None else policy.range_dtype
        room = math.log2(torch.finfo(dtype).max) - math.log2(largest)
    return LayerAmax(tap.name, "" if policy is None else str(policy), out, grad_x, room, tap.why_not)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _bits(room: float | None) -> str:
    return "" if room is None else f"{room:.1f} bits"
