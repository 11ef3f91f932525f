# SPDX-License-Identifier: Apache-2.0
"""Updates by torch's own fused optimizers: which tensors they serve, and how many at a time.

`torch._fused_adamw_` and its like take fp32 weights, gradients and moments, many tensors a launch. Gradients come to them as
a copy in fp32 of a segment of the list at a time, since they write what they unscale, and gradients are never written.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

import torch

from mpkernels.runtime.fake import copy_

_MOST = {"cpu": 2**18, "cuda": 2**26}  # elements of a segment: 1 MiB stays in the cache; 256 MiB of a GPU's memory


def served_by(function: str, masters: list[torch.Tensor], moments: list[torch.Tensor]) -> list[bool]:
    """Whether `torch.<function>`, which a torch may not have, serves each master with its moment, or without any.

    It has one dtype for both, and from fp64 masters copies would be rounded twice.
    """
    has_function, pairs = hasattr(torch, function), zip(masters, moments or masters, strict=True)
    return [has_function and master.dtype == moment.dtype == torch.float32 for master, moment in pairs]


class Contiguous:
    """`lists` with contiguous copies in place of tensors that are not: the bits of an update follow the place of an element.

    Where a size is 1, whose stride says nothing but has to agree too, they are seen as vectors.
    """

    def __init__(self, *lists: list[torch.Tensor]):
        self._replaced = []
        self.lists = [tensors if _are_plain(tensors) else list(map(self._replace, tensors)) for tensors in lists]

    def _replace(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.detach()
        if not tensor.is_contiguous() or tensor.is_neg():
            copy = copy.resolve_neg().contiguous()
            self._replaced.append((tensor, copy))
        return copy.as_strided((tensor.numel(),), (1,)) if 1 in tensor.shape else copy

    def write_back(self, grads: list[torch.Tensor]) -> None:
        """Copy the copies back, but for those of gradients, which are never written."""
        read = set(map(id, grads))
        for tensor, copy in self._replaced:
            if id(tensor) not in read:
                copy_(tensor, copy)


def _are_plain(tensors: list[torch.Tensor]) -> bool:
    for tensor in tensors:  # noqa: SIM110 - a generator takes longer
        if not tensor.is_contiguous() or 1 in tensor.shape or tensor.is_neg():
            return False
    return True


def update_fused(fused, lists: tuple, indices: list[int], factor, skip) -> None:
    """Update the tensors of these indices, segment after segment of the lists, then their copies.

    fused: the rule's Fused. lists: masters, grads, copies and states. factor: what gradients are multiplied by, or None. skip:
    `skip_flag`, or None.
    """
    masters, grads, copies, states = lists
    found_inf = None if skip is None else skip.float()  # exactly 0 or 1: others are no verdict to them
    factor, divisor = (None, None) if factor is None else (factor.float(), factor.reciprocal().float())
    scratch = None
    for segment in _segments(masters, grads, copies, indices, fused.apart):
        of = lambda tensors, segment=segment: [tensors[i] for i in segment]
        own, scale = of(grads), None
        if own[0].dtype == torch.float32:
            # Multiplied here: with a scale near 2^127 and a clip the reciprocal of the factor can be beyond fp32.
            work = own if factor is None else torch._foreach_mul(own, factor)
        else:
            room = sum(map(_room, own))
            if scratch is None or scratch.numel() < room:  # segments share it, so that it stays in a CPU's cache
                scratch = torch.empty(room, dtype=torch.float32, device=own[0].device)
            work = _views(scratch, own)
            torch._foreach_copy_(work, own)
            scale = divisor
        fused.update(
            segment, of(masters), work, [of(state) for state in states if state], grad_scale=scale, found_inf=found_inf
        )
        if copies[segment[0]].numel():
            torch._foreach_copy_(of(copies), of(masters))  # round: fp32 -> copy


def _room(tensor: torch.Tensor) -> int:
    """Elements up to where the next one is aligned for any vector."""
    return -(-tensor.numel() // 16) * 16


def _views(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    begins = accumulate(map(_room, like), initial=flat.storage_offset())
    return [flat.as_strided(t.shape, t.stride(), begin) for t, begin in zip(like, begins, strict=False)]


def _segments(masters, grads, copies, indices: list[int], apart: list | None) -> Iterator[list[int]]:
    """Indices of tensors with one dtype of gradients and of copies, of no more elements than a segment has or of one tensor."""
    alike = defaultdict(list)
    for i in indices:
        if masters[i].numel():
            alike[grads[i].dtype, copies[i].dtype if copies[i].numel() else None, apart and apart[i]].append(i)
    for same in alike.values():
        segment, room = [], _MOST[masters[0].device.type]
        for i in same:
            room -= masters[i].numel()
            if segment and room < 0:
                yield segment
                segment, room = [], _MOST[masters[0].device.type] - masters[i].numel()
            segment.append(i)
        yield segment
