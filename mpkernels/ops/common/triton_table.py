# SPDX-License-Identifier: Apache-2.0
"""Put lists of tensors of any number and size into one Triton launch: tables of addresses on the device, and who does what.

The elements of each tensor are cut into chunks, the chunks of all tensors numbered one after the other; a program does one.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

CHUNK = 16384  # elements of one program: the scalars that it derives in fp64 cost little beside them
BLOCK = 512  # elements of one pass of its loop
NUM_WARPS = 4


@dataclass(eq=False)
class Launch:
    """Tensors of one combination of dtypes. All on the device, all int64.

    dtypes: of each list, None where its tensors have no elements. addresses: (lists, n). layout: (3, n): elements, first
    chunk in this launch, and place in the call's lists. tensors: (chunks,): whose chunk each is. aligned: all addresses are
    multiples of 16.
    """

    dtypes: tuple[torch.dtype | None, ...]
    addresses: torch.Tensor
    layout: torch.Tensor
    tensors: torch.Tensor
    aligned: bool

    @property
    def grid(self) -> tuple[int]:
        return (self.tensors.numel(),)

    @property
    def arguments(self) -> dict:
        """What every kernel over tensors takes by these names."""
        return dict(
            addresses_ptr=self.addresses, layout_ptr=self.layout, tensors_ptr=self.tensors, count=self.layout.shape[1],
            ALIGNED=self.aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


def launches(lists: Sequence[Sequence[torch.Tensor]]) -> list[Launch]:
    """One launch for each combination of dtypes; tensors without elements are in none. `lists[l][i]` are dense and alike."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(zip(*lists, strict=True)):
        if row[0].numel():
            groups.setdefault(tuple(t.dtype if t.numel() else None for t in row), []).append(i)
    return [_launch(dtypes, lists, places) for dtypes, places in groups.items()]


def _launch(dtypes, lists, places) -> Launch:
    addresses = tuple(tensors[i].data_ptr() for tensors in lists for i in places)
    sizes = tuple(lists[0][i].numel() for i in places)
    device = lists[0][places[0]].device
    layout, tensors = _made(_layout, sizes, tuple(places), device)
    table = numbers(addresses, device).view(len(lists), len(places))
    return Launch(dtypes, table, layout, tensors, all(address % 16 == 0 for address in addresses))


_captured: list[tuple[torch.Tensor, torch.Tensor]] = []  # (pinned, on the device): what CUDA graphs read at every replay


def _made(make, *values):
    """`make` of values of which the last is a device; what is there is not sent twice.

    NOTE: the stream is a key, since on another one a table could be read before it has arrived. A capture neither takes what
    is there, which could be gone when its graph is replayed, nor leaves anything that could go.
    """
    device = values[-1]
    if _is_capturing(device):
        return make.__wrapped__(*values, None)
    return make(*values, _stream(device))


@functools.lru_cache(maxsize=64)
def _layout(sizes, places, device, stream) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = torch.tensor([-(-n // CHUNK) for n in sizes], dtype=torch.int64, device="cpu")
    first = chunks.cumsum(0) - chunks
    layout = torch.stack([torch.tensor(n, dtype=torch.int64, device="cpu") for n in (sizes, first.tolist(), places)])
    tensors = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int64, device="cpu"), chunks)
    return _to_device(layout, device), _to_device(tensors, device)


@functools.lru_cache(maxsize=256)
def _numbers(values, device, stream) -> torch.Tensor:
    return _to_device(torch.tensor(values, dtype=torch.int64, device="cpu"), device)


def numbers(values: Iterable[int], device: torch.device) -> torch.Tensor:
    """int64 on the device; the same ones are not sent twice."""
    return _made(_numbers, tuple(values), device)


def chunk_starts(sizes: Iterable[int], device: torch.device) -> torch.Tensor:
    """(n + 1,): where the chunks of each of n tensors begin when all chunks are in the order of the call's lists."""
    return numbers(itertools.accumulate((-(-n // CHUNK) for n in sizes), initial=0), device)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting. The pinned buffer goes back to torch's pinned allocator, which reuses it only after this copy.

    Under capture the copy becomes part of the graph, and reads the buffer at every replay.
    """
    pinned = table.pin_memory() if device.type == "cuda" else table
    sent = pinned.to(device, non_blocking=True)
    if _is_capturing(device):
        _captured.append((pinned, sent))
    return sent


def lr_arguments(op: str, lr: torch.Tensor, device: torch.device) -> dict:
    """lr by value where it is on the CPU, else by its address: no wait for the device."""
    on_device = lr.device.type != "cpu"
    if not on_device and _is_capturing(device):
        raise RuntimeError(f"{op}: lr is on the CPU and would be frozen in the CUDA graph; pass it as a tensor on the device")
    return dict(lr_ptr=lr if on_device else None, lr=0.0 if on_device else lr.item())
