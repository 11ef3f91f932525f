# SPDX-License-Identifier: Apache-2.0
"""The optimizers that tests share, beside torch's, with parameters and gradients that every dtype holds."""

import io

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests.steps import compute_copies, raw

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


def everything(optimizer) -> list[bytes]:
    """Bytes of parameters, masters, moments, step counts and compute copies."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in params for _, t in sorted(optimizer.state.get(p, {}).items())]
    return raw([*params, *states, *compute_copies(optimizer)])


def through_a_file(value):
    """Saved and loaded again, as by torch without code."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
