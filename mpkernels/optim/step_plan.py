# SPDX-License-Identifier: Apache-2.0
"""StepPlan: the parameters of a step and all that belongs to them, looked at once and kept while nothing but values is new.

What a step asks of a tensor is asked of a whole list at once: Python's time per tensor is most of a step's CPU launch overhead.
A plan is made for one `Signature`: it matches that of a step or not, it `is_current` or is rebuilt, as a whole.
"""

from itertools import chain, compress, repeat, starmap, zip_longest
from operator import attrgetter, is_, is_not, itemgetter

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.common.layout import Tensors, same_formats
from mpkernels.optim import distributed, hyperparameters
from mpkernels.optim.state import ParameterState
from mpkernels.optim.update_lists import readings, update_lists
from mpkernels.runtime import compute_copy
from mpkernels.runtime.fake import addresses, any_fake
from mpkernels.runtime.op import Op

_NEVER_SEEN = object()
MAX_PLANS = 8  # of steps that find other parameters with a gradient, as experts and dropped layers alternate

_grad, _is_placed, _params_of = attrgetter("grad"), attrgetter("placed"), itemgetter("params")


class GroupValues:
    """The hyperparameters of all groups as of the last look, and what follows from them.

    partition: per group, the first with the same values: one call of the op serves both. moments: per group, their names.
    generation: moves at every look.
    """

    def __init__(self, requirements: dict[str, hyperparameters.Requirement], kept: ParameterState):
        self._requirements, self._kept = {**requirements, "lr": hyperparameters.LEARNING_RATE_AT_A_STEP}, kept
        self._values_of = itemgetter(*requirements)
        self._seen: list[tuple] = []
        self._keys: list[tuple] = []  # of these what groups are compared by: the immutable values are themselves
        self._are_immutable = True
        self.generation = 0
        self.partition: list[int] = []
        self.moments: list[tuple[str, ...]] = []

    def is_current(self, groups: list[dict]) -> bool:
        """Whether no group was given another value since; never where a value may be written in place, as a tensor."""
        if not self._are_immutable or len(groups) != len(self._seen):
            return False
        try:
            now = chain.from_iterable(map(self._values_of, groups))
            return all(map(is_, now, chain.from_iterable(self._seen)))
        except KeyError:  # a group lacks one
            return False

    def look(self, groups: list[dict]) -> None:
        """Raise ValueError for a value that a user or a scheduler has put there since and that is not allowed."""
        seen, keys, moments = [*self._seen], [*self._keys], [*self.moments]
        if len(seen) != len(groups):
            seen, keys, moments = [()] * len(groups), [()] * len(groups), [()] * len(groups)
        for i, group in enumerate(groups):  # of hundreds, few have changed
            values = tuple(map(group.get, self._requirements))
            new = [n for n, v, old in zip_longest(self._requirements, values, seen[i], fillvalue=_NEVER_SEEN) if v is not old]
            if new:
                hyperparameters.check({name: self._requirements[name] for name in new}, group)
                seen[i], moments[i] = values, self._kept.moments_of(group)
            if new or not self._are_immutable:
                keys[i] = hyperparameters.comparable(values)
        first: dict[tuple, int] = {}
        self.partition = [first.setdefault(key, i) for i, key in enumerate(keys)]
        self._seen, self._keys, self.moments = seen, keys, moments
        self._are_immutable = all(map(is_, chain.from_iterable(seen), chain.from_iterable(keys)))
        self.generation += 1


class Signature:
    """Which parameters a step finds, in which groups, which of them have a gradient, and which groups go together."""

    def __init__(self, param_groups: list[dict], partition: list[int]):
        self.params = list(chain.from_iterable(map(_params_of, param_groups)))
        self.grads = list(map(_grad, self.params))
        self.present = list(map(is_not, self.grads, repeat(None)))
        self.sizes = list(map(len, map(_params_of, param_groups)))
        self.partition = partition

    def matches(self, other: "Signature") -> bool:
        same = self.present == other.present and self.sizes == other.sizes and self.partition == other.partition
        return same and all(map(is_, self.params, other.params))

    def local_grads(self, dtensors: bool) -> list[torch.Tensor]:
        """The gradients; of DTensors what this rank holds, laid out as the parameters lie: a collective where they do not."""
        grads = self.grads
        if dtensors:
            distributed.redistribute_grads(self.params)
            grads = list(map(distributed.local, map(_grad, self.params)))
        return grads if all(self.present) else list(compress(grads, self.present))

    def params_with_gradient(self) -> list[torch.Tensor]:
        return list(compress(self.params, self.present))

    def groups_with_gradient(self) -> list[int]:
        """The index of its group, for each parameter with a gradient."""
        groups = chain.from_iterable([i] * size for i, size in enumerate(self.sizes))
        return list(compress(groups, self.present))


class StepPlan:
    """The lists of a step, with their addresses.

    signature: what it is for. state: the optimizer's, with all that these parameters need. values_generation: of the
    hyperparameters that were taken.
    """

    def __init__(self, signature: Signature, state: dict, values: GroupValues, ranks: distributed.Ranks):
        self.signature, self.ranks, self.dtensors = signature, ranks, ranks.dtensors
        signature.grads = []  # a plan keeps no gradients
        self.params = signature.params_with_gradient()
        self.moments, self.values_generation = values.moments, None
        self._copies_generation = compute_copy.generation
        self.entries = [state[p] for p in self.params]
        self._state = list(state), list(state.values())
        self.local_params = list(map(self.local, self.params))
        self.with_master = [(p, entry) for p, entry in zip(self.params, self.entries, strict=True) if "master" in entry]
        self.compute_copies = self._claim_copies()
        self.copies = {id(copy.weight): copy.tensor for copy in self.compute_copies}
        self._grad_lists: dict[tuple[int, ...], Tensors] = {}
        self.updates, self.readings = update_lists(self), readings(self)
        self._owners = [(itemgetter(name), lists.entries) for lists in self.updates for name in ("step", *lists.moments)]
        self._owners.append((itemgetter("master"), [entry for _, entry in self.with_master]))
        self._state_tensors = list(self._find_state_tensors())
        self._placed = [*self.local_params, *self._state_tensors]
        self._is_fake = any_fake(self.local_params)
        self._addresses = self._find_addresses()
        self._copied = list(zip(self.compute_copies, addresses(c.weight for c in self.compute_copies), strict=True))
        self._params_match, self._grads_match = same_formats(self.local_params), None

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return distributed.local(tensor) if self.dtensors else tensor

    def _claim_copies(self) -> list[compute_copy.ComputeCopy]:
        """What layers ask for. The op writes one copy of a master: where that is the parameter itself, there is no other."""
        rows = zip(self.params, self.entries, strict=True)
        return list(compute_copy.claim([p for p, entry in rows if "master" not in entry]).values())

    # ----- whether it is still what it was ---------------------------------------------------

    def is_current(self, state: dict, values: GroupValues) -> bool:
        """Whether these parameters and what is in their state are, but for values, what they were when the plan was made.

        NOTE: users replace what is in the state, as offloading to the host and back does.
        """
        if self._copies_generation != compute_copy.generation or values.moments != self.moments:
            return False
        params = list(map(self.local, self.params)) if self.dtensors else self.local_params
        try:
            return (
                self._has_entries_of(state)
                and self._params_match(*params)
                and all(map(is_, self._find_state_tensors(), self._state_tensors))
                and self._find_addresses() == self._addresses
            )
        except (KeyError, TypeError, RuntimeError):  # an entry is gone, is no tensor, or has no address
            return False

    def _has_entries_of(self, state: dict) -> bool:
        keys, entries = self._state
        if len(state) == len(keys) and all(map(is_, state, keys)) and all(map(is_, state.values(), entries)):
            return True
        self._state = list(state), list(state.values())
        return all(state.get(p) is entry for p, entry in zip(self.params, self.entries, strict=True))

    def _find_state_tensors(self) -> chain:
        return chain.from_iterable(starmap(map, self._owners))

    def _find_addresses(self) -> list[int]:
        """NOTE: of DTensors it asks anew for what this rank holds."""
        if self.dtensors:
            return addresses(map(distributed.local, chain(self.params, self._state_tensors)))
        return addresses(self._placed) if self._is_fake else list(map(torch.Tensor.data_ptr, self._placed))

    def take_options(self, values: GroupValues, param_groups: list[dict], options_of, all_moments: tuple[str, ...]) -> None:
        """Put the hyperparameters into the arguments of the updates."""
        for lists in self.updates:
            group = param_groups[lists.group]
            lists.set_options(group["lr"], options_of(group), all_moments)
        self.values_generation = values.generation

    # ----- the gradients of a step -----------------------------------------------------------

    def grads_of(self, indices: list[int]) -> Tensors:
        """The gradients of these, of DTensors what this rank holds, inside a step; one list for all that ask for the same."""
        return self._grad_lists.setdefault(tuple(indices), Tensors([]))

    def rebind(self, grads: list[torch.Tensor]) -> bool:
        """Take these gradients, of DTensors what this rank holds, if they are but for values and places as those before."""
        if self._grads_match is None or not self._grads_match(*grads):
            return False
        for indices, tensors in self._grad_lists.items():
            tensors.replace(grads if len(indices) == len(grads) else [grads[i] for i in indices])
        return True

    def rebuild_grads(self, grads: list[torch.Tensor], op: Op) -> None:
        """Take these gradients, whatever they are. Raises RuntimeError where `op` cannot work on them."""
        self._grads_match = None
        for indices, tensors in self._grad_lists.items():
            tensors[:] = [grads[i] for i in indices]
            tensors.describe()
        for lists in self.updates:
            op.check(op.call(*lists.arguments))
        self._grads_match = same_formats(grads)

    def grads_of_params(self) -> list[torch.Tensor]:
        """As the parameters have them, DTensors too."""
        return list(map(_grad, self.params))

    def release_grads(self) -> None:
        """Or those of this step would live on while the next backward allocates its own."""
        for tensors in self._grad_lists.values():
            tensors.clear()

    def has_memory(self) -> bool:
        """Whether no gradient lies at address 0, as what was freed does; what has no elements does too."""
        return all(map(_is_placed, self._grad_lists.values()))

    # ----- compute copies ---------------------------------------------------------------------

    def refresh_copies(self) -> None:
        """Take over what others wrote to the weights: a skipped step must not leave a copy behind its weight."""
        for copy, address in self._copied:
            if copy.stamp != (copy.weight._version, address):
                copy.write(cast(copy.weight, copy.tensor.dtype))

    def stamp_copies(self) -> None:
        """To be called after the update: `compute_copy.stamp` of weights whose addresses are known."""
        for copy, address in self._copied:
            copy.stamp = copy.weight._version, address


class PlanCache:
    """The plans of an optimizer, the last used first."""

    def __init__(self):
        self.plans: list[StepPlan] = []

    def find(self, signature: Signature) -> StepPlan | None:
        """The plan of such a step, which comes first then, or None."""
        for plan in self.plans:
            if plan.signature.matches(signature):
                if plan is not self.plans[0]:
                    self.plans.remove(plan)
                    self.plans.insert(0, plan)
                return plan
        return None

    def add(self, plan: StepPlan) -> None:
        """Put `plan` first, in place of one for the same steps; those of other parameters go."""
        params = list(map(id, plan.signature.params))
        others = (p for p in self.plans if not p.signature.matches(plan.signature))
        self.plans = [plan, *(p for p in others if list(map(id, p.signature.params)) == params)][:MAX_PLANS]

    def release_grads(self) -> None:
        for plan in self.plans[:1]:
            plan.release_grads()

    def compute_copies(self) -> list[compute_copy.ComputeCopy]:
        return list({id(copy): copy for plan in self.plans for copy in plan.compute_copies}.values())
