# SPDX-License-Identifier: Apache-2.0
"""state_dict of the optimizers: resumed bit for bit, both ways with torch's, and a bad one that loads nothing."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests import bounds
from tests.optimizers import OURS, PAIRS, everything, ours, pairs, parameters, through_a_file, train
from tests.steps import DTYPES, raw


@ours
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_resume_is_bitwise(name, order):
    """Three steps, a checkpoint, three steps: those of a run without a break."""
    straight = parameters(*DTYPES)
    optimizer = OURS[name](straight, lr=0.01)
    train(straight, optimizer)
    saved = through_a_file({"model": [p.detach() for p in straight], "optimizer": optimizer.state_dict()})
    train(straight, optimizer, first=3)
    resumed = [nn.Parameter(torch.zeros_like(p)) for p in straight]
    again = OURS[name](resumed, lr=0.7)
    actions = [lambda: again.load_state_dict(saved["optimizer"]), lambda: _fill(resumed, saved["model"])]
    for action in actions[:: 1 if order == "optimizer first" else -1]:
        action()
    train(resumed, again, first=3)
    assert everything(again) == everything(optimizer)


@torch.no_grad()
def _fill(params, values):
    for parameter, value in zip(params, values, strict=True):
        parameter.copy_(value)


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_state_dict_both_ways_with_torchs(pair, dtype):
    ours, theirs, options = PAIRS[pair]
    for here, there in ((ours, theirs), (theirs, ours)):
        params = parameters(dtype, dtype)
        first = here(params, **options)
        train(params, first, 2)
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        second = there(twins, lr=0.5)
        second.load_state_dict(through_a_file(first.state_dict()))
        saved, loaded = first.state_dict(), second.state_dict()
        assert loaded["param_groups"][0]["lr"] == options["lr"]
        for key in saved["state"]:
            names = saved["state"][key].keys() & loaded["state"][key].keys()
            assert names >= saved["state"][key].keys() - {"step"}
            assert raw(saved["state"][key][n] for n in sorted(names)) == raw(loaded["state"][key][n] for n in sorted(names))
        train(params, first, 3, 2)
        train(twins, second, 3, 2)
        for parameter, twin in zip(params, twins, strict=True):
            mine, other = (parameter, twin) if here is ours else (twin, parameter)
            arrays = [p.detach().double().numpy()[None] for p in (mine, other)]
            bounds.check_trajectory(*arrays, arrays[1] if dtype == torch.float32 else None)


def test_state_dict_of_torchs_16_bit_optimizer():
    params = parameters(torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=0.01)
    train(params, theirs, 2)
    optimizer = mpk.optim.AdamW(params, lr=0.01)
    optimizer.load_state_dict(theirs.state_dict())
    state = optimizer.state[params[0]]
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"].bfloat16(), theirs.state[params[0]]["exp_avg"])
    assert torch.equal(state["master"], params[0].float())
    train(params, optimizer, 1, 2)
    theirs.load_state_dict(optimizer.state_dict())
    assert theirs.state[params[0]]["step"] == 3
    train(params, theirs, 1, 3)


SWITCHES = {
    "momentum off": ("SGD", {"momentum": 0.9}, {"momentum": 0.0}),
    "momentum on": ("SGD", {"momentum": 0.0, "dampening": 0.5}, {"momentum": 0.9}),
    "amsgrad off": ("AdamW", {"amsgrad": True}, {"amsgrad": False}),
    "amsgrad on": ("AdamW", {"amsgrad": False}, {"amsgrad": True}),
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("switch", SWITCHES)
def test_resume_after_a_switch_is_bitwise(switch, steps):
    """A state may lie there that is not wanted now, and one that is wanted not yet; switched back, both are as they were."""
    name, before, after = SWITCHES[switch]
    runs = []
    for resume in (False, True):
        params = parameters(torch.float16, torch.float32)
        optimizer = OURS[name](params, lr=0.1, **before)
        train(params, optimizer)
        optimizer.param_groups[0].update(after)
        train(params, optimizer, steps, 3)
        if resume:
            optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        train(params, optimizer, 1, 4)
        optimizer.param_groups[0].update({key: before[key] for key in after})
        train(params, optimizer, 1, 5)
        runs.append(everything(optimizer))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_momentum_may_come_later(dtype, reload):
    """As torch's, the buffer begins with the gradient, undamped."""
    trajectories = []
    for make, wanted in ((mpk.optim.SGD, dtype), (torch.optim.SGD, torch.float64), (torch.optim.SGD, torch.float32)):
        params, weights = parameters(wanted, wanted), []
        optimizer = make(params, lr=0.1, dampening=0.5)
        for t in range(5):
            if t == 2:
                optimizer.param_groups[0]["momentum"] = 0.9
                if reload:
                    optimizer.load_state_dict(optimizer.state_dict())
            train(params, optimizer, 1, t)
            weights.append(torch.cat([p.detach() for p in params]).double().numpy())
        trajectories.append(np.stack(weights))
    got, exact, plain = trajectories
    bounds.check_trajectory(got, exact, plain if dtype == torch.float32 else None)


def test_momentum_that_comes_later_keeps_the_step_tensor():
    """What holds it, as a captured graph does, sees it go on."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = mpk.optim.SGD([parameter], lr=0.1)
    train([parameter], optimizer, 2)
    step = optimizer.state[parameter]["step"]
    optimizer.param_groups[0]["momentum"] = 0.9
    train([parameter], optimizer, 1)
    assert optimizer.state[parameter]["step"] is step
    assert step.item() == 1, "the buffer's first step"


def test_adam_and_adamw_of_torch_are_told_apart():
    params = parameters(torch.float32)
    for here, there in ((mpk.optim.Adam, torch.optim.AdamW), (mpk.optim.AdamW, torch.optim.Adam)):
        theirs = there(params)
        train(params, theirs, 1)
        with pytest.raises(ValueError, match="decoupled_weight_decay"):
            here(params).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("make", [mpk.optim.AdamW, mpk.optim.SGD])
def test_state_dict_is_live(make):
    """As torch's: its step counts are those of `state`, which the step advances, beside moments that move too."""
    params = parameters(torch.float16, torch.float32)
    optimizer = make(params, lr=0.1, **(dict(momentum=0.9) if make is mpk.optim.SGD else {}))
    train(params, optimizer, 1)
    kept = optimizer.state_dict()["state"]
    train(params, optimizer, 2, 1)
    for i, parameter in enumerate(params):
        assert kept[i].keys() == optimizer.state[parameter].keys()
        assert all(kept[i][name] is tensor for name, tensor in optimizer.state[parameter].items())
        assert (kept[i]["step"].shape, kept[i]["step"].dtype, kept[i]["step"].item()) == ((), torch.float32, 3)


class _Payload:
    """What a pickle can say: call this, with that."""

    def __reduce__(self):
        return print, ("run from a file",)


@pytest.mark.parametrize("spoil", ["truncated", "empty", "payload", "bits"])
def test_bad_checkpoint_file(spoil, capsys):
    """torch.load(weights_only=True) raises, and what is loaded otherwise is checked: nothing runs, nothing is half loaded."""
    params = parameters(torch.float16, torch.float32)
    optimizer = mpk.optim.AdamW(params)
    train(params, optimizer)
    before, file, state = everything(optimizer), io.BytesIO(), optimizer.state_dict()
    if spoil == "payload":
        state = _changed(state, exp_avg=_Payload())
    torch.save(state, file)
    data = bytearray(file.getvalue())
    if spoil in ("truncated", "empty"):
        data = data[: len(data) // 2 if spoil == "truncated" else 0]
    if spoil == "bits":
        at = data.index(b"PK", 4)
        data[at : at + 64] = bytes(64)
    with pytest.raises((RuntimeError, pickle.UnpicklingError, EOFError)):
        optimizer.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    assert capsys.readouterr().out == ""
    assert everything(optimizer) == before
    train(params, optimizer, first=3)


def _changed(state, **entries):
    return {**state, "state": {**state["state"], 0: {**state["state"][0], **entries}}}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {"state": s["state"]}, "keys state and param_groups"),
        (lambda s: [s], "keys state and param_groups"),
        (lambda s: {**s, "param_groups": []}, r"groups of \[\] parameters, the optimizer of \[2\]"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": [0]}]}, r"groups of \[1\]"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "lr": math.nan}]}, "Invalid learning rate: nan"),
        (lambda s: {**s, "state": {**s["state"], 7: {}}}, r"state for \[7\], which no group names"),
        (lambda s: _changed(s, exp_avg=torch.zeros(4)), r"exp_avg of parameter 0 \(a\) must have shape \(5,\), got \(4,\)"),
        (lambda s: _changed(s, exp_avg_sq=None), "exp_avg_sq of parameter 0 .*got NoneType"),
        (lambda s: _changed(s, exp_avg=[1.0]), "exp_avg of parameter 0 .*got list"),
        (
            lambda s: {**s, "state": {0: {"step": 1, "momentum_buffer": torch.zeros(5)}}},
            "exp_avg of parameter 0 .*got NoneType",
        ),
        (lambda s: _changed(s, step=torch.tensor(math.nan)), "step of parameter 0 .a. must be a count"),
        (lambda s: _changed(s, step=-1), "step of parameter 0 .a. must be a count, got -1"),
        (lambda s: _changed(s, step=1.5), "step of parameter 0 .a. must be a count, got 1.5"),
        (lambda s: _changed(s, step=None), "step of parameter 0 .a. must be a count, got None"),
        (lambda s: _changed(s, step=2**128), "step of parameter 0 .a. must be a count, got 3402823"),
        (lambda s: _changed(s, master=torch.zeros(5).half()), "master of parameter 0 .a. is torch.float16, .* torch.float32"),
        (lambda s: _changed(s, master=torch.zeros(1)), r"master of parameter 0 .a. must have shape \(5,\), got \(1,\)"),
        (lambda s: _changed(s, master="m"), "master of parameter 0 .a. .* got str"),
        (lambda s: _changed(s, exp_avg=torch.zeros(5).to_sparse()), "exp_avg of parameter 0 .a. must be a dense .*sparse_coo"),
        (lambda s: _changed(s, exp_avg=torch.zeros(5).cfloat()), "exp_avg of parameter 0 .a. must be .*got torch.complex64"),
        (lambda s: _changed(s, exp_avg=torch.zeros(5, device="meta")), "exp_avg of parameter 0 .a. must be .*on meta"),
        (lambda s: {**s, "state": [1]}, "state must be a dict, got list"),
        (lambda s: {**s, "state": {0: None}}, "the state of parameter 0 .a. must be a dict, got NoneType"),
        (lambda s: {**s, "state": {"a": s["state"][0]}}, r"state for \['a'\], which no group names"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": [0, 0]}]}, "different numbers or names"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": [[0], 1]}]}, "different numbers or names"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": 2}]}, "must be a list of groups with params"),
        (lambda s: {**s, "param_groups": None}, "param_groups must be a list of groups"),
        (lambda s: {**s, "param_groups": [{"lr": 1.0}]}, "param_groups must be a list of groups"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "betas": (0.9,)}]}, "betas must be two numbers"),
    ],
)
def test_bad_state_dict_loads_nothing(change, message):
    """The second parameter's state is good, the bad one is the first's; or the other way about, for what comes late."""
    params = parameters(torch.float16, torch.float32)
    optimizer = mpk.optim.AdamW(zip("ab", params, strict=True))
    train(params, optimizer)
    before, groups = everything(optimizer), copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(change(optimizer.state_dict()))
    assert everything(optimizer) == before
    assert [{**g, "params": None} for g in optimizer.param_groups] == groups
    train(params, optimizer, first=3)


@ours
@pytest.mark.parametrize("renew", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
def test_copies_of_the_optimizer(name, renew):
    params = parameters(*DTYPES)
    optimizer = OURS[name](params, lr=0.01, max_norm=2.0, master_dtype=torch.float64)
    train(params, optimizer)
    twins, twin = renew((params, optimizer))
    assert (twin.max_norm, twin.master_dtype) == (2.0, torch.float64)
    for group, owner in ((params, optimizer), (twins, twin)):
        train(group, owner, first=3)
    assert everything(twin) == everything(optimizer)
    assert twins[0] is not params[0]
