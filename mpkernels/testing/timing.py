# SPDX-License-Identifier: Apache-2.0
"""Time several ways to do the same, interleaved and with cold caches."""

import time
from collections.abc import Callable

import torch

FLUSH = 1 << 28  # bytes written before a timed run on a GPU: more than an L2, and long enough to queue the launches under


def interleave(runs: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """us of every run in every round, caches cold; a round has one run of each, and the first does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    timed = _time_cuda if device.type == "cuda" else _time_cpu
    for counted in [False] + [True] * rounds:
        for name, run in runs.items():
            us = timed(run, device)
            if counted:
                times[name].append(us)
    return times


def _time_cpu(run: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def _time_cuda(run: Callable, device: torch.device) -> float:
    """By events; the write that flushes the L2 keeps the GPU busy while the launches are queued."""
    with torch.cuda.device(device):
        torch.empty(FLUSH, dtype=torch.int8, device=device).zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3
