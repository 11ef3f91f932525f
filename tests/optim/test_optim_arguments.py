# SPDX-License-Identifier: Apache-2.0
"""Tests of what the optimizers take and refuse: torch's arguments, hyperparameters, parameters that stay frozen."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

import mpkernels as mpk
from tests.steps import raw

PAIRS = {name: (getattr(mpk.optim, name), getattr(torch.optim, name)) for name in ("AdamW", "Adam", "SGD")}
pairs = pytest.mark.parametrize("name", PAIRS)


def params(n=2) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(n)]


def step(optimizer, value=1.0):
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()


@pairs
def test_signature_is_that_of_torch(name):
    """In order, with the same defaults; ours come after."""
    ours, theirs = (inspect.signature(cls).parameters for cls in PAIRS[name])
    if name == "Adam":
        ours = {**ours, **{k: v for k, v in inspect.signature(mpk.optim.AdamW).parameters.items() if k not in ours}}
    for key, parameter in theirs.items():
        assert key in ours
        assert ours[key].default == parameter.default, key
        assert ours[key].kind == parameter.kind, key
    positional = [key for key, p in theirs.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


@pairs
def test_groups_have_the_keys_of_torch(name):
    """What torch's flattened distributed checkpoints are read by."""
    ours, theirs = (cls(params()) for cls in PAIRS[name])
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert {**ours.defaults} == {**theirs.defaults}


@pytest.mark.parametrize("option", [{"foreach": True}, {"fused": True}, {"fused": False}, {"foreach": False}])
@pairs
def test_options_of_torch_are_kept_without_effect(name, option):
    runs = []
    for options in ({}, option):
        mine = params()
        optimizer = PAIRS[name][0](mine, **options)
        step(optimizer)
        optimizer.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in mine)
        assert optimizer.param_groups[0].items() >= options.items()
        assert optimizer.state_dict()["param_groups"][0].items() >= options.items()
        runs.append(raw(mine))
    assert runs[0] == runs[1]


def _errors() -> list:
    """Of the CPU: those of a GPU make their tensors there."""
    return [
        pytest.param(name, error, id=f"{name}: {error.optimizer_error_input.desc}")
        for info in optim_db
        if (name := info.optim_cls.__name__) in PAIRS and info.optim_error_inputs_func is not None
        for error in info.optim_error_inputs_func("cpu", torch.float32)
    ]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("name, error", _errors())
def test_errors_of_torch(name, error):
    """Every input that torch's own suite expects an error or a warning of; of a duplicate, of which torch warns, we raise."""
    given = error.optimizer_error_input
    error_type, message = error.error_type, error.error_regex
    if error_type is UserWarning:
        error_type, message = ValueError, "stands twice"
    expected = pytest.warns if issubclass(error_type, Warning) else pytest.raises
    with expected(error_type, match=message):
        PAIRS[name][0](params() if given.params is None else given.params, **given.kwargs)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"differentiable": True}, RuntimeError, "differentiable=True: .* use torch's optimizer"),
    ],
)
@pairs
def test_arguments_that_do_not_go_together(name, options, error, message):
    with pytest.raises(error, match=message):
        PAIRS[name][0](params(), **options)


def test_betas_of_two_kinds():
    for betas in ((0.9, torch.tensor(0.99)), (torch.tensor(0.9), 0.99), (0, 0.99)):
        for cls in (mpk.optim.AdamW, torch.optim.AdamW):
            with pytest.raises(ValueError, match="betas must be either both floats or both Tensors"):
                cls(params(), betas=betas)


# ----- one table of what each value must be -------------------------------------------------

BAD = {
    "lr": [-1.0, math.nan, math.inf, 10**400, 10**5000, "1e-3", None, [1.0], 1j, torch.tensor(1), torch.tensor(math.nan),
           torch.ones(2), torch.ones((), device="meta"), torch.tensor(1j), torch.tensor(True)],
    "weight_decay": [-1.0, math.nan, 10**400, "0", None, torch.ones(2), torch.tensor(-1.0), 1j],
    "maximize": ["no", 2, None, 0.5, [], torch.ones(2)],
    "differentiable": ["yes", 1],
    "eps": [-1.0, math.inf, "0", None, (1.0,)],
    "amsgrad": ["no", 7, None],
    "betas": [None, 0.9, "ab", (0.9,), (0.9, 1.0), (0.9, "0.9"), (-1, 0.9), (0.9, None), (math.nan, 0.9), (0.9, 0.9, 0.9),
              (torch.ones((), device="meta"), 0.9)],
    "decoupled_weight_decay": ["no", 2, None],
    "momentum": [-1.0, math.nan, "0.9", None, 1j],
    "dampening": [math.nan, math.inf, "0", None],
    "nesterov": ["no", None, 3],
}  # fmt: skip
CASES = [
    pytest.param(name, key, value, id=f"{name} {key} {i}")
    for name, keys in (
        ("AdamW", ("lr", "weight_decay", "maximize", "differentiable", "eps", "amsgrad", "betas", "decoupled_weight_decay")),
        ("SGD", ("lr", "weight_decay", "maximize", "differentiable", "momentum", "dampening", "nesterov")),
    )
    for key in keys
    for i, value in enumerate(BAD[key])
]


@pytest.mark.parametrize("name, key, value", CASES)
def test_bad_values_are_refused_everywhere(name, key, value):
    """At construction, in a group that is added, in one that is loaded and at a step: ValueError with the name."""
    cls = PAIRS[name][0]
    message = key if key != "lr" else "lr must be"
    with pytest.raises((ValueError, RuntimeError) if key == "differentiable" else ValueError, match=message):
        cls(params(), **{key: value})
    mine = params()
    optimizer = cls(mine[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": mine[1:], key: value})
    assert len(optimizer.param_groups) == 1
    step(optimizer)
    before, states = raw(mine), raw(optimizer.state[mine[0]].values())
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], key: value}]})
    good = optimizer.param_groups[0][key]
    assert good is saved["param_groups"][0][key]
    optimizer.param_groups[0][key] = value
    if key == "lr" and isinstance(value, float) and value == -1.0:
        return  # at a step as torch
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            step(optimizer)
        assert (raw(mine), raw(optimizer.state[mine[0]].values())) == (before, states)
    optimizer.param_groups[0][key] = good
    step(optimizer)
    assert raw(mine) != before


@pytest.mark.parametrize(
    "name, option",
    [
        ("AdamW", {"lr": np.float32(0.25), "weight_decay": 0, "maximize": np.bool_(True), "eps": np.float64(0.5)}),
        ("AdamW", {"lr": np.array(0.5), "amsgrad": 1, "betas": (torch.tensor(0.5), torch.tensor([0.25]))}),
        ("AdamW", {"lr": torch.tensor([0.25], dtype=torch.bfloat16), "weight_decay": torch.tensor(0.5)}),
        ("SGD", {"lr": torch.tensor(0.25).half(), "momentum": np.float32(0.5), "nesterov": np.bool_(True)}),
        ("SGD", {"momentum": 1, "dampening": np.int64(0), "maximize": 0, "weight_decay": True}),
    ],
)
def test_values_of_other_kinds_are_those_numbers(name, option):
    """What numpy, a configuration file or torch's own tensors give."""
    plain = {
        key: tuple(float(v) for v in value) if key == "betas" else value.item() if hasattr(value, "item") else value
        for key, value in option.items()
    }
    results = []
    for options in (option, plain):
        mine = params()
        optimizer = PAIRS[name][0](mine, **options)
        step(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        step(optimizer, -0.5)
        results.append(raw(mine))
    assert results[0] == results[1]


@pairs
def test_lr_below_0_steps_as_torch(name):
    """What a user has set for ascent, or a schedule rounded: torch checks at construction only."""
    results = []
    for cls in PAIRS[name]:
        mine = params()
        optimizer = cls(mine, lr=0.5)
        optimizer.param_groups[0]["lr"] = -0.5
        step(optimizer)
        results.append(mine)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal((ours - params()[0]).sign(), (theirs - params()[0]).sign())


# ----- parameters that get no gradient -----------------------------------------------------


def _frozen(kind: str) -> torch.Tensor:
    if kind == "lazy":
        return nn.LazyLinear(3).weight
    if kind == "sparse":
        return torch.ones(3).to_sparse()
    if kind == "expanded":
        return torch.ones(1).expand(3)
    return torch.ones(3).to(getattr(torch, kind))


@pytest.mark.parametrize("kind", ["uint8", "int8", "int64", "bool", "complex64", "float8_e4m3fn", "sparse", "expanded", "lazy"])
@pairs
def test_frozen_parameters_are_nobodys_business(name, kind):
    """Beside trained ones, as of quantized base weights; in steps, checkpoints, reports and copies."""
    frozen, (trained, twin) = _frozen(kind), params()
    if kind != "lazy":
        frozen = nn.Parameter(frozen, requires_grad=False)
    optimizer, plain = PAIRS[name][0]([frozen, trained]), PAIRS[name][0]([twin])
    twin.data.copy_(trained.data)
    scaler = mpk.GradScaler(init_scale=4.0)
    for _ in range(2):
        trained.grad, twin.grad = torch.ones(3), torch.ones(3)
        scaler.scale(torch.ones(()))
        optimizer.step()
        plain.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.sync_masters_()
    assert torch.equal(trained, twin)
    trained.grad = torch.full((3,), torch.inf)
    scaler.step(optimizer)
    assert "parameter 1 (3,) has 3 non-finite" in scaler.overflow_report(optimizer)
    assert repr(optimizer)


def test_lazy_parameters_are_seen_at_the_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    twins = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for twin, p in zip(twins, model.parameters(), strict=True):
        twin.grad = p.grad.clone()
    optimizer.step()
    mpk.optim.AdamW(twins, lr=0.1).step()
    assert raw(model.parameters()) == raw(twins)


@pytest.mark.parametrize(
    "parameter, grad, message",
    [
        (torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64), r"parameter 1 \(b\) .*complex64"),
        (torch.ones(1).expand(3), torch.ones(3), r"parameter 1 \(b\) overlaps itself"),
        (
            torch.ones(3, dtype=torch.float64),
            torch.ones(3, dtype=torch.float64),
            r"narrower than .*float64 of parameter 1 \(b\)",
        ),
    ],
)
def test_frozen_parameter_that_gets_a_gradient(parameter, grad, message):
    trained, odd = params()[0], nn.Parameter(parameter, requires_grad=False)
    optimizer = mpk.optim.AdamW([("a", trained), ("b", odd)], master_dtype=torch.float32)
    step(optimizer)
    before = raw([trained])
    odd.grad, trained.grad = grad, torch.ones(3)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert raw([trained]) == before
    odd.grad = None
    optimizer.step()


@pytest.mark.parametrize("name", ["write_grads", "skip_nonfinite"])
@pytest.mark.parametrize("make", [mpk.optim.AdamW, mpk.optim.SGD])
def test_bad_switches(make, name):
    for value in (None, "yes", 2, torch.tensor(True)):
        with pytest.raises(ValueError, match=f"Invalid {name}: .*: {name} must be True or False"):
            make(params(), **{name: value})
    assert getattr(make(params(), **{name: 1}), name) is True


def test_group_that_lost_a_value():
    optimizer = mpk.optim.AdamW(params())
    del optimizer.param_groups[0]["eps"]
    with pytest.raises(ValueError, match="a param group lacks eps, which must be a finite number"):
        step(optimizer)


def test_message_ends_with_what_to_do():
    with pytest.raises(ValueError, match=r"Invalid learning rate: '1e-3' \(a str\): lr must be .*; convert it with float\(\)"):
        mpk.optim.AdamW(params(), lr="1e-3")
