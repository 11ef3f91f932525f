# SPDX-License-Identifier: Apache-2.0
"""Time implementations against each other: interleaved rounds in one process, medians, ratios taken within a round.

Every implementation has tensors of its own, and calls rotate over copies of all of them, so that none finds its operands in a
cache. On a CPU with one thread it is process time, which a busy machine disturbs least; with more, wall time. On a GPU it
is the time between two events, the L2 swept before.

Memory that malloc gave out stays with the process (`keep_memory`): else a temporary of some megabytes costs page faults or
not, ten times its own time or nothing, by allocator noise. It is in favour of peers, who allocate more than ours.

So that two runs agree: every peer is timed between two samples of the implementation it is compared with, so that what drifts,
clocks and the load of other processes, drops out; a sample is long beside a clock's tick and an interrupt; all have the same
share of the case's time, so that one that takes seconds leaves the others their rounds; and a ratio in doubt gets more.
"""

import ctypes
import gc
import itertools
import math
import statistics
import time
from dataclasses import dataclass, field

import torch

SAMPLE_US = 3000.0  # a sample on a CPU is of as many calls as take this long
MOST_CALLS = 64
ROUNDS = (5, 400)  # of every implementation, at least and at most
LONG_US, LONG_ROUNDS = 1e6, 3  # at least so many of one whose every sample is that long: it averages by itself
DOUBT, PATIENCE = 0.015, 3  # a ratio known less well than this is given up to so many times its share of the time
WARM_CALLS = 3  # of each before the first round on a CPU, in which the heap becomes as large as all of them need it
WARM_SECONDS = 0.1  # of work of each before the first round on a GPU, so that clocks are up
HIDING_CYCLES = 2_000_000  # about 1 ms of a GPU's time in which the host runs ahead
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
SWEPT = 1 << 28  # bytes written to sweep a GPU's L2


def keep_memory() -> None:
    """Let malloc take everything from one heap that does not shrink; other libraries than glibc's are left alone."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def release_memory() -> None:
    """Give back what is free in that heap: the next case is to find the same machine, whatever came before it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Clock:
    """Microseconds of a call on a device."""

    device: torch.device
    threads: int

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return "GPU events"
        return "process time, 1 thread" if self.threads == 1 else f"wall time, {self.threads} threads"

    def now(self) -> float:
        """Seconds by which time is spent."""
        return time.process_time() if self.device.type == "cpu" and self.threads == 1 else time.perf_counter()

    def __call__(self, run, timed: str) -> float:
        """timed: what an implementation says of itself."""
        if timed == "by itself":
            return run() * 1e6
        if self.device.type == "cuda" and timed != "host":
            return self._events(run, hide_launches=timed == "kernels")
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # what lies ahead in the queue is not this call's
        start = self.now()
        run()
        return (self.now() - start) * 1e6

    def _events(self, run, hide_launches: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(SWEPT, dtype=torch.int8, device=self.device).zero_()
        torch.cuda.synchronize()
        if hide_launches:
            torch.cuda._sleep(HIDING_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


@dataclass
class Times:
    """Of one implementation: us per call in every round, and in the same round the subject's time over its own."""

    us: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.us)

    def summary(self) -> dict[str, float]:
        """p20, p50 and p80 in us; the median ratio, and half of the 95 % confidence interval of that, relative to it."""
        quantiles = statistics.quantiles(self.us, n=5, method="inclusive")
        return {
            "us_p20": quantiles[0], "us_p50": self.median, "us_p80": quantiles[3], "rounds": len(self.us),
            "ratio": statistics.median(self.ratios), "uncertainty": self.uncertainty(),
        }  # fmt: skip

    def uncertainty(self) -> float:
        """By order statistics, whatever the distribution."""
        ratios, reach = sorted(self.ratios), 0.98 * math.sqrt(len(self.ratios))
        low, high = math.floor(len(ratios) / 2 - reach), math.ceil(len(ratios) / 2 + reach) - 1
        return (ratios[min(high, len(ratios) - 1)] - ratios[max(low, 0)]) / 2 / statistics.median(ratios)


def interleave(instances: list[dict], clock: Clock, seconds: float) -> dict[str, Times]:
    """The times of every implementation, measured in `seconds` or longer: each has at least a few rounds.

    instances: the same implementations with other tensors, used in turn. Each is run once before, which is not counted. The
    first implementation is the subject, with which the others are compared; alone, it is compared with itself.
    """
    samplers = {name: _Sampler([instance[name] for instance in instances], clock) for name in instances[0]}
    subject, *peers = samplers
    peers, times = peers or [subject], {name: Times() for name in samplers}
    share, spent = seconds / len(peers), dict.fromkeys(peers, 0.0)

    def wants_more(name: str) -> bool:
        us = times[name].us
        long = us and min(us) * samplers[name].calls >= LONG_US  # one sample alone may be a moment's hiccup
        if len(us) < (LONG_ROUNDS if long else ROUNDS[0]):
            return True
        return spent[name] < share or (spent[name] < PATIENCE * share and times[name].uncertainty() > DOUBT)

    gc.collect()
    gc.disable()
    try:
        before = samplers[subject].us()
        for r in range(ROUNDS[1]):
            entered = [name for name in peers if wants_more(name)]
            for name in entered if r % 2 else reversed(entered):
                begin = clock.now()
                us, after = samplers[name].us(), samplers[subject].us()
                times[subject].us.append(after)
                times[name].ratios.append((before + after) / 2 / us)
                if name != subject:
                    times[name].us.append(us)
                measured = us * samplers[name].calls + after * samplers[subject].calls  # not this process's, of one by itself
                spent[name] += max(measured / 1e6, clock.now() - begin)
                before = after
    finally:
        gc.enable()
    times[subject].ratios = [1.0]
    return times


class _Sampler:
    """Samples of one implementation: the mean over as many calls as make a sample, on its instances in turn."""

    def __init__(self, implementations: list, clock: Clock):
        self.clock, self.timed = clock, implementations[0].timed
        self.runs = itertools.cycle([implementation.run for implementation in implementations])
        begin = time.perf_counter()
        for implementation in implementations:
            implementation.run()
        while clock.device.type == "cuda" and time.perf_counter() - begin < WARM_SECONDS:
            next(self.runs)()
            torch.cuda.synchronize()
        once = (time.perf_counter() - begin) / len(implementations) * 1e6
        several = clock.device.type == "cpu" and self.timed != "by itself"
        for _ in range(WARM_CALLS if several else 0):  # the first was not typical
            once = clock(next(self.runs), self.timed)
            if once > LONG_US:
                break
        self.bundled = implementations[0].calls
        self.calls = (min(MOST_CALLS, math.ceil(SAMPLE_US / once)) if several else 1) * self.bundled

    def us(self) -> float:
        """Of a call."""
        chosen = list(itertools.islice(self.runs, self.calls // self.bundled))

        def run():
            for one in chosen[:-1]:
                one()
            return chosen[-1]()

        return self.clock(run, self.timed) / self.calls
