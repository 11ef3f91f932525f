# SPDX-License-Identifier: Apache-2.0
"""A forward that is not the user's leaves buffers and random numbers as they were."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

is_inside = False  # whether `untouched` runs a forward now: no call of training, which a watch leaves out


def fork_rng(model: nn.Module):
    """`torch.random.fork_rng` of the CPU and the GPUs that `model` is on: asking another GPU would initialise CUDA there."""
    return torch.random.fork_rng({tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda})


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers, values and objects, and the states of the random number generators."""
    global is_inside
    was_inside, is_inside = is_inside, True
    buffers = [(m, name, b, None if b is None else b.clone()) for m in model.modules() for name, b in m._buffers.items()]
    try:
        with fork_rng(model):
            yield
    finally:
        is_inside = was_inside
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if buffer is not None:
                    buffer.copy_(values)
