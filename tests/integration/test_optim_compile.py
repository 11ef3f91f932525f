# SPDX-License-Identifier: Apache-2.0
"""Tests of steps inside torch.compile: a new learning rate compiles nothing, and the bits are those of eager."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import mpkernels as mpk
from tests.levels import each_once
from tests.steps import raw

MAKE = {"AdamW": mpk.optim.AdamW, "SGD": lambda p, **o: mpk.optim.SGD(p, momentum=0.9, **o)}
LRS = 50


class Training:
    """50 steps, each with its own learning rate; `step` is what is compiled."""

    def __init__(self, name: str, lr, way: str):
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.way = way
        self.model = mpk.convert(nn.Linear(4, 3), "mixed_float16")
        self.params = [*self.model.parameters(), nn.Parameter(torch.randn(3).half())]
        lr = torch.tensor(0.1) if isinstance(lr, torch.Tensor) else 0.1
        self.optimizer = MAKE[name](self.params, lr=lr, max_norm=1.0 if way == "max_norm" else None)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.95)
        self.scaler = mpk.GradScaler(init_scale=8.0, enabled=way in ("scaler", "clip", "unscale"))
        self.scaler.scale(torch.ones(()))

    def step(self, x):
        """A graph before the step and one after it."""
        y = x * 2
        if self.way == "clip":
            self.scaler.clip_grad_norm_(self.optimizer, 1.0)
        if self.way == "unscale":
            self.scaler.unscale_(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        return y + 1

    def run(self, step) -> list:
        """What is left, and how many frames dynamo had compiled after each step."""
        frames = []
        for t in range(LRS):
            for parameter in self.params:
                parameter.grad = torch.full_like(parameter, (t % 5 - 2) / 2)
            if t % 7 == 3 and self.scaler.is_enabled():
                self.params[0].grad[0, 0] = torch.inf
            assert step(torch.ones(2)).tolist() == [3, 3]
            self.schedule.step()
            frames.append(counters["frames"]["ok"])
        states = [t for p in self.params for _, t in sorted(self.optimizer.state[p].items())]
        return [*raw([*self.params, *states]), self.scaler.get_scale()], frames


WAYS = ("plain", "max_norm", "scaler", "clip", "unscale")


@pytest.mark.parametrize("name, lr, way", each_once(MAKE, (0.1, torch.tensor(0.1)), WAYS))
def test_step_compiles_for_no_learning_rate(name, lr, way):
    eager = Training(name, lr, way)
    expected, _ = eager.run(eager.step)
    compiled, backend = Training(name, lr, way), CompileCounter()
    counters.clear()
    got, frames = compiled.run(torch.compile(compiled.step, backend=backend))
    assert got == expected
    assert backend.frame_count == 2, "one graph before the step, one after it"
    assert frames[0] > 0
    assert frames[1] == frames[-1], "nothing is compiled once more"
