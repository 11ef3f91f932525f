# SPDX-License-Identifier: Apache-2.0
"""A step looks at its tensors once, whatever their number, and sees what has changed at the same address."""

import collections
import sys

import numpy as np
import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.ops.common import layout
from mpkernels.runtime import native
from tests import bounds
from tests.optimizers import PAIRS, pairs, parameters, train
from tests.steps import DTYPES, raw


class Calls:
    """How many calls of Python or C functions the interpreter makes inside."""

    def __enter__(self):
        self.count = 0
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _event(self, frame, event, arg):
        self.count += event in ("call", "c_call")


@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_step_calls_do_not_follow_the_number_of_tensors(dtype, monkeypatch):
    """What is asked of each tensor is asked a list at a time: two calls of a gradient's, which collect it, are left."""
    monkeypatch.delenv("MPKERNELS_BACKEND", raising=False)
    calls = []
    for count in (10, 110):
        params = [torch.nn.Parameter(torch.randn(8).to(dtype)) for _ in range(count)]
        optimizer, scaler = mpk.optim.AdamW(params, lr=0.1, max_norm=1.0), mpk.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            with Calls() as counted:
                scaler.step(optimizer)
                scaler.update()
        calls.append(counted.count)
    assert (calls[1] - calls[0]) / 100 <= 0.5, f"{calls} calls for 10 and 110 tensors"


@pytest.mark.parametrize("shared", [False, True])
def test_step_checks_the_lists_once(monkeypatch, shared):
    """A tensor that stands twice in a list, as one gradient of all does, is no reason to look at it anew."""
    params = [torch.nn.Parameter(torch.randn(8)) for _ in range(5)]
    optimizer, checks = mpk.optim.SGD(params, lr=0.1, momentum=0.9), []
    check = optimizer._op.check
    monkeypatch.setattr(optimizer._op, "check", lambda call: checks.append(1) or check(call))
    for t in range(6):
        one = torch.ones(8)
        for p in params:
            p.grad = one if shared else torch.randn_like(p)
        if t == 4:
            optimizer.state[params[2]]["momentum_buffer"].data = torch.zeros(8)  # moved: looked at again
        optimizer.step()
    assert len(checks) == 2
    assert torch.equal(
        optimizer._plans.plans[0].updates[0].states["momentum_buffer"][2], optimizer.state[params[2]]["momentum_buffer"]
    )


@pairs
def test_step_moves_the_versions_of_all_that_it_writes(pair):
    """In a step that is prepared anew and in the next, so that autograd sees that what it has saved is no more."""
    ours, _, options = PAIRS[pair]
    params = parameters(*DTYPES)
    optimizer = ours(params, **options)
    tensors = lambda: [*params, *(t for p in params for t in optimizer.state[p].values())]
    train(params, optimizer, 1)
    for t in range(1, 4):
        before = [tensor._version for tensor in tensors()]
        train(params, optimizer, 1, first=t)
        assert all(tensor._version > version for tensor, version in zip(tensors(), before, strict=True))
        assert not any(p.grad._version for p in params)


def test_step_keeps_the_table_of_gradients_that_stay():
    """Their addresses, that is: the tensors themselves are let go between two steps."""
    params = parameters(torch.float16, torch.float32)
    optimizer = mpk.optim.AdamW(params)
    train(params, optimizer, 1)
    grads = optimizer._plans.plans[0].updates[0].grads
    table = grads.table
    optimizer.step()
    assert grads.table is table
    assert optimizer._plans.plans[0].updates[0].grads is grads


@pytest.fixture(params=["torch.compile's", "in Python"])
def formats(request, monkeypatch):
    """What compares formats; without torch.compile's guards it is Python."""
    if request.param == "in Python":
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    elif not hasattr(torch._C._dynamo.guards, "TensorGuards"):
        pytest.skip("this torch has no TensorGuards")
    return request.param


@pytest.mark.parametrize("change", [
    lambda p: setattr(p, "data", p.data[:1]), lambda p: setattr(p, "data", p.data.view(torch.float16)[:, :2]),
    lambda p: setattr(p.grad, "data", torch.zeros(5)), lambda p: setattr(p.grad, "data", p.grad.data.to(torch.int32)),
])  # fmt: skip
def test_step_sees_what_changed_at_the_same_address(formats, change):
    params = [torch.nn.Parameter(torch.randn(2, 2)) for _ in range(3)]
    optimizer = mpk.optim.AdamW(params, lr=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p in params:
        p.grad = torch.randn_like(p)
    before = raw(p.data for p in params[:1])
    change(params[1])
    with pytest.raises(RuntimeError, match="parameter 1"):
        optimizer.step()
    assert raw(params[:1]) == before


@pytest.mark.parametrize("other", [
    lambda t: t.double(), lambda t: t.to("meta"), lambda t: t[:1], lambda t: t.view(3, 2), lambda t: t.mT.contiguous().mT,
    lambda t: t.requires_grad_(), lambda t: torch._neg_view(t), lambda t: t.to_sparse(), nn.Parameter, lambda t: None,
])  # fmt: skip
def test_formats_that_differ(formats, other):
    tensor = lambda: torch.arange(6.0).view(2, 3)
    same = layout.same_formats([tensor(), tensor()])
    assert ("TensorGuards" in repr(same)) == (formats == "torch.compile's")
    assert same(tensor(), tensor() + 1)
    assert not same(tensor(), other(tensor()))
    assert not same(other(tensor()), tensor())


def test_step_follows_a_transposed_parameter():
    """Same address, same shape, other strides; in numbers for which all arithmetic is exact."""
    params = [torch.nn.Parameter(torch.arange(9.0).view(3, 3)) for _ in range(2)]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    grads = [torch.arange(9.0).view(3, 3) + t for t in range(3)]
    optimizer, other = mpk.optim.SGD(params, lr=0.5), torch.optim.SGD(others, lr=0.5)
    for t, grad in enumerate(grads):
        if t == 2:
            params[0].data, others[0].data = params[0].data.t(), others[0].data.t()
        for p in (*params, *others):
            p.grad = grad.clone()
        optimizer.step()
        other.step()
    assert raw(params) == raw(others)


def _host_and_back(optimizer, params):
    for p in params:
        for key, value in optimizer.state[p].items():
            optimizer.state[p][key] = value.clone()


def _moment(optimizer, params):
    name = "exp_avg" if "exp_avg" in optimizer.state[params[1]] else "momentum_buffer"
    optimizer.state[params[1]][name] = torch.ones_like(optimizer.state[params[1]][name])


def _count(optimizer, params):
    state = optimizer.state[params[1]]
    if "step" in state:  # torch's SGD has none
        state["step"] = torch.full_like(state["step"], 40)


def _reset(optimizer, params):
    optimizer.state = collections.defaultdict(dict)


@pytest.mark.parametrize("change", [
    _host_and_back, _moment, _count, _reset, lambda optimizer, _: optimizer.state.clear(),
    lambda optimizer, params: optimizer.state.update({params[0]: {}}),
])  # fmt: skip
@pytest.mark.parametrize("pair", ["adamw", "amsgrad", "momentum"])
def test_step_sees_state_that_was_put_in(pair, change):
    """torch looks the state up in every step: offloaded and fetched again, reset, or set by hand, it is what counts."""
    ours, torchs, options = PAIRS[pair]
    runs = [(ours, torch.float32), (torchs, torch.float64), (torchs, torch.float32)]
    trajectories = []
    for make, dtype in runs:
        params = parameters(dtype, dtype, dtype)
        optimizer = make(params, **options)
        train(params, optimizer)
        change(optimizer, params)
        trajectories.append([])
        for t in range(3, 6):
            train(params, optimizer, 1, t)
            trajectories[-1].append(torch.cat([p.detach() for p in params]).double().numpy())
        listed = optimizer._plans.plans[0].updates[0].states if make is ours else {}
        assert all(
            t is optimizer.state[p][name] for name, tensors in listed.items() for p, t in zip(params, tensors, strict=True)
        )
    bounds.check_trajectory(*map(np.stack, trajectories))
