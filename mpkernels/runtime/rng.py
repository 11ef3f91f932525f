# SPDX-License-Identifier: Apache-2.0
"""Random number generators around a forward that is not the user's."""

import torch


def fork_rng(model: torch.nn.Module):
    """`torch.random.fork_rng` of the CPU and the GPUs that `model` is on: asking another GPU would initialise CUDA there."""
    return torch.random.fork_rng({tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda})
