# SPDX-License-Identifier: Apache-2.0
"""What the tests of GradScaler share: gradients as a scaled loss leaves them, and steps with them."""

import torch


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
