# SPDX-License-Identifier: Apache-2.0
"""Guarded memory: tensors between two bands that must stay as they are, outputs full of NaN before they are written."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 4096  # bytes on either side
_BAND, _POISON = 0xA5, 0xFF  # bytes; of 0xFF every floating-point number is NaN and every integer -1

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class Memory:
    """What one run of an implementation reads and writes on `device`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._bands: dict[int, list[torch.Tensor]] = {_BAND: [], _POISON: []}

    def put(self, values: torch.Tensor, *, shift: int = 0) -> torch.Tensor:
        """A guarded copy, strides as they are; `shift`: elements that it begins past an aligned address."""
        tensor = self.allocate(values.shape, values.stride(), values.dtype, shift, band=_POISON)
        return tensor.copy_(values)

    def allocate(self, size, stride, dtype: torch.dtype, shift: int = 0, band: int = _BAND) -> torch.Tensor:
        """A guarded tensor, poisoned. `band`: of an input NaN, so that a read past its end makes a wrong result."""
        elements = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride))
        first = GUARD + shift * dtype.itemsize
        last = first + elements * dtype.itemsize
        buffer = torch.full((last + GUARD,), band, dtype=torch.uint8, device=self.device)
        if band != _POISON:
            buffer[first:last] = _POISON
        self._bands[band] += [buffer[:first], buffer[last:]]
        empty = torch.empty(0, dtype=dtype, device=self.device)
        return empty.set_(buffer.untyped_storage(), first // dtype.itemsize, size, stride)

    def check(self) -> None:
        """Raise AssertionError if a band was written."""
        for byte, bands in self._bands.items():
            assert not bands or (torch.cat(bands) == byte).all(), "memory outside of an output was written"

    def outputs(self) -> "TorchDispatchMode":
        """Inside, what is allocated on the device is guarded and poisoned."""
        return _GuardAllocations(self)


class _GuardAllocations(TorchDispatchMode):
    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in _ALLOCATIONS or result.device.type != self.memory.device.type or (kwargs or {}).get("pin_memory"):
            return result
        return self.memory.allocate(result.shape, result.stride(), result.dtype)
