# SPDX-License-Identifier: Apache-2.0
"""The update of every rule in plain torch: by torch's fused optimizers where they serve, else a tensor at a time."""

from dataclasses import dataclass
from functools import cached_property

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.common.multi_tensor import grad_factor, inv_scale, skip_flag, values_are_here
from mpkernels.ops.optimizer_update.fused import Contiguous, served_by, update_fused


def update(call) -> None:
    step = Step.of(call)
    if step is None:
        return
    layout = Contiguous(call.masters, call.grads, call.copies, *call.states)
    masters, grads, copies, *states = layout.lists
    fused, rest = call.rule.fused(call, step), range(len(masters))
    if fused is not None:
        is_served = served_by(fused.name, masters, states[0])
        served = [i for i in rest if is_served[i]]
        update_fused(fused, (masters, grads, copies, states), served, step.factor, step.skip)
        rest = [i for i in rest if not is_served[i]]
    if rest:
        _one_by_one(call, step, rest, masters, grads, copies, list(filter(None, states)))
    step.count(call.steps)
    layout.write_back(call.grads)


def _one_by_one(call, step: "Step", indices, masters, grads, copies, states) -> None:
    factor, scalars = step.signed_factor(call.maximize), call.rule.tensor_scalars(call, step.lr, step.taken)
    for i in indices:
        master, old = masters[i], [tensors[i] for tensors in states]
        g = grads[i].to(master.dtype) * factor.to(master.dtype)
        w, *new = call.rule.tensor_update(call, [values[i] for values in scalars], g, master, *old)
        for state, value in zip(old, new, strict=True):
            state.copy_(where_taken(step.skip, value, state))
        if copies[i].numel():
            copies[i].copy_(where_taken(step.skip, cast(w, copies[i].dtype), copies[i]))  # round: master -> copy
        master.copy_(where_taken(step.skip, w, master))


@dataclass(frozen=True)
class Step:
    """The scalars of an update in plain torch, on the device of the masters."""

    taken: torch.Tensor  # fp32: steps of each tensor before this one,
    later: torch.Tensor  # and after it
    skip: torch.Tensor | None  # `skip_flag`
    factor: torch.Tensor | None  # what gradients are multiplied by, fp64; None: by 1
    given_lr: torch.Tensor

    @classmethod
    def of(cls, call) -> "Step | None":
        """None where the step is known to be skipped."""
        device, skip, factor = call.steps[0].device, skip_flag(call.found_inf, call.grad_scale), None
        if skip is not None and values_are_here(device):
            if skip:
                return None
            skip = None
        if call.grad_scale is not None or call.max_norm is not None:
            factor = grad_factor(call.grad_scale, call.grad_norm, call.max_norm, device)
        taken = torch.stack(list(call.steps))
        return cls(taken, taken + 1, skip, factor, call.lr)  # counts in fp32, as torch's: they stay at 2^24

    @cached_property
    def counts(self) -> tuple[torch.Tensor, ...]:
        """`later`, one by one."""
        return self.later.unbind()

    @property
    def lr(self) -> torch.Tensor:
        return self.given_lr.to(self.taken.device, torch.float64)

    @cached_property
    def lr_of_fused(self) -> float | torch.Tensor:
        """As torch's fused optimizers take it: a number, or a tensor of a GPU in fp32, which they do not wait for."""
        return self.given_lr.item() if self.given_lr.device.type == "cpu" else self.given_lr.float()

    def signed_factor(self, maximize: bool) -> torch.Tensor:
        factor = inv_scale(None, self.taken.device) if self.factor is None else self.factor
        return -factor if maximize else factor

    def count(self, steps) -> None:
        """Advance `steps`, where the step is taken."""
        torch._foreach_copy_(list(steps), where_taken(self.skip, self.later, self.taken).unbind())


def where_taken(skip: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new`, or `old` bit for bit when the step is skipped; decided on the device."""
    return new if skip is None else torch.where(skip, old, new)
