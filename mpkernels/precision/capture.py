# SPDX-License-Identifier: Apache-2.0
"""Run a model under hooks and leave it as it was: gradients, buffers, hooks and random numbers."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mpkernels.runtime.rng import fork_rng


def check_is_module(name: str, model: object) -> None:
    """Raises TypeError for what is no module, RuntimeError for a model without data."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    for which, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise RuntimeError(f"{name}: {which} is on meta and has no values: load the model first")


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
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, the model may run forward and backward; after it gradients, buffers and random numbers are what they were."""
    buffers = [(m, name, b, None if b is None else b.clone()) for m in model.modules() for name, b in m._buffers.items()]
    grads = [(p, p.grad) for p in model.parameters()]
    for p, _ in grads:
        p.grad = None
    try:
        with fork_rng(model):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if buffer is not None:
                    buffer.copy_(values)


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
