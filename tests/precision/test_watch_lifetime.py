# SPDX-License-Identifier: Apache-2.0
"""A watch from its making to its end: what it refuses, what copies and checkpoints have of it, and that it leaves nothing."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests.precision.test_watch import X, hooks_of, model_with, parts, train


def test_watch_close_leaves_nothing():
    model = model_with()
    optimizer, scaler = parts(model)
    mine = model[3].register_forward_hook(lambda *_: None)
    before = hooks_of(model)
    watch = mpk.watch(model, optimizer, scaler)
    train(model, optimizer, scaler)
    watch.close()
    watch.close()
    assert hooks_of(model) == before
    assert not optimizer._optimizer_step_post_hooks
    assert scaler._layer_watch is None
    train(model, optimizer, scaler)
    mine.remove()
    for use in (watch.report, watch.state_dict, lambda: watch.load_state_dict({}), watch.__enter__):
        with pytest.raises(RuntimeError, match="it is closed: make a new one"):
            use()
    mpk.watch(model, optimizer, scaler).close()


def test_watch_does_not_follow_copies():
    model = model_with()
    optimizer, scaler = parts(model)
    with mpk.watch(model, optimizer, scaler) as watch:
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        other = copy.deepcopy(scaler)
        for each in (copied, loaded):
            each(X).float().sum().backward()
        assert other._layer_watch is None
        assert all(layer.out is None for layer in watch.report().layers)
        mpk.watch(copied).close()


def test_watch_hooks_of_a_copy_go_at_its_first_call():
    """Those of the model and of an nn.Linear, which a hook watches; the user's stay."""
    model = model_with(policy=None)
    mine = lambda *_: None
    model[3].register_forward_hook(mine)
    with mpk.watch(model):
        copied = copy.deepcopy(model)
        count = len(hooks_of(model))
    copied(X)
    assert hooks_of(copied) == [mine]
    assert count == 8  # a pair of each linear, and that of the model
    assert not copied._forward_pre_hooks_with_kwargs


def test_watch_ends_with_what_holds_it():
    """Without optimizer and scaler with itself, else with theirs; and it keeps no model."""
    model = model_with()
    mpk.watch(model)
    assert not hooks_of(model)
    optimizer, scaler = parts(model)
    mpk.watch(model, optimizer, scaler)
    train(model, optimizer, scaler)
    assert scaler._layer_watch.report().step == 1
    scaler = None
    gc.collect()  # it and the watch hold each other
    assert not hooks_of(model)
    model.optimizer = optimizer
    mpk.watch(model, optimizer)
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None


def a_conv1d():
    model = nn.Sequential(pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 8))
    return mpk.convert(model)


def a_forward_of_its_own():
    model = mpk.convert(nn.Sequential(nn.Linear(8, 8)))
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) + 1
    return model


@pytest.mark.parametrize("make", [a_conv1d, a_forward_of_its_own])
def test_watch_keeps_layers_that_a_hook_watches(make):
    model = make()
    with mpk.watch(model) as watch:
        with pytest.raises(RuntimeError, match=r"^0 is watched: close\(\) its mpk\.watch first$"):
            mpk.revert(model)
        model(X.clone().requires_grad_()).square().sum().backward()
        (layer,) = watch.report().layers
        assert layer.out > 0
        assert layer.grad_x > 0
    mpk.revert(model)


@pytest.mark.parametrize("do", [copy.copy, copy.deepcopy, pickle.dumps])
def test_watch_is_of_one_model(do):
    with mpk.watch(model_with()) as watch, pytest.raises(TypeError, match=r"neither copied nor pickled: keep its state_dict"):
        do(watch)


@pytest.mark.parametrize("change", [mpk.revert, mpk.convert, lambda model: mpk.convert(model, "bfloat16")])
def test_watch_keeps_its_layers(change):
    """A reverted layer would no longer tell it anything, and have no policy to adapt."""
    model = model_with()
    optimizer, scaler = parts(model)
    with mpk.watch(model, optimizer, scaler, adapt=mpk.Adapt()) as watch:
        with pytest.raises(RuntimeError, match=r"^0 is watched: close\(\) its mpk\.watch first$"):
            change(model)
        train(model, optimizer, scaler)
        assert all(layer.out and layer.policy == "mixed_float16" for layer in watch.report().layers)
        assert mpk.revert(copy.deepcopy(model))(X).isfinite().all()
    change(model)


def test_watch_state_dict_round_trip():
    model = model_with()
    optimizer, scaler = parts(model)
    file = io.BytesIO()
    with mpk.watch(model, optimizer, scaler) as watch:
        train(model, optimizer, scaler)
        model(X)
        torch.save(watch.state_dict(), file)
        expected, table = watch.report(), watch._table.clone()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with mpk.watch(model, optimizer, scaler) as watch:
        watch.load_state_dict(state)
        assert watch.report() == expected
        assert torch.equal(watch._table, table)
        for bad, error, message in (
            (3, TypeError, "must be what a watch's"),
            ({}, ValueError, "lacks layers, steps"),
            (dict(state, layers=["0", "3", "9"]), ValueError, "of other layers than the model has: 5, 9"),
            (dict(state, layers=[1, [2], "5"]), ValueError, r"of other layers than the model has: 0, 1, 3, \[2\]"),
            (dict(state, layers=None), ValueError, "layers of the state_dict must be a list, got NoneType"),
            (dict(state, pending=None), ValueError, "pending of the state_dict must be a list, got NoneType"),
            (dict(state, steps="1"), ValueError, "steps of the state_dict must be a natural number, got '1'"),
            (dict(state, steps=True), ValueError, "steps of the state_dict must be a natural number, got True"),
            (dict(state, order=5), ValueError, "order of the state_dict must be the rows of 3 layers, got 5"),
            (dict(state, order=[[1], [2], [3]]), ValueError, "order of the state_dict must be the rows of 3 layers"),
            (dict(state, order=[1, 2]), ValueError, r"order of the state_dict must be the rows of 3 layers, got \[1, 2\]"),
            (dict(state, last=torch.zeros(2)), ValueError, "last of the state_dict must be a tensor"),
        ):
            with pytest.raises(error, match=message):
                watch.load_state_dict(bad)
        assert watch.report() == expected


def test_watch_refuses():
    model = model_with()
    optimizer, scaler = parts(model)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        mpk.watch(3)
    with pytest.raises(ValueError, match="the model has no linear"):
        mpk.watch(nn.Sequential(nn.Conv1d(2, 2, 1)))
    with pytest.raises(RuntimeError, match="on meta and has no values"):
        mpk.watch(nn.Linear(2, 2, device="meta"))
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got GradScaler"):
        mpk.watch(model, scaler)
    with pytest.raises(TypeError, match=r"must be an mpkernels.GradScaler, got torch.amp.grad_scaler.GradScaler"):
        mpk.watch(model, optimizer, torch.amp.GradScaler("cpu"))
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup"):
        mpk.watch(model, process_group=3)
    assert not hooks_of(model)
    with mpk.watch(model, optimizer, scaler):
        with pytest.raises(RuntimeError, match="0 is watched already"):
            mpk.watch(nn.Sequential(nn.Linear(2, 2), model))
        with pytest.raises(RuntimeError, match="the scaler has a watch already"):
            mpk.watch(nn.Linear(2, 2), optimizer, scaler)
