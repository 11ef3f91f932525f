# SPDX-License-Identifier: Apache-2.0
"""The order of GradScaler's calls: torch's errors, and what to do."""

import warnings

import pytest
import torch

import mpkernels as mpk
from tests.amp.scaling import give_grads, iteration
from tests.optimizers import parameters
from tests.steps import raw


@pytest.mark.parametrize("make", [mpk.optim.AdamW, torch.optim.AdamW])
def test_state_machine_errors_are_torchs(make):
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = make(params)
    for call in (scaler.unscale_, scaler.step):
        with pytest.raises(AssertionError, match="_scale is None"):
            call(optimizer)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.update()
    give_grads(params, scaler)
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last update"):
        scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.step(optimizer)


def test_step_inside_backward():
    params, scaler = parameters(torch.float32, torch.float32), mpk.GradScaler(init_scale=8.0)
    optimizer = mpk.optim.AdamW(params)
    handle = params[0].register_post_accumulate_grad_hook(lambda _: scaler.step(optimizer))
    before = raw(params)
    loss = scaler.scale(sum(p.sum() for p in params))
    with pytest.raises(RuntimeError, match="inside backward"):
        loss.backward(retain_graph=True)
    assert raw(params) == before
    handle.remove()
    optimizer.zero_grad()
    loss.backward()
    scaler.step(optimizer)
    assert raw(params) != before


def test_fp16_gradients_of_other_optimizers_stay_an_error():
    params, scaler = parameters(torch.float16), mpk.GradScaler()
    give_grads(params, scaler, size=2.0**-16)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(torch.optim.SGD(params, lr=0.1))


def test_lr_scheduler_does_not_warn():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.AdamW(params, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            iteration(params, optimizer, scaler)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
