# SPDX-License-Identifier: Apache-2.0
"""Tests of optimizers whose parameters, groups or state the user replaces: what is there at the step is what counts."""

import copy

import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.optim import hyperparameters, master_weights
from tests.optimizers import everything, parameters, train
from tests.steps import raw

OPTIMIZERS = {
    "AdamW": (mpk.optim.AdamW, dict(lr=0.1)),
    "amsgrad": (mpk.optim.Adam, dict(lr=0.1, amsgrad=True)),
    "momentum": (mpk.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "plain SGD": (mpk.optim.SGD, dict(lr=0.1)),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)


def make(name, params):
    cls, options = OPTIMIZERS[name]
    return cls(params, **options)


def as_made_anew(name, params, optimizer) -> list[bytes]:
    """What two steps make of copies of these parameters in an optimizer that is made and loaded now."""
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    twin = make(name, twins)
    state = {i: copy.deepcopy(optimizer.state[p]) for i, p in enumerate(params) if p in optimizer.state}
    for i, entry in state.items():
        if "master" in entry and entry["master"].shape != params[i].shape:
            del entry["master"]
    twin.load_state_dict({"state": state, "param_groups": twin.state_dict()["param_groups"]})
    train(twins, twin, first=3)
    return everything(twin)


def grown(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor[:2] / 2))


def pruned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[1:].clone()


@pytest.mark.parametrize("master_too", [False, True])
@pytest.mark.parametrize("state_first", [False, True])
@pytest.mark.parametrize("resize", [grown, pruned, torch.clone])
@every_dtype
@every_optimizer
def test_replaced_parameter_with_its_state(name, dtype, resize, state_first, master_too):
    """As densifying and pruning in Gaussian splatting do; a master of the old shape starts from the parameter."""
    params = parameters(*[dtype] * 3)
    optimizer = make(name, params)
    train(params, optimizer)
    old = params[1]
    state = optimizer.state.pop(old)
    for key, value in state.items():
        if key.startswith(("exp", "max", "mom")) or (key == "master" and master_too):
            state[key] = resize(value)
    new = params[1] = nn.Parameter(resize(old.detach()))
    if state_first:
        optimizer.state[new] = state
    optimizer.param_groups[0]["params"][1] = new
    optimizer.state[new] = state
    expected = as_made_anew(name, params, optimizer)
    train(params, optimizer, first=3)
    assert everything(optimizer) == expected
    assert ("master" in optimizer.state[new]) == (dtype == torch.float16)
    assert old not in optimizer.state


@pytest.mark.parametrize("whole_list", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
@every_dtype
@every_optimizer
def test_replaced_parameter_without_state(name, dtype, stepped, whole_list):
    """As sharding a model after its optimizer was made does."""
    params = parameters(*[dtype] * 3)
    optimizer = make(name, params)
    if stepped:
        train(params, optimizer)
        optimizer.state.pop(params[0])
    params[0] = nn.Parameter(torch.ones(7, dtype=dtype))
    if whole_list:
        optimizer.param_groups[0]["params"] = list(params)
    else:
        optimizer.param_groups[0]["params"][0] = params[0]
    expected = as_made_anew(name, params, optimizer)
    train(params, optimizer, first=3)
    assert everything(optimizer) == expected


@every_optimizer
def test_state_that_changes_hands(name):
    params = parameters(*[torch.float32] * 3)
    optimizer = make(name, params)
    train(params, optimizer)
    state = optimizer.state
    state[params[0]], state[params[1]] = state[params[1]], state[params[0]]
    expected = as_made_anew(name, params, optimizer)
    train(params, optimizer, first=3)
    assert everything(optimizer) == expected


@pytest.mark.parametrize("replaced", [False, True])
def test_state_of_another_shape_is_refused_by_name(replaced):
    params = parameters(*[torch.float32] * 3)
    optimizer = mpk.optim.AdamW(list(zip("abc", params, strict=True)))
    train(params, optimizer)
    if replaced:
        state = optimizer.state.pop(params[1])
        params[1] = optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.ones(7))
        optimizer.state[params[1]] = state
    else:
        params[1].data = torch.ones(7)
    before = raw(params)
    with pytest.raises(RuntimeError, match=r"parameter 1 \(b\) changed shape .* exp_avg has \(5,\), .* \(7,\): resize .*pop"):
        train(params, optimizer, 2)
    assert raw(params) == before
    optimizer.state.pop(params[1])
    train(params, optimizer, 2)
    assert raw(params) != before


@pytest.mark.parametrize(
    "of, to",
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_cast_after_state_was_made_is_refused_by_name(of, to):
    params = parameters(*[of] * 3)
    optimizer = mpk.optim.SGD(list(zip("abc", params, strict=True)), lr=0.1)
    train(params, optimizer)
    params[1].grad, params[1].data = None, params[1].data.to(to)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=rf"1 \(b\) changed dtype since its state was made: {of} then, {to} now: make the"
        ):
            train(params, optimizer, 2)
    optimizer.state.pop(params[1])
    train(params, optimizer, 2)
    assert optimizer.state[params[1]]["step"] == 2


def test_cast_before_state_was_made():
    params = parameters(*[torch.float32] * 3)
    optimizer = mpk.optim.AdamW(params)
    for parameter in params:
        parameter.data = parameter.data.half()
    expected = as_made_anew("AdamW", params, optimizer := make("AdamW", params))
    train(params, optimizer, first=3)
    assert everything(optimizer) == expected


def test_plans_of_replaced_parameters_do_not_pile_up():
    params = parameters(*[torch.float16] * 3)
    optimizer = mpk.optim.AdamW(params)
    for t in range(20):
        train(params, optimizer, 1, t)
        state = optimizer.state.pop(params[0])
        params[0] = optimizer.param_groups[0]["params"][0] = nn.Parameter(params[0].detach().clone())
        optimizer.state[params[0]] = state
    assert len(optimizer._plans.plans) == 1
    assert len(optimizer._writes._stamps) <= len(params)
    assert len(optimizer._dtypes._recorded) <= len(params)


@every_dtype
def test_steps_of_alternating_sets_are_those_of_single_optimizers(dtype):
    """Bit for bit, with writes of others in between, for more sets than there are plans."""
    params, alone = parameters(*[dtype] * 3), parameters(*[dtype] * 3)
    optimizer, singles = make("AdamW", params), [make("AdamW", [p]) for p in alone]
    for t in range(40):
        present = [i for i in range(3) if (t * 5 // 3 >> i) & 1]
        if t % 7 == 3:
            for group in (params, alone):
                with torch.no_grad():
                    group[t % 3].mul_(0.5)
        for group in (params, alone):
            for i, parameter in enumerate(group):
                generator = torch.Generator().manual_seed(10 * t + i)
                grad = torch.randn(parameter.shape, generator=generator).to(dtype)
                parameter.grad = grad if i in present else None
        optimizer.step()
        for single in singles:
            single.step()
        assert raw(params) == raw(alone), t


def test_sets_that_take_turns_are_not_taken_for_written_by_others(monkeypatch):
    """What one plan has written is not external to the next."""
    params, taken_over = parameters(*[torch.float16] * 3), []
    optimizer = mpk.optim.AdamW(params)
    take_over = master_weights.take_over
    monkeypatch.setattr(master_weights, "take_over", lambda *args: taken_over.append(1) or take_over(*args))
    for t in range(6):
        if t == 2:
            taken_over.clear()  # every plan has been made
        for i, parameter in enumerate(params):
            parameter.grad = torch.ones_like(parameter) if i != t % 2 else None
        optimizer.step()
    assert not taken_over
    assert len(optimizer._plans.plans) == 2


def test_groups_of_equal_hyperparameters_are_one_call(monkeypatch):
    params = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    optimizer = mpk.optim.AdamW([{"params": [p], "weight_decay": 0.1 * (i % 2)} for i, p in enumerate(params)])
    twins = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    apart = [mpk.optim.AdamW([p], weight_decay=0.1 * (i % 2)) for i, p in enumerate(twins)]
    for t, count in enumerate((2, 2, 3, 3)):
        if t == 2:
            optimizer.param_groups[3]["lr"] = apart[3].param_groups[0]["lr"] = 0.5
        train(params, optimizer, 1, t)
        assert len(optimizer._plans.plans[0].updates) == count
        for i, (p, single) in enumerate(zip(twins, apart, strict=True)):
            p.grad = params[i].grad.clone()
            single.step()
        assert raw(params) == raw(twins)


def test_one_group_that_changes_is_looked_at_alone(monkeypatch):
    """As of a schedule for some layers: what the others are compared by is not made anew."""
    params = [nn.Parameter(torch.zeros(4)) for _ in range(5)]
    optimizer = mpk.optim.AdamW([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)])
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    made, comparable = [], hyperparameters.comparable
    monkeypatch.setattr(hyperparameters, "comparable", lambda values: made.append(values) or comparable(values))
    optimizer.param_groups[3]["lr"] = 0.7
    optimizer.step()
    assert [0.7 in values for values in made if len(values) > 2] == [True]  # betas are compared by themselves
