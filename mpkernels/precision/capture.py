# SPDX-License-Identifier: Apache-2.0
"""Run a model under hooks and leave it as it was: gradients, buffers, hooks and random numbers."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpkernels.nn.convert.linears import is_linear
from mpkernels.nn.linear import is_converted
from mpkernels.policy import Policy
from mpkernels.runtime.untouched import untouched


def check_is_module(name: str, model: object) -> None:
    """Raises TypeError for what is no module, RuntimeError for a model without data."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    for which, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(f"{name}: {which} is on meta and has no values: load the model first")


def check_is_step(name: str, step: object) -> None:
    """TypeError for what cannot be called, which most often is the loss itself."""
    if not callable(step):
        raise TypeError(f"{name}: step must be a function of the model that returns the loss, got {type(step).__name__}")


def several(name: str, what: str, values: Any) -> list:
    """`values` as a list, of one where it is one policy; TypeError for what is not several, ValueError for none."""
    if isinstance(values, str | Policy):
        return [values]
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: {what} must be several, as a list, got {values!r}")
    if not (found := list(values)):
        raise ValueError(f"{name}: {what} must not be empty")
    return found


def is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and mappings (so in the outputs of transformers), in their order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_of(value)


def mapped(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """The same nest of tuples, lists and dicts with `function` of each tensor; what else there is stays."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(function, value) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(function, value) for value in tree)
    if type(tree) is dict:
        return {key: mapped(function, value) for key, value in tree.items()}
    return tree


@contextlib.contextmanager
def hooked(model: nn.Module, register: Callable[[str, nn.Module], list]) -> Iterator[None]:
    """Inside, each module of `model` has the hooks that `register(name, module)` puts on it and returns the handles of."""
    handles = []
    try:
        for name, module in model.named_modules():
            handles += register(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Call:
    """One call of a module in forward, and what came back to it in backward."""

    name: str
    x: torch.Tensor
    grad_out: torch.Tensor | None = None  # None: backward did not come to it
    out: torch.Tensor | None = None  # not of linears, whose output is computed again
    wants_grad_x: bool = True  # False where x is data, say


def capture(model: nn.Module, step: Callable, targets: Mapping[str, nn.Module], analyse: Callable[[Call], None]) -> float:
    """Run `step(model)` and its backward once, in the dtype of the parameters, and hand over each call of `targets`.

    `analyse` is given a call when its gradient arrives, and those that none came to after backward; what it was given lives
    no longer than autograd keeps it. Returns the loss. Linears compute without policy and outside of autocast meanwhile.
    A call inside a checkpoint counts once, though backward computes it again.
    """
    waiting: dict[object, Call] = {}  # for a gradient
    without_graph: dict[str, list[Call]] = {name: [] for name in targets}
    is_backward = False

    def register(name: str, module: nn.Module) -> list:
        if targets.get(name) is not module:
            return []
        note = lambda _, args, kwargs, out: called(name, module, (args, kwargs), out)
        handles = [module.register_forward_hook(note, with_kwargs=True)]
        if is_linear(module):
            outside = _Outside(module)
            handles.append(module.register_forward_pre_hook(outside.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(outside.leave))
        return handles

    def called(name: str, module: nn.Module, given: tuple, out: Any) -> None:
        inputs = [t for t in tensors_of(given) if t.is_floating_point()]
        outputs = [t for t in tensors_of(out) if t.is_floating_point()]
        if not outputs:
            return
        kept = None if is_linear(module) else _dense(outputs[0])
        x, wants_grad_x = (_dense(inputs[0]), inputs[0].requires_grad) if inputs else (_dense(outputs[0])[:0], False)
        call, key = Call(name, x, None, kept, wants_grad_x), object()
        if is_backward:  # a checkpoint; the first time had no graph if it is reentrant, which alone has its gradients here
            if not without_graph[name]:
                return
            without_graph[name].pop(0)
        if outputs[0].requires_grad:
            waiting[key] = call
            outputs[0].register_hook(lambda grad: arrived(key, _dense(grad)))
        else:
            without_graph[name].append(call)

    def arrived(key: object, grad: torch.Tensor) -> None:
        if (call := waiting.pop(key, None)) is not None:
            with torch.no_grad():
                analyse(replace(call, grad_out=grad))

    with untouched(model), without_gradients(model), without_policies(model), hooked(model, register), torch.enable_grad():
        with without_optimizers("advise"):
            loss = step(model)
        check_loss("advise", loss)
        value = float(loss.detach())
        is_backward = True
        run_backward("advise", loss)
        del loss
        with torch.no_grad():
            for call in itertools.chain(waiting.values(), *without_graph.values()):
                analyse(call)
    return value


def _dense(t: torch.Tensor) -> torch.Tensor:
    """Of a jagged tensor the matrix in which its rows lie."""
    return t.detach().values() if t.is_nested else t.detach()


@contextlib.contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside there are none, for a backward; after it they are what they were."""
    grads = [(p, p.grad) for p in model.parameters()]
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad


@contextlib.contextmanager
def without_policies(model: nn.Module) -> Iterator[None]:
    """Inside, converted linears compute in the dtype of their parameters, as nn.Linear does."""
    before = [(module, module.policy) for module in model.modules() if is_converted(module)]
    for module, _ in before:
        module.policy = None  # not `adopt`, which would drop gradients
    try:
        yield
    finally:
        for module, policy in before:
            module.policy = policy


class _Outside:
    """Hooks of one linear that turn off autocast around it, and widen what comes to it from inside of one."""

    def __init__(self, module: nn.Module):
        self.device, self.was_on = module.weight.device.type, False

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.was_on = torch.amp.is_autocast_available(self.device) and torch.is_autocast_enabled(self.device)
        if not self.was_on:
            return args, kwargs
        torch.set_autocast_enabled(self.device, False)
        return mapped(lambda t: t.to(module.weight.dtype) if t.is_floating_point() else t, (args, kwargs))

    def leave(self, module: nn.Module, args: tuple, out: Any) -> None:
        if self.was_on:
            torch.set_autocast_enabled(self.device, True)


@contextlib.contextmanager
def without_optimizers(name: str) -> Iterator[None]:
    """Inside, a step of an optimizer raises RuntimeError before it writes."""

    def refuse(*_: object) -> None:
        raise RuntimeError(f"{name}: step has called optimizer.step() itself: it must only return the loss, without backward")

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def run_backward(name: str, loss: torch.Tensor) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(f"{name}: step has called backward itself: it must leave that to {name}") from error


def check_loss(name: str, loss: Any) -> None:
    """TypeError for what is no tensor, ValueError for no scalar, RuntimeError for one without a graph."""
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"{name}: step must return the loss, a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{name}: step must return a scalar, got shape {tuple(loss.shape)}")
    if loss.is_complex():
        raise ValueError(f"{name}: step must return a real loss, got {loss.dtype}")
    if not loss.requires_grad:
        raise RuntimeError(f"{name}: the loss has no graph: it was computed under no_grad, or detached")
