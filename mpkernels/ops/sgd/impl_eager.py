# SPDX-License-Identifier: Apache-2.0
"""sgd_ in plain torch: b = momentum * b + (1 - dampening) * g; w -= lr * b.

By torch's fused SGD, many tensors a launch; what that does not serve a tensor at a time.
"""

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.common.fused import Contiguous, update_fused, why_not_fused
from mpkernels.ops.common.multi_tensor import Step, values_are_here, where_taken


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def sgd_(
    masters, grads, momentum_buffers, copies, steps, lr, momentum, dampening, weight_decay, nesterov, maximize,
    grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
):  # fmt: skip
    given_grads = grads
    step = Step.of(steps, lr, grad_scale, found_inf, grad_norm, max_norm)
    if step is None:
        return
    layout = Contiguous(masters, grads, momentum_buffers, copies)
    masters, grads, momentum_buffers, copies = layout.lists
    options = dict(momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize)
    is_first = _known_first_steps(step, momentum_buffers)

    def by_fused(piece, work, grad_scale, found_inf):
        of = lambda tensors: [tensors[i] for i in piece]
        cases = [(is_first[piece[0]], found_inf)] if is_first else _either_case(of(step.taken.unbind()), found_inf)
        for first, found in cases:
            buffers, scalars = of(momentum_buffers) if momentum_buffers else [], {"grad_scale": grad_scale, "found_inf": found}
            torch._fused_sgd_(of(masters), work, buffers, lr=step.lr_of_fused, is_first_step=first, **options, **scalars)

    served = []
    if is_first or not dampening:
        why_not = why_not_fused("_fused_sgd_", masters, momentum_buffers)
        served = [i for i, reason in enumerate(why_not) if reason is None]
        update_fused(by_fused, (masters, grads, copies), served, step.factor, step.skip, is_first)
    if rest := sorted(set(range(len(masters))) - set(served)):
        _one_by_one(rest, masters, grads, momentum_buffers, copies, step, **options)
    step.count(steps)
    layout.write_back(given_grads)


def _known_first_steps(step: Step, momentum_buffers) -> list[bool] | None:
    """Whether each tensor takes its first step, which torch's fused SGD has to be told; None on a GPU, where only it knows."""
    if not momentum_buffers:
        return [False] * len(step.taken)
    return (step.taken == 0).tolist() if values_are_here(step.taken.device) else None


def _either_case(taken: list[torch.Tensor], found_inf) -> list[tuple[bool, torch.Tensor]]:
    """(is_first_step, found_inf) of two calls, of which the one that is not so is skipped, by the device.

    Where only some tensors take their first step their buffers are zeros: momentum * b + g is the gradient too.
    """
    first = (torch.stack(taken) == 0).all().float()
    if found_inf is None:
        return [(True, 1 - first), (False, first)]
    return [(True, torch.maximum(found_inf, 1 - first)), (False, torch.maximum(found_inf, first))]


def _one_by_one(indices, masters, grads, momentum_buffers, copies, step, momentum, dampening, weight_decay, nesterov, maximize):
    skip, factor, first = step.skip, step.signed_factor(maximize), step.taken == 0
    for i in indices:
        master = masters[i]
        dtype = master.dtype
        g = grads[i].to(dtype) * factor.to(dtype)
        if weight_decay:
            g = g + weight_decay * master
        if momentum_buffers:
            buffer = momentum_buffers[i]
            b = torch.where(first[i], g, momentum * buffer.to(dtype) + (1 - dampening) * g)
            g = g + momentum * b if nesterov else b
            buffer.copy_(where_taken(skip, cast(b, buffer.dtype), buffer))
        w = master - step.lr.to(dtype) * g
        if copies[i].numel():
            copies[i].copy_(where_taken(skip, cast(w, copies[i].dtype), copies[i]))  # round: master -> copy
        master.copy_(where_taken(skip, w, master))
