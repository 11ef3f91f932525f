# SPDX-License-Identifier: Apache-2.0
"""StepPlan: the parameters of a step and all that belongs to them, looked at once and kept while nothing but values is new.

What a step asks of a tensor is asked of a whole list at once: Python's time per tensor is most of what it costs the host.
A plan is made for one set of parameters with gradients; it `is_for` a step or not, `is_current` or is made anew, as a whole.
"""

from itertools import chain, compress
from operator import attrgetter, is_, itemgetter

import torch

from mpkernels.ops.common.layout import Tensors, same_formats
from mpkernels.optim import _ranks
from mpkernels.runtime import compute_copy
from mpkernels.runtime.fake import addresses, any_fake

_version = attrgetter("_version")


class Signature:
    """Which parameters a step finds, in which groups, which of them have a gradient, and which groups go together.

    partition: per group, the first with the same hyperparameters.
    """

    def __init__(self, param_groups: list[dict], partition: list[int]):
        self.params = list(chain.from_iterable(group["params"] for group in param_groups))
        self.grads = [p.grad for p in self.params]
        self.present = [grad is not None for grad in self.grads]
        self.all_present = all(self.present)
        self.sizes = [len(group["params"]) for group in param_groups]
        self.partition = partition

    def redistribute_grads(self) -> None:
        """Lay the gradients of DTensors out as the parameters lie: a collective where they do not."""
        _ranks.redistribute_grads(self.params)
        self.grads = [p.grad for p in self.params]

    def matches(self, other: "Signature") -> bool:
        same = self.present == other.present and self.sizes == other.sizes and self.partition == other.partition
        return same and self.has_params_of(other)

    def has_params_of(self, other: "Signature") -> bool:
        return len(self.params) == len(other.params) and all(map(is_, self.params, other.params))

    def with_gradient(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if self.all_present:
            return self.params, self.grads
        return list(compress(self.params, self.present)), list(compress(self.grads, self.present))

    def groups_with_gradient(self) -> list[int]:
        """The index of its group, for each parameter with a gradient."""
        groups = chain.from_iterable([i] * size for i, size in enumerate(self.sizes))
        return list(compress(groups, self.present))


class Call:
    """What one call of the update op is given: the parameters of one device whose groups have the same hyperparameters.

    rows: their places among the plan's parameters. group: the index of the first of their groups.
    """

    def __init__(self, plan: "StepPlan", group: int, rows: list[int], names: tuple[str, ...]):
        self.group, self.rows, self.names = group, rows, names
        pick = list if len(rows) == len(plan.params) else lambda tensors: [tensors[i] for i in rows]
        self.device = plan.params[rows[0]].device
        entries = pick(plan.entries)
        self.masters, self.copies = Tensors(pick(plan.masters)), Tensors(pick(plan.copies))
        self.states = {name: Tensors(plan.local(entry[name]) for entry in entries) for name in names}
        self.steps = Tensors(entry["step"] for entry in entries)
        self.grads = Tensors([])  # inside a step; of DTensors what this rank holds
        states = chain(*self.states.values(), self.steps)
        dtensors = filter(_ranks.is_dtensor, pick(plan.params)) if plan.dtensors else ()
        self.written = [*self.masters, *(copy for copy in self.copies if copy.numel()), *states, *dtensors]
        self._lr: tuple[float, torch.Tensor] | None = None

    def lr(self, value) -> torch.Tensor:
        """The learning rate as the ops take it: 0-d, on the CPU for a float."""
        if isinstance(value, torch.Tensor):
            return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
        if self._lr is None or self._lr[0] != value:
            self._lr = value, torch.tensor(value, dtype=torch.float64, device="cpu")
        return self._lr[1]


class Reading:
    """The gradients of one device in the order of the parameters, which decides the bits of their norm."""

    def __init__(self, device: torch.device, rows: list[int], params: list[torch.Tensor], calls: list[Call]):
        self.device, self.rows, self.params = device, rows, [params[i] for i in rows]
        same = (call.grads for call in calls if call.rows == rows)
        self.grads = next(same, Tensors([]))  # usually those of its only call


class StepPlan:
    """The lists of a step.

    signature: what it is for. state: the optimizer's, with all that these parameters need. names: what an op needs of the
    state, by group. checked: whether an op has checked these lists; then only values are new.
    """

    def __init__(self, signature: Signature, state: dict, names: list[tuple[str, ...]], ranks: _ranks.Ranks, optimizer):
        self.signature, self.ranks, self.dtensors = signature, ranks, ranks.dtensors
        signature.grads, grads = [], signature.with_gradient()[1]  # a plan keeps no gradients
        self.params = list(compress(signature.params, signature.present))
        self.generation, self.names, self.checked = compute_copy.generation, names, False
        self.versions: list | None = None  # of the parameters after our last write
        self.entries = [state[p] for p in self.params]
        self._state = list(state), list(state.values())
        self.local_params = list(map(self.local, self.params))
        self._is_fake = any_fake(self.local_params)
        self.has_master = [i for i, entry in enumerate(self.entries) if "master" in entry]
        self.compute_copies = compute_copy.claim(optimizer, self.params)
        self.always_taken_over = [i for i in self.has_master if self._may_be_written_unseen(self.params[i])]
        self.masters, self.copies = list(self.local_params), [self._no_copy(p) for p in self.params]
        for i, copy in self.compute_copies.items():
            self.copies[i] = copy.tensor
        for i in self.has_master:
            self.masters[i], self.copies[i] = self.local(self.entries[i]["master"]), self.local_params[i]
        self.calls = self._make_calls()
        self.readings = self._make_readings()
        self._owners = [(name, [self.entries[i] for i in call.rows]) for call in self.calls for name in ("step", *call.names)]
        self._owners.append(("master", [self.entries[i] for i in self.has_master]))
        self._state_tensors = self._state_tensors_now()
        self._addresses = self._addresses_now()
        self._same_params = same_formats(self.local_params)
        self.give(list(map(self.local, grads)))

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return _ranks.local(tensor) if self.dtensors else tensor

    @staticmethod
    def _may_be_written_unseen(parameter: torch.Tensor) -> bool:
        """NOTE: what `state_dict()` hands out of a DTensor has a version counter of its own."""
        return _ranks.is_dtensor(parameter) or compute_copy.is_shared(parameter)

    @staticmethod
    def _no_copy(parameter: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=torch.float16, device=parameter.device)

    def _make_calls(self) -> list[Call]:
        rows: dict[tuple[int, torch.device], list[int]] = {}
        for i, (parameter, group) in enumerate(zip(self.params, self.signature.groups_with_gradient(), strict=True)):
            rows.setdefault((self.signature.partition[group], parameter.device), []).append(i)
        return [Call(self, group, members, self.names[group]) for (group, _), members in rows.items()]

    def _make_readings(self) -> list[Reading]:
        rows: dict[torch.device, list[int]] = {}
        for i, parameter in enumerate(self.params):
            rows.setdefault(parameter.device, []).append(i)
        return [Reading(device, members, self.params, self.calls) for device, members in rows.items()]

    # ----- whether it is still what it was ---------------------------------------------------

    def is_current(self, state: dict, names: list[tuple[str, ...]]) -> bool:
        """Whether these parameters and what is in their state are, but for values, what they were when the plan was made."""
        return (
            self.generation == compute_copy.generation
            and names == self.names
            and self._has_entries_of(state)
            and self._lies_where_it_lay()
        )

    def _has_entries_of(self, state: dict) -> bool:
        keys, values = self._state
        if len(state) == len(keys) and all(map(is_, state, keys)) and all(map(is_, state.values(), values)):
            return True
        self._state = list(state), list(state.values())
        return all(state.get(p) is entry for p, entry in zip(self.params, self.entries, strict=True))

    def _lies_where_it_lay(self) -> bool:
        """NOTE: users replace what is in the state, as those do who move it to the host and back."""
        params = list(map(self.local, self.params)) if self.dtensors else self.local_params
        if not self._same_params(*params):
            return False
        try:
            now = self._state_tensors_now()
            return all(map(is_, now, self._state_tensors)) and self._addresses_now() == self._addresses
        except (KeyError, TypeError, RuntimeError):  # an entry is gone, is no tensor, or has no address
            return False

    def _state_tensors_now(self) -> list[torch.Tensor]:
        return list(chain.from_iterable(map(itemgetter(name), entries) for name, entries in self._owners))

    def _addresses_now(self) -> list[int]:
        """NOTE: of DTensors it asks anew for what this rank holds."""
        if self.dtensors:
            return addresses(map(_ranks.local, chain(self.params, self._state_tensors)))
        tensors = chain(self.local_params, self._state_tensors)
        return addresses(tensors) if self._is_fake else list(map(torch.Tensor.data_ptr, tensors))

    # ----- the gradients of a step -----------------------------------------------------------

    def rebind(self, grads: list[torch.Tensor]) -> bool:
        """Take these gradients, of DTensors what this rank holds, if they are but for values and places as those before."""
        if not self._same_grads(*grads):
            return False
        for part in self._distinct_lists():
            part.grads.replace(grads if len(part.rows) == len(grads) else [grads[i] for i in part.rows])
        return True

    def give(self, grads: list[torch.Tensor]) -> None:
        """Take these gradients, whatever they are."""
        self.checked, self._same_grads = False, same_formats(grads)
        for part in self._distinct_lists():
            part.grads[:] = [grads[i] for i in part.rows]
            part.grads.describe()

    def _distinct_lists(self) -> list[Call | Reading]:
        shared = {id(call.grads) for call in self.calls}
        return [*self.calls, *(reading for reading in self.readings if id(reading.grads) not in shared)]

    def release_grads(self) -> None:
        """Or those of this step would live on while the next backward allocates its own."""
        for part in (*self.calls, *self.readings):
            part.grads.clear()

    def has_memory(self) -> bool:
        """Whether no gradient lies at address 0, as what was freed does; what has no elements does too."""
        return all(call.grads.placed for call in self.calls)

    # ----- what was written by others --------------------------------------------------------

    def versions_now(self) -> list:
        """What changes when a parameter, or what this rank holds of it, is written visibly; nothing where none has a master."""
        if not self.has_master:
            return []
        versions = list(map(_version, self.local_params))
        return list(zip(versions, map(_version, self.params), strict=True)) if self.dtensors else versions

    def stamps(self) -> dict[int, tuple]:
        """By id, version and address of each parameter after our last write; the state's addresses come behind."""
        return dict(zip(map(id, self.params), zip(self.versions or (), self._addresses, strict=False), strict=False))

    def written_by_others(self, versions: list) -> list[int]:
        """Rows with a master whose parameter may have been written since our last write."""
        if self.versions is None:
            return self.has_master
        if versions == self.versions:
            return self.always_taken_over
        unseen, old = set(self.always_taken_over), self.versions
        return [i for i in self.has_master if versions[i] != old[i] or i in unseen]
