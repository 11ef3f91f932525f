# SPDX-License-Identifier: Apache-2.0
"""What is asked of a parameter: its name in messages, and which memory it lies in."""

from itertools import pairwise

import torch
from torch.nn.parameter import is_lazy

from mpkernels.runtime.fake import is_fake

__all__ = ["first_shared", "has_memory", "is_lazy", "name_of", "shape_of", "takes_another_grad_dtype"]


def name_of(group: dict, index: int) -> str:
    """As messages call it: by its index in the group, and by name if the optimizer was made from named parameters."""
    names = group.get("param_names")
    return f"parameter {index} ({names[index]})" if names else f"parameter {index}"


def shape_of(parameter: torch.Tensor) -> str:
    return "without a shape yet" if is_lazy(parameter) else str(tuple(parameter.shape))


def takes_another_grad_dtype(parameter: torch.Tensor) -> bool:
    """Whether `Tensor.grad_dtype` refuses a gradient of the parameter's own dtype."""
    return parameter.requires_grad and getattr(parameter, "grad_dtype", None) not in (None, parameter.dtype)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether its elements lie anywhere: a storage can be freed, as FSDP1 does, and a ZeroTensor never had one."""
    return tensor.numel() == 0 or tensor.is_meta or is_fake(tensor) or tensor.data_ptr() != 0


def first_shared(tensors: list[torch.Tensor], addresses: list[int]) -> tuple[int, int] | None:
    """Two that share memory. Of what is not contiguous only the first element is looked at: others may be interleaved."""
    spans = sorted(
        (address, address + (t.nbytes if t.is_contiguous() else t.itemsize), i)
        for i, (t, address) in enumerate(zip(tensors, addresses, strict=True))
        if address and t.numel()
    )
    return next(((i, j) for (_, end, i), (begin, _, j) in pairwise(spans) if begin < end), None)
