# SPDX-License-Identifier: Apache-2.0
"""Time contenders against each other: interleaved rounds in one process, medians, ratios taken within a round.

Every contender has tensors of its own, and rounds rotate over copies of all of them, so that nobody finds its operands in
a cache. On a CPU with one thread it is process time, which a busy machine disturbs least; with more, wall time. On a GPU
it is the time between two events, behind a wait that hides the launches: what those cost is a case of its own.
"""

import statistics
import time
from dataclasses import dataclass

import torch

WARM_SECONDS = 0.5  # of work before the first round on a GPU, so that clocks are up
HIDING_CYCLES = 2_000_000  # about 1 ms of a GPU's time in which the host runs ahead


@dataclass(frozen=True)
class Clock:
    """Microseconds of one call on a device."""

    device: torch.device
    threads: int

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return "GPU events"
        return "process time, 1 thread" if self.threads == 1 else f"wall time, {self.threads} threads"

    def __call__(self, contender) -> float:
        run = contender.run
        if contender.measures_itself:
            return run() * 1e6
        if self.device.type == "cuda":
            return _events(run, contender.hide_launches)
        now = time.process_time if self.threads == 1 else time.perf_counter
        start = now()
        run()
        return (now() - start) * 1e6


def _events(run, hide_launches: bool) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if hide_launches:
        torch.cuda._sleep(HIDING_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def interleave(instances: list[dict], clock: Clock, seconds: float, rounds: tuple[int, int]) -> dict[str, list[float]]:
    """us per call of every contender in every round.

    instances: the same contenders with other tensors, used in turn. As many rounds as fit in `seconds`, within `rounds`.
    One round per instance comes first and is not counted.
    """
    begin = time.perf_counter()
    for instance in instances:
        for contender in instance.values():
            contender.run()
    once = (time.perf_counter() - begin) / len(instances)
    while clock.device.type == "cuda" and time.perf_counter() - begin < WARM_SECONDS:
        for contender in instances[0].values():
            contender.run()
    times: dict[str, list[float]] = {name: [] for name in instances[0]}
    for r in range(int(min(max(seconds / once, rounds[0]), rounds[1]))):
        instance = instances[r % len(instances)]
        for name in list(instance) if r % 2 else reversed(instance):  # whoever follows a dear one does so half of the time
            contender = instance[name]
            times[name].append(clock(contender) / contender.calls)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in us."""
    quantiles = statistics.quantiles(times, n=5, method="inclusive")
    return {"us_p20": quantiles[0], "us_p50": statistics.median(times), "us_p80": quantiles[3]}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
