# SPDX-License-Identifier: Apache-2.0
"""FakeTensors, by which torch plans without data: they have formats, but no address and no value to be read."""

from collections.abc import Iterable

import torch


def is_fake(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor"  # by its name: the class is private


def any_fake(tensors: Iterable[torch.Tensor]) -> bool:
    return any(kind.__name__ == "FakeTensor" for kind in set(map(type, tensors)))


def copy_(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """NOTE: `Tensor.copy_` and indexing ask for the device's library: FakeTensors of a GPU would need a torch for GPUs."""
    return torch.ops.aten.copy_(target, source)


def addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Of the first element of each; 0 for a FakeTensor, whose `data_ptr` torch forbids."""
    tensors = list(tensors)
    if any_fake(tensors):
        return [0 if is_fake(tensor) else tensor.data_ptr() for tensor in tensors]
    return list(map(torch.Tensor.data_ptr, tensors))
