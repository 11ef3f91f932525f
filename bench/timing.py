# SPDX-License-Identifier: Apache-2.0
"""Time contenders against each other: interleaved rounds in one process, medians, ratios taken within a round."""

import statistics
import time
from collections.abc import Callable


def interleave(contenders: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, list[float]]:
    """Process time in us of every contender in every round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False] + [True] * rounds:
        for name, run in contenders.items():
            start = time.process_time()
            run()
            elapsed = (time.process_time() - start) * 1e6
            if counted:
                times[name].append(elapsed)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in us."""
    quantiles = statistics.quantiles(times, n=5, method="inclusive")
    return {"us_p20": quantiles[0], "us_p50": statistics.median(times), "us_p80": quantiles[3]}


def ratio(times: dict[str, list[float]], contender: str, baseline: str) -> float:
    """Median over the rounds of contender / baseline."""
    return statistics.median(a / b for a, b in zip(times[contender], times[baseline], strict=True))
