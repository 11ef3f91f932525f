# SPDX-License-Identifier: Apache-2.0
"""What the tests of GradScaler share: parameters, gradients as a scaled loss leaves them, and comparison by bytes."""

import torch
from torch import nn

import mpkernels as mpk
from tests.steps import compute_copies, raw

OURS = {"AdamW": mpk.optim.AdamW, "Adam": mpk.optim.Adam, "SGD": lambda p, **o: mpk.optim.SGD(p, momentum=0.9, **o)}


def parameters(*dtypes, n=5) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for dtype in dtypes]


def give_grads(params, scaler, size=1.0, poison=None):
    """What backward of a scaled loss leaves: gradients times the scale."""
    scaler.scale(torch.zeros(()))
    for parameter in params:
        parameter.grad = torch.full_like(parameter, size * scaler.get_scale())
    if poison is not None:
        params[-1].grad[-1] = poison


def iteration(params, optimizer, scaler, poison=None, size=1.0):
    give_grads(params, scaler, size, poison)
    scaler.step(optimizer)
    scaler.update()


def everything(optimizer) -> list[bytes]:
    """Bytes of parameters, masters, moments, step counts and compute copies."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in params for _, t in sorted(optimizer.state[p].items())]
    return raw([*params, *states, *compute_copies(optimizer)])
