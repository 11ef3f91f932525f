# SPDX-License-Identifier: Apache-2.0
"""What `model.half()` does, with one rounding; refused where it would take hooks off parameters."""

import sys

import torch
from torch import distributed, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mpkernels.ops.common.cast import cast

_FIRST = "convert first, then wrap the model in DDP or FSDP and put hooks on parameters"


def check_can_cast(model: nn.Module, dtype: torch.dtype, stay: set[int]) -> None:
    """Raise RuntimeError where a cast would drop what was put on a parameter: gradients would no longer reach it.

    stay: the ids of the tensors that keep their dtype.
    """
    for name, module in model.named_modules():
        if _synchronizes(module) and any(_is_cast(t, dtype, stay) for t in (*module.parameters(), *module.buffers())):
            what = f"{name or 'model'} is a {type(module).__name__}, whose hooks on parameters"
            raise RuntimeError(f"convert: {what} would be lost by a cast to {dtype}: {_FIRST}")
    for name, parameter in model.named_parameters():
        if _is_cast(parameter, dtype, stay) and (reason := _why_not(parameter)) is not None:
            raise RuntimeError(f"convert: {reason} {name}, and would be lost by a cast to {dtype}: {_FIRST}")


def cast_model(model: nn.Module, dtype: torch.dtype, stay: set[int]) -> None:
    """Cast floating-point parameters and buffers in nn.Module's own way, which knows of sharded and wrapped tensors.

    Gradients are dropped: an optimizer that could use them would have to be made anew. A buffer may have several names.
    """
    if not any(_is_cast(tensor, dtype, stay) for tensor in (*model.parameters(), *model.buffers())):
        return
    for parameter in model.parameters():
        if _is_cast(parameter, dtype, stay):
            parameter.grad = None
    casts: dict[int, tuple] = {}  # with what was cast, whose id must not be used again

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if not _is_cast(tensor, dtype, stay):
            return tensor
        if id(tensor) not in casts:
            is_torchs = is_traceable_wrapper_subclass(tensor) or nn.parameter.is_lazy(tensor)  # knows how itself
            once = tensor.to(dtype) if is_torchs else cast(tensor, dtype)
            casts[id(tensor)] = tensor, once
        return casts[id(tensor)][1]

    with torch.inference_mode(False), torch.no_grad():  # Parameters made under it could not be trained
        model._apply(convert)


def _is_cast(tensor: torch.Tensor, dtype: torch.dtype, stay: set[int]) -> bool:
    return tensor.is_floating_point() and tensor.dtype != dtype and id(tensor) not in stay


def _synchronizes(module: nn.Module) -> bool:
    """Whether it is DDP or FSDP1, which wait for gradients at nodes that a cast replaces. FSDP2 knows of casts."""
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return isinstance(module, (nn.parallel.DistributedDataParallel, fsdp1))


def _why_not(parameter: nn.Parameter) -> str | None:
    """What would be lost of it, in words."""
    if nn.parameter.is_lazy(parameter):
        return None
    if not parameter.requires_grad or parameter.is_inference() or parameter.layout != torch.strided:
        return None
    replaced = (
        is_traceable_wrapper_subclass(parameter)
        or torch.__future__.get_swap_module_params_on_conversion()
        or torch.__future__.get_overwrite_module_params_on_conversion()
    )
    if replaced and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
        return "hooks lie on"
    return "DDP, or the graph of an earlier forward, waits for the gradient of" if _is_awaited(parameter) else None


def _is_awaited(parameter: nn.Parameter) -> bool:
    """Whether something holds the node that accumulates the gradient: DDP's reducer does, for the hook it has on it.

    NOTE: torch does not say which hooks a node has, and the graph of an earlier forward holds it as well. Where there is no
    process group there is no reducer, and a cast after a forward is as good as any other.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    with torch.inference_mode(False), torch.enable_grad():
        _node(parameter).metadata["mpkernels"] = True  # is gone with the node, unless something else holds that
        return _node(parameter).metadata.pop("mpkernels", False)


def _node(parameter: torch.Tensor):
    return torch.autograd.graph.get_gradient_edge(parameter).node
