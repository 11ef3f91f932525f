# SPDX-License-Identifier: Apache-2.0
"""Tests of the clip that scaler.clip_grad_norm_ leaves to the step: for which gradients it holds, and when it is dropped."""

import pytest
import torch
from torch import nn

import mpkernels as mpk

MAX_NORM = 1.0


def backward(params, scaler, size):
    scaler.scale(sum((size * (i + 1) * p).sum() for i, p in enumerate(params))).backward()


def zero_each(params, optimizer):
    for parameter in params:
        parameter.grad.zero_()


def zero_all_at_once(params, optimizer):
    torch._foreach_zero_([p.grad for p in params])


def zero_grad(params, optimizer):
    optimizer.zero_grad(set_to_none=False)


def zero_grad_to_none(params, optimizer):
    optimizer.zero_grad()


def zero_of_the_model(params, optimizer):
    model = nn.ParameterList(params)
    model.zero_grad(set_to_none=False)


def model_to_none(params, optimizer):
    nn.ParameterList(params).zero_grad()


def new_gradients(params, optimizer):
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)


ZEROS = [zero_each, zero_all_at_once, zero_grad, zero_grad_to_none, zero_of_the_model, model_to_none, new_gradients]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("zero", ZEROS)
def test_pending_clip_is_not_for_the_next_backward(zero, enabled):
    """Its step was left out: as with torch, whose clip is done by then."""
    results = []
    for make, scaler in ((mpk.optim.SGD, mpk.GradScaler), (torch.optim.SGD, lambda **o: torch.amp.GradScaler("cpu", **o))):
        params = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (4, 12)]
        optimizer, scaler = make(params, lr=1.0), scaler(init_scale=8.0, enabled=enabled)
        backward(params, scaler, 2.0)
        if make is mpk.optim.SGD:
            scaler.clip_grad_norm_(optimizer, MAX_NORM)
        else:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, MAX_NORM)
            scaler.update() if enabled else None
        zero(params, optimizer)
        backward(params, scaler, 3.0)
        scaler.step(optimizer)
        results.append(torch.cat([p.detach() for p in params]).tolist())
    assert results[0] == results[1] == [-3.0] * 4 + [-6.0] * 12


@pytest.mark.parametrize("zero", ZEROS)
def test_pending_clip_does_not_judge_the_next_backward(zero):
    """An overflow that was read with it skips no step of other gradients."""
    params = [nn.Parameter(torch.zeros(4))]
    optimizer, scaler = mpk.optim.SGD(params, lr=1.0), mpk.GradScaler(init_scale=8.0)
    backward(params, scaler, torch.inf)
    scaler.clip_grad_norm_(optimizer, MAX_NORM)
    zero(params, optimizer)
    backward(params, scaler, 2.0)
    scaler.step(optimizer)
    scaler.update()
    assert not scaler.last_step_skipped
    assert params[0].tolist() == [-2.0] * 4


def test_pending_clip_keeps_no_gradient():
    params = [nn.Parameter(torch.zeros(4))]
    optimizer, scaler = mpk.optim.SGD(params, lr=1.0), mpk.GradScaler(init_scale=8.0)
    backward(params, scaler, 1.0)
    storage = torch.multiprocessing.reductions.StorageWeakRef(params[0].grad.untyped_storage())
    scaler.clip_grad_norm_(optimizer, MAX_NORM)
    params[0].grad = None
    assert storage.expired()
