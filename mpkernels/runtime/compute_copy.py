# SPDX-License-Identifier: Apache-2.0
"""Compute copies: wide weights rounded to what a layer multiplies with, written by an optimizer's pass and read by the layer.

A layer asks for the copy of its weight; the optimizer that steps the weight makes one, keeps it alive and writes it in its
pass. The layer refers to it weakly, so it dies with the optimizer. It is read while the Parameter, its version counter and
its address are those of the last write; after another write that torch can see it is made anew. Writes that move no
version, as through `.data`, are invisible: `refresh_`.

Nothing here refers weakly to a tensor, which would keep torch from swapping it (`torch.utils.swap_tensors`), or finds
anything by a tensor's id: only layers are looked up.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class ComputeCopy:
    """`tensor` is `weight`, rounded, if it `is_fresh`. Optimizers hold it, and with it the weight; layers do not."""

    weight: torch.Tensor
    tensor: torch.Tensor
    stamp: tuple[int, int] | None = None  # of the weight when `tensor` was written

    def is_fresh(self) -> bool:
        """Whether nothing that torch can see has written the weight since `tensor` was written."""
        return self.stamp == stamp(self.weight)

    def fits(self) -> bool:
        return self.tensor.shape == self.weight.shape and self.tensor.device == self.weight.device

    def write(self, rounded: torch.Tensor) -> None:
        """Make the copy anew; `rounded`: the weight in the copy's dtype."""
        if self.fits():
            torch.ops.aten.copy_(self.tensor, rounded)  # NOTE: as `fake.copy_`
        else:
            self.tensor = rounded
            bump_generation()
        self.stamp = stamp(self.weight)


@dataclass(eq=False)
class _Request:
    """What one layer wants. copy: a weak reference to the ComputeCopy, or what stands for one before there is any."""

    dtype: torch.dtype
    copy: Callable[[], ComputeCopy | None] = lambda: None


_requests: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # layer -> _Request
generation = 0  # moves when a layer wants a copy that is not there, or one is replaced: optimizers then look again


def bump_generation() -> None:
    global generation
    generation += 1


def stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when `tensor` is written visibly or its storage is replaced."""
    return tensor._version, 0 if type(tensor).__name__ == "FakeTensor" else tensor.data_ptr()


def is_plain(weight: torch.Tensor) -> bool:
    """Whether `weight` is a Parameter and no subclass, or a FakeTensor that stands for one."""
    if type(weight) is torch.nn.Parameter:
        return True
    return type(weight).__name__ == "FakeTensor" and isinstance(weight, torch.nn.Parameter)


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether other processes may write `tensor`, which moves no version here; torch says it of all CUDA tensors."""
    return tensor.device.type == "cpu" and tensor.is_shared()


def for_layer(layer: torch.nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> ComputeCopy | None:
    """The copy of the layer's weight in `dtype`, which the layer may use once it is fresh, or None: cast.

    Asking for it is what makes the optimizer of the weight keep one from its next step on.
    """
    request = _requests.get(layer)
    copy = None if request is None else request.copy()
    if copy is not None and copy.weight is weight and copy.tensor.dtype == dtype:
        if copy.is_fresh() or not is_shared(weight):
            return copy
        return None
    is_new = request is None or copy is not None or request.dtype != dtype
    if is_new and is_plain(weight) and weight.is_leaf and weight.requires_grad:
        _requests[layer] = _Request(dtype)
        bump_generation()
    return None


def claim(params: list[torch.Tensor]) -> dict[int, ComputeCopy]:
    """The copies that layers want of `params`, by index, for the optimizer that steps these, which holds and writes them."""
    index, wanted = {id(p): i for i, p in enumerate(params)}, {}
    for layer, request in list(_requests.items()):
        weight = layer._parameters.get("weight")
        if (i := index.get(id(weight))) is not None and request.dtype.itemsize < weight.dtype.itemsize:
            wanted.setdefault(i, []).append(request)
    plain = (i for i in wanted if is_plain(params[i]))  # it may have become a DTensor since
    return {i: _copy_for(params[i], wanted[i]) for i in plain if not is_shared(params[i])}


def _copy_for(weight: torch.Tensor, requests: list[_Request]) -> ComputeCopy:
    """One copy for all layers that share `weight`; in the dtype that the first of them wants."""
    there = (request.copy() for request in requests)
    copy = next((c for c in there if c is not None and c.weight is weight and c.fits()), None)
    if copy is None:
        copy = ComputeCopy(weight, torch.empty_like(weight, dtype=requests[0].dtype, requires_grad=False))
    for request in requests:
        if request.dtype == copy.tensor.dtype:
            request.copy = weakref.ref(copy)
    return copy


def forget(layer: torch.nn.Module) -> None:
    """`layer` reads no copy any more."""
    if _requests.pop(layer, None) is not None:
        bump_generation()


def of_model(model: torch.nn.Module) -> list[ComputeCopy]:
    """The copies that layers of `model` have, each once."""
    requests = (_requests.get(layer) for layer in model.modules())
    copies = (request.copy() for request in requests if request is not None)
    return list({id(copy): copy for copy in copies if copy is not None}.values())


def refresh_(model: torch.nn.Module) -> None:
    """Make every compute copy of `model` anew at its next use: the remedy after writes that move no version.

    Such are writes through `.data`, numpy and DLPack views, and collectives (`dist.broadcast(p, 0)`, all_reduce, scatter).
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    for copy in of_model(model):
        copy.stamp = None
