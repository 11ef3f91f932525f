# SPDX-License-Identifier: Apache-2.0
"""sgd_ in plain torch, a tensor at a time: b = momentum * b + (1 - dampening) * g; w -= lr * b."""

import torch

from mpkernels.ops._cast import cast
from mpkernels.ops._multi_tensor import step_scalars, where_taken


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def sgd_(
    masters, grads, momentum_buffers, copies, steps, lr, momentum, dampening, weight_decay, nesterov, maximize,
    grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
):  # fmt: skip
    device = masters[0].device
    skip, factor, lr = step_scalars(device, lr, maximize, grad_scale, found_inf, grad_norm, max_norm)
    if skip is not None and device.type == "cpu" and skip:
        return
    taken = torch.stack(list(steps))
    first, later = taken == 0, taken + 1  # in fp32, as torch's: it stays at 2^24
    for i, master in enumerate(masters):
        dtype = master.dtype
        g = grads[i].to(dtype) * factor.to(dtype)
        if weight_decay:
            g = g + weight_decay * master
        if momentum_buffers:
            buffer = momentum_buffers[i]
            b = torch.where(first[i], g, momentum * buffer.to(dtype) + (1 - dampening) * g)
            g = g + momentum * b if nesterov else b
            buffer.copy_(where_taken(skip, cast(b, buffer.dtype), buffer))
        w = master - lr.to(dtype) * g
        if copies[i].numel():
            copies[i].copy_(where_taken(skip, cast(w, copies[i].dtype), copies[i]))  # round: master -> copy
        master.copy_(where_taken(skip, w, master))
    torch._foreach_copy_(list(steps), where_taken(skip, later, taken).unbind())
