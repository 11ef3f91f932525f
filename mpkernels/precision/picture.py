# SPDX-License-Identifier: Apache-2.0
"""Advice as one HTML file: the range of every tensor, drawn against the ranges of the formats, and the verdicts."""

import math
from html import escape
from typing import Any

import torch

from mpkernels.policy import dtype_name
from mpkernels.precision.layer import BACKWARD, FORWARD

LEFT, WIDTH, BAR, GAP = 250, 760, 9, 14  # pixels: of the names, of the axis, of a bar, of a layer's space
_COLORS = {
    "x": "#4c78a8", "weight": "#72b7b2", "out": "#54a24b", "grad_out": "#f58518", "grad_x": "#e4a04c", "grad_weight": "#b279a2"
}  # fmt: skip
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1060px; color: #222; background: #fff }
svg text { font: 11px system-ui, sans-serif; fill: #222 } .faint { fill: #777 } .wrong { fill: #c22 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 10px 2px 0; text-align: left; vertical-align: top }
.key { display: inline-block; width: 10px; height: 10px; margin-right: 4px } .name { margin-right: 14px }
"""


def html(advice: Any) -> str:
    """The file of an Advice."""
    rows = [row for row in advice.rows if row.policies]
    key = '<span class="key" style="background:{}"></span><span class="name">{}</span>'
    keys = "".join(key.format(color, name) for name, color in _COLORS.items())
    sentences = "".join(
        f"<tr><td>{escape(row.name or '(model)')}</td><td>{escape(row.policy or '-')}</td>"
        f"<td>{escape(advice.why(row.name).partition(': ')[2])}</td></tr>"
        for row in advice.rows
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Advice</title><style>{_STYLE}</style></head><body>'
        f"<h1>Which format each layer needs</h1><p>Loss {advice.loss:.4g}. Each bar goes from the smallest magnitude of a "
        f"tensor that is not 0 to the largest; gradients are times a loss scale of {advice.loss_scale:g}. Red: beyond its "
        f"format under one of the policies that were judged.</p><p>{keys}</p>{_svg(rows)}"
        f"<table><tr><th>layer</th><th>policy</th><th>why</th></tr>{sentences}</table></body></html>\n"
    )


def _svg(rows: list) -> str:
    """Formats as bands from top to bottom, tensors as bars."""
    ranges = [r for row in rows for r in next(iter(row.policies.values())).range.values()]
    ends = [math.log2(v) for r in ranges for v in (r.amax, r.min_nonzero) if 0 < v < math.inf]
    low, high = math.floor(min([-26.0, *ends])) - 1, math.ceil(max([17.0, *ends])) + 1
    judged = [r for row in rows for p in row.policies.values() for r in p.range.values()]
    formats = sorted({r.format for r in judged if r.scaling is None}, key=str)  # a scale moves the others to where they fit

    def x(exponent: float) -> float:
        return LEFT + WIDTH * (min(max(exponent, low), high) - low) / (high - low)

    top = 24 + 16 * len(formats)
    bars, y = [], top
    for row in rows:
        bars.append(f'<text x="0" y="{y + BAR}">{escape(row.name or "(model)")}</text>')
        bars.append(f'<text class="faint" x="0" y="{y + BAR + 13}">{escape(row.policy or "not converted")}</text>')
        drawn = 0
        for name in (*FORWARD, *BACKWARD):
            found = [p.range[name] for p in row.policies.values() if name in p.range]
            if found:
                bars.append(_bar(name, found, x, y))
                y, drawn = y + BAR + 2, drawn + 1
        y += GAP + max(2 - drawn, 0) * (BAR + 2)
    bands = "".join(_band(dtype, i, x, y) for i, dtype in enumerate(formats))
    step = next(s for s in (4, 8, 16, 32, 64, 256) if (high - low) / s <= 14)
    ticks = "".join(
        f'<text class="faint" x="{x(e):.1f}" y="{y + 12}" text-anchor="middle">2^{e}</text>'
        for e in range(-(-low // step) * step, high, step)
    )
    size = f'width="{LEFT + WIDTH + 20}" height="{y + 24}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>{bands}{"".join(bars)}{ticks}</svg>'


def _bar(name: str, found: list, x, y: int) -> str:
    amax, least = found[0].amax, found[0].min_nonzero
    wrong = [dtype_name(r.format) for r in found if r.overflows]
    if math.isnan(amax) or amax == math.inf:
        return f'<text class="wrong" x="{LEFT}" y="{y + BAR}">{name}: {amax}</text>'
    if not amax:
        return f'<text class="faint" x="{LEFT}" y="{y + BAR}">{name}: all 0</text>'
    left, right = x(math.log2(least)), x(math.log2(amax))
    color = "#c22" if wrong else _COLORS[name]
    label = f"{name}: {least:.3g} to {amax:.3g}"
    place = f'x="{left:.1f}" y="{y}" width="{max(right - left, 2):.1f}" height="{BAR}"'
    said = f"{name} beyond {', '.join(dict.fromkeys(wrong))}" if wrong else ""
    text = f'<text class="wrong" x="{left - 6:.1f}" y="{y + BAR}" text-anchor="end">{said}</text>' if wrong else ""
    return f'<rect {place} fill="{color}"><title>{label}</title></rect>{text}'


def _band(dtype: torch.dtype, index: int, x, bottom: int) -> str:
    """A format: light where its numbers are subnormal."""
    info = torch.finfo(dtype)
    least, normal, end = x(math.log2(info.tiny * info.eps)), x(math.log2(info.tiny)), x(math.log2(info.max))
    y = 12 + 16 * index
    lines = "".join(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y}" y2="{bottom}" stroke="#bbb" stroke-dasharray="3 3"/>'
        for at in (least, end) if LEFT < at < LEFT + WIDTH
    )  # fmt: skip
    return (
        f'<text class="faint" x="{LEFT - 8}" y="{y + 9}" text-anchor="end">{dtype_name(dtype)}</text>'
        f'<rect x="{least:.1f}" y="{y}" width="{normal - least:.1f}" height="{BAR}" fill="#e4e4e4"/>'
        f'<rect x="{normal:.1f}" y="{y}" width="{end - normal:.1f}" height="{BAR}" fill="#c9c9c9"/>{lines}'
    )
