# SPDX-License-Identifier: Apache-2.0
"""Tests of the way of a gradient, warm: how many of our Python files a step goes through, and that each op chooses once."""

from unittest import mock

import pytest
import torch
from torch import nn

import mpkernels as mpk
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
