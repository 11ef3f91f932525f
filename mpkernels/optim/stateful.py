# SPDX-License-Identifier: Apache-2.0
"""What an optimizer keeps: the state of its parameters, their masters, and both in checkpoints."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.nn.parameter import is_lazy

from mpkernels.optim import checkpoint, hyperparameters, master_weights
from mpkernels.optim.external_writes import ExternalWrites
from mpkernels.optim.format_checks import check_parameter, name_of, names_of, takes_another_grad_dtype
from mpkernels.optim.state import ParameterDtypes, ParameterState
from mpkernels.optim.step_plan import PlanCache


class StatefulOptimizer(torch.optim.Optimizer):
    """torch's, whose state has a master for each parameter that is not updated in its own dtype.

    The class attributes are documented in `Optimizer`, which steps.
    """

    _moments: tuple[str, ...] = ()
    _optional: ClassVar[dict[str, str]] = {}
    _requirements: ClassVar[dict[str, hyperparameters.Requirement]] = {}
    _default_step: int | None = None

    def __init__(
        self, params, defaults: dict[str, Any], master_dtype: torch.dtype | None, state_dtype: torch.dtype | None
    ) -> None:
        self.master_dtype, self.state_dtype = master_dtype, state_dtype
        self._forget()
        hyperparameters.check_as_torch(defaults)
        self._check_hyperparameters(defaults)
        super().__init__(params, defaults)
        if any(takes_another_grad_dtype(p) for group in self.param_groups for p in group["params"]):
            self._make_state_ahead()

    def _forget(self) -> None:
        """Start without anything that is tied to these Parameter objects: at construction, and in a copy."""
        self._kept = ParameterState(self.master_dtype, self.state_dtype, self._moments, self._optional, self._default_step)
        self._plans, self._dtypes, self._writes = PlanCache(), ParameterDtypes(), ExternalWrites({})
        self._is_swapped = False  # inside master_weights

    @torch.no_grad()
    def _make_state_ahead(self) -> None:
        """Where there is no state, torch's distributed checkpoints step with gradients of the parameter's dtype to get it.

        Parameters that take gradients of another refuse those: here all that is trained has its state from construction.
        """
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter.requires_grad and not is_lazy(parameter):
                    self._init_state(group, parameter, name_of(group, i))
        self._dtypes.record(self.state)

    def __getstate__(self) -> dict:
        self._refuse_while_swapped("a copy of the optimizer")
        ours = ("master_dtype", "state_dtype", "max_norm", "write_grads", "skip_nonfinite", "process_group")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()
        self._dtypes.record(self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._refuse_while_swapped("add_param_group")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_hyperparameters(group)
            seen = set()
            for i, parameter in enumerate(group["params"]):
                # What is frozen may be anything: quantized, complex. What is lazy has no shape before the first forward.
                if parameter.requires_grad and not is_lazy(parameter):
                    check_parameter(parameter, name_of(group, i), self._kept, ValueError)
                if id(parameter) in seen:
                    raise ValueError(f"{name_of(group, i)} stands twice in one group")
                seen.add(id(parameter))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_hyperparameters(self, group: dict) -> None:
        hyperparameters.check(self._requirements, group)

    def _init_state(self, group: dict, parameter: torch.Tensor, name: str) -> None:
        """Make what is missing of a parameter's state."""
        if new := self._kept.missing(self.state.get(parameter, {}), group, parameter, name):
            self.state.setdefault(parameter, {}).update(new)  # a user may have put a plain dict there

    # ----- masters ------------------------------------------------------------------------------

    @torch.no_grad()
    def sync_masters_(self) -> None:
        """Take over into masters and compute copies what was written to the parameters without moving their versions.

        So do writes through `.data`, numpy and DLPack views, and collectives (`dist.broadcast(p, 0)`, all_reduce, scatter).
        """
        self._writes.take_over_for_readers(self.state, unseen=True)
        for compute_copy in self._plans.compute_copies():
            compute_copy.stamp = None

    @torch.no_grad()
    def check_masters(self) -> list[str]:
        """The names of the parameters that are not their masters rounded, or whose compute copy is not them, rounded.

        They were written without moving their versions, and the next step would undo that: `sync_masters_`. Waits for the
        device. Of DTensors each rank looks at what it holds.
        """
        self._writes.take_over_for_readers(self.state)
        rounded = [(p, p, master) for p, master in master_weights.pairs(self.state)]
        rounded += [(c.weight, c.tensor, c.weight) for c in self._plans.compute_copies() if c.is_fresh()]
        strayed = master_weights.strays((narrow, wide) for _, narrow, wide in rounded)
        found = {id(p) for (p, _, _), stray in zip(rounded, strayed, strict=True) if stray}
        return [name for key, name in names_of(self.param_groups).items() if key in found]

    @contextlib.contextmanager
    def master_weights(self) -> Iterator[None]:
        """Put the masters in the parameters' place: inside, each parameter that has one holds it, in its dtype.

        Afterwards it holds its own 16 bits again. For evaluation, an EMA and saving; nothing is copied. Gradients, hooks and
        versions of the parameters are put aside and come back. A write to a parameter inside that torch can see is one to
        its master, rounded to 16 bits at the end.
        Raises RuntimeError for a DTensor that has a master (use `master_state_dict`) and, inside, for what would step,
        load or copy the optimizer.
        """
        self._refuse_while_swapped("master_weights")
        with torch.no_grad():
            self._writes.take_over_for_readers(self.state, unseen=True)
        with master_weights.all_swapped_in(self.state):
            self._is_swapped = True
            try:
                yield
            finally:
                self._is_swapped = False

    def _refuse_while_swapped(self, what: str) -> None:
        if self._is_swapped:
            raise RuntimeError(f"{what} is not possible inside master_weights(): the parameters are the masters there")

    @torch.no_grad()
    def master_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """`model.state_dict()` with the master in place of every parameter that has one.

        What was written to a parameter so that torch sees it, as `model.load_state_dict` does, is taken over first; what
        is read from `state[p]["master"]` itself is as of the last step.
        """
        self._writes.take_over_for_readers(self.state)
        return master_weights.in_state_dict(model, self.state)

    # ----- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, all live; 16-bit parameters have a `master` besides, up to date with what torch sees written to them."""
        with torch.no_grad():
            self._writes.take_over_for_readers(self.state)
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ours or torch's. A 16-bit parameter without a saved master gets one of its own value.

        Where a 16-bit parameter is not its loaded master rounded, the next step starts from the parameter.
        Raises ValueError for groups, keys, shapes or values that do not fit; nothing is loaded then.
        """
        self._refuse_while_swapped("load_state_dict")
        state_dict = copy.copy(state_dict)  # keeps what class it is, and any attributes
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            returned = hook(self, state_dict)
            state_dict = state_dict if returned is None else returned
        check, name = self._check_hyperparameters, type(self).__name__
        loaded = checkpoint.checked_state(state_dict, self.param_groups, self._kept, check, name)
        groups = copy.deepcopy(state_dict["param_groups"])
        for group, new in zip(self.param_groups, groups, strict=True):
            group.update({**new, **checkpoint.identity(group)})
        self.state.clear()
        self.state.update(loaded)
        # The weights may be loaded after this: masters that were read meanwhile must not be those of the weights before.
        self._plans, self._writes = PlanCache(), ExternalWrites(self.state)
        self._dtypes.record(self.state)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
