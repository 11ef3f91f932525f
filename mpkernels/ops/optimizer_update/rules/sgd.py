# SPDX-License-Identifier: Apache-2.0
"""The rule of sgd_.

    g = g + weight_decay * w
    b = g at a tensor's first step, else momentum * b + (1 - dampening) * g           (with momentum)
    d = g + momentum * b with nesterov, else b              (g without momentum)
    w = w - lr * d

momentum_buffers are empty without momentum. A step count of 0 means "first step", and a skipped one stays the first. `eager`
on a GPU takes the buffers for zeros, as new ones are, where only some of its tensors take their first step.

In bf16 a buffer is rounded to nearest even, and a momentum above 0.99 would stall. Bytes per parameter with 16-bit gradients
and copies: 18 instead of 22, the check included. Source: torch.optim.SGD.
"""

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.common.multi_tensor import values_are_here
from mpkernels.ops.optimizer_update.rules import Fused, Rule


def check(call) -> None:
    if (call.momentum != 0) != bool(call.momentum_buffers):
        raise RuntimeError("sgd_: momentum_buffers and a momentum other than 0 go together")


def tensor_scalars(call, lr, taken):
    return lr.expand_as(taken), taken == 0


def tensor_update(call, scalars, g, w, buffer=None):
    lr, is_first = scalars
    if call.weight_decay:
        g = g + call.weight_decay * w
    if buffer is None:
        return (w - lr.to(w.dtype) * g,)
    b = torch.where(is_first, g, call.momentum * buffer.to(w.dtype) + (1 - call.dampening) * g)
    g = g + call.momentum * b if call.nesterov else b
    return w - lr.to(w.dtype) * g, cast(b, buffer.dtype)


def fused(call, step) -> Fused | None:
    """torch's fused SGD has to be told whether a tensor takes its first step, which on a GPU only the device knows."""
    options = {name: getattr(call, name) for name in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")}
    if not call.momentum_buffers:
        is_first = [False] * len(call.masters)
    elif values_are_here(call.masters[0].device):
        is_first = (step.taken == 0).tolist()
    elif call.dampening:
        return None
    else:
        is_first = None

    taken = step.taken.unbind() if is_first is None else ()

    def update(indices, masters, grads, states, grad_scale, found_inf):
        cases = [(is_first[indices[0]], found_inf)] if is_first else _either_case([taken[i] for i in indices], found_inf)
        for first, found in cases:
            torch._fused_sgd_(
                masters, grads, *(states or [[]]), lr=step.lr_of_fused, is_first_step=first, grad_scale=grad_scale,
                found_inf=found, **options,
            )  # fmt: skip

    return Fused("_fused_sgd_", update, is_first)


def _either_case(taken: list[torch.Tensor], found_inf) -> list[tuple[bool, torch.Tensor]]:
    """(is_first_step, found_inf) of two calls, of which the one that is not so is skipped, by the device.

    Where only some tensors take their first step their buffers are zeros: momentum * b + g is the gradient too.
    """
    first = (torch.stack(taken) == 0).all().float()
    if found_inf is None:
        return [(True, 1 - first), (False, first)]
    return [(True, torch.maximum(found_inf, 1 - first)), (False, torch.maximum(found_inf, first))]


def triton(call) -> tuple[tuple[float, ...], tuple[bool, bool]]:
    return (call.momentum, call.dampening, call.weight_decay), (call.weight_decay != 0, call.nesterov)


RULE = Rule(
    name="sgd_",
    states=("momentum_buffers",),
    required_states=0,
    parameters={"momentum": float, "dampening": float, "weight_decay": float, "nesterov": bool},
    tensor_scalars=tensor_scalars,
    tensor_update=tensor_update,
    triton=triton,
    fused=fused,
    check=check,
)
