# SPDX-License-Identifier: Apache-2.0
"""MPSequential: what convert makes of an nn.Sequential. What runs as one call is decided by its forward, at each call."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from mpkernels import functional
from mpkernels.nn.linear import MPLinear, has_hooks
from mpkernels.ops.linear_act.call import FusedBackwardLink
from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.runtime.op import is_dtensor

_FORWARDS = {cls: cls.forward for cls in (MPLinear, nn.ReLU, nn.Identity)}
_CALL = nn.Module.__call__  # may be patched later, by what wants to see every call
_NO_TORCH_FUNCTION = torch._C._disabled_torch_function_impl  # what Parameter, FakeTensor and DTensor have for one


class MPSequential(nn.Sequential):
    """An nn.Sequential whose forward runs an MPLinear and the nn.ReLU after it as one call; its children stay what they are.

    Called alone, sliced, hooked, replaced, inserted or deleted, each does what it says. The two run as one where neither
    has hooks (but FSDP2's), a forward of its own, another class or a compiled call, nor all modules have hooks.
    Where such an MPLinear of the same compute dtype comes next (an nn.Identity may be between), what goes to it is in that
    dtype under `mixed_*`, and where kernels run both, its backward does the streaming pass of the layer before.
    The result has the dtype that the last child's policy says: of what came in, where that follows the input.
    """

    def forward(self, input: Any) -> Any:
        if hooks_on_all_modules():
            return super().forward(input)
        modules, x, i = list(self._modules.values()), input, 0
        prev, wide = None, None  # the link to the previous layer, and the dtype that x had if it were not narrowed
        reader = None  # the MPLinear that is next, which is plain as nothing ran since
        with_grad = torch.is_grad_enabled()
        while i < len(modules):
            module = modules[i]
            is_reader = module is reader is not None
            joined = is_reader and (prev is not None or wide is not None)
            if not (joined or ((is_reader or is_plain(module, MPLinear)) and _is_plain_tensor(x))):
                x, i = module(x), i + 1
                modules = list(self._modules.values())  # it, or a hook on it, may have put another child in its place
                continue
            i, activation, reader = step(modules, i)
            next = FusedBackwardLink() if with_grad and reader is not None and _share_backward(module, reader) else None
            given = wide or x.dtype
            out_dtype, narrow = None, False
            if follows_input(module):
                out_dtype = functional.autocast_dtype(x.device) or given
                narrow = reader is not None and narrows(module, reader, out_dtype)
            x = module(x, prev, next, activation, module.policy.compute_dtype if narrow else out_dtype)
            prev, wide = next, given if narrow else None
        return x

    def _get_name(self) -> str:
        return super()._get_name().replace("MPSequential", "Sequential")  # FSDP2 puts a prefix before it


def step(modules: list[nn.Module], i: int) -> tuple[int, Activation, MPLinear | None]:
    """What runs in one call with the MPLinear modules[i]: the index after it, its activation, and who alone reads it.

    The reader: the next MPLinear, where nothing else can see what goes to it.
    """
    linear, end = modules[i], i + 1
    activation = linear._activation
    if activation == Activation.NONE and end < len(modules) and is_plain(modules[end], nn.ReLU):
        activation, end = Activation.RELU, end + 1
    for module in modules[end:]:
        if is_plain(module, MPLinear):
            return end, activation, module
        if not is_plain(module, nn.Identity):
            break
    return end, activation, None


def follows_input(linear: MPLinear) -> bool:
    """Whether its output has the dtype of its input (autocast's inside of that)."""
    policy = linear.policy
    return policy is not None and policy.param_dtype != policy.compute_dtype and policy.output_dtype is None


def narrows(linear: MPLinear, reader: MPLinear | None, wide: torch.dtype) -> bool:
    """Whether the reader would cast a `wide` output to what the linear computes in: then it is given that.

    What a reader quantizes stays wide: its scale is not known before all of it is there.
    """
    if reader is None or reader.policy is None or not follows_input(linear) or linear.policy.float8:
        return False
    dtype = linear.policy.compute_dtype
    return reader.policy.compute_dtype == dtype and dtype.itemsize < wide.itemsize


def _share_backward(linear: MPLinear, reader: MPLinear) -> bool:
    ours, theirs = linear.policy, reader.policy
    if ours is theirs:
        return True
    return None not in (ours, theirs) and (ours.compute_dtype, ours.grad_dtype) == (theirs.compute_dtype, theirs.grad_dtype)


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of `module` is the forward of `cls`, and nothing sees or changes what goes in and comes out.

    FSDP2's hooks only gather, and its classes do nothing else. A weight that lies on a mesh for another reason is seen.
    """
    if not isinstance(module, cls) or type(module).forward is not _FORWARDS[cls]:
        return False
    call = type(module).__call__
    if "forward" in module.__dict__ or module._compiled_call_impl is not None or (call is not _CALL and not _is_traced(call)):
        return False
    if has_hooks(module):
        kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
        return all(_only_gathers(hook) for hooks in kinds for hook in hooks.values())
    return cls is not MPLinear or _is_plain_tensor(module._parameters.get("weight"))  # None: it is made at each look at it


def _is_traced(call) -> bool:
    """torch.export has a call of its own for all modules, by which it notes their names."""
    return torch.compiler.is_compiling() and call is nn.Module.__call__


def _only_gathers(hook) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp.")


def _is_plain_tensor(x) -> bool:
    """Not a proxy, nor a subclass with functions of its own, nor a DTensor, whose parts may still have to be summed."""
    if type(x) in (torch.Tensor, nn.Parameter):
        return True
    if not isinstance(x, torch.Tensor) or type(x).__torch_function__ is not _NO_TORCH_FUNCTION:
        return False
    return not is_dtensor(x)


def hooks_on_all_modules() -> bool:
    return bool(
        _module._global_forward_pre_hooks or _module._global_forward_hooks
        or _module._global_backward_pre_hooks or _module._global_backward_hooks
    )  # fmt: skip
