# SPDX-License-Identifier: Apache-2.0
"""A contender of a case: what to run, what to check first, and what it has to move and to compute."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests import bounds

OURS = (
    "mpkernels"  # the name, or its beginning, of what is ours; the first contender of a case is what others are compared with
)
NARROWEST = torch.bfloat16  # what a peer computes in at worst


class Missing(Exception):
    """A contender that this machine or this torch does not have."""


@dataclass
class Contender:
    """run: one call, or `calls` of them. check: its numerics against fp64; AssertionError where the result is wrong.

    bytes: to and from memory per call, counted: an input once, an output once. flops: 2MNK per product, in `gemm`, the
    dtype in which the device multiplies. after: more for the row, once all rounds are over. measures_itself: run returns
    the seconds it took.
    """

    run: Callable[[], object]
    check: Callable[[], dict] = dict
    bytes: int = 0
    flops: int = 0
    gemm: str = "float32"
    calls: int = 1
    hide_launches: bool = True
    measures_itself: bool = False
    after: Callable[[], dict] = dict


def numerics(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The error beside the least possible in `dtype`: ratio of norms, and the share of correctly rounded elements."""
    best = exact.to(dtype)
    least = (best.double() - exact).norm().item()
    error = (got.double() - exact).norm().item()
    return {
        "error_to_best": error / least if least else float(error > 0),
        "correctly_rounded": (got.to(dtype) == best).double().mean().item(),
    }


def check_peer(got: torch.Tensor, exact: torch.Tensor) -> None:
    """A peer may be as coarse as it is, but has to compute the same thing."""
    error, allowed = (got.double() - exact).norm(), 8 * bounds.unit_roundoff(NARROWEST) * exact.norm()
    assert error <= allowed, f"the peer's error is {error:.3g}, its result {exact.norm():.3g}: it computes something else"


def sample(count: int, cost: int, budget: int = 1 << 30) -> torch.Tensor:
    """Indices of as many of `count` rows as fp64 can check when one costs `cost`; all of them where that is few."""
    wanted = min(count, max(32, budget // max(cost, 1)))
    return torch.linspace(0, count - 1, wanted).long() if wanted < count else torch.arange(count)
