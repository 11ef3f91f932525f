# SPDX-License-Identifier: Apache-2.0
"""The parameters of a step and all that belongs to them, kept from step to step.

What a step asks of a tensor is asked of a whole list at once: Python's time per tensor is most of what it costs the host.
"""

from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_, itemgetter

import torch

from mpkernels import _copies
from mpkernels.ops._layout import Tensors, same_formats
from mpkernels.optim import _ranks

_address, _version = torch.Tensor.data_ptr, attrgetter("_version")


@dataclass(eq=False)
class Rows:
    """The parameters of one group and device that have a gradient, and everything a step of them needs, in order."""

    params: list[torch.Tensor]
    held: Tensors  # the parameters, of DTensors what this rank holds
    masters: Tensors
    copies: Tensors  # the 16-bit parameter, its compute copy, or an empty tensor
    states: dict[str, Tensors]
    steps: Tensors  # the counts that stand in the optimizer's state
    entries: list[dict]  # the optimizer's state of each parameter
    compute_copies: dict[int, _copies.ComputeCopy]  # by row
    mastered: list[int]  # rows whose master is not the parameter itself
    generation: int  # _copies.generation when these rows were made
    dtensors: bool
    grads: Tensors = field(default_factory=lambda: Tensors([]))  # inside a step; of DTensors what this rank holds
    versions: list | None = None  # of the parameters after our last write
    checked: bool = False  # whether an op has checked these lists: only the scalars and the gradients' values are new

    def __post_init__(self):
        self._same_params = self._same_grads = None  # until there are gradients, and while `take` is not for them
        self._owners = dict.fromkeys(("step", *self.states), self.entries)
        self._owners["master"] = [self.entries[i] for i in self.mastered]
        self._addresses = self._state_addresses()
        copies = [copy for copy in self.copies if copy.numel()]
        dtensors = filter(_ranks.is_dtensor, self.params) if self.dtensors else ()
        self.written = [*self.masters, *chain(*self.states.values()), *copies, *self.steps, *dtensors]
        self._lr: tuple[float, torch.Tensor] | None = None

    # ----- whether they are still what they were ---------------------------------------------

    def are(self, params: list[torch.Tensor]) -> bool:
        return len(params) == len(self.params) and all(map(is_, params, self.params))

    def take(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> bool:
        """Take these gradients if nothing but values and places is new, of parameters and gradients alike."""
        known = self._same_grads is not None and self.are(params)
        if not (known and self._same_params(*params) and self._same_grads(*grads)):
            return False
        self.grads.replace(grads)
        return True

    def give(self, grads: list[torch.Tensor]) -> None:
        """Take these gradients, whatever they are, and look at every other list anew: `take` has refused them."""
        self.grads, self.checked = Tensors(grads), False
        if self.grads.contiguous and not self.dtensors:
            self._same_params, self._same_grads = same_formats(self.params), same_formats(grads)
        else:
            self._same_grads = None
        for tensors in (self.held, self.masters, self.copies, self.steps, *self.states.values()):
            tensors.describe()

    def moved(self) -> bool:
        """Whether a parameter lies elsewhere than at the last step, or what is in its state does."""
        held = list(map(_ranks.local, self.params)) if self.dtensors else self.held
        try:
            return list(map(_address, held)) != self.held.addresses or self._state_addresses() != self._addresses
        except (KeyError, TypeError, RuntimeError):  # an entry is gone, is no tensor, or has no address
            return True

    def _state_addresses(self) -> list[int]:
        """NOTE: of what the user can reach and replace, as those do who move an optimizer's state to the host and back."""
        tensors = chain(*(map(itemgetter(name), entries) for name, entries in self._owners.items()))
        return list(map(_address, map(_ranks.local, tensors) if self.dtensors else tensors))

    # ----- what somebody may have written ----------------------------------------------------

    def versions_now(self) -> list:
        """What changes when a parameter, or what this rank holds of it, is written visibly; a replaced one has `moved`."""
        versions = list(map(_version, self.held))
        return list(zip(versions, map(_version, self.params), strict=True)) if self.dtensors else versions

    def copy_stamps(self, versions: list) -> list[tuple[int, int]]:
        """The same as the compute copies are stamped."""
        return list(map(_copies.stamp, self.params) if self.dtensors else zip(versions, self.held.addresses, strict=True))

    # ----- the learning rate ---------------------------------------------------------------------

    def lr(self, value) -> torch.Tensor:
        """The learning rate as the ops take it: 0-d, on the CPU for a float."""
        if isinstance(value, torch.Tensor):
            return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
        if self._lr is None or self._lr[0] != value:
            self._lr = value, torch.tensor(value, dtype=torch.float64, device="cpu")
        return self._lr[1]
