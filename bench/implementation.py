# SPDX-License-Identifier: Apache-2.0
"""An implementation of a case: what to run, what to check first, and what it has to move and to compute."""

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE, ops
from tests import bounds

OURS = "mpkernels"  # the name, or its beginning, of what is ours; others are compared with the first implementation of a case
NARROWEST = torch.bfloat16  # what a peer computes in at worst


FORCED = ("native", "triton")  # on a GPU also by name: `auto` chooses neither before it has been proven there


class Missing(Exception):
    """An implementation that this machine or this torch does not have, and why."""


def package(function: Callable) -> Callable:
    """Something of another package, which may be absent or broken: either way it is left out, with a reason."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise Missing(f"{type(error).__name__}: {error}") from error

    return guarded


@dataclass
class Implementation:
    """run: one call, or `calls` of them. check: its numerics against fp64; AssertionError where the result is wrong.

    bytes: to and from memory per call, counted: an input once, an output once. flops: 2MNK per product, in `gemm`, the
    dtype in which the device multiplies. after: more for the row, once all rounds are over. timed: on a GPU "kernels"
    alone, "all" with the gaps between their launches, or the "host" until it has launched them; anywhere "by itself",
    where run returns the seconds.
    """

    run: Callable[[], object]
    check: Callable[[], dict] = dict
    bytes: int = 0
    flops: int = 0
    gemm: str = "float32"
    calls: int = 1
    timed: str = "kernels"
    after: Callable[[], dict] = dict


def forced(implementation: Implementation, backend: str, op: str, device: torch.device) -> Implementation:
    """The same with every op that has `backend` forced to it; missing where `op` has it not, or it cannot serve."""

    @contextlib.contextmanager
    def setting():
        before = os.environ.get(ENVIRONMENT_VARIABLE)
        os.environ[ENVIRONMENT_VARIABLE] = backend
        try:
            yield
        finally:
            del os.environ[ENVIRONMENT_VARIABLE]
            if before is not None:
                os.environ[ENVIRONMENT_VARIABLE] = before

    def check() -> dict:
        with setting():
            try:
                served = served_by(device)
            except RuntimeError as error:  # its reason
                raise Missing(str(error)) from error
            if served[op] != backend:
                raise Missing(f"{op} has no {backend} implementation there")
            return {"backends": served, **implementation.check()}

    return replace(implementation, run=setting()(implementation.run), check=check)


def with_forced(found: dict[str, Implementation], ours: Callable[[], Implementation], op: str, device: torch.device):
    """`found`, on a GPU with ours once more for each backend by name, right behind the first: they go before their peers."""
    subject, *peers = found.items()
    by_name = [(f"{OURS} {backend}", forced(ours(), backend, op, device)) for backend in FORCED if device.type == "cuda"]
    return dict([subject, *by_name, *peers])


def served_by(device: torch.device) -> dict[str, str]:
    """{op: the backend that serves it in fp16}."""
    return {name: op.backend(device, torch.float16) for name, op in ops.items()}


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
