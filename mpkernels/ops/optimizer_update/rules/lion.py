# SPDX-License-Identifier: Apache-2.0
"""The rule of lion_.

    d = sign(beta1 * m + (1 - beta1) * g), 0 at 0 and NaN at NaN
    w = w * (1 - lr * weight_decay) - lr * d
    m = beta2 * m + (1 - beta2) * g

In bf16 exp_avgs are rounded up or down with the probability that makes them right on average: to nearest, an m that changes by
less than 2^-9 of itself a step would stall. Bytes per parameter with 16-bit gradients and copies: 18 instead of 22, the check
included. Source: Chen et al., "Symbolic Discovery of Optimization Algorithms"; lion-pytorch, whose sign of NaN is 0.
"""

import torch

from mpkernels.ops.common.cast import stochastic_round
from mpkernels.ops.optimizer_update.rules import Rule


def tensor_scalars(call, lr, taken):
    return lr.expand_as(taken), (1 - lr * call.weight_decay).expand_as(taken), taken + 1


def tensor_update(call, scalars, g, w, exp_avg):
    lr, decay, step = scalars
    m = exp_avg.to(w.dtype)
    direction = call.beta1 * m + (1 - call.beta1) * g
    sign = torch.where(direction.isnan(), direction, direction.sign())
    w = w * decay.to(w.dtype) - lr.to(w.dtype) * sign
    return w, stochastic_round(call.beta2 * m + (1 - call.beta2) * g, exp_avg.dtype, step)


def triton(call) -> tuple[tuple[float, ...], None]:
    return (call.beta1, call.beta2, call.weight_decay), None


RULE = Rule(
    name="lion_",
    states=("exp_avgs",),
    required_states=1,
    parameters={"beta1": float, "beta2": float, "weight_decay": float},
    tensor_scalars=tensor_scalars,
    tensor_update=tensor_update,
    triton=triton,
)
