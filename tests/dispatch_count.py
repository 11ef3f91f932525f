# SPDX-License-Identifier: Apache-2.0
"""Count what calls of torch would do on a GPU: kernels launched, and bytes they read and write, without one.

    with FakeTensorMode(), Counting() as counted:
        ...                         # on tensors of device="cuda"
    counted.launches, counted.bytes_of(least)

An op that does not only look at memory in another way is one launch, which reads each of its inputs once and writes each of
its outputs once; a list of tensors (`_foreach_*`) is one launch, as the multi-tensor kernels take a list whole. What a kernel
caches or reads twice is not known here: counts compare recipes, they are no measurement.
"""

from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ONLY_WRITE = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")  # do not read what they write to
_NO_KERNEL = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_local_scalar_dense", "resize_")


@dataclass
class Launch:
    op: str
    read: list[torch.Tensor]
    written: list[torch.Tensor]

    def bytes_of(self, least: int) -> int:
        return sum(size_of(t) for t in (*self.read, *self.written) if t.numel() >= least)


@dataclass
class Counted:
    """The launches in order."""

    all: list[Launch] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return len(self.all)

    def bytes_of(self, least: int = 0) -> int:
        """Of the tensors with at least so many elements."""
        return sum(launch.bytes_of(least) for launch in self.all)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of memory that hold the elements: of one that is expanded only what is there."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


class Counting(TorchDispatchMode):
    """Entered after FakeTensorMode, or with tensors that are real."""

    def __enter__(self) -> Counted:
        self.counted = Counted()
        super().__enter__()
        return self.counted

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        namespace, name = op._schema.name.split("::")
        # these return nothing that is used, and torch has no fake of all of them
        if (kwargs or {}).get("is_first_step"):  # of two calls of SGD the one that is skipped: counted is a later step
            self.counted.all.append(Launch(name, [], []))
            return None
        result = None if name.startswith(("_fused_", "_amp_")) else op(*args, **(kwargs or {}))
        if namespace == "prim" or name in _NO_KERNEL or _is_view(op):
            return result
        read, written = [], []
        for argument, value in _arguments(op, args, kwargs or {}):
            tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if name.startswith("_fused_") and argument.name == "grads" and (kwargs or {}).get("grad_scale") is None:
                writes = False  # they write gradients that they unscale
            if writes:
                written += tensors
            if not argument.is_out and not (writes and name in _ONLY_WRITE):
                read += tensors
        if not any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments):
            written += [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if (name == "_to_copy" and result is args[0]) or not (read or written):
            return result
        self.counted.all.append(Launch(name, read, written))
        return result


def _arguments(op, args, kwargs):
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _is_view(op) -> bool:
    """Whether every result looks at an argument's memory and writes nothing."""
    aliases = [r.alias_info for r in op._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)
