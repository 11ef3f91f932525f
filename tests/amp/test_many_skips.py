# SPDX-License-Identifier: Apache-2.0
"""The warning after many skipped steps in a row, and that no value is read on the host."""

import copy
import math
import warnings
from unittest import mock

import pytest
import torch

import mpkernels as mpk
from tests.amp.scaling import give_grads, iteration
from tests.optimizers import parameters


def warned(events: str, scaler=None, after_each=lambda i: None) -> list[int]:
    """At which of these updates ("x" is an overflow) the scaler warned of many skips."""
    scaler, params, found = scaler or mpk.GradScaler(), parameters(torch.float32), []
    optimizer = mpk.optim.SGD(params, lr=0.0)
    for i, event in enumerate(events, 1):
        give_grads(params, scaler, poison=math.inf if event == "x" else None)
        scaler.step(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler.update()
        assert all("steps were skipped" in str(one.message) and one.filename == __file__ for one in caught)
        found += [i] * len(caught)
        after_each(i)
    return found


@pytest.mark.parametrize(
    "events, expected",
    [
        ("x" * 19 + ".", []), ("x" * 20, [20]), ("x" * 100, [20]), ("x" * 19 + "." + "x" * 19, []), ("." * 7 + "x" * 30, [27]),
        ("x" * 25 + "." + "x" * 25, [20, 46]), ("x" * 20 + "." + "x" * 20 + "." + "x" * 20, [20, 41, 62]), ("x." * 50, []),
        ("." * 19 + "x" * 45, [39]), ("x" * 45 + "." * 3 + "x" * 20, [20, 68]),
    ],
)  # fmt: skip
def test_many_skips_in_a_row_are_told_once_per_run(events, expected):
    assert warned(events) == expected


def test_many_skips_name_the_scale_and_what_to_look_at():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.SGD(params, lr=0.0)
    for _ in range(19):
        iteration(params, optimizer, scaler, math.nan)
    give_grads(params, scaler, poison=math.nan)
    scaler.step(optimizer)
    with pytest.warns(UserWarning, match=r"last 20 steps were skipped.*loss scale is 0\.0625 now.*the data has.*overflow_rep"):
        scaler.update()


def test_many_skips_after_a_checkpoint_or_a_copy():
    scaler = mpk.GradScaler()
    assert warned("x" * 25, scaler) == [20]
    assert warned("x" * 15, copy.deepcopy(scaler)) == []
    fresh = mpk.GradScaler()
    fresh.load_state_dict(scaler.state_dict())
    assert warned("x" * 25, fresh) == [20], "the run goes on"


def test_many_skips_where_warnings_are_errors():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.SGD(params, lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            iteration(params, optimizer, scaler, math.inf)
        with pytest.raises(UserWarning, match="were skipped"):
            iteration(params, optimizer, scaler, math.inf)
        iteration(params, optimizer, scaler)
    assert scaler.skipped_in_a_row == 0


@pytest.mark.parametrize("late", [1, 3, 50])
def test_many_skips_are_read_when_the_copy_is_there(monkeypatch, late):
    """As on a GPU: nothing waits, and what is read is of the update at which it was copied."""
    from mpkernels.amp import skip_watch

    now, copies, capturing = [0], [], range(16, 22)

    class Event:
        def __init__(self, values):
            self.ready = now[0] + late

        def query(self):
            assert now[0] not in capturing
            return now[0] >= self.ready

    class Skipped(torch.Tensor):
        is_cuda, is_cpu = True, False

    def copy_to_host(values):
        copies.append(now[0])
        return values.as_subclass(torch.Tensor).clone(), Event(values)

    monkeypatch.setattr(skip_watch, "copy_to_host", copy_to_host)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[0] in capturing)
    watch, found = skip_watch.SkipWatch(), []
    for i in range(1, 121):
        now[0] = i
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch.after_update(torch.tensor([i, i]).as_subclass(Skipped), torch.ones(()))
        found += [i] * len(caught)
    assert found == [22 + late]
    assert len(copies) <= 120 / 20


def test_no_value_is_read_on_the_host(monkeypatch):
    """The op is replaced by one that reads nothing; what is left is ours: no value of a tensor may be asked for."""
    params, scaler = parameters(torch.float16, torch.float32), mpk.GradScaler(init_scale=8.0)
    optimizer = mpk.optim.AdamW(params, lr=0.1)
    iteration(params, optimizer, scaler)
    give_grads(params, scaler, poison=math.inf)

    def refuse(*args):
        raise AssertionError("a step waits for the device")

    with monkeypatch.context() as patch:
        patch.setattr(mpk.optim.AdamW, "_op", mock.Mock())
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        scaler.step(optimizer)
        scaler.update()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.skipped_steps is not None
    assert scaler.skipped_steps == 3
