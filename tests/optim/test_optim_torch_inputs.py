# SPDX-License-Identifier: Apache-2.0
"""Tests of every argument combination that torch's own test-suite has for AdamW, Adam and SGD, against fp64.

torch's own, in fp64 on the CPU, is not given `capturable`, which is for GPUs there, and numbers for tensors.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

import mpkernels as mpk
from mpkernels.ops.common.cast import cast
from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE
from tests import bounds
from tests.levels import each_once

SHAPES = ((7,), (3, 5), (), (130,))
KINDS = {  # dtype of the parameters, and of what the update is applied to
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "fp16 fp64": (torch.float16, torch.float64),
    "fp64": (torch.float64, torch.float64),
}


def _inputs() -> dict[str, tuple[type, dict]]:
    result = {}
    for info in optim_db:
        ours = {"Adam": mpk.optim.Adam, "AdamW": mpk.optim.AdamW, "SGD": mpk.optim.SGD}.get(info.optim_cls.__name__)
        for given in info.optim_inputs_func(device="cuda") if ours else ():  # the CPU's inputs are among them
            result[f"{ours.__name__}: {given.desc}"] = (ours, given.kwargs)
    return result


INPUTS = _inputs()


def test_inputs_are_there():
    for name, least in (("Adam", 7), ("AdamW", 7), ("SGD", 9)):
        assert sum(given.startswith(f"{name}:") for given in INPUTS) >= least


def trajectory(make, options: dict, dtype: torch.dtype, n_steps: int, start: torch.dtype) -> np.ndarray:
    """(steps, n): the weights (masters where there are) after each step; all start from values that `start` holds."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(start).to(dtype)) for shape in SHAPES]
    optimizer, result = make(params, **copy.deepcopy(options)), []
    for _ in range(n_steps):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(start).to(dtype)
        optimizer.step()
        masters = [optimizer.state[p].get("master", p) for p in params]
        for parameter, master in zip(params, masters, strict=True):
            assert torch.equal(parameter, cast(master, parameter.dtype))
        result.append(torch.cat([m.detach().reshape(-1) for m in masters]))
    return torch.stack(result).double().numpy()


def check(given: str, kind: str, n_steps: int) -> None:
    ours, options = INPUTS[given]
    theirs = getattr(torch.optim, ours.__name__)
    start, master = KINDS[kind]
    plain = {"foreach": False, "fused": False, "capturable": False}
    if theirs is torch.optim.SGD:
        del plain["capturable"]
    if "betas" in options:
        plain["betas"] = tuple(map(float, options["betas"]))
    if "lr" in options:
        plain["lr"] = float(options["lr"])  # NOTE: from an fp32 tensor torch's for-loop makes an fp32 step size, in fp64 too
    got = trajectory(ours, options | ({"master_dtype": master} if start == torch.float16 else {}), start, n_steps, start)
    exact = trajectory(theirs, options | plain, torch.float64, n_steps, start)
    fp32 = trajectory(theirs, options | plain, torch.float32, n_steps, start) if master == torch.float32 else None
    bounds.check_trajectory(got, exact, fp32)


@pytest.fixture(params=["eager", "native"])
def backend(request, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", INPUTS)
def test_torch_inputs_match_reference(backend, given, kind):
    check(given, kind, 20)


@pytest.mark.parametrize("given, kind", each_once(INPUTS, KINDS, few=pytest.mark.sweep, others=pytest.mark.release))
def test_torch_inputs_match_reference_for_1000_steps(backend, given, kind):
    check(given, kind, 1000)
