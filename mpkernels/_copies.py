# SPDX-License-Identifier: Apache-2.0
"""Which parameter has a compute copy, who owns it, and whether it still holds.

A weight stored wide and multiplied narrow (`mixed_*`) has a compute copy once an optimizer of ours steps it: written in
the optimizer's pass, read by the layer. It holds while the weight's version counter and address are those of the last
write; after another write that torch can see it is made anew. Writes through `.data` are invisible: `refresh_`.
"""

import weakref
from dataclasses import dataclass

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(eq=False)
class Copy:
    """The compute copy of one weight. `tensor` is None until an optimizer claims it."""

    dtype: torch.dtype
    tensor: torch.Tensor | None = None
    stamp: tuple[int, int] | None = None  # (version, address) of the weight when `tensor` was written

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether nothing that torch can see has written `weight` since `tensor` was written."""
        return self.stamp == stamp(weight)

    def write(self, weight: torch.Tensor, rounded: torch.Tensor) -> None:
        """Make the copy anew; `rounded`: the weight in `dtype`."""
        if _fits(self.tensor, weight):
            self.tensor.copy_(rounded)
        else:
            self.tensor = rounded
            ask_again()
        self.stamp = stamp(weight)


_copies = WeakIdKeyDictionary()  # weight -> Copy
_owners = WeakIdKeyDictionary()  # parameter -> weak reference to the optimizer of ours that steps it
_claimants = weakref.WeakSet()  # the optimizers of ours
_hook = None
requests = 0  # moves when a layer asks for a copy that is not there, or replaces one: optimizers then look again


def ask_again() -> None:
    global requests
    requests += 1


def stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when `tensor` is written visibly or its storage is replaced."""
    return tensor._version, tensor.data_ptr()


def for_layer(weight: torch.Tensor, dtype: torch.dtype) -> Copy | None:
    """The copy of `weight` in `dtype`, which a layer may use once it holds, or None: cast.

    Asking for it is what makes the optimizer of the weight keep one from its next step on.
    """
    copy = _copies.get(weight)
    if copy is None:
        if weight.is_leaf and weight.requires_grad:
            _copies[weight] = Copy(dtype)
            ask_again()
        return None
    owner = _owners.get(weight)
    if copy.tensor is None or copy.dtype != dtype or owner is None or owner() is None:
        return None
    return copy


def claim(parameter: torch.Tensor, owner: torch.optim.Optimizer) -> Copy | None:
    """Called by the optimizer that steps `parameter`: it owns the copy from now on; None where no layer asked for one."""
    global _hook
    _owners[parameter] = weakref.ref(owner)
    _claimants.add(owner)
    _hook = _hook or register_optimizer_step_post_hook(_after_any_step)
    copy = _copies.get(parameter)
    if copy is None or copy.dtype.itemsize >= parameter.dtype.itemsize:
        return None
    if not _fits(copy.tensor, parameter):
        copy.tensor, copy.stamp = torch.empty_like(parameter, dtype=copy.dtype, requires_grad=False), None
    return copy


def forget(weight: torch.Tensor) -> None:
    """No layer reads a copy of `weight` any more."""
    if _copies.pop(weight, None) is not None:
        ask_again()


def _fits(tensor: torch.Tensor | None, weight: torch.Tensor) -> bool:
    return tensor is not None and tensor.shape == weight.shape and tensor.device == weight.device


def _after_any_step(optimizer, args, kwargs) -> None:
    """torch's fused optimizers, and those that write through `.data`, move no version: move it for what we watch."""
    if optimizer in _claimants:  # ours do move it
        return
    written = [p for group in optimizer.param_groups for p in group["params"] if p in _owners]
    if written:
        torch.autograd.graph.increment_version(written)


def refresh_(model: torch.nn.Module) -> None:
    """Make every compute copy of `model` anew at its next use: the remedy after writes through `.data`, which torch hides."""
    for parameter in model.parameters():
        copy = _copies.get(parameter)
        if copy is not None:
            copy.stamp = None
