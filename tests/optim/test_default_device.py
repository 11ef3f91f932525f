# SPDX-License-Identifier: Apache-2.0
"""Tests under torch.set_default_device and torch.set_default_dtype: what is made inside names both, so that the bits stay."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

import mpkernels as mpk
from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE, ops
from mpkernels.testing import checks
from tests.steps import raw

PACKAGE = Path(mpk.__file__).parent
CONSTRUCTORS = {function.__name__ for function in _device_constructors()}


def test_every_constructor_names_dtype_and_device():
    """Also where the code runs on a GPU alone."""
    missing, found = [], 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CONSTRUCTORS):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
                continue
            found += 1
            names = {keyword.arg for keyword in node.keywords}
            if None not in names and not {"dtype", "device"} <= names:
                missing.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert found > 20
    assert not missing, "\n".join(missing)


def train(optimizer_class, policy: str) -> list[bytes]:
    """Two losses, clipped and not, one of which overflows, and a checkpoint between them; all that is left of it."""
    with torch.device("cpu"):
        generator = torch.Generator("cpu").manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
        x = torch.randn(5, 8, generator=generator, dtype=torch.float32)
    mpk.convert(model, policy)
    optimizer, scaler = optimizer_class(model.named_parameters(), lr=0.01), mpk.GradScaler(init_scale=16.0)
    x = x.to(model[0].weight.dtype) if policy == "float16" else x
    norms = []
    for t in range(5):
        scaler.scale(model(x).float().square().sum()).backward()
        if t == 3:
            model[0].weight.grad[0, 0] = torch.inf
        if t % 2:
            norms.append(scaler.clip_grad_norm_(optimizer, 0.5))
        elif t == 4:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if t == 2:
            optimizer.load_state_dict(optimizer.state_dict())
            scaler.load_state_dict(scaler.state_dict())
    with torch.no_grad():
        out = mpk.revert(model)(x)
    states = [value for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
    counted = [scaler.skipped_steps, scaler.skipped_in_a_row, scaler.last_step_skipped]
    assert scaler.skipped_steps.item() == 1
    assert len(norms) == 2
    return raw([out, *model.parameters(), *states, *norms, *counted, torch.tensor(scaler.get_scale(), device="cpu").float()])


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
@pytest.mark.parametrize("optimizer", [mpk.optim.AdamW, mpk.optim.SGD])
def test_bits_do_not_follow_the_defaults(optimizer, policy, backend, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    expected = train(optimizer, policy)
    with torch.device("meta"):
        assert train(optimizer, policy) == expected
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        assert train(optimizer, policy) == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("op", ["adamw_", "sgd_", "grad_stats_", "update_scale_", "linear_act", "quantize"])
def test_checks_do_not_follow_the_defaults(op):
    with torch.device("meta"):
        assert checks.wrong(ops[op], "eager", torch.device("cpu")) is None
