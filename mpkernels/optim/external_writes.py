# SPDX-License-Identifier: Apache-2.0
"""What others write to parameters: noticed by version and address, so that masters take it over."""

import weakref
from operator import attrgetter

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from mpkernels.optim import master_weights
from mpkernels.optim.distributed import is_dtensor, local
from mpkernels.optim.step_plan import StepPlan
from mpkernels.runtime import compute_copy
from mpkernels.runtime.fake import addresses

_optimizers: weakref.WeakSet = weakref.WeakSet()  # of ours, that step
hook = None  # of torch, while one of them steps or did
_version = attrgetter("_version")


class ExternalWrites:
    """The parameters that have a master, as they were after our last write: what others have written since, it takes over.

    In a step they are known by their versions, and by their addresses to the plan, which is made anew where one has moved.
    Outside of steps the address counts too: `p.data = ...`, by vector_to_parameters say, moves no version.
    """

    def __init__(self, state: dict):
        """As they are now."""
        params = (parameter for parameter, _ in master_weights.pairs(state))
        self._stamps = {id(p): compute_copy.stamp(p) for p in params if not _may_be_written_unseen(p)}
        self._plan: StepPlan | None = None  # of the last step, and what is known of its parameters, in its order
        self._params, self._versions, self._addresses = [], [], []

    def _close(self) -> None:
        """Keep what is known by id, as other plans and readers ask for it."""
        self._stamps.update(zip(map(id, self._params), zip(self._versions, self._addresses, strict=True), strict=True))
        self._plan, self._params, self._versions, self._addresses = None, [], [], []

    def _open(self, plan: StepPlan) -> None:
        self._close()
        self._plan, self._params = plan, [parameter for parameter, _ in plan.with_master]
        self._addresses = addresses(map(local, self._params))
        known = [self._stamps.get(id(p), (None, None)) for p in self._params]
        rows = zip(known, self._addresses, strict=True)
        self._versions = [version if address == now else None for (version, address), now in rows]
        self._are_unseen = list(map(_may_be_written_unseen, self._params))
        self._any_unseen = any(self._are_unseen)

    def take_over(self, plan: StepPlan) -> None:
        """Before the masters of `plan` are written."""
        if plan is not self._plan:
            self._open(plan)
        versions = list(map(_version, self._params))
        if versions != self._versions or self._any_unseen:
            rows = zip(plan.with_master, versions, self._versions, self._are_unseen, strict=True)
            for (parameter, state), now, known, is_unseen in rows:
                if now != known or is_unseen:
                    master_weights.take_over(state["master"], parameter)
        self._versions = versions

    def record(self) -> None:
        """After they were written."""
        self._versions = list(map(_version, self._params))

    def take_over_for_readers(self, state: dict, *, unseen: bool = False) -> None:
        """Before masters are read outside of a step. unseen: also what moved neither version nor address.

        What `p.data = ...` put there may be put back before the next step, unseen: that looks at these parameters again.
        """
        self._close()
        for parameter, master in master_weights.pairs(state):
            may_be, known = _may_be_written_unseen(parameter), self._stamps.get(id(parameter))
            is_written = not may_be and known != compute_copy.stamp(parameter)
            if unseen or may_be or is_written:
                master_weights.take_over(master, parameter)
            if is_written:
                self._stamps.pop(id(parameter), None)

    def forget(self, params: list[torch.Tensor], state: dict) -> None:
        """The masters of these start from their parameters at the next step. What is in the state no more goes too."""
        self._close()
        kept = set(map(id, state)) - set(map(id, params))
        self._stamps = {key: stamp for key, stamp in self._stamps.items() if key in kept}


def _may_be_written_unseen(parameter: torch.Tensor) -> bool:
    """NOTE: what `state_dict()` hands out of a DTensor has a version counter of its own."""
    return is_dtensor(parameter) or compute_copy.is_shared(parameter)


def watch_other_optimizers(optimizer: torch.optim.Optimizer) -> None:
    """NOTE: torch offers a hook for the steps of all optimizers or of one that is known."""
    global hook
    hook = hook or register_optimizer_step_post_hook(_after_any_step)
    _optimizers.add(optimizer)


def _after_any_step(optimizer, args, kwargs) -> None:
    """torch's fused optimizers, and those that write through `.data`, move no version: move it for parameters of ours."""
    if optimizer in _optimizers:  # ours do move it
        return
    watched = {id(p) for ours in _optimizers for group in ours.param_groups for p in group["params"]}
    if watched and (written := [p for group in optimizer.param_groups for p in group["params"] if id(p) in watched]):
        torch.autograd.graph.increment_version(written)
