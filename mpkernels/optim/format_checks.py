# SPDX-License-Identifier: Apache-2.0
"""What a parameter and its gradient must be to be stepped, and how messages name them."""

from collections.abc import Iterator
from itertools import pairwise, zip_longest

import torch
from torch.nn.parameter import is_lazy

from mpkernels.ops.common.cast import DTYPES
from mpkernels.ops.common.layout import overlaps
from mpkernels.optim import distributed
from mpkernels.optim.state import ParameterState
from mpkernels.runtime.fake import addresses, is_fake


def name_of(group: dict, index: int) -> str:
    """As messages call it: by its index in the group, and by name if the optimizer was made from named parameters."""
    names = group.get("param_names")
    return f"parameter {index} ({names[index]})" if names else f"parameter {index}"


def names_of(param_groups: list[dict]) -> dict[int, str]:
    """id -> name if the optimizer was made from named parameters, else index over all groups and shape."""
    named = [(p, name) for g in param_groups for p, name in zip_longest(g["params"], g.get("param_names", ()))]
    return {id(p): name or f"parameter {i} {_shape_of(p)}" for i, (p, name) in enumerate(named)}


def with_gradient(param_groups: list[dict]) -> Iterator[tuple[dict, torch.Tensor, str]]:
    """(group, parameter, name) of each that has one; what is lazy, or frozen, may be anything."""
    for group in param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter.grad is not None:
                yield group, parameter, name_of(group, i)


def _shape_of(parameter: torch.Tensor) -> str:
    return "without a shape yet" if is_lazy(parameter) else str(tuple(parameter.shape))


def takes_another_grad_dtype(parameter: torch.Tensor) -> bool:
    """Whether `Tensor.grad_dtype` refuses a gradient of the parameter's own dtype."""
    return parameter.requires_grad and getattr(parameter, "grad_dtype", None) not in (None, parameter.dtype)


def check_parameter(parameter: torch.Tensor, name: str, kept: ParameterState, error: type[Exception]) -> None:
    """Raise `error` for a parameter that cannot be stepped."""
    if parameter.layout != torch.strided or parameter.dtype not in DTYPES:
        got = f"{parameter.dtype}, {parameter.layout}"
        raise error(f"{name} must be a dense float16, bfloat16, float32 or float64 tensor, got {got}")
    if overlaps(parameter):
        raise error(f"{name} overlaps itself (strides {parameter.stride()}): its elements are not updated one by one")
    if any(where.is_partial() for where in distributed.placement(parameter)[1]):
        raise error(f"{name} has placements {parameter.placements}: no rank has its values")
    kept.check_dtypes(parameter, name, error)


def check_gradient(parameter: torch.Tensor, grad: torch.Tensor, name: str, kept: ParameterState, dtensors: bool) -> None:
    """Raise RuntimeError for a gradient with which the parameter cannot be stepped."""
    if dtensors or type(grad) is not torch.Tensor:
        distributed.check_placements(name, parameter, grad)
    if grad.layout != torch.strided or grad.dtype not in DTYPES or grad.shape != parameter.shape:
        raise RuntimeError(
            f"the gradient of {name} must be a dense floating-point tensor of shape {tuple(parameter.shape)}, "
            f"got {tuple(grad.shape)} {grad.dtype}, {grad.layout}"
        )
    if grad.device != parameter.device:
        raise RuntimeError(f"the gradient of {name} is on {grad.device}, expected {parameter.device}")
    if grad.dtype.itemsize > (master := kept.master_dtype(parameter)).itemsize:
        raise RuntimeError(
            f"the gradient of {name} is {grad.dtype}, wider than its master, {master}: "
            f"make the optimizer with master_dtype={grad.dtype}"
        )
    for what, tensor in (("", parameter), ("the gradient of ", grad)):
        if not _has_memory(distributed.local(tensor)):
            raise RuntimeError(f"{what}{name} has no memory: its storage was freed, or it is a ZeroTensor")


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether its elements lie anywhere: a storage can be freed, as FSDP1 does, and a ZeroTensor never had one."""
    return tensor.numel() == 0 or tensor.is_meta or is_fake(tensor) or tensor.data_ptr() != 0


def check_not_shared(params: list[torch.Tensor], param_groups: list[dict]) -> None:
    """Raise RuntimeError where two parameters share memory, of which each would update its part of the other."""
    tensors = [distributed.local(p) for p in params]
    if shared := _first_shared(tensors, addresses(tensors)):
        names = names_of(param_groups)
        first, second = (names[id(params[i])] for i in sorted(shared))
        raise RuntimeError(f"{second} shares memory with {first}: use one Parameter in both places")


def _first_shared(tensors: list[torch.Tensor], starts: list[int]) -> tuple[int, int] | None:
    """Two that share memory. Of what is not contiguous only the first element is looked at: others may be interleaved."""
    spans = sorted(
        (start, start + (t.nbytes if t.is_contiguous() else t.itemsize), i)
        for i, (t, start) in enumerate(zip(tensors, starts, strict=True))
        if start and t.numel()
    )
    return next(((i, j) for (_, end, i), (begin, _, j) in pairwise(spans) if begin < end), None)
