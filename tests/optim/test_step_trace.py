# SPDX-License-Identifier: Apache-2.0
"""Tests of the way of a gradient, warm: how many of our Python files a step goes through, and that each op chooses once."""

from collections import OrderedDict
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torchs

import mpkernels as mpk
from mpkernels.optim import external_writes
from mpkernels.runtime.op import Op
from tests.call_trace import trace

MOST_FILES = 10


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("make", [mpk.optim.AdamW, mpk.optim.SGD])
def test_step_goes_through_few_files(make, max_norm):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    mpk.convert(model, "mixed_float16")
    optimizer, scaler = make(model.named_parameters(), lr=0.1, max_norm=max_norm), mpk.GradScaler()
    for _ in range(4):  # the copies that the layers ask for are there from the second on
        scaler.scale(model(torch.randn(4, 8)).float().sum()).backward()
        with mock.patch.object(Op, "resolve", autospec=True, side_effect=Op.resolve) as chosen:
            calls = trace(lambda: scaler.step(optimizer))
        scaler.update()
        optimizer.zero_grad()
    assert len({file for file, _ in calls}) <= MOST_FILES, calls
    assert [call.args[0].name for call in chosen.call_args_list] == ["grad_stats_", optimizer._op.name]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_profiler_sees_the_ranges_of_torchs_optimizers(set_to_none):
    def step():
        parameter.grad = torch.ones(3)
        optimizer.step()
        optimizer.zero_grad(set_to_none)

    parameter = nn.Parameter(torch.zeros(3))
    optimizer = mpk.optim.AdamW([parameter])
    step()
    with torch.profiler.profile() as profile:
        step()
    ranges = {event.name for event in profile.events() if event.is_user_annotation}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= ranges
    assert parameter.grad is None if set_to_none else not parameter.grad.any()


@pytest.mark.parametrize("register", [
    lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    lambda optimizer, hook: optimizer.register_step_post_hook(hook),
    lambda _, hook: torchs.register_optimizer_step_pre_hook(hook),
    lambda _, hook: torchs.register_optimizer_step_post_hook(hook),
])  # fmt: skip
@pytest.mark.parametrize("is_first", [True, False])
def test_hooks_of_steps_run_once(register, is_first, monkeypatch):
    if is_first:  # of all optimizers of the process: nothing of ours is registered yet
        monkeypatch.setattr(external_writes, "hook", None)
        monkeypatch.setattr(torchs, "_global_optimizer_post_hooks", OrderedDict())
    parameter, ran = nn.Parameter(torch.zeros(3)), []
    optimizer = mpk.optim.AdamW([parameter])
    handle = register(optimizer, lambda stepped, args, kwargs: ran.append(stepped))
    try:
        for t in range(3):  # before there is a plan, and with one
            parameter.grad = torch.ones(3)
            optimizer.step()
            assert ran == [optimizer] * (t + 1)
    finally:
        handle.remove()


@pytest.mark.parametrize("register", [
    lambda optimizer, hook: optimizer.register_step_post_hook(hook),
    lambda _, hook: torchs.register_optimizer_step_post_hook(hook),
])  # fmt: skip
def test_hook_that_a_closure_registers_runs_after_its_step(register):
    parameter, ran, handles = nn.Parameter(torch.zeros(3)), [], []
    optimizer = mpk.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    try:
        optimizer.step(lambda: handles.append(register(optimizer, lambda *_: ran.append(1))) or 2.0)
        assert ran == [1]
    finally:
        handles[0].remove()


def test_hook_runs_where_that_of_ours_was_removed(monkeypatch):
    """As a test suite does that empties torch's table between its tests."""
    parameter, ran = nn.Parameter(torch.ones(3)), []
    optimizer = mpk.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    monkeypatch.setattr(torchs, "_global_optimizer_post_hooks", OrderedDict())
    torchs.register_optimizer_step_post_hook(lambda *_: ran.append(1))
    optimizer.step()
    assert ran == [1]
