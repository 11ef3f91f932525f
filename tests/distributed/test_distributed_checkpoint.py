# SPDX-License-Identifier: Apache-2.0
"""Tests of torch.distributed.checkpoint.state_dict: our optimizers' state to torch's, back and to ours, flattened or not."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import mpkernels as mpk
from tests.steps import raw

NAMES = {"AdamW": {}, "Adam": {"amsgrad": True}, "SGD": {"momentum": 0.9}}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def make(library, name: str, policy: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    if library is mpk.optim:
        mpk.convert(model, policy)
    return model, getattr(library, name)(model.parameters(), lr=0.01, **NAMES[name])


def train(model, optimizer, steps=3) -> None:
    for t in range(steps):
        for i, parameter in enumerate(model.parameters()):
            dtype = parameter.dtype if parameter.grad_dtype is None else parameter.grad_dtype
            parameter.grad = torch.full_like(parameter, (t + i) % 3 - 1.25, dtype=dtype)
        optimizer.step()
        optimizer.zero_grad()


def moments(optimizer) -> list[bytes]:
    return raw(t for state in optimizer.state.values() for n, t in sorted(state.items()) if n in MOMENTS)


@pytest.mark.parametrize("flat", [True, False], ids=["flattened", "nested"])
@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@pytest.mark.parametrize("way", ["ours to torch's", "torch's to ours", "ours to ours"])
@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_goes_both_ways(name, way, policy, flat):
    here, there = (mpk.optim if side == "ours" else torch.optim for side in way.split(" to "))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(here, name, policy)
    train(model, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other, fresh = make(there, name, policy)
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert moments(fresh) == moments(optimizer)
    assert len(moments(fresh)) >= 4
    assert fresh.param_groups[0]["lr"] == 0.01
    other.load_state_dict(model.state_dict())
    train(other, fresh)
    if here is there:
        train(model, optimizer)
        assert raw(other.parameters()) == raw(model.parameters())


@pytest.mark.parametrize("policy", ["mixed_float16,grad=float16", "mixed_bfloat16,grad=bfloat16", "float16,grad=float32"])
@pytest.mark.parametrize("name", NAMES)
def test_fresh_optimizer_whose_gradients_have_another_dtype(name, policy):
    """torch's functions step it with gradients of the parameter's dtype, which such a parameter refuses."""
    model, optimizer = make(mpk.optim, name, policy)
    state = get_optimizer_state_dict(model, optimizer)
    assert state["state"].keys() == dict(model.named_parameters()).keys()
    straight, plain = make(mpk.optim, name, policy)
    before = raw(straight.parameters())
    train(straight, plain)
    assert before != raw(straight.parameters())
    train(model, optimizer)
    assert raw(model.parameters()) == raw(straight.parameters())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other, fresh = make(mpk.optim, name, policy)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, saved)
    for some in ((straight, plain), (other, fresh)):
        train(*some)
    assert raw(other.parameters()) == raw(straight.parameters())
