# SPDX-License-Identifier: Apache-2.0
"""The lists that one call of an op is given: to update the parameters that go together, to read a device's gradients."""

from itertools import chain

import torch

from mpkernels.ops.common.layout import NO_TENSORS, Tensors
from mpkernels.optim import distributed


class UpdateLists:
    """Those of one call of the update op: the parameters of one device whose groups have the same hyperparameters.

    indices: the places of these among the plan's. group: the index of the first of their groups.
    arguments: the op's, up to the options of scaling and clipping. has_lr_tensor: its format may change unseen.
    """

    def __init__(self, plan, group: int, indices: list[int], moments: tuple[str, ...]):
        self.group, self.moments = group, moments
        self.device = plan.params[indices[0]].device
        self.entries = [plan.entries[i] for i in indices]
        rows = [(plan.local_params[i], plan.entries[i]) for i in indices]
        self.masters = Tensors(plan.local(entry.get("master", p)) for p, entry in rows)
        none = torch.empty(0, dtype=torch.float16, device=self.device)
        self.copies = Tensors(p if "master" in entry else plan.copies.get(id(p), none) for p, entry in rows)
        self.states = {name: Tensors(plan.local(entry[name]) for entry in self.entries) for name in moments}
        self.steps = Tensors(entry["step"] for entry in self.entries)
        self.grads = plan.grads_of(indices)
        states = chain(*self.states.values(), self.steps)
        dtensors = filter(distributed.is_dtensor, (plan.params[i] for i in indices)) if plan.dtensors else ()
        self.written = [*self.masters, *(copy for copy in self.copies if copy.numel()), *states, *dtensors]
        self._lr: tuple[float, torch.Tensor] | None = None
        self.arguments: tuple = ()
        self.has_lr_tensor = False

    def set_options(self, lr: float | torch.Tensor, options: tuple, all_moments: tuple[str, ...]) -> None:
        states = (self.states.get(name, NO_TENSORS) for name in all_moments)
        self.has_lr_tensor = isinstance(lr, torch.Tensor)
        lists = self.masters, self.grads, *states, self.copies, self.steps
        self.arguments = *lists, self._learning_rate(lr), *options

    def _learning_rate(self, value: float | torch.Tensor) -> torch.Tensor:
        """As the ops take it: 0-d, on the CPU for a float."""
        if isinstance(value, torch.Tensor):
            return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
        if self._lr is None or self._lr[0] != value:
            self._lr = value, torch.tensor(value, dtype=torch.float64, device="cpu")
        return self._lr[1]


class Reading:
    """The gradients of one device in the order of the parameters, which decides the bits of their norm.

    part: over which ranks their squares are summed, see `distributed.Ranks.part_of`.
    """

    def __init__(self, plan, device: torch.device, part, indices: list[int]):
        self.device, self.part = device, part
        self.params, self.grads = [plan.params[i] for i in indices], plan.grads_of(indices)


def update_lists(plan) -> list[UpdateLists]:
    """By hyperparameters and device."""
    indices: dict[tuple[int, torch.device], list[int]] = {}
    for i, (parameter, group) in enumerate(zip(plan.params, plan.signature.groups_with_gradient(), strict=True)):
        indices.setdefault((plan.signature.partition[group], parameter.device), []).append(i)
    return [UpdateLists(plan, group, members, plan.moments[group]) for (group, _), members in indices.items()]


def readings(plan) -> list[Reading]:
    """By device and part of the norm. A rank without gradients joins the others in with none."""
    indices: dict[tuple, list[int]] = {}
    for i, parameter in enumerate(plan.params):
        indices.setdefault((parameter.device, plan.ranks.part_of(parameter)), []).append(i)
    if plan.ranks.many and not indices:
        indices[plan.signature.params[0].device, distributed.LOCAL] = []
    return [Reading(plan, device, part, members) for (device, part), members in indices.items()]
