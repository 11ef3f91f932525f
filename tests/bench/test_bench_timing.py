# SPDX-License-Identifier: Apache-2.0
"""How the benchmark times: ratios, shares of the time, and what it asks of a GPU; implementations say how long they took."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from bench import limits, rows, timing
from bench.implementation import Implementation

CPU = timing.Clock(torch.device("cpu"), 1)


def says(seconds):
    """An implementation that claims to have taken the next of `seconds`."""
    return Implementation(iter(seconds).__next__, timed="by itself")


def test_bench_ratio_of_steady_implementations():
    times = timing.interleave([{"ours": says(itertools.repeat(1e-3)), "theirs": says(itertools.repeat(4e-3))}], CPU, 0.1)
    assert times["theirs"].summary() == {
        "us_p20": 4000, "us_p50": 4000, "us_p80": 4000, "rounds": len(times["theirs"].us), "ratio": 0.25, "uncertainty": 0,
    }  # fmt: skip
    assert times["ours"].median == 1000
    assert times["ours"].ratios == [1]


def test_bench_ratio_ignores_drift():
    """A machine that becomes slower all the time, for all: 5 % from sample to sample."""
    slower = (1e-3 * 1.05**i for i in itertools.count())
    implementations = {"ours": Implementation(lambda: next(slower), timed="by itself")}
    implementations["theirs"] = Implementation(lambda: 2 * next(slower), timed="by itself")
    ratios = timing.interleave([implementations], CPU, 0.01)["theirs"].ratios
    assert all(abs(ratio - 0.5) < 0.001 for ratio in ratios)


def test_bench_ratio_ignores_outliers():
    disturbed = itertools.cycle([1e-3, 1e-3, 1e-3, 1e-3, 50e-3])
    implementations = {"ours": says(itertools.repeat(1e-3)), "theirs": says(disturbed)}
    assert timing.interleave([implementations], CPU, 0.1)["theirs"].summary()["ratio"] == 1


def test_bench_a_slow_implementation_leaves_the_others_their_rounds():
    implementations = {
        "ours": says(itertools.repeat(1e-3)),
        "slow": says(itertools.repeat(0.5)),
        "fast": says(itertools.repeat(1e-3)),
    }
    times = timing.interleave([implementations], CPU, 0.2)
    assert len(times["slow"].us) == timing.ROUNDS[0]
    assert len(times["fast"].us) == 0.1 / 2e-3


def test_bench_seconds_are_sampled_less_often():
    """Of what takes long, once is not a moment's noise."""
    implementations = {"ours": says(itertools.repeat(1e-3)), "slow": says(itertools.repeat(2.0))}
    assert len(timing.interleave([implementations], CPU, 0.2)["slow"].us) == timing.LONG_ROUNDS


@pytest.fixture
def first_call_of_a_second(monkeypatch):
    monkeypatch.setattr(
        timing, "time", SimpleNamespace(perf_counter=itertools.count(0, 1.2).__next__, process_time=time.process_time)
    )


def test_bench_a_hiccup_is_not_a_long_call(first_call_of_a_second):
    """What swapped at its first calls is sampled as often as the others."""
    hiccups = itertools.chain([1.2, 1.1, 1.1], itertools.repeat(20e-3))
    implementations = {"ours": says(itertools.repeat(10e-3)), "theirs": says(hiccups)}
    summary = timing.interleave([implementations], CPU, 0.2)["theirs"].summary()
    assert summary["rounds"] == timing.ROUNDS[0]
    assert summary["ratio"] == 0.5


def test_bench_a_first_call_is_not_typical(first_call_of_a_second):
    """However long it took, a sample is of as many calls as a later one needs."""
    assert timing._Sampler([Implementation(lambda: None)], CPU).calls == timing.MOST_CALLS


@pytest.mark.parametrize("seconds, calls", [(0.0, 1 + timing.WARM_CALLS), (2.0, 2)])
def test_bench_warms_up_on_a_cpu(monkeypatch, seconds, calls):
    """Beside the call that makes it ready, a few; one where a call takes long."""
    monkeypatch.setattr(timing.Clock, "__call__", lambda _, run, timed: run() or seconds * 1e6 + 1)
    called = []
    timing._Sampler([Implementation(lambda: called.append(0))], CPU)
    assert len(called) == calls


def test_bench_a_doubtful_ratio_gets_more_rounds():
    generator = torch.Generator().manual_seed(0)
    noisy = (1e-3 * (1 + torch.rand((), generator=generator).item()) for _ in itertools.count())
    implementations = {"ours": says(itertools.repeat(1e-3)), "noisy": says(noisy), "steady": says(itertools.repeat(2e-3))}
    times = timing.interleave([implementations], CPU, 0.2)
    assert len(times["noisy"].us) > 2 * len(times["steady"].us)


def test_bench_uncertainty_covers_the_median():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        ratios = (1 + 0.1 * torch.randn(41, generator=generator)).tolist()
        times = timing.Times(us=[1.0] * 41, ratios=ratios)
        covered += abs(times.summary()["ratio"] - 1) <= times.uncertainty()
    assert covered >= 180  # of 200, for an interval of 95 % of which half the width is known


def test_bench_calls_rotate_over_the_instances():
    used = []
    instances = [{"ours": Implementation(lambda i=i: used.append(i) or 1e-3, timed="by itself")} for i in range(3)]
    timing.interleave(instances, CPU, 0.01)
    assert used[3:9] == [0, 1, 2, 0, 1, 2]


def test_bench_short_calls_are_bundled():
    """A sample of microseconds would show the clock."""
    sampler = timing._Sampler([Implementation(lambda: None)], CPU)
    assert sampler.calls == timing.MOST_CALLS
    assert timing._Sampler([Implementation(lambda: None, calls=10)], CPU).calls == 10 * timing.MOST_CALLS


def test_bench_knows_what_a_cpu_is_slow_at(monkeypatch):
    monkeypatch.setattr(limits, "_seconds_per_flop", lambda dtype, direction: {"forward": 1e-10, "backward": 1e-9}[direction])
    cpu = torch.device("cpu")
    assert limits.too_slow(cpu, torch.float16, "forward", 10**10) is None
    assert limits.too_slow(cpu, torch.float16, "both", 10**10) == "would take 10 s a call on this CPU"
    assert limits.too_slow(cpu, torch.float16, "both", 10**8) is None
    assert limits.too_slow(torch.device("cuda"), torch.float16, "both", 10**18) is None


# ----- a GPU that only writes down what it is asked ---------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, other):
            return 0.25

    swept = SimpleNamespace(zero_=lambda: calls.append("sweep"))
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: swept)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"), raising=False)
    return calls


def test_bench_gpu_hides_launches(asked):
    clock = timing.Clock(torch.device("cuda"), 1)
    assert clock(lambda: asked.append("run"), "kernels") == 250
    assert asked == ["sweep", "synchronize", "sleep", "record", "run", "record", "wait"]


def test_bench_gpu_whole_steps_keep_their_gaps(asked):
    assert timing.Clock(torch.device("cuda"), 1)(lambda: asked.append("run"), "all") == 250
    assert "sleep" not in asked


def test_bench_gpu_host_time_does_not_wait(asked):
    timing.Clock(torch.device("cuda"), 1)(lambda: asked.append("run"), "host")
    assert asked == ["synchronize", "run"]


# ----- malloc ---------------------------------------------------------------

RESIDENT = """
import resource, torch
from pathlib import Path
from bench import timing
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
{keep}
before = resident()
t = torch.ones(1 << 24)
del t
freed = resident()
timing.release_memory()
print(freed - before > 60e6, resident() - before < 10e6)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_bench_malloc_keeps_what_a_peer_frees(keep):
    """64 MB that were written and freed stay with the process until the case is over; by default they go at once."""
    code = RESIDENT.format(keep="timing.keep_memory()" if keep else "")
    assert rows.python("-c", code).split() == [str(keep), "True"]
