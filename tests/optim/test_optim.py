# SPDX-License-Identifier: Apache-2.0
"""Tests of AdamW, Adam and SGD as optimizers: masters, groups, gradients that come and go, checkpoints, bad input.

How the update itself follows fp64 for 1,000 steps is tests/ops/optimizer_update/test_rules.py's.
"""

import collections
import copy
import io
import math
import pickle
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.ops.common import layout
from mpkernels.ops.common.cast import cast
from mpkernels.runtime import native
from tests import bounds
from tests.steps import BAD_SCALES, norm_is_in_fp32, raw

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POLICIES = ("float64", "float32", "mixed_float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16")
PAIRS = {  # ours and torch's, with the arguments of both
    "adamw": (mpk.optim.AdamW, torch.optim.AdamW, {"lr": 0.01}),
    "adamw_all": (mpk.optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    "amsgrad": (mpk.optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "adam": (mpk.optim.Adam, torch.optim.Adam, {"lr": 0.01}),
    "adam_decay": (mpk.optim.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "sgd": (mpk.optim.SGD, torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.1}),
    "momentum": (mpk.optim.SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (mpk.optim.SGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "maximize": True}),
}
pairs = pytest.mark.parametrize("pair", PAIRS)
OURS = {
    "AdamW": mpk.optim.AdamW,
    "Adam": mpk.optim.Adam,
    "Lion": mpk.optim.Lion,
    "SGD": lambda p, **o: mpk.optim.SGD(p, **{"momentum": 0.9} | o),
}
ours = pytest.mark.parametrize("name", OURS)


def parameters(*dtypes, n=5) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for dtype in dtypes]


def set_grads(params, t=0):
    """Gradients of step t: the same numbers, in each parameter's dtype, that every dtype holds."""
    for i, parameter in enumerate(params):
        values = torch.arange(parameter.numel()).reshape(parameter.shape)
        parameter.grad = (((values + 3 * t + i) % 7 - 3) / 4).to(parameter.dtype)


def train(params, optimizer, steps=3, first=0):
    for t in range(first, first + steps):
        set_grads(params, t)
        optimizer.step()


def state_bytes(optimizer) -> list[bytes]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return raw([*params, *(t for p in params for _, t in sorted(optimizer.state[p].items()))])


# ----- the step ----------------------------------------------------------------------


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_step_matches_reference(pair, dtype):
    ours, theirs, options = PAIRS[pair]
    trajectories = []
    for make, wanted in ((ours, dtype), (theirs, torch.float64), (theirs, torch.float32)):
        params, weights = parameters(wanted, wanted, n=50), []
        optimizer = make(params, **options) if make is ours else make(params, **options, foreach=False)
        for t in range(5):
            train(params, optimizer, 1, t)
            weights.append(torch.cat([p.detach() for p in params]).numpy().copy())
        trajectories.append(np.stack(weights).astype(np.float64))
    got, exact, plain = trajectories
    bounds.check_trajectory(got, exact, plain if dtype == torch.float32 else None)


@pairs
def test_step_keeps_16_bit_parameters_as_rounded_masters(pair):
    """16-bit parameters follow the fp32 ones that start at the same values; each is its master rounded."""
    ours, _, options = PAIRS[pair]
    narrow = parameters(torch.float16, torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer, twin = ours(narrow, **options), ours(wide, **options)
    for t in range(4):
        train(narrow, optimizer, 1, t)
        train(wide, twin, 1, t)
        for parameter, expected in zip(narrow, wide, strict=True):
            assert torch.equal(optimizer.state[parameter]["master"], expected)
            assert torch.equal(parameter, expected.to(parameter.dtype))


@ours
def test_step_of_all_dtypes_in_one_group(name):
    params = parameters(*DTYPES, torch.float16)
    optimizer = OURS[name](params, lr=0.1)
    train(params, optimizer)
    for i, parameter in enumerate(parameters(*DTYPES, torch.float16)):
        alone = OURS[name]([parameter], lr=0.1)
        for t in range(3):
            set_grads(params, t)
            parameter.grad = params[i].grad
            alone.step()
        assert torch.equal(parameter, params[i])


@pytest.mark.parametrize("policy", POLICIES)
@ours
def test_every_policy_trains(policy, name):
    """A small regression: the loss falls to less than half, under a scaler, clipped."""
    torch.manual_seed(0)
    policy = mpk.Policy.parse(policy)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).to(policy.param_dtype)
    mpk.convert(model, policy)
    optimizer, scaler = OURS[name](model.named_parameters(), lr=0.02, max_norm=10.0), mpk.GradScaler(init_scale=256.0)
    x = torch.randn(32, 6).to(policy.param_dtype)
    y = (x[:, :2] * x[:, 2:4]).float()
    losses = []
    for _ in range(60):
        loss = (model(x).float() - y).square().mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    assert scaler.skipped_steps == 0
    assert {p.dtype for p in model.parameters()} == {policy.param_dtype}
    has_master = {"master" in optimizer.state[p] for p in model.parameters()}
    assert has_master == {policy.param_dtype.itemsize == 2}


def test_updates_below_half_an_ulp_need_a_master():
    """Negative control: 100 steps of 2^-13 from 1 reach fp16 only where they are collected."""
    params = [nn.Parameter(torch.ones(1, dtype=torch.float16)) for _ in range(2)]
    with_master, without = mpk.optim.SGD(params[:1], lr=2.0**-13), torch.optim.SGD(params[1:], lr=2.0**-13)
    for _ in range(100):
        for parameter, optimizer in zip(params, (with_master, without), strict=True):
            parameter.grad = torch.full_like(parameter, -1.0)
            optimizer.step()
    assert params[0].item() == torch.tensor(1 + 100 * 2.0**-13).half().item()
    assert params[1].item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp64_masters(dtype):
    params = parameters(dtype)
    optimizer = mpk.optim.AdamW(params, lr=0.1, master_dtype=torch.float64)
    wide = [nn.Parameter(params[0].detach().double())]
    twin = mpk.optim.AdamW(wide, lr=0.1)
    train(params, optimizer)
    train(wide, twin)
    state = optimizer.state[params[0]]
    assert ("master" in state) == (dtype != torch.float64)
    assert state["exp_avg"].dtype == torch.float64
    assert torch.equal(state.get("master", params[0]), wide[0])
    assert torch.equal(params[0], cast(wide[0].detach(), dtype))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "channels_last", "expanded grad", "0-d"])
@ours
def test_strided(layout, name):
    base = torch.arange(48.0).reshape(2, 3, 2, 4).div(8)
    values = {
        "transposed": base.transpose(0, 3), "sliced": base[:, ::2, :, 1:3], "expanded grad": base, "0-d": base[1, 1, 1, 1],
        "channels_last": base.to(memory_format=torch.channels_last),
    }[layout]  # fmt: skip
    strided, plain = nn.Parameter(values), nn.Parameter(values.clone(memory_format=torch.contiguous_format))
    for parameter in (strided, plain):
        optimizer = OURS[name]([parameter], lr=0.1)
        for t in range(3):
            set_grads([parameter], t)
            if layout == "expanded grad":
                parameter.grad = torch.full((), 0.5).expand(parameter.shape)
                parameter.grad = parameter.grad if parameter is strided else parameter.grad.contiguous()
            optimizer.step()
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("what", ["parameter", "gradient"])
@ours
def test_minus_that_torch_has_put_off(name, what):
    """`z.conj().imag` is a view of z with its negative bit set, and contiguous where it has one element."""
    results = []
    for laid in (torch.neg, torch._neg_view):
        params = parameters(torch.float16, torch.float32)
        if what == "parameter":
            params[1] = nn.Parameter(laid(params[1].detach()))
        optimizer = OURS[name](params, lr=0.1, max_norm=3.0)
        for t in range(4):
            set_grads(params, t)
            if what == "gradient" and t >= 2:  # after steps that kept their lists
                params[0].grad = laid(params[0].grad)
            optimizer.step()
        results.append(raw(p.detach().resolve_neg() for p in params))
    assert results[0] == results[1]


def test_imaginary_part_of_a_conjugate_as_a_gradient():
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([2 + 3j]).conj().imag
    mpk.optim.SGD([parameter], lr=1.0).step()
    assert parameter.item() == 3


# ----- gradients and parameters that come and go ----------------------------------------------------------------------


@ours
def test_gradients_none_late_and_alternating(name):
    """Each parameter sees its own sequence of steps, whatever the others do: counts are not shared or lost."""
    params, alone = parameters(*[torch.float32] * 3), parameters(*[torch.float32] * 3)
    optimizer, singles = OURS[name](params, lr=0.1), [OURS[name]([p], lr=0.1) for p in alone]
    for t, present in enumerate([(0, 1), (0,), (0, 1), (2,), (0, 1, 2), (), (1, 2), (0, 1), (0,)]):
        set_grads(params, t)
        set_grads(alone, t)
        for i, parameter in enumerate(params):
            if i in present:
                singles[i].step()
            else:
                parameter.grad = None
        optimizer.step()
        assert raw(params) == raw(alone), t
    steps = [optimizer.state_dict()["state"][i]["step"].item() for i in range(3)]
    assert steps == [single.state_dict()["state"][0]["step"].item() for single in singles] == [6, 5, 3]
    assert len(optimizer._plans.plans) == 6, "one for each set, but that with none"


@ours
def test_gradients_empty_none_at_all_and_frozen(name):
    params = [*parameters(torch.float32, torch.float16), nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(3, 0).half())]
    params[0].requires_grad_(False)
    optimizer = OURS[name](params, lr=0.1, max_norm=1.0)
    optimizer.step()
    assert not optimizer.state
    before = raw(params)
    for _ in range(2):
        for parameter in params[1:]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert raw(params)[0] == before[0]
    assert raw(params)[1] != before[1]
    bounds.check_norm(optimizer.grad_norm.item(), math.sqrt(5), 5)


def test_added_and_tied_parameters():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    optimizer = mpk.optim.SGD(model.parameters(), lr=1.0)
    assert len(optimizer.param_groups[0]["params"]) == 3
    added = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    model(torch.ones(1, 3)).sum().backward()
    added.grad = torch.ones(2)
    expected = first.weight.detach() - first.weight.grad
    optimizer.step()
    assert torch.equal(first.weight, expected)
    assert added.tolist() == [-0.5, -0.5]


@ours
def test_groups_have_their_own_hyperparameters(name):
    params, alone = parameters(torch.float32, torch.float16), parameters(torch.float32, torch.float16)
    options = {"lr": 0.5, "weight_decay": 0.25}
    optimizer = OURS[name]([{"params": params[:1]}, {"params": params[1:], **options}], lr=0.1)
    train(params, optimizer)
    singles = [OURS[name](alone[:1], lr=0.1), OURS[name](alone[1:], **options)]
    for t in range(3):
        set_grads(alone, t)
        for single in singles:
            single.step()
    assert raw(params) == raw(alone)


def test_hyperparameters_may_be_written_in_place():
    """A list of betas and a tensor of a learning rate count as they are at each step, as values that are replaced do."""
    runs = []
    for in_place in (False, True):
        params = parameters(torch.float32, torch.float16)
        groups = [{"params": [p], "betas": [0.9, 0.999], "lr": torch.tensor(0.1)} for p in params]
        optimizer = mpk.optim.AdamW(groups)
        train(params, optimizer, 2)
        first = optimizer.param_groups[0]
        if in_place:
            first["betas"][0] = 0.5
            first["lr"].fill_(0.01)
        else:
            first["betas"], first["lr"] = [0.5, 0.999], torch.tensor(0.01)
        train(params, optimizer, 2, 2)
        runs.append(state_bytes(optimizer))
    assert runs[0] == runs[1]


def test_hyperparameters_may_change_on_the_way():
    """Momentum turned on and off, amsgrad turned on: what is missing of the state is made."""
    for make, changes in ((mpk.optim.SGD, [{"momentum": 0.9}, {"momentum": 0.0}]), (mpk.optim.AdamW, [{"amsgrad": True}])):
        params, theirs = parameters(torch.float64), parameters(torch.float64)
        optimizer, other = make(params, lr=0.1), getattr(torch.optim, make.__name__)(theirs, lr=0.1)
        for t, change in enumerate([{}, *changes]):
            for group in (optimizer.param_groups[0], other.param_groups[0]):
                group.update(change)
            if "amsgrad" in change:  # torch does not make it
                other.state[theirs[0]]["max_exp_avg_sq"] = torch.zeros_like(theirs[0])
            train(params, optimizer, 2, 2 * t)
            train(theirs, other, 2, 2 * t)
            bounds.check_trajectory(params[0].detach().numpy()[None], theirs[0].detach().numpy()[None], None)


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_lr_float_or_tensor_and_scheduler(lr):
    params = [nn.Parameter(torch.zeros(2))]
    optimizer = mpk.optim.SGD(params, lr=copy.deepcopy(lr))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for expected in (-0.5, -0.75, -0.875):
        params[0].grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
        assert params[0].tolist() == [expected] * 2


def test_closure():
    params = parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.1)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].detach().clone()
    assert optimizer.step(closure).item() == before.square().sum().item()
    assert not torch.equal(before, params[0])


# ----- clipping, skipping ----------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_max_norm_clips_over_all_groups(max_norm):
    params = parameters(torch.float64, torch.float32, torch.float16)
    optimizer = mpk.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.0, max_norm=max_norm)
    assert optimizer.grad_norm is None
    set_grads(params)
    optimizer.step()
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
    bounds.check_norm(optimizer.grad_norm.item(), exact, 15, norm_is_in_fp32([p.grad for p in params]))
    assert (optimizer.grad_norm.dtype, optimizer.grad_norm.dim()) == (torch.float64, 0)
    moved = [nn.Parameter(torch.zeros(5, dtype=torch.float64))]
    optimizer = mpk.optim.SGD(moved, lr=1.0, max_norm=max_norm)
    set_grads(moved)
    grad = moved[0].grad.clone()
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(moved, max_norm)
    bounds.check_trajectory(-moved[0].detach().numpy()[None], moved[0].grad.numpy()[None], None)
    assert max_norm < 1 or torch.equal(-moved[0], grad)


def test_max_norm_of_tiny_fp16_gradients():
    """fp16 squares of 1e-4 are subnormal, of 1e-5 zero: the norm is summed in fp32 or fp64."""
    params = parameters(torch.float16, n=1000)
    params[0].grad = torch.full_like(params[0], 1e-5)
    optimizer = mpk.optim.SGD(params, lr=0.1, max_norm=1.0)
    optimizer.step()
    exact = math.sqrt(1000) * torch.tensor(1e-5).half().item()
    bounds.check_norm(optimizer.grad_norm.item(), exact, 1000, norm_is_in_fp32([params[0].grad]))


@ours
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_skip_nonfinite(name, poison):
    params = parameters(*DTYPES)
    optimizer = OURS[name](params, lr=0.1, skip_nonfinite=True)
    train(params, optimizer, 2)
    before = state_bytes(optimizer)
    params[1].grad[2] = poison
    optimizer.step()
    assert state_bytes(optimizer) == before
    plain = OURS[name](parameters(torch.float32), lr=0.1)
    (parameter,) = plain.param_groups[0]["params"]
    parameter.grad = torch.full_like(parameter, poison)
    plain.step()
    written = [parameter, *plain.state[parameter].values()]  # the sign of inf is finite
    assert not all(t.isfinite().all() for t in written), "without a scaler or skip_nonfinite a step is torch's"


def test_grads_are_not_written():
    params = parameters(*DTYPES)
    optimizer = mpk.optim.AdamW(params, max_norm=0.1, write_grads=True)
    set_grads(params)
    before = raw([p.grad for p in params])
    optimizer.step()
    assert raw([p.grad for p in params]) == before, "there is no scale to take off"


@pytest.mark.parametrize("way", ["plain", "max_norm", "scaler", "write_grads", "clip", "unscale", "left out"])
@ours
def test_gradients_are_let_go(name, way):
    """After a step, or what else reads them, the parameters alone hold the gradients: the next ones take their memory."""
    params = parameters(torch.float16, torch.float32)
    options = {"max_norm": 1.0} if way == "max_norm" else {"write_grads": True} if way == "write_grads" else {}
    optimizer, scaler = OURS[name](params, **options), mpk.GradScaler(enabled=way not in ("plain", "max_norm"))
    scaler.scale(torch.ones(()))
    for t in range(3):
        set_grads(params, t)
        if way == "clip":
            scaler.clip_grad_norm_(optimizer, 1.0)
        if way in ("unscale", "left out"):
            scaler.unscale_(optimizer)
        grads = [weakref.ref(p.grad) for p in params]
        if way != "left out":
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert [grad() for grad in grads] == [None, None]


# ----- masters and external writes ----------------------------------------------------------------------


def half_trained(dtype=torch.float16):
    params = parameters(dtype, n=50)
    optimizer = mpk.optim.SGD(params, lr=2.0**-12)
    train(params, optimizer)
    return params[0], optimizer, optimizer.state[params[0]]["master"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters_follow_visible_writes(dtype):
    parameter, optimizer, master = half_trained(dtype)
    assert not torch.equal(master, parameter.float())
    expected = master.clone()
    with torch.no_grad():
        parameter[:10] = 3.0
    expected[:10] = 3.0
    set_grads([parameter])
    optimizer.step()
    assert torch.equal(master, expected - 2.0**-12 * parameter.grad.float())
    assert torch.equal(parameter, master.to(dtype))


def test_masters_survive_a_swap_and_back():
    """EMA weights in, evaluation, the old ones back: no bit of the master is lost, though the version moved."""
    parameter, optimizer, master = half_trained()
    kept, bits = parameter.detach().clone(), master.clone()
    with torch.no_grad():
        parameter.fill_(9.0)
        parameter.copy_(kept)
    set_grads([parameter])
    parameter.grad.zero_()
    optimizer.step()
    assert torch.equal(master, bits)


def test_masters_follow_hidden_writes_after_sync():
    parameter, optimizer, master = half_trained()
    parameter.data.fill_(5.0)
    optimizer.sync_masters_()
    assert (master == 5).all()


def test_masters_follow_torch_optimizers():
    parameter, optimizer, master = half_trained()
    set_grads([parameter])
    torch.optim.SGD([parameter], lr=1.0).step()
    written = parameter.detach().clone()
    parameter.grad.zero_()
    optimizer.step()
    assert torch.equal(parameter, written)
    assert torch.equal(master.half(), written)


def test_masters_are_made_at_the_first_step():
    """Weights loaded after construction, before the first step, are what the master starts from."""
    params = parameters(torch.float16)
    optimizer = mpk.optim.SGD(params, lr=0.0)
    assert not optimizer.state
    params[0].data.fill_(2.5)
    set_grads(params)
    optimizer.step()
    assert optimizer.state[params[0]]["master"].tolist() == [2.5] * 5


@pytest.mark.parametrize("loaded", [False, True])
def test_masters_start_from_the_parameter(loaded):
    """From nothing that lies beside it: ranks whose parameters are equal, as DDP makes them, have equal masters."""
    model = mpk.convert(nn.Linear(3, 3), "float16")
    if loaded:
        model.load_state_dict(mpk.convert(nn.Linear(3, 3), "float16").state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = mpk.optim.SGD(model.parameters(), lr=0.0)
    set_grads(list(model.parameters()))
    optimizer.step()
    assert all(torch.equal(optimizer.state[p]["master"], b.float()) for p, b in zip(model.parameters(), before, strict=True))


def test_master_state_dict():
    model = mpk.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "float16")
    model.register_parameter("late", nn.Parameter(torch.ones(1).half()))
    optimizer = mpk.optim.SGD(model.parameters(), lr=1e-4)
    model[0].weight.grad = torch.ones(3, 3).half()
    optimizer.step()
    exported = optimizer.master_state_dict(model)
    assert exported.keys() == model.state_dict().keys()
    assert torch.equal(exported["0.weight"], optimizer.state[model[0].weight]["master"])
    assert exported["0.weight"].dtype == torch.float32
    assert torch.equal(exported["0.weight"].half(), model[0].weight)
    assert torch.equal(exported["late"], model.late)


# ----- checkpoints ----------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
    assert state_bytes(again) == state_bytes(optimizer)


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
        runs.append(state_bytes(optimizer))
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
    before, file, state = state_bytes(optimizer), io.BytesIO(), optimizer.state_dict()
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
    assert state_bytes(optimizer) == before
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
    before, groups = state_bytes(optimizer), copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(change(optimizer.state_dict()))
    assert state_bytes(optimizer) == before
    assert [{**g, "params": None} for g in optimizer.param_groups] == groups
    train(params, optimizer, first=3)


def test_state_dict_hooks_run():
    params = parameters(torch.float32)
    optimizer, seen = mpk.optim.AdamW(params), []
    train(params, optimizer, 1)
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("saved"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saved", "before", "after"]


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
    assert state_bytes(twin) == state_bytes(optimizer)
    assert twins[0] is not params[0]


# ----- bad input ----------------------------------------------------------------------

GOOD = nn.Parameter(torch.ones(3))
COMPLEX = torch.ones(3, dtype=torch.complex64)


@pytest.mark.parametrize(
    "params, error, message",
    [
        ([], ValueError, "empty parameter list"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
        (torch.ones(3), TypeError, "params argument given to the optimizer should be an iterable"),
        ([("a", GOOD), ("b", nn.Parameter(COMPLEX))], ValueError, r"parameter 1 \(b\) must be .*got torch.complex64"),
        ([nn.Parameter(torch.ones(3).to_sparse())], ValueError, "parameter 0 must be a dense .*torch.sparse_coo"),
        ([nn.Parameter(torch.ones(1).expand(3))], ValueError, "parameter 0 overlaps itself"),
        ([nn.Parameter(torch.ones(5).as_strided((3, 3), (1, 1)))], ValueError, "parameter 0 overlaps itself"),
        ([{"params": [GOOD]}, {"params": [GOOD]}], ValueError, "some parameters appear in more than one parameter group"),
    ],
)
@ours
def test_bad_parameters(name, params, error, message):
    with pytest.raises(error, match=message):
        OURS[name](params)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_duplicate_parameter():
    with pytest.raises(ValueError, match=r"parameter 2 \(c\) stands twice in one group"):
        mpk.optim.AdamW([("a", GOOD), ("b", nn.Parameter(torch.ones(1))), ("c", GOOD)])


BAD_NUMBERS = (-1.0, math.nan, math.inf)


@pytest.mark.parametrize(
    "make, options, message",
    [
        *((m, {"lr": v}, f"Invalid learning rate: {v}") for m in (mpk.optim.AdamW, mpk.optim.SGD) for v in BAD_NUMBERS),
        (mpk.optim.AdamW, {"lr": torch.tensor(math.nan)}, "Invalid learning rate: nan"),
        (mpk.optim.SGD, {"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        *((mpk.optim.AdamW, {"eps": v}, f"Invalid epsilon value: {v}") for v in BAD_NUMBERS),
        *((mpk.optim.Adam, {"weight_decay": v}, f"Invalid weight_decay value: {v}") for v in BAD_NUMBERS),
        *((mpk.optim.AdamW, {"betas": (v, 0.9)}, f"Invalid beta parameter at index 0: {v}") for v in (1.0, *BAD_NUMBERS)),
        *((mpk.optim.AdamW, {"betas": (0.9, v)}, f"Invalid beta parameter at index 1: {v}") for v in (1.0, *BAD_NUMBERS)),
        *((mpk.optim.AdamW, {"betas": v}, "betas must be two numbers") for v in ((0.9,), (0.9, 0.99, 0.999))),
        *((mpk.optim.SGD, {"momentum": v}, f"Invalid momentum value: {v}") for v in BAD_NUMBERS),
        *((mpk.optim.SGD, {"dampening": v}, f"Invalid dampening value: {v}") for v in (math.nan, math.inf)),
        (mpk.optim.SGD, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        (mpk.optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum requires"),
        (mpk.optim.AdamW, {"master_dtype": torch.float16}, "master_dtype must be torch.float32 or .*got torch.float16"),
        *((mpk.optim.AdamW, {"max_norm": v}, f"Invalid max_norm: {v}") for v in (0.0, -1.0, math.nan)),
    ],
)
def test_bad_hyperparameters(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([GOOD], **options)


def test_master_narrower_than_a_parameter():
    with pytest.raises(ValueError, match=r"master_dtype torch.float32 is narrower than torch.float64 of parameter 1 \(b\)"):
        mpk.optim.AdamW([("a", GOOD), ("b", nn.Parameter(torch.ones(1).double()))], master_dtype=torch.float32)


def test_bad_group_is_not_added():
    optimizer = mpk.optim.AdamW([GOOD])
    for group in ({"params": [nn.Parameter(COMPLEX)]}, {"params": [nn.Parameter(torch.ones(1))], "lr": -1.0}):
        with pytest.raises(ValueError, match=r"must be a dense|Invalid learning rate"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


def _sparse(params, optimizer):
    params[1].grad = torch.ones(5).to_sparse()


def _wide_grad(params, optimizer):
    params[1].grad, params[1].grad_dtype = None, None
    params[1].grad = torch.ones(5, dtype=torch.float64)


def _complex(params, optimizer):
    params[1].grad, params[1].grad_dtype = None, None
    params[1].grad = torch.ones(5, dtype=torch.complex64)


def _resized_grad(params, optimizer):
    params[1].grad.resize_(3)


def _retyped(params, optimizer):
    params[1].data, params[1].grad = params[1].data.half(), torch.ones(5).half()


def _resized(params, optimizer):
    params[1].data, params[1].grad = torch.ones(6), torch.ones(6)


def _shared(params, optimizer):
    params[1].data = params[2].data


def _shared_in_part(params, optimizer):
    params[2].data = torch.ones(8)[3:]
    params[1].data = params[2].data.as_strided((5,), (1,), 0)


def _float_grad_scale(params, optimizer):
    optimizer.grad_scale = 2.0


def _bad_lr(params, optimizer):
    optimizer.param_groups[1]["lr"] = torch.tensor(1)


def _bad_grad_scale(params, optimizer):
    optimizer.grad_scale = torch.ones(2)


def _wrong_grad_scale(params, optimizer):
    optimizer.grad_scale = torch.ones((), dtype=torch.float64)


def _wrong_found_inf(params, optimizer):
    optimizer.found_inf = torch.zeros((), dtype=torch.int32)


def _grad_scale_without_a_value(params, optimizer):
    optimizer.grad_scale = torch.ones((), device="meta")


def _found_inf_without_a_value(params, optimizer):
    optimizer.found_inf = torch.zeros((), device="meta")


def _zero_tensor(params, optimizer):
    params[1].grad = torch._efficientzerotensor((5,))


def _freed_gradient(params, optimizer):
    params[2].grad.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_sparse, r"the gradient of parameter 1 \(b\) must be a dense .*torch.sparse_coo"),
        (_complex, r"the gradient of parameter 1 \(b\) must be a dense floating-point .*torch.complex64"),
        (_wide_grad, r"the gradient of parameter 1 \(b\) is torch.float64, wider than its master, torch.float32: make"),
        (_resized_grad, r"the gradient of parameter 1 \(b\) must be .* of shape \(5,\), got \(3,\)"),
        (
            _retyped,
            r"parameter 1 \(b\) changed dtype since its state was made: torch.float32 then, torch.float16 now: make",
        ),
        (_resized, r"parameter 1 \(b\) changed shape since its state was made: .* has \(5,\), the parameter \(6,\): resize"),
        (_shared, r"^c shares memory with b"),
        (_shared_in_part, r"^c shares memory with b"),
        (_bad_lr, "Invalid learning rate: 1 .torch.int64 tensor .*: lr must be a finite number or a 1-element floating"),
        (_float_grad_scale, "grad_scale must be .* got 2.0"),
        (_bad_grad_scale, "grad_scale must be"),
        (_wrong_grad_scale, "grad_scale must be .*float32.*got .*float64"),
        (_wrong_found_inf, "found_inf must be"),
        (_grad_scale_without_a_value, "grad_scale must be .*on meta"),
        (_found_inf_without_a_value, "found_inf must be .*on meta"),
        (_zero_tensor, r"the gradient of parameter 1 \(b\) has no memory: .* ZeroTensor"),
        (_freed_gradient, r"the gradient of parameter 0 \(c\) has no memory: its storage was freed"),
    ],
)
@ours
def test_bad_steps_write_nothing(name, spoil, message):
    """What is bad is in the second parameter or in the second group, so that something could have been written before."""
    params = parameters(torch.float16, torch.float32, torch.float32)
    named = list(zip("abc", params, strict=True))
    optimizer = OURS[name]([{"params": named[:2]}, {"params": named[2:]}])
    train(params, optimizer, 1)
    set_grads(params, 1)
    spoil(params, optimizer)
    before = state_bytes(optimizer)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=message):
            optimizer.step()
        assert state_bytes(optimizer) == before


@pytest.mark.parametrize("steps", [0, 3])
@ours
def test_freed_parameter(name, steps):
    """What FSDP1 does to parameters that it does not need. A loop over raw pointers would end the process."""
    params = parameters(torch.float16, torch.float16)
    optimizer = OURS[name](params)
    train(params, optimizer, steps)
    set_grads(params, steps)
    first = [params[0], *(optimizer.state[params[0]].values() if steps else ())]
    before = raw(first)
    kept, storage = params[1].detach().clone(), params[1].untyped_storage()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="parameter 1 has no memory: its storage was freed"):
        optimizer.step()
    assert raw(first) == before
    assert bool(optimizer.state) == bool(steps)
    storage.resize_(kept.nbytes)
    params[1].data.copy_(kept)
    optimizer.step()
    twins = parameters(torch.float16, torch.float16)
    train(twins, OURS[name](twins), steps + 1)
    assert raw(params) == raw(twins)


@pytest.mark.parametrize("scale", BAD_SCALES)
@pytest.mark.parametrize("master", [None, torch.float64], ids=str)
@ours
def test_bad_value_of_grad_scale_is_an_overflow(name, master, scale):
    """On the optimizer, without a scaler: skipped, never applied, and the next step is taken."""
    params = parameters(*DTYPES)
    optimizer = OURS[name](params, master_dtype=master)
    train(params, optimizer, 1)
    set_grads(params, 1)
    before = state_bytes(optimizer)
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.step()
    assert state_bytes(optimizer) == before
    optimizer.grad_scale = None
    optimizer.found_inf = torch.tensor(math.nan)  # not 0: a skip
    optimizer.step()
    assert state_bytes(optimizer) == before
    optimizer.found_inf = None
    optimizer.step()
    assert state_bytes(optimizer) != before


def test_parameters_beside_each_other_in_one_storage():
    """As views of a flat buffer, and interleaved: they share no element."""
    flat = torch.ones(20)
    params = [nn.Parameter(v) for v in (flat[:5], flat[5:10], flat[10::2], flat[11::2], flat[:0])]
    optimizer = mpk.optim.SGD(params, lr=1.0)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not flat.any()


def test_parameter_moved_to_another_device():
    params = parameters(torch.float32)
    optimizer = mpk.optim.AdamW(params)
    train(params, optimizer)
    before = state_bytes(optimizer)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):  # torch's own
        params[0].data = torch.ones(5, device="meta")
    assert state_bytes(optimizer) == before


def test_step_inside_backward_without_a_scaler():
    """As torch's: an optimizer per parameter, run by the hook that its gradient has arrived; under a scaler see test_amp.py."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    twin, x = copy.deepcopy(model), torch.ones(2, 3)
    optimizers = {p: mpk.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    model(x).sum().backward()
    optimizer = mpk.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).sum().backward()
    optimizer.step()
    assert raw(model.parameters()) == raw(twin.parameters())


def test_closure_under_a_scaler():
    optimizer = mpk.optim.SGD(parameters(torch.float32), lr=0.1)
    optimizer.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match="a closure cannot be used with loss scaling"):
        optimizer.step(lambda: None)


# ----- host time ------------------------------------------------------------------------------------


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


def test_step_checks_the_lists_once(monkeypatch):
    params = [torch.nn.Parameter(torch.randn(8)) for _ in range(5)]
    optimizer, checks = mpk.optim.SGD(params, lr=0.1, momentum=0.9), []
    check = optimizer._op.check
    monkeypatch.setattr(optimizer._op, "check", lambda call: checks.append(1) or check(call))
    for t in range(6):
        for p in params:
            p.grad = torch.randn_like(p)
        if t == 4:
            optimizer.state[params[2]]["momentum_buffer"].data = torch.zeros(8)  # moved: looked at again
        optimizer.step()
    assert len(checks) == 2
    assert torch.equal(
        optimizer._plans.plans[0].updates[0].states["momentum_buffer"][2], optimizer.state[params[2]]["momentum_buffer"]
    )


def test_step_of_one_gradient_for_all_looks_at_the_lists_once(monkeypatch):
    """A tensor that stands twice in a list is no reason to look at it anew."""
    params = [torch.nn.Parameter(torch.randn(8)) for _ in range(5)]
    optimizer, checks = mpk.optim.SGD(params, lr=0.1), []
    check = optimizer._op.check
    monkeypatch.setattr(optimizer._op, "check", lambda call: checks.append(1) or check(call))
    for _ in range(4):
        grad = torch.ones(8)
        for p in params:
            p.grad = grad
        optimizer.step()
    assert len(checks) == 1


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
