# SPDX-License-Identifier: Apache-2.0
"""Tests of AdamW, Adam and SGD as optimizers: masters, groups, gradients that come and go, clipping, skipping.

How the update itself follows fp64 for 1,000 steps is tests/ops/optimizer_update/test_rules.py's.
"""

import copy
import math
import weakref

import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.ops.common.cast import cast
from tests import bounds
from tests.optimizers import OURS, PAIRS, POLICIES, everything, ours, pairs, parameters, set_grads, train
from tests.steps import DTYPES, norm_is_in_fp32, raw

# ----- the step ----------------------------------------------------------------------


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
        runs.append(everything(optimizer))
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


@ours
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_skip_nonfinite(name, poison):
    params = parameters(*DTYPES)
    optimizer = OURS[name](params, lr=0.1, skip_nonfinite=True)
    train(params, optimizer, 2)
    before = everything(optimizer)
    params[1].grad[2] = poison
    optimizer.step()
    assert everything(optimizer) == before
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
