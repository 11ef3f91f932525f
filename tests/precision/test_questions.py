# SPDX-License-Identifier: Apache-2.0
"""What advise, find_nonfinite and check_batch_invariant share: bad input, and a model that stays what it was."""

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests.steps import raw

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def step(model):
    return model(X).float().square().mean()


def check_batch_invariant(model, step):
    """Which takes data."""
    return mpk.check_batch_invariant(model, X, sizes=(2, 3))


of_a_step = pytest.mark.parametrize("ask", [mpk.advise, mpk.find_nonfinite])
every = pytest.mark.parametrize("ask", [mpk.advise, mpk.find_nonfinite, check_batch_invariant])


class Fails(nn.Module):
    fails = False

    def forward(self, x):
        return x / (1 // (not self.fails))


def everything(model) -> list:
    """Values, the objects that gradients are, modes, hooks, policies, random numbers."""
    grads = [p.grad for p in model.parameters()]
    modules = [
        (m.training, getattr(m, "policy", None), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    return [*raw([*model.state_dict().values(), *grads, torch.get_rng_state()]), list(map(id, grads)), modules]


@every
def test_questions_leave_the_model_alone(ask):
    model = mpk.convert(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), Fails(), nn.Linear(8, 4)))
    step(model).backward()
    before = everything(model)
    ask(model, step)
    assert everything(model) == before
    model[3].fails = True
    with pytest.raises(ZeroDivisionError):
        ask(model, step)
    assert everything(model) == before


@of_a_step
def test_questions_leave_a_model_with_dropout_alone(ask):
    """Random numbers are drawn, and are those of before."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 4))
    step(model).backward()
    before = everything(model)
    ask(model, step)
    ask(model, lambda model: model(X * torch.inf).mean())
    assert everything(model) == before


@of_a_step
def test_questions_of_a_compiled_model_have_the_names_of_the_model(ask):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert ask(torch.compile(model, backend="eager"), step) == ask(model, step)
    assert ask(torch.compile(model, backend="eager"), lambda model: step(model) * torch.inf) is not None


@every
def test_questions_refuse_what_is_no_model(ask):
    with pytest.raises(TypeError, match=rf"{ask.__name__}: model must be a torch\.nn\.Module, got int"):
        ask(3, step)
    with pytest.raises(RuntimeError, match=rf"{ask.__name__}: weight is on meta and has no values: load the model first"):
        ask(nn.Linear(8, 4, device="meta"), step)


def backward_itself(model):
    loss = step(model)
    loss.backward()
    return loss


@of_a_step
@pytest.mark.parametrize(
    "step, error, message",
    [
        (3.0, TypeError, "step must be a function of the model that returns the loss, got float"),
        (torch.ones(()), TypeError, "step must be a function of the model that returns the loss, got Tensor"),
        (lambda model: 3.0, TypeError, "step must return the loss, a tensor, got float"),
        (lambda model: model(X), ValueError, r"step must return a scalar, got shape \(6, 4\)"),
        (lambda model: torch.view_as_complex(model(X)[:, :2]).sum(), ValueError, "step must return a real loss, got"),
        (lambda model: step(model).detach(), RuntimeError, "the loss has no graph: it was computed under no_grad"),
        (backward_itself, RuntimeError, "step has called backward itself: it must leave that to"),
    ],
)
def test_questions_refuse_steps(ask, step, error, message):
    with pytest.raises(error, match=f"{ask.__name__}: {message}"):
        ask(nn.Linear(8, 4), step)


@of_a_step
@pytest.mark.parametrize("make", [torch.optim.SGD, mpk.optim.SGD], ids=["torch", "ours"])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_questions_refuse_a_step_of_an_optimizer_before_it_writes(ask, make, is_scaled):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer, scaler = make(model.parameters(), lr=0.1), mpk.GradScaler(enabled=is_scaled)
    step(model).backward()
    before = everything(model)

    def training_step(model):
        loss = step(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        return loss

    with pytest.raises(RuntimeError, match=rf"{ask.__name__}: step has called optimizer.step\(\) itself: it must only return"):
        ask(model, training_step)
    assert everything(model) == before
