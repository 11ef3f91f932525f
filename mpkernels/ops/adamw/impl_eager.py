# SPDX-License-Identifier: Apache-2.0
"""adamw_ in plain torch, a tensor at a time: w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)."""

import torch

from mpkernels.ops._cast import cast, cast_to_either_side
from mpkernels.ops._multi_tensor import step_scalars, where_taken


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def adamw_(
    masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, steps, lr, beta1, beta2, eps, weight_decay,
    decoupled, maximize, grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
):  # fmt: skip
    device = masters[0].device
    skip, factor, lr = step_scalars(device, lr, maximize, grad_scale, found_inf, grad_norm, max_norm)
    if skip is not None and device.type == "cpu" and skip:
        return
    taken = torch.stack(list(steps))
    later = taken + 1  # in fp32, as torch's: it stays at 2^24
    t = later.double()
    step_sizes, roots = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
    for i, master in enumerate(masters):
        dtype, m, v = master.dtype, exp_avgs[i], exp_avg_sqs[i]
        g = grads[i].to(dtype) * factor.to(dtype)
        w = master
        if decoupled:
            w = w * (1 - lr * weight_decay).to(dtype)
        elif weight_decay:
            g = g + weight_decay * w
        m_new = m.to(dtype) + (1 - beta1) * (g - m.to(dtype))
        v_new = beta2 * v.to(dtype) + (1 - beta2) * g * g
        v_used = v_new
        if max_exp_avg_sqs:
            v_used, v_max = torch.maximum(max_exp_avg_sqs[i].to(dtype), v_new), max_exp_avg_sqs[i]
            v_max.copy_(where_taken(skip, cast(v_used, v_max.dtype), v_max))
        w = w - step_sizes[i].to(dtype) * (m_new / (v_used.sqrt() / roots[i].to(dtype) + eps))
        m.copy_(where_taken(skip, cast(m_new, m.dtype), m))
        v.copy_(where_taken(skip, cast_to_either_side(v_new, v.dtype, later[i]), v))
        if copies[i].numel():
            copies[i].copy_(where_taken(skip, cast(w, copies[i].dtype), copies[i]))  # round: master -> copy
        master.copy_(where_taken(skip, w, master))
    torch._foreach_copy_(list(steps), where_taken(skip, later, taken).unbind())
