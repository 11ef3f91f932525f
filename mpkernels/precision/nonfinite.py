# SPDX-License-Identifier: Apache-2.0
"""find_nonfinite: the first module whose output, or in backward whose input's gradient, is inf or NaN."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mpkernels.nn.convert.linears import uncompiled
from mpkernels.precision.capture import (
    check_is_module,
    check_is_step,
    check_loss,
    hooked,
    mapped,
    run_backward,
    tensors_of,
    without_gradients,
    without_optimizers,
)  # fmt: skip
from mpkernels.precision.report import Report
from mpkernels.precision.tables import described
from mpkernels.runtime.untouched import untouched


def find_nonfinite(model: nn.Module, step: Callable[[nn.Module], torch.Tensor]) -> Report:
    """Run `step(model)` and its backward once, and name the first module that makes inf or NaN of what is finite.

    step: runs one forward on real data and returns the loss, a scalar with a graph; where a loss scale is in use, the scaled
    one (`lambda model: scaler.scale(loss_of(model))`), since backward overflows with it.
    "First" is in the order in which modules end, so it is the innermost; a module that was given inf or NaN is not named, and
    where the first module was, the data is, but for the -inf of attention masks. In backward the gradient of a module's input
    counts, and of its parameters. It waits for the device.
    The model stays what it was: gradients, buffers, hooks, random numbers.
    Raises TypeError for what is no module or function, and for a loss that is no tensor, ValueError for a loss that is no
    scalar, RuntimeError for one without a graph and for a step that does not call the model, or calls an optimizer.
    """
    check_is_module("find_nonfinite", model)
    check_is_step("find_nonfinite", step)
    model = uncompiled(model)
    with untouched(model), without_gradients(model), torch.enable_grad():
        search = _Search()
        with hooked(model, search.register):
            with without_optimizers("find_nonfinite"):
                loss = step(model)
            check_loss("find_nonfinite", loss)
            if search.found is None and not _finite(loss):
                last = f" (the last, {search.last}, returned amax {search.last_amax:g})" if search.last is not None else ""
                message = f"first in forward: the loss is {loss.item():g}, every module's output is finite{last}"
                search.found = Report(False, message, None, "forward", amax=search.last_amax)
            if search.found is None:
                run_backward("find_nonfinite", loss)
        if search.found is None and search.last is None and all(p.grad is None for p in model.parameters()):
            raise RuntimeError("find_nonfinite: step called no module of the model: it must call the model that it is given")
        found = _of_parameters(model) if search.found is None else search.found
        return Report(True, "every output and every gradient is finite") if found is None else found


class _Search:
    """Hooks on every module, and the first fault that they saw."""

    def __init__(self) -> None:
        self.found: Report | None = None
        self.last: str | None = None  # the module that ended last, and what it returned
        self.last_amax = 0.0

    def register(self, name: str, module: nn.Module) -> list:
        enter = lambda _, args, kwargs: self.enter(name, module, args, kwargs)
        leave = lambda _, args, kwargs, out: self.leave(name, module, (args, kwargs), out)
        before = module.register_forward_pre_hook(enter, with_kwargs=True)
        return [before, module.register_forward_hook(leave, with_kwargs=True)]

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Each module reads a view of its own, whose gradient is the one that this module alone gives."""
        given = args, kwargs
        if self.found is None and self.last is None and not all(map(_finite_or_mask, tensors_of(given))):
            message = f"in the data: {described(name, module)} was given {_worst(given)}, and no module ran before"
            self.found = Report(False, message, None, "data", amax=_amax(given))
        if not torch.is_grad_enabled():
            return None
        view = lambda t: self._view(t, name, module)
        # of kwargs no container is made anew, into which the module may write
        return mapped(view, args), {key: view(t) if isinstance(t, torch.Tensor) else t for key, t in kwargs.items()}

    def leave(self, name: str, module: nn.Module, given: tuple, out: Any) -> None:
        if self.found is None and not all(map(_finite, tensors_of(out))):
            bad = [which for which, p in module.named_parameters(recurse=False) if not _finite(p)]
            why = f"; its {' and '.join(bad)} is not finite" if bad else ""
            read = f"amax {_amax(given):g}{_and_minus_inf(given)}"
            message = f"first in forward: {described(name, module)} returns {_worst(out)}; it read {read}{why}"
            self.found = Report(False, message, name, "forward", amax=_amax(given))
        self.last, self.last_amax = name or type(module).__name__, _amax(out)
        for t in tensors_of(out):
            if t.requires_grad:
                t.register_hook(lambda grad: self.backward_enters(name, module, grad))

    def _view(self, t: torch.Tensor, name: str, module: nn.Module) -> torch.Tensor:
        if not t.requires_grad:
            return t
        view = t.view_as(t)
        view.register_hook(lambda grad: self.backward_leaves(name, module, grad))
        return view

    def backward_enters(self, name: str, module: nn.Module, grad: torch.Tensor) -> None:
        if self.found is None and not _finite(grad):
            message = (
                f"first in backward: the gradient of what {described(name, module)} returns is {_worst(grad)}, made by the "
                "loss or an operation after it that is no module"
            )
            self.found = Report(False, message, name, "backward", amax=self.last_amax)

    def backward_leaves(self, name: str, module: nn.Module, grad: torch.Tensor) -> None:
        if self.found is None and not _finite(grad):
            message = f"first in backward: {described(name, module)}: grad_x is {_worst(grad)}, its forward was fine"
            self.found = Report(False, message, name, "backward", amax=None)


def _of_parameters(model: nn.Module) -> Report | None:
    """Gradients of inputs were all fine: those of parameters, the last registered module first, as backward goes."""
    for name, module in reversed(list(model.named_modules())):
        bad = [w for w, p in module.named_parameters(recurse=False) if p.grad is not None and not _finite(p.grad)]
        if bad:
            grads = [module.get_parameter(which).grad for which in bad]
            message = (
                f"first in backward: {described(name, module)}: the gradient of its {' and '.join(bad)} is {_worst(grads)}, "
                "those of all inputs are finite"
            )
            return Report(False, message, name, "backward")
    return None


def _finite(t: torch.Tensor) -> bool:
    return not t.is_floating_point() or bool(t.isfinite().all())


def _finite_or_mask(t: torch.Tensor) -> bool:
    """-inf is what masks of attention have."""
    return not t.is_floating_point() or not bool((t.isnan() | t.isposinf()).any())


def _and_minus_inf(tree: Any) -> str:
    """Said of what `_amax` leaves out, which may be no mask."""
    return " and -inf" if any(bool((t == -math.inf).any()) for t in tensors_of(tree) if t.is_floating_point()) else ""


def _amax(tree: Any) -> float:
    """The largest magnitude of the tensors in `tree`, masks aside; NaN where there is one, 0 where there is nothing."""
    tensors = (t.masked_fill(t == -math.inf, 0) for t in tensors_of(tree) if t.is_floating_point() and t.numel())
    found = [t.abs().max().item() for t in tensors]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def _worst(tree: Any) -> str:
    """How many are inf and how many NaN."""
    inf = sum(int(t.isinf().sum()) for t in tensors_of(tree) if t.is_floating_point())
    nan = sum(int(t.isnan().sum()) for t in tensors_of(tree) if t.is_floating_point())
    of = sum(t.numel() for t in tensors_of(tree) if t.is_floating_point())
    return " and ".join(f"{what} at {n} of {of}" for what, n in (("inf", inf), ("NaN", nan)) if n)
