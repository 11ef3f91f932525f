# SPDX-License-Identifier: Apache-2.0
"""Whether what an op writes has memory of its own: no element twice, none in another tensor of the call."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from mpkernels.ops.common.layout import is_dense, overlaps
from mpkernels.runtime.op import PLAIN

Named = Mapping[str, torch.Tensor | Sequence[torch.Tensor] | None]


class _Span(NamedTuple):
    """The bytes from a tensor's first element to its last."""

    begin: int
    end: int
    tensor: torch.Tensor
    name: str
    written: bool


def check_memory(op: str, *, written: Named, read: Named) -> None:
    """Raise RuntimeError where an element of a written tensor lies in memory twice, or is one of another tensor too.

    Tensors that are only read may share. What has no memory, as a FakeTensor, is not looked at.
    """
    if _are_apart([*written.values(), *read.values()]):
        return
    spans = _spans(written, True) + _spans(read, False)
    for span in spans:
        if span.written and not span.tensor.is_contiguous() and overlaps(span.tensor):
            raise RuntimeError(f"{op}: {span.name} overlaps itself (strides {span.tensor.stride()})")
    cluster, reach = [], 0  # spans that reach into each other
    for span in sorted((span for span in spans if span.begin < span.end), key=lambda span: span.begin):
        if span.begin >= reach:
            _check_cluster(op, cluster)
            cluster = []
        cluster.append(span)
        reach = max(reach, span.end)
    _check_cluster(op, cluster)


def _are_apart(values: list[torch.Tensor | Sequence[torch.Tensor] | None]) -> bool:
    """Whether there is nothing to look into: plain contiguous tensors one behind the other."""
    spans = []
    for value in values:
        for tensor in (value,) if isinstance(value, torch.Tensor) else value or ():
            if type(tensor) not in PLAIN or not tensor.is_contiguous():
                return False
            begin = tensor.data_ptr()
            spans.append((begin, begin + tensor.nbytes))
    spans.sort()
    return all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def _spans(named: Named, written: bool) -> list[_Span]:
    result = []
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            result.append(_span(value, name, written))
        elif value is not None:
            result += [_span(tensor, f"{name}[{i}]", written) for i, tensor in enumerate(value)]
    return result


def _span(tensor: torch.Tensor, name: str, written: bool) -> _Span:
    begin, length = _address(tensor), 0
    if begin and tensor.is_contiguous():
        length = tensor.numel()
    elif begin:
        length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _Span(begin, begin + length * tensor.itemsize, tensor, name, written)


def _address(tensor: torch.Tensor) -> int:
    """0 where there is nothing to share."""
    if type(tensor) not in PLAIN:
        try:
            if tensor.untyped_storage().device.type == "meta":  # of a FakeTensor
                return 0
        except RuntimeError:  # of one that wraps others
            return 0
    return 0 if tensor.is_meta else tensor.data_ptr()


def _check_cluster(op: str, cluster: list[_Span]) -> None:
    if len(cluster) > 1 and any(span.written for span in cluster) and (shared := _first_shared(cluster)):
        first, second = sorted(shared, key=lambda span: not span.written)
        raise RuntimeError(f"{op}: {first.name} shares memory with {second.name}: what is written needs memory of its own")


def _first_shared(spans: list[_Span]) -> tuple[_Span, _Span] | None:
    """Two of which one is written and that have a byte in common: of dense ones at once, else element by element."""
    whole = all(is_dense(span.tensor) for span in spans)
    begins = [_on_host([span.begin]) if whole else span.begin + _offsets(span.tensor) for span in spans]
    owner = torch.repeat_interleave(torch.arange(len(spans), **_ON_HOST), _on_host([len(begin) for begin in begins]))
    lengths = _on_host([span.end - span.begin if whole else span.tensor.itemsize for span in spans])
    begin, order = torch.cat(begins).sort()
    owner = owner[order]
    end, is_written = begin + lengths[owner], _on_host([span.written for span in spans])[owner]
    reaches = end.cummax(0), torch.where(is_written == 1, end, 0).cummax(0)
    for reach, matters in zip(reaches, (is_written[1:] == 1, True), strict=True):
        found = ((begin[1:] < reach.values[:-1]) & matters).nonzero()
        if len(found):
            return spans[owner[reach.indices[found[0]]]], spans[owner[found[0] + 1]]
    return None


_ON_HOST = {"dtype": torch.int64, "device": "cpu"}


def _on_host(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, **_ON_HOST)


def _offsets(tensor: torch.Tensor) -> torch.Tensor:
    """In bytes, of each element."""
    result = torch.zeros(tensor.shape, **_ON_HOST)
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(size, **_ON_HOST) * (stride * tensor.itemsize)
        result += steps.view([-1] + [1] * (tensor.dim() - dim - 1))
    return result.flatten()
