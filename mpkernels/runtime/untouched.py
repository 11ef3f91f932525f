# SPDX-License-Identifier: Apache-2.0
"""A forward and backward that are not the user's leave buffers and random numbers as they were."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

is_inside = False  # whether `untouched` runs a forward now: no call of training, which a watch leaves out


def call(model: nn.Module, inputs: Any) -> Any:
    """model of a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def run_once(model: nn.Module, example_inputs: object) -> None:
    """One forward and backward, for what they call: no gradient is left, and the model `untouched`."""
    params = [p for p in model.parameters() if p.requires_grad]
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        found = pytree.tree_leaves(call(model, example_inputs))
        outputs = [t for t in found if isinstance(t, torch.Tensor) and t.requires_grad]
        if outputs and params:  # not backward(): that adds to .grad, and steps optimizers that live in hooks
            torch.autograd.grad(outputs, params, [torch.zeros_like(t) for t in outputs], allow_unused=True)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers, values and objects, and the states of the random number generators."""
    global is_inside
    # Not every GPU that there is: to ask one for its state initialises CUDA there.
    gpus = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    buffers = [(m, name, b, None if b is None else b.clone()) for m in model.modules() for name, b in m._buffers.items()]
    was_inside, is_inside = is_inside, True
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        is_inside = was_inside
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if buffer is not None:
                    buffer.copy_(values)
