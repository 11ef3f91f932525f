# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on a GPU: replayed from a CUDA graph, without a wait for the GPU, and a skipped one for almost nothing.

bench/device.sh runs these; the loop that they replay runs anywhere.
"""

import copy
import statistics

import pytest
import torch

import mpkernels as mpk
from mpkernels.runtime.resolve import ops
from tests.linear_act_cases import same_bits

BACKENDS = ("native", "triton")
REPLAYS, NAN_AT = 1000, 500
PARAMETERS, ROUNDS, SHARE_OF_A_STEP = 50_000_000, 20, 0.1


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """Forced for every op that has it here."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for op in ops.values():
        if op.implementation(request.param, torch.device("cuda")) is None:
            continue
        reason = op.why_not(request.param, torch.device("cuda"), torch.float16)
        if reason is not None:
            pytest.skip(f"{request.param}: {op.name}: {reason}")
    monkeypatch.setenv("MPKERNELS_BACKEND", request.param)
    return request.param


class Training:
    """A small network under mixed_float16 with AdamW and the scaler; `step` is one step on what `x` and `y` hold."""

    def __init__(self, device: torch.device):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 72), torch.nn.ReLU(), torch.nn.Linear(72, 8)]
        self.model = mpk.convert(torch.nn.Sequential(*layers).to(device), "mixed_float16")
        lr = torch.tensor(1e-2, device=device)  # a number would be frozen in a graph
        self.optimizer = mpk.optim.AdamW(self.model.named_parameters(), lr=lr, max_norm=1.0)
        self.scaler = mpk.GradScaler(device.type, init_scale=1024.0, growth_interval=100)
        self.x, self.y = torch.zeros(32, 64, device=device), torch.zeros(32, 8, device=device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(self.model(self.x).float(), self.y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def run(self, steps: int, nan_at: int, once=None) -> list[torch.Tensor]:
        """`steps` times `once`, each on its own data, in one of them a NaN; the state of everything after."""
        generator = torch.Generator(self.x.device).manual_seed(1)
        for i in range(steps):
            self.x.normal_(generator=generator)
            self.y.normal_(generator=generator)
            if i == nan_at:
                self.x[3, 5].fill_(torch.nan)
            (once or self.step)()
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return [t.detach().clone() for t in (*self.model.parameters(), *state, self.scaler._scale, self.scaler.skipped_steps)]


def test_step_gpu_loop_skips_the_nan():
    """Anywhere: what the others replay takes every step but one, and stays finite."""
    training = Training(torch.device("cpu"))
    before = copy.deepcopy(training.model.state_dict())
    *state, skipped = training.run(12, 6)
    assert skipped.item() == 1
    assert all(t.isfinite().all() for t in state)
    assert not any(same_bits(p.detach(), before[name]) for name, p in training.model.named_parameters())


@pytest.mark.gpu
def test_step_gpu_replays_a_graph(backend):
    """1,000 replays, a NaN in the 500th: every bit of weights, moments, step counts and scale is that of the eager run."""
    device = torch.device("cuda")
    eager, captured = Training(device), Training(device)
    side = torch.cuda.Stream()
    for training in (eager, captured):  # kernels are compiled and moments made before a graph is captured
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            training.run(3, -1)
        torch.cuda.current_stream().wait_stream(side)
    captured.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    expected, got = eager.run(REPLAYS, NAN_AT), captured.run(REPLAYS, NAN_AT, graph.replay)
    assert expected[-1].item() == 1
    assert all(same_bits(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.gpu
def test_step_gpu_does_not_wait(backend):
    """Forward, backward and step, skipped or not, in a mode that refuses to wait for the GPU."""
    training = Training(torch.device("cuda"))
    training.run(2, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
        training.x.fill_(torch.nan)
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_step_gpu_skips_for_almost_nothing(backend):
    """A skipped update takes less than a tenth of a full one; the pass that finds the NaN is not part of either."""
    device = torch.device("cuda")
    params = [torch.nn.Parameter(torch.randn(PARAMETERS // 50, device=device, dtype=torch.float16)) for _ in range(50)]
    optimizer = mpk.optim.AdamW(params, lr=torch.tensor(1e-3, device=device))
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.grad_scale = torch.ones((), device=device)
    us = {}
    for skipped in (False, True):
        optimizer.found_inf = torch.full((), float(skipped), device=device)
        us[skipped] = statistics.median(_us(optimizer.step) for _ in range(ROUNDS))
    assert us[True] < SHARE_OF_A_STEP * us[False], us


def _us(run) -> float:
    """By events, behind a wait in which the host runs ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
