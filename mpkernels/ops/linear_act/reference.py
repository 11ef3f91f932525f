# SPDX-License-Identifier: Apache-2.0
"""linear_act in fp64 on the operands as they were rounded: act(x @ weight.T + bias), and its gradients."""

import math

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act.epilogues import Activation


def linear_act(x, weight, bias, activation, compute_dtype):
    """fp64 pre-rounding output (*, N) for operands rounded to compute_dtype."""
    z = _rounded(x, compute_dtype) @ _rounded(weight, compute_dtype).T
    if bias is not None:
        z = z + bias.double()
    return activate(z, activation)


def activate(z, activation):
    """act(z) in fp64."""
    if activation == Activation.RELU:
        return z.relu()
    if activation == Activation.RELU2:
        return z.relu().square()
    if activation == Activation.GELU:
        return z * 0.5 * torch.special.erfc(-z / math.sqrt(2))
    if activation == Activation.GELU_TANH:
        return z * torch.sigmoid(_tanh_argument(z))
    return z * torch.sigmoid(z) if activation == Activation.SILU else z


def slope(z, activation):
    """act'(z) in fp64 for finite z; not for a ReLU, whose gradient is selected."""
    if activation == Activation.RELU2:
        return 2 * z.relu()
    if activation == Activation.GELU:
        return 0.5 * torch.special.erfc(-z / math.sqrt(2)) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    t, inner = (z, 1) if activation == Activation.SILU else (_tanh_argument(z), _TANH * (1 + 3 * 0.044715 * z * z))
    return torch.sigmoid(t) * (1 + z * torch.sigmoid(-t) * inner)


_TANH = 2 * math.sqrt(2 / math.pi)


def _tanh_argument(z):
    """Twice what GELU's tanh is taken of: (1 + tanh(t / 2)) / 2 is sigmoid(t)."""
    return _TANH * (z + 0.044715 * z**3)


def linear_act_backward(grad_out, x, weight, positive, compute_dtype):
    """fp64 (grad_x, grad_weight, grad_bias) for x (M, K); `positive` (M, N) bool: the implementation's own mask, or None."""
    grad_z = grad_out.double()
    if positive is not None:
        grad_z = torch.where(positive, grad_z, 0)
    grad_bias = grad_z.sum(0)
    grad_z = _rounded(grad_z, compute_dtype)
    return grad_z @ _rounded(weight, compute_dtype), grad_z.T @ _rounded(x, compute_dtype), grad_bias


def _rounded(tensor, dtype):
    """`tensor` rounded once to `dtype`, in fp64."""
    return cast(tensor, dtype).double()
