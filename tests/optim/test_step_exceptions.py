# SPDX-License-Identifier: Apache-2.0
"""Tests of steps that end in an exception: out of a hook, or out of any of the allocations that a step makes.

Afterwards the step can be taken again, or left out, and training has the bits of a run in which nothing happened.
"""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mpkernels as mpk
from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE
from tests.optimizers import everything
from tests.steps import compute_copies, raw

MAKE = {
    "AdamW": lambda p, **o: mpk.optim.AdamW(p, amsgrad=True, **o),
    "SGD": lambda p, **o: mpk.optim.SGD(p, momentum=0.9, **o),
}
ALLOCATIONS = ("empty", "empty_like", "zeros", "zeros_like", "ones", "full", "tensor", "stack", "cat", "where")
WAYS = ("plain", "max_norm", "scaler", "clip", "unscale")  # how a step is taken
STEPS, LATE = 5, 2  # one parameter has its first gradient in step 2, before which others are written by the user


class Training:
    """Parameters of every dtype in two groups, one with a compute copy, two rounded by convert."""

    def __init__(self, name: str, way: str):
        torch.manual_seed(0)
        self.way, self.layer = way, mpk.MPLinear(3, 3, policy="mixed_float16")
        self.layer(torch.ones(1, 3))
        narrow = mpk.convert(nn.Linear(3, 3), "float16")
        plain = [nn.Parameter(torch.randn(5).to(d)) for d in (torch.bfloat16, torch.float64, torch.float16)]
        plain.append(nn.Parameter(torch.randn(4, 6)[:, ::2]))
        self.late, groups = plain[0], [plain, [*self.layer.parameters(), *narrow.parameters()]]
        self.params = [p for group in groups for p in group]
        options = {"max_norm": 0.5} if way == "max_norm" else {}
        self.optimizer = MAKE[name]([{"params": group} for group in groups], lr=0.1, **options)
        self.scaler = mpk.GradScaler(init_scale=8.0, enabled=way in ("scaler", "clip", "unscale"))
        self.scaler.scale(torch.ones(()))

    def begin(self, t: int) -> None:
        """Everything of iteration t before `scaler.step`."""
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(t)
        for parameter in self.params:
            grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter is not self.late or t >= LATE:
                parameter.grad = grad
        if t == LATE:
            with torch.no_grad():
                self.layer.weight.fill_(0.1)
                self.params[2].fill_(0.3)
        if self.way == "clip":
            self.scaler.clip_grad_norm_(self.optimizer, 0.5)
        if self.way == "unscale":
            self.scaler.unscale_(self.optimizer)

    def step(self) -> None:
        self.scaler.step(self.optimizer)

    def end(self) -> None:
        self.scaler.update()

    def run(self, ts) -> None:
        for t in ts:
            self.begin(t)
            self.step()
            self.end()

    def everything(self) -> list:
        assert compute_copies(self.optimizer)
        return [*everything(self.optimizer), self.scaler.get_scale(), self.scaler.skipped_steps.item()]


class Failing:
    """Inside, the k-th call (from 0) of torch's allocating functions raises."""

    def __init__(self, monkeypatch, k: int):
        self.monkeypatch, self.left, self.raised = monkeypatch, k, False

    def __enter__(self):
        self.patch = self.monkeypatch.context()
        patch = self.patch.__enter__()
        for name in ALLOCATIONS:
            patch.setattr(torch, name, self._counted(getattr(torch, name)))
        return self

    def __exit__(self, kind, error, trace):
        self.patch.__exit__(kind, error, trace)
        return kind is torch.OutOfMemoryError

    def _counted(self, function):
        def wrapper(*args, **kwargs):
            self.left -= 1
            if self.left < 0 and not self.raised:
                self.raised = True
                raise torch.OutOfMemoryError("no memory")
            return function(*args, **kwargs)

        return wrapper


@pytest.mark.parametrize("at", [0, LATE, STEPS - 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKE)
def test_step_after_any_failed_allocation(monkeypatch, name, way, at):
    """On `native`, which allocates before it writes; `eager` updates a tensor at a time, and allocates for each."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    undisturbed, without = Training(name, way), Training(name, way)
    undisturbed.run(range(STEPS))
    without.run(range(at))
    without.begin(at)  # what is written there stays
    if way == "unscale":
        without.end()
    without.run(range(at + 1, STEPS))
    for k in range(1000):
        again, lost = Training(name, way), Training(name, way)
        for training in (again, lost):
            training.run(range(at))
            training.begin(at)
            with Failing(monkeypatch, k) as failing:
                training.step()
        if not failing.raised:
            break
        again.step()
        again.end()
        again.run(range(at + 1, STEPS))
        assert again.everything() == undisturbed.everything(), k
        if way == "unscale":
            lost.end()
        lost.run(range(at + 1, STEPS))
        assert lost.everything() == without.everything(), k
    assert k > 0, "nothing was made to fail"


def test_unscale_after_any_failed_allocation(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    undisturbed = Training("SGD", "unscale")
    undisturbed.run(range(STEPS))
    for k in range(1000):
        training = Training("SGD", "scaler")
        for t in range(STEPS):
            training.begin(t)
            with Failing(monkeypatch, k if t == STEPS - 1 else 1000) as failing:
                training.scaler.unscale_(training.optimizer)
            if failing.raised:
                training.scaler.unscale_(training.optimizer)
            training.step()
            training.end()
        assert training.everything() == undisturbed.everything(), k
        if not failing.raised:
            break
    assert k > 0, "nothing was made to fail"


class Raised(Exception):
    """What the hooks raise."""


def refuse(*_):
    raise Raised


HOOKS = {
    "before": lambda optimizer: optimizer.register_step_pre_hook(refuse),
    "before any": lambda _: register_optimizer_step_pre_hook(refuse),
    "after": lambda optimizer: optimizer.register_step_post_hook(refuse),
    "after any": lambda _: register_optimizer_step_post_hook(refuse),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", MAKE)
def test_step_hook_raises(name, hook, way):
    """Before the step: it can be taken again. After it: it has been taken, and the scaler knows."""
    undisturbed, disturbed = Training(name, way), Training(name, way)
    undisturbed.run(range(STEPS))
    for t in range(STEPS):
        disturbed.begin(t)
        handle = HOOKS[hook](disturbed.optimizer)
        with pytest.raises(Raised):
            disturbed.step()
        handle.remove()
        if hook.startswith("before"):
            disturbed.step()
        elif disturbed.scaler.is_enabled():
            with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
                disturbed.step()
        disturbed.end()
    assert disturbed.everything() == undisturbed.everything()


def test_preset_grad_scale_survives_a_step_that_was_not_taken():
    undisturbed, disturbed = Training("AdamW", "scaler"), Training("AdamW", "scaler")
    for training in (undisturbed, disturbed):
        training.begin(0)
        training.optimizer.grad_scale = torch.tensor(4.0)
    handle = disturbed.optimizer.register_step_pre_hook(refuse)
    with pytest.raises(Raised):
        disturbed.step()
    handle.remove()
    for training in (undisturbed, disturbed):
        training.step()
        training.end()
        assert not hasattr(training.optimizer, "grad_scale")
    assert disturbed.everything() == undisturbed.everything()


def test_clip_goes_with_its_gradients():
    """A clip whose step was left out does not clip, or judge, the gradients after them."""
    clipped, plain = Training("SGD", "clip"), Training("SGD", "scaler")
    clipped.begin(0)
    plain.begin(0)
    clipped.way = "scaler"
    for training in (clipped, plain):
        training.begin(1)
        training.params[1].grad[0] = torch.inf
        training.step()
        training.end()
        training.run(range(1, STEPS))
    assert clipped.everything() == plain.everything()
    assert clipped.scaler.skipped_steps == 1


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hook_raises(kind, policy):
    """Some gradients have arrived, others not: without them training goes on as if nothing had happened."""
    results = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        model = mpk.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), policy)
        optimizer, scaler = mpk.optim.AdamW(model.parameters(), lr=0.1, max_norm=1.0), mpk.GradScaler(init_scale=8.0)
        x = torch.randn(3, 4).to(model[0].weight.dtype)
        for t in range(4):
            optimizer.zero_grad()
            if disturbed and t in (0, 2):
                handle = getattr(model[0].weight, kind)(refuse)
                with pytest.raises(Raised):
                    scaler.scale(model(x).float().square().sum()).backward()
                handle.remove()
                optimizer.zero_grad()
            scaler.scale(model(x).float().square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(raw([*model.parameters(), *(t for p in model.parameters() for t in optimizer.state[p].values())]))
    assert results[0] == results[1]


def test_found_inf_of_another_scaler_may_not_lie_in_a_parameter():
    """As torch's GradScaler leaves it on an optimizer that unscales by itself."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = mpk.optim.SGD([parameter], lr=1.0)
    parameter.grad, optimizer.grad_scale, optimizer.found_inf = torch.ones(3), None, parameter.detach()[1]
    with pytest.raises(RuntimeError, match="shares memory with found_inf"):
        optimizer.step()
    assert parameter.tolist() == [0, 0, 0]
