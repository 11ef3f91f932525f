# SPDX-License-Identifier: Apache-2.0
"""The parameters of a step and all that belongs to them, kept from step to step.

What a step asks of a tensor is asked of a whole list at once: Python's time per tensor is most of what it costs the host.
"""

from dataclasses import dataclass, field
from itertools import chain
from operator import is_, itemgetter

import torch

from mpkernels import _copies
from mpkernels.ops._layout import Tensors, format_of
from mpkernels.optim import _ranks

_address = torch.Tensor.data_ptr


@dataclass(eq=False)
class Rows:
    """The parameters of one group and device that have a gradient, and everything a step of them needs, in order."""

    params: list[torch.Tensor]
    held: Tensors  # the parameters, of DTensors what this rank holds
    masters: Tensors
    copies: Tensors  # the 16-bit parameter, its compute copy, or an empty tensor
    states: dict[str, Tensors]
    steps: torch.Tensor
    entries: list[dict]  # the optimizer's state of each parameter
    compute_copies: list[tuple[int, _copies.Copy]]  # by row
    mastered: list[int]  # rows whose master is not the parameter itself
    requests: int  # _copies.requests when these rows were made
    dtensors: bool
    grads: Tensors = field(default_factory=lambda: Tensors([]))  # inside a step; of DTensors what this rank holds
    stamps: list[tuple[int, ...]] | None = None  # of the parameters after our last write
    checked: bool = False  # whether an op has checked these lists: only the scalars and the gradients' values are new

    def __post_init__(self):
        self._formats = list(map(format_of, self.params))
        self._addresses = self._state_addresses()
        self._lr: tuple[float, torch.Tensor] | None = None

    # ----- whether they are still what they were ---------------------------------------------

    def are(self, params: list[torch.Tensor]) -> bool:
        return len(params) == len(self.params) and all(map(is_, params, self.params))

    def take(self, params: list[torch.Tensor], grads: list[torch.Tensor], kinds: set[type]) -> bool:
        """Take these gradients, of these types, if nothing but values and places is new, of parameters and gradients alike."""
        old = self.grads
        try:
            unchanged = (
                kinds == {torch.Tensor}
                and old.contiguous
                and self.are(params)
                and list(map(format_of, params)) == self._formats
                and list(map(format_of, grads)) == old.formats
                and all(map(torch.Tensor.is_contiguous, grads))
                and not any(map(torch.Tensor.is_neg, grads))
                and all(map(torch.Tensor.is_contiguous, params)) == self.held.contiguous
                and set(map(torch.Tensor.get_device, grads)) == {self.steps.get_device()}
            )
            if unchanged:
                old.replace(grads)  # NOTE: raises as is_contiguous does for layouts that are not strided
        except RuntimeError:
            return False
        return unchanged

    def give(self, grads: list[torch.Tensor]) -> None:
        """Take these gradients, whatever they are, and look at every other list anew: `take` has refused them."""
        self.grads, self.checked = Tensors(grads), False
        for tensors in (self.held, self.masters, self.copies, *self.states.values()):
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
        tensors = chain(*(map(itemgetter(name), self.entries) for name in ("step", *self.states)))
        tensors = chain(tensors, (self.entries[i]["master"] for i in self.mastered))
        return list(map(_address, map(_ranks.local, tensors) if self.dtensors else tensors))

    # ----- what somebody may have written ----------------------------------------------------

    def stamp(self) -> list[tuple[int, ...]]:
        """What changes when a parameter, or what this rank holds of it, is written visibly or replaced."""
        stamps = list(zip([t._version for t in self.held], self.held.addresses, strict=True))
        return [(*stamp, p._version) for stamp, p in zip(stamps, self.params, strict=True)] if self.dtensors else stamps

    def copy_stamps(self, stamps: list[tuple[int, ...]]) -> list[tuple[int, int]]:
        """The same as the compute copies are stamped."""
        return [_copies.stamp(p) for p in self.params] if self.dtensors else stamps

    # ----- the learning rate ---------------------------------------------------------------------

    def lr(self, value) -> torch.Tensor:
        """The learning rate as the ops take it: 0-d, on the CPU for a float."""
        if isinstance(value, torch.Tensor):
            return value.reshape(())
        if self._lr is None or self._lr[0] != value:
            self._lr = value, torch.tensor(value, dtype=torch.float64)
        return self._lr[1]
