# SPDX-License-Identifier: Apache-2.0
"""The way of a call: through how many files of ours x travels from the layer to a kernel, and that it is chosen for once."""

from collections import Counter

import pytest
import torch

import mpkernels as mpk
from mpkernels.runtime import native, resolve
from mpkernels.runtime.op import Op
from tests.call_trace import trace

FILES = 8  # at most

by_native = pytest.mark.skipif(native.why_not() is not None, reason=f"native: {native.why_not()}")


def layer(policy, activation, stepped: bool):
    """A layer whose every call but the first takes the fast way; stepped: with a compute copy of an optimizer's."""
    made = mpk.MPLinear(8, 8, activation=activation, policy=policy)
    x = torch.randn(3, 8, requires_grad=True)
    optimizer = mpk.optim.SGD(made.parameters(), lr=0.1) if stepped else None
    for _ in range(3):
        made(x).sum().backward()
        if stepped:
            optimizer.step()
    return made, x, optimizer


CASES = [("mixed_float16", "relu"), ("mixed_bfloat16", "gelu"), ("float32", None), (None, "relu")]


@by_native
@pytest.mark.parametrize("stepped", [False, True], ids=["", "stepped"])
@pytest.mark.parametrize(("policy", "activation"), CASES, ids=str)
def test_forward_touches_few_files(policy, activation, stepped):
    made, x, _optimizer = layer(policy, activation, stepped)
    calls = trace(lambda: made(x))
    files = {file for file, _ in calls}
    assert len(files) <= FILES, sorted(calls)
    assert calls["runtime/op.py", "resolve"] == 1


@pytest.mark.parametrize(("policy", "activation"), CASES, ids=str)
def test_forward_and_backward_are_chosen_for_once_each(policy, activation, monkeypatch):
    """One question for each call of an op, which a table in memory answers: nothing looks at the setting or a file again."""
    made, x, _ = layer(policy, activation, stepped=False)
    asked, resolve_ = Counter(), Op.resolve
    monkeypatch.setattr(Op, "resolve", lambda op, call: (asked.update([op.name]), resolve_(op, call))[1])
    before = resolve.choose.cache_info()
    calls = trace(lambda: made(x).sum().backward())
    assert asked == {"linear_act": 1, "linear_act_backward": 1}
    after = resolve.choose.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 0)
    assert not {file for file, _ in calls} & {"runtime/resolve.py", "runtime/tuned_table.py"}
    assert ("ops/linear_act/call.py", "check_tensors") not in calls
