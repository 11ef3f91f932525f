# SPDX-License-Identifier: Apache-2.0
"""Tests of torch's contract of `optimizer.state`: keys and entries of others, hooks, a state in its place."""

import collections
import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from tests.optimizers import OURS, parameters, through_a_file, train
from tests.steps import raw

names = pytest.mark.parametrize("name", ["AdamW", "SGD"])


def make(name: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = parameters(torch.float16, torch.float32)
    return params, OURS[name](params, lr=0.1)


def own(params, optimizer) -> list[bytes]:
    """What is left of training, but for what others have put beside it."""
    names = ("step", "master", "exp_avg", "exp_avg_sq", "momentum_buffer")
    return raw([*params, *(optimizer.state[p][n] for p in params for n in names if n in optimizer.state[p])])


def another(params, optimizer) -> None:
    """What wrappers such as Lookahead, and users, keep in an optimizer's state."""
    optimizer.state["global_step"] = 7
    optimizer.state["history"] = {"losses": [1.0, 2.0], "master": torch.ones(2)}
    optimizer.state[params[0]]["slow_buffer"] = params[0].detach().clone()
    optimizer.state[params[0]]["masked"] = {"mask": torch.tensor([True, False]), "note": "keep", "sizes": (1, 2)}
    optimizer.state[params[1]]["counter"] = 3
    optimizer.state[params[1]]["ids"] = torch.arange(4)


@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
@names
def test_state_of_others_is_kept(name, way):
    straight, optimizer = make(name)
    params, other = make(name)
    for made in ((straight, optimizer), (params, other)):
        train(*made)
    another(params, other)
    if way in ("deepcopy", "pickle"):
        renew = copy.deepcopy if way == "deepcopy" else lambda value: pickle.loads(pickle.dumps(value))
        params, other = renew((params, other))
    else:
        saved = other.state_dict()
        assert saved["state"]["global_step"] == 7
        values = [p.detach().clone() for p in params]
        params, other = make(name)
        for parameter, value in zip(params, values, strict=True):
            parameter.data.copy_(value)
        other.load_state_dict(through_a_file(saved) if way == "file" else saved)
    assert other.state["global_step"] == 7
    assert other.state["history"]["losses"] == [1.0, 2.0]
    assert other.state[params[0]]["slow_buffer"].dtype == torch.float16
    assert other.state[params[0]]["masked"]["note"] == "keep"
    assert other.state[params[0]]["masked"]["sizes"] == (1, 2)
    assert other.state[params[1]]["counter"] == 3
    other.sync_masters_()
    assert other.check_masters() == []
    with other.master_weights():
        assert params[0].dtype == torch.float32
    assert other.master_state_dict(nn.ParameterDict({"a": params[0]}))["a"].dtype == torch.float32
    train(straight, optimizer, first=3)
    train(params, other, first=3)
    assert own(params, other) == own(straight, optimizer)


@names
def test_entries_of_others_load_as_by_torch(name):
    """Their tensors take the dtype and device of the parameter; the rest is as it was."""
    params, optimizer = make(name)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.SGD(twins, momentum=0.9)
    loaded = []
    for some, mine in ((params, optimizer), (twins, theirs)):
        another(some, mine)
        train(some, mine)
        mine.state[some[0]]["wide"] = torch.full((2,), 0.1, dtype=torch.float64)
        mine.load_state_dict(mine.state_dict())
        state = [mine.state[p] for p in some]
        loaded.append([state[0]["slow_buffer"], state[0]["wide"], state[1]["ids"], state[0]["masked"]["mask"]])
    for ours, other in zip(*loaded, strict=True):
        assert ours.dtype == other.dtype
        assert torch.equal(ours, other)


@names
def test_state_of_others_before_the_first_step(name):
    """A parameter that has nothing but a slow buffer gets our state at its first step."""
    params, optimizer = make(name)
    straight, plain = make(name)
    optimizer.state[params[0]]["slow_buffer"] = params[0].detach().clone()
    optimizer.load_state_dict(optimizer.state_dict())
    train(params, optimizer)
    train(straight, plain)
    assert own(params, optimizer) == own(straight, plain)
    assert "slow_buffer" in optimizer.state[params[0]]


@names
def test_state_may_be_a_plain_dict(name):
    params, optimizer = make(name)
    straight, plain = make(name)
    optimizer.state = {}
    train(params, optimizer)
    optimizer.state = collections.OrderedDict(optimizer.state)
    optimizer.load_state_dict(optimizer.state_dict())
    train(params, optimizer, first=3)
    optimizer.state = {}
    optimizer.load_state_dict(optimizer.state_dict())
    train(straight, plain, 6)
    assert raw(params) == raw(straight)


@names
def test_hooks_see_what_the_user_gets(name):
    """And may return another format, which a hook of the loading side reads."""
    params, optimizer = make(name)
    train(params, optimizer)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    handle = optimizer.register_state_dict_post_hook(lambda o, s: seen.append(s))
    result = optimizer.state_dict()
    assert seen[0] == "before"
    assert seen[1] is result
    handle.remove()
    optimizer.register_state_dict_post_hook(lambda o, s: {"format": 2, "payload": s})
    wrapped = optimizer.state_dict()
    assert wrapped["format"] == 2
    assert wrapped["payload"].keys() == result.keys()
    again, other = make(name)
    other.register_load_state_dict_pre_hook(lambda o, s: s["payload"])
    other.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    for parameter, value in zip(again, params, strict=True):
        parameter.data.copy_(value.data)
    other.load_state_dict(wrapped)
    assert seen[-1] == "after"
    train(params, optimizer, first=3)
    train(again, other, first=3)
    assert own(again, other) == own(params, optimizer)


@names
def test_pre_hook_changes_a_copy(name):
    params, optimizer = make(name)
    train(params, optimizer)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda o, s: s.update(state={}))
    optimizer.load_state_dict(saved)
    assert saved["state"]
    assert not optimizer.state


@names
def test_pre_hook_sees_what_class_was_loaded(name):
    """And its attributes: some mark what wrote a checkpoint so."""

    class Marked(dict):
        pass

    _, optimizer = make(name)
    saved, seen = Marked(optimizer.state_dict()), []
    saved.version = 3
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append((type(s), s.version, s is saved)))
    optimizer.load_state_dict(saved)
    assert seen == [(Marked, 3, False)]


@names
@pytest.mark.parametrize("count", [int, np.int64, np.float32, lambda step: torch.tensor([int(step)])])
def test_count_of_steps_may_be_any_number(name, count):
    """In what is loaded and in what a user puts into the state."""
    results = []
    for change in (float, count):
        params, optimizer = make(name)
        train(params, optimizer)
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            state["step"] = change(state["step"])
        optimizer.load_state_dict(saved)
        train(params, optimizer, first=3)
        for state in optimizer.state.values():
            state["step"] = change(state["step"])
        train(params, optimizer, first=6)
        results.append(own(params, optimizer))
    assert results[0] == results[1]
