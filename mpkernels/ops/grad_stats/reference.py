# SPDX-License-Identifier: Apache-2.0
"""grad_stats_ in fp64 on the host: amax, count of non-finite, found_inf, norm / grad_scale."""

import math

import torch


def grad_stats(grads, grad_scale: float):
    """(found_inf: bool, amax: list, nonfinite: list, grad_norm: float) from fp64 copies of `grads`."""
    inv = 1 / grad_scale if grad_scale != 0 and not math.isnan(grad_scale) else math.inf
    found_inf = not (0 < grad_scale < math.inf)
    amax, nonfinite = [], []
    for grad in grads:
        work = grad.double().flatten()
        largest = torch.float64 if grad.dtype == torch.float64 else torch.float32
        amax.append(work[work.isfinite()].abs().max().item() if work.isfinite().any() else 0.0)
        nonfinite.append(int((~work.isfinite()).sum()))
        unscaled = work[work.isfinite()].to(largest) * torch.tensor(inv, dtype=largest, device="cpu")
        found_inf = found_inf or nonfinite[-1] > 0 or not bool(unscaled.isfinite().all())
    return found_inf, amax, nonfinite, _norm(grads) * inv


def _norm(grads) -> float:
    """The root of the exact sum of squares, of numbers divided by a power of 2 near the largest: none is lost."""
    values = [x for grad in grads for x in grad.double().flatten().tolist()]
    if not all(map(math.isfinite, values)):
        return math.nan
    power = min(max(math.frexp(max(map(abs, values), default=0.0))[1], -1000), 1000)
    root = math.sqrt(math.fsum(math.ldexp(x, -power) ** 2 for x in values))
    return root * 2.0**power  # which may be inf
