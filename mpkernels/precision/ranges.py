# SPDX-License-Identifier: Apache-2.0
"""What becomes of the values of a tensor in a format: how many overflow, become subnormal or 0, and how much room is left."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from mpkernels import functional

Scaling = Literal["row", "tensor"]
BLOCK = 1 << 18  # elements that are counted at a time, of which some ten in fp64 live then


@dataclass(frozen=True)
class Range:
    """The values of one tensor, gradients times the loss scale, held against one format.

    amax: NaN where the tensor has one. min_nonzero: 0 where all are 0. zero_share, subnormal_share: of all elements, those
    that are not 0 and are rounded to 0, or to a subnormal. norm_lost: the share of the norm that is rounded to 0.
    overflows: how many become inf, or are inf or NaN already. margin_bits: how often the largest may double before it
    overflows; negative where it does. scaling: of a format of 8 bits, whether its values are divided by a scale per "row" or
    by one for the "tensor" before; then nothing finite overflows, and margin_bits is that of float32, which has the scale.
    """

    format: torch.dtype
    amax: float
    min_nonzero: float
    zero_share: float
    subnormal_share: float
    norm_lost: float
    overflows: int
    margin_bits: float
    scaling: Scaling | None = None


def overflow_from(dtype: torch.dtype) -> float:
    """Half a unit in the last place beyond the largest number: the smallest magnitude that is rounded to inf."""
    info = torch.finfo(dtype)
    return info.max * (1 + info.eps / 4) if dtype != torch.float64 else math.inf


class RangeCounter:
    """Counts over a tensor for several formats at once: dtypes, of 8 bits with the kind of scale that they have, else None."""

    def __init__(self, formats: Iterable[tuple[torch.dtype, Scaling | None]], loss_scale: float = 1.0):
        self.loss_scale, self.elements, self.amax, self.least, self.norm = loss_scale, 0, 0.0, math.inf, 0.0
        self.counts = {format: _Counts() for format in formats}

    def add(self, values: torch.Tensor) -> None:
        """values: a block in fp64, so that those counted are exact; before the loss scale."""
        if not values.numel():
            return
        magnitudes = values.abs().reshape(-1).mul_(self.loss_scale)
        self.elements += values.numel()
        least, amax = map(float, torch.aminmax(magnitudes))  # NaN comes through
        self.amax = math.nan if math.isnan(amax) or math.isnan(self.amax) else max(self.amax, amax)
        nonzero = magnitudes if least > 0 else torch.where(magnitudes > 0, magnitudes, math.inf)
        least = least if least > 0 else float(nonzero.min())
        self.least = min(self.least, least)
        self.norm += float(magnitudes.dot(magnitudes))
        for (dtype, scaling), counts in self.counts.items():
            if scaling is not None:
                continue
            info = torch.finfo(dtype)
            if least < info.tiny:
                small = nonzero[nonzero < info.tiny]
                zero = small[small <= info.smallest_normal * info.eps / 2]
                counts.zero += len(zero)
                counts.subnormal += len(small) - len(zero)
                counts.lost += float(zero.dot(zero))
            if not amax < info.max:
                counts.large += int((~(magnitudes < overflow_from(dtype))).sum())

    def add_scaled(self, values: torch.Tensor) -> None:
        """The same for formats with scales, by the op itself. values: a whole operand, (rows, n), before the loss scale."""
        if not values.numel():
            return
        rows = max(BLOCK // values.shape[1], 1)
        for (dtype, scaling), counts in self.counts.items():
            if scaling is None:
                continue
            q, _ = functional.quantize(values.float(), dtype, -1 if scaling == "row" else None)
            for x, bits in zip(values.split(rows), q.split(rows), strict=True):
                size = bits.float().abs_()
                is_zero = (size == 0) & (x != 0)
                lost = x[is_zero].double().mul_(self.loss_scale)
                counts.lost += float(lost.dot(lost))
                counts.zero += len(lost)
                counts.subnormal += int(((size > 0) & (size < torch.finfo(dtype).tiny)).sum())
                counts.large += int((~x.isfinite()).sum())

    def range(self, dtype: torch.dtype, scaling: Scaling | None = None) -> Range:
        counts, n = self.counts[dtype, scaling], max(self.elements, 1)
        end = torch.finfo(dtype if scaling is None else torch.float32).max
        margin = math.log2(end) - math.log2(self.amax) if 0 < self.amax < math.inf else math.inf
        margin = -math.inf if math.isnan(self.amax) or self.amax == math.inf else margin
        norm_lost = math.sqrt(counts.lost / self.norm) if 0 < self.norm < math.inf else 0.0
        least = 0.0 if self.least == math.inf else self.least
        return Range(dtype, self.amax, least, counts.zero / n, counts.subnormal / n, norm_lost, counts.large, margin, scaling)


@dataclass
class _Counts:
    """Of what becomes 0, subnormal and inf in a format. lost: the squares of what becomes 0."""

    zero: int = 0
    subnormal: int = 0
    large: int = 0
    lost: float = 0.0
