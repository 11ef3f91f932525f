# SPDX-License-Identifier: Apache-2.0
"""adamw_ in plain torch: w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).

By torch's fused AdamW, many tensors a launch; what that does not serve a tensor at a time.
"""

import torch

from mpkernels.ops.common.cast import cast, cast_to_either_side
from mpkernels.ops.common.fused import Contiguous, update_fused, why_not_fused
from mpkernels.ops.common.multi_tensor import Step, where_taken


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def adamw_(
    masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, steps, lr, beta1, beta2, eps, weight_decay,
    decoupled, maximize, grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
):  # fmt: skip
    given_grads = grads
    step = Step.of(steps, lr, grad_scale, found_inf, grad_norm, max_norm)
    if step is None:
        return
    layout = Contiguous(masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies)
    masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies = layout.lists
    name = "_fused_adamw_" if decoupled else "_fused_adam_"
    why_not = why_not_fused(name, masters, exp_avgs, bool(max_exp_avg_sqs))
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}

    def by_fused(piece, work, **scalars):
        of = lambda tensors: [tensors[i] for i in piece]
        moments = of(exp_avgs), of(exp_avg_sqs), []
        fused = getattr(torch, name)
        fused(of(masters), work, *moments, of(step.counts), lr=step.lr_of_fused, amsgrad=False, **options, **scalars)

    served = [i for i, reason in enumerate(why_not) if reason is None]
    update_fused(by_fused, (masters, grads, copies), served, step.factor, step.skip)
    if len(served) < len(masters):
        rest = [i for i, reason in enumerate(why_not) if reason]
        _one_by_one(rest, masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, step, decoupled, **options)
    step.count(steps)
    layout.write_back(given_grads)


def _one_by_one(
    indices, masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, step, decoupled, beta1, beta2, eps,
    weight_decay, maximize,
):  # fmt: skip
    lr, skip, factor = step.lr, step.skip, step.signed_factor(maximize)
    t = step.later.double()
    step_sizes, roots = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
    for i in indices:
        master, m, v = masters[i], exp_avgs[i], exp_avg_sqs[i]
        dtype = master.dtype
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
        v.copy_(where_taken(skip, cast_to_either_side(v_new, v.dtype, step.later[i]), v))
        if copies[i].numel():
            copies[i].copy_(where_taken(skip, cast(w, copies[i].dtype), copies[i]))  # round: master -> copy
        master.copy_(where_taken(skip, w, master))
