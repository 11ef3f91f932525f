# SPDX-License-Identifier: Apache-2.0
"""Tests of write_grads: what unscales the gradients allocates before the step is written, whatever it is that fails."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpkernels as mpk
from tests.optimizers import OURS, everything
from tests.steps import DTYPES, raw


class FailingAllocation(TorchDispatchMode):
    """Inside, the k-th op (from 0) that makes a tensor raises."""

    def __init__(self, k: int):
        super().__init__()
        self.left, self.raised = k, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        makes = any(r.alias_info is None and "Tensor" in str(r.type) for r in func._schema.returns)
        if makes and not self.raised:
            self.left -= 1
            if self.left < 0:
                self.raised = True
                raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))


class Training:
    def __init__(self, name: str, poison: bool):
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(3, 4, generator=generator).to(dtype)) for dtype in DTYPES]
        self.params.append(nn.Parameter(torch.randn(4, 6, generator=generator).half().t()))
        self.optimizer = OURS[name](self.params, lr=0.1, write_grads=True)
        self.scaler = mpk.GradScaler(init_scale=3.0)
        self.scaler.scale(torch.ones(()))
        self.begin(0)
        self.step()
        self.begin(1)
        if poison:
            self.params[0].grad[0, 0] = torch.inf

    def begin(self, t: int) -> None:
        generator = torch.Generator().manual_seed(t)
        for parameter in self.params:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def everything(self) -> list:
        return [*everything(self.optimizer), *raw(p.grad for p in self.params), self.scaler.state_dict()]


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_write_grads_after_any_failed_allocation(name, poison):
    """Neither a step without its gradients, nor a scaler that knows nothing of it: it can be taken again, or it was taken."""
    expected = Training(name, poison)
    expected.step()
    for k in range(1000):
        training, failing = Training(name, poison), FailingAllocation(k)
        try:
            with failing:
                training.scaler.step(training.optimizer)
        except torch.OutOfMemoryError:
            training.scaler.step(training.optimizer)
        training.scaler.update()
        assert training.everything() == expected.everything(), k
        if not failing.raised:
            break
    assert k > 5


@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_that_overlaps_itself_is_refused_before_the_step(unscale):
    parameter = nn.Parameter(torch.ones(3))
    optimizer, scaler = mpk.optim.SGD([parameter], lr=1.0, write_grads=True), mpk.GradScaler(init_scale=2.0)
    scaler.scale(torch.ones(()))
    parameter.grad = torch.ones(1).expand(3)
    with pytest.raises(RuntimeError, match=r"gradient of shape \(3,\) overlaps itself .* a clone of it"):
        (scaler.unscale_ if unscale else scaler.step)(optimizer)
    assert parameter.tolist() == [1, 1, 1]
