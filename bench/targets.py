# SPDX-License-Identifier: Apache-2.0
"""Targets for speed, held against the rows: the worst case of each target, met, missed or in doubt."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bench.cases import select
from bench.implementation import FORCED, OURS
from bench.step import PLAIN_READ, PLAIN_STEP

BY_BACKEND = (OURS, *(f"{OURS} {backend}" for backend in FORCED))  # the same call; the fastest of them counts
DOUBTFUL = 0.1  # uncertainty above which a ratio decides nothing
Found = dict[str, dict]  # the rows of a case by implementation


@dataclass(frozen=True)
class Target:
    """value(rows of a case) is at most (or at least) `limit` in each of `cases`.

    It is None where a case has nothing of the kind, NaN where it is in doubt.
    """

    what: str
    against: str
    cases: tuple[str, ...]  # names; one that ends in / stands for all below it
    limit: float
    value: Callable[[Found], float | None]
    form: str = ".3g"
    at_least: bool = False

    def _has(self, name: str) -> bool:
        return name in self.cases or name.startswith(tuple(case for case in self.cases if case.endswith("/")))

    def line(self, by_case: dict[str, Found]) -> list[str]:
        """what, against, wanted, the worst value, its case, the outcome."""
        values = {
            name: value for name, found in by_case.items() if self._has(name) and (value := self.value(found)) is not None
        }
        wanted = f"{'>=' if self.at_least else '<='} {self.limit:{self.form}}"
        if not values:
            return [self.what, self.against, wanted, "", "", "not measured"]
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        if not known:
            return [self.what, self.against, wanted, "", "", "in doubt"]
        worst = (min if self.at_least else max)(known, key=known.get)
        missed = sum(value < self.limit if self.at_least else value > self.limit for value in known.values())
        outcome = f"missed in {missed} of {len(known)}" if missed else "met"
        in_doubt = f", {len(values) - len(known)} in doubt" if len(known) < len(values) else ""
        return [self.what, self.against, wanted, f"{known[worst]:{self.form}}", worst, outcome + in_doubt]


# ----- values ---------------------------------------------------------------


def doubtful(row: dict) -> bool:
    """Whether its ratio is known too badly to decide anything."""
    return row["uncertainty"] > DOUBTFUL


def _ratio(row: dict) -> float:
    return math.nan if doubtful(row) else row["ratio"]


def time_over(peer: str) -> Callable[[Found], float | None]:
    """Our time over the peer's, both taken in rounds with the same implementation."""
    return lambda found: _ratio(found[peer]) / _ratio(_fastest(found)) if peer in found else None


def added_to(other: str) -> Callable[[Found], float | None]:
    """What ours takes more than another step of ours."""
    return lambda found: _ratio(found[other]) - 1 if other in found else None


def time_over_best(found: Found) -> float:
    """The fastest of ours over the fastest of torch's, whatever the recipe."""
    return _ratio(_best(found, ours=False)) / _ratio(_best(found, ours=True))


def memory_over_best(found: Found) -> float:
    """The same two's peak memory."""
    return _best(found, ours=True)["peak_bytes"] / _best(found, ours=False)["peak_bytes"]


def share_of_copy(found: Found) -> float:
    row = _fastest(found)
    return row["gb_s"] / row["limits"]["copy_gb_s"]


def microseconds(found: Found) -> float:
    return _fastest(found)["us_p50"]


def _fastest(found: Found) -> dict:
    return max((found[name] for name in BY_BACKEND if name in found), key=lambda row: row["ratio"])


def _best(found: Found, ours: bool) -> dict:
    return max((row for name, row in found.items() if name.startswith(OURS) == ours), key=lambda row: row["ratio"])


# ----- the targets ---------------------------------------------------------------


_STEPS = tuple(f"step/float16/plain/{size}in{tensors}" for size in ("1e7", "5e7") for tensors in (1, 300))
_CLIPPED = tuple(name.replace("plain", "clip") for name in _STEPS)
_FORWARD = "linear_act/forward/float16/"
_ONE_ROW = f"{_FORWARD}1x4096x4096"
_ROWS_64 = tuple(case.name for case in select("cpu", ["linear_act"], f"{_FORWARD}*") if case.M >= 64)
_FUSED, _MKL = "oneDNN on fp32 copies, ReLU fused", "MKL on fp32 copies"
_CLASSICAL, _FP32 = "classical fp16 recipe", "fp32 parameters"
_AUTOCAST, _BY_HAND = "torch autocast fp16", "torch fp16 model, fp32 masters"
_MODELS = ("training/mlp6_wide", "training/dlrm_wide", "training/vit_b", "training/bert_base", "training/gpt2_small")
_FLOAT8 = tuple(case.name for case in select("cuda", ["float8"], "*/both/*") if min(case.K, case.N) >= 4096)
_IN_BF16 = f"{OURS} bfloat16"
_LARGE = ("step/float16/plain/1e8in300", "step/float16/plain/1e9in300")

TARGETS = {
    "cpu": (
        Target("forward with ReLU, fp16, M >= 64", _FUSED, _ROWS_64, 1.10, time_over(_FUSED)),
        Target("forward with ReLU, fp16, M=1 K=4096 N=4096", "torch float16", (_ONE_ROW,), 1.05, time_over("torch float16")),
        Target("backward, fp16", _MKL, ("linear_act/backward/float16/",), 0.6, time_over(_MKL)),
        Target("AdamW step, 10e6 and 50e6 parameters in 1 and 300", _CLASSICAL, _STEPS, 0.58, time_over(_CLASSICAL)),
        Target("AdamW step, 10e6 and 50e6 parameters in 1 and 300", _FP32, _STEPS, 0.80, time_over(_FP32)),
        Target("clipping adds to the step", "a step without", _CLIPPED, 0.05, added_to(PLAIN_STEP), ".1%"),
        Target("statistics add to the step", "a plain read of the gradients", _STEPS, 0.02, added_to(PLAIN_READ), ".1%"),
        Target("training step, MLP", _AUTOCAST, ("training/mlp",), 0.1, time_over(_AUTOCAST)),
        Target("training step, MLP", _BY_HAND, ("training/mlp",), 0.1, time_over(_BY_HAND)),
        Target("step of 100 small tensors, us", "the clock", ("overhead/step of 100",), 150, microseconds),
    ),
    "cuda": (
        Target("a layer in eight bits, K and N from 4096", _IN_BF16, _FLOAT8, 1 / 1.15, time_over(_IN_BF16)),
        Target("AdamW step, bytes over time", "a device copy", _LARGE, 0.90, share_of_copy, at_least=True),
        Target("AdamW step", "fp32 parameters, weights cast", _LARGE, 1 / 1.40, time_over("fp32 parameters, weights cast")),
        Target("AdamW step", _CLASSICAL, _LARGE, 1 / 1.50, time_over(_CLASSICAL)),
        Target("clipping adds to the step", "a step without", ("step/float16/clip/",), 0.02, added_to(PLAIN_STEP), ".1%"),
        Target("a skipped step", "one that is taken", ("step/float16/skipped/",), 0.1, time_over(PLAIN_STEP)),
        Target("training step, whole models", "the best of torch", _MODELS, 1.0, time_over_best),
        Target("training step, MLP and DLRM", "the best of torch", _MODELS[:2], 1 / 1.10, time_over_best),
        Target("peak memory, whole models", "the best of torch", _MODELS, 1.0, memory_over_best),
        Target("step of 100 small tensors, us", "the clock", ("overhead/step of 100",), 150, microseconds),
    ),
}  # fmt: skip


def lines(device: str, by_case: dict[str, Found]) -> list[list[str]]:
    """A line for each target on `device`."""
    return [target.line(by_case) for target in TARGETS[device]]
