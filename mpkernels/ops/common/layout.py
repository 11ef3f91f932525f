# SPDX-License-Identifier: Apache-2.0
"""What the step ops share: lists of tensors as tables, and any layout in the one that a raw-pointer loop walks."""

import contextlib
from array import array
from collections.abc import Callable, Iterable
from operator import attrgetter

import torch

from mpkernels.runtime.fake import addresses, any_fake

_SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}  # of c10
_dtype_of, _is_contiguous = attrgetter("dtype"), attrgetter("contiguous")


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order."""
    if tensor.is_contiguous():
        return True
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).is_contiguous()


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory: a stride that does not pass all that lies within the smaller ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def same_formats(tensors: list[torch.Tensor]) -> Callable[..., bool]:
    """Whether as many others are as these, one by one: in class, dtype, device, shape, strides, requires_grad and is_neg.

    May also say no where something else differs, such as a mode that is on. torch.compile's guards, which are not public,
    look at a whole list in the time that one attribute of each tensor takes in Python.
    """
    with contextlib.suppress(AttributeError, ImportError, TypeError):  # a torch without them, or with others
        from torch._C._dynamo.guards import TensorGuards

        check = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        if check(*tensors):  # which they deny where one tensor stands twice
            return check
    formats = list(map(_format, tensors))
    return lambda *others: list(map(_format, others)) == formats


def _format(tensor: torch.Tensor | None) -> tuple:
    if tensor is None or tensor.layout != torch.strided:
        return ()
    strides, flags = tensor.stride(), (tensor.requires_grad, tensor.is_neg())
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, strides, flags


class Tensors(list):
    """A list of tensors with what the native ops read of it: `table`, int64 (3, n), elements, dtype and address of each.

    contiguous: whether a raw-pointer loop sees the values of all of them: no gaps, and not lazily negated.
    placed: whether all have memory; one without elements has none.

    Code that keeps one from call to call, as an optimizer does, calls `describe` when a tensor is not what it was, or `clear`,
    which lets the tensors go, and `replace`. Handing over a table instead of a list saves unboxing every tensor in every call.
    """

    __slots__ = ("_numbers", "addresses", "contiguous", "placed", "table")

    def __init__(self, tensors: Iterable[torch.Tensor]):
        super().__init__(tensors)
        self.describe()

    def describe(self) -> None:
        """Look at every tensor anew."""
        self.contiguous = all(map(torch.Tensor.is_contiguous, self)) and not any(map(torch.Tensor.is_neg, self))
        now, types = addresses(self), map(_SCALAR_TYPES.__getitem__, map(_dtype_of, self))
        self._numbers = array("q", map(torch.Tensor.numel, self)) + array("q", types) + array("q", now)
        self.addresses = now
        if 0 in now and any_fake(self):
            self.table = None  # which no native op is given
        elif self:
            self.table = torch.frombuffer(self._numbers, dtype=torch.int64).view(3, len(self))
        else:
            self.table = torch.empty(3, 0, dtype=torch.int64, device="cpu")
        self.placed = self.table is None or 0 not in now

    def replace(self, tensors: list[torch.Tensor]) -> None:
        """Hold these, which the caller has found to have the `same_formats`."""
        self[:] = tensors
        now = addresses(self) if self.table is None else list(map(torch.Tensor.data_ptr, tensors))
        if now != self.addresses:
            self._numbers[2 * len(now) :] = array("q", now)  # which `table` shows
            self.addresses, self.placed = now, self.table is None or 0 not in now


NO_TENSORS = Tensors([])  # a list that is absent


def described(tensors: list[torch.Tensor]) -> Tensors:
    return tensors if isinstance(tensors, Tensors) else Tensors(tensors)


class SameLayout:
    """The lists of an update, in which all tensors of one index lie in memory as their master does: dense copies if need be.

    An empty list is absent, a tensor of size 0 is a copy that is not wanted; both stay. `tables`: what the native op takes.
    """

    def __init__(self, masters: list[torch.Tensor], grads: list[torch.Tensor], *written: list[torch.Tensor]):
        self.lists = [t if type(t) is Tensors else Tensors(t) for t in (masters, grads, *written)]
        self._copied = []
        if not all(map(_is_contiguous, self.lists)):
            lists = [list(tensors) for tensors in self.lists]
            with torch.no_grad():
                for i, master in enumerate(masters):
                    self._align(lists, i, master)
            self.lists = [Tensors(tensors) for tensors in lists]
        self.tables = [tensors.table for tensors in self.lists]

    def _align(self, lists: list[list[torch.Tensor]], i: int, master: torch.Tensor) -> None:
        strides = master.stride() if is_dense(master) else torch.empty(master.shape, dtype=master.dtype, device="meta").stride()
        for tensors in filter(None, lists):
            tensor = tensors[i]
            if tensor.numel() and (tensor.stride() != strides or tensor.is_neg()):
                tensors[i] = torch.empty_strided(master.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
                if tensors is not lists[1]:  # gradients are never written
                    self._copied.append((tensor, tensors[i]))

    def write_back(self) -> None:
        """Copy the copies back."""
        if self._copied:
            with torch.no_grad():
                for tensor, copy in self._copied:
                    tensor.copy_(copy)
