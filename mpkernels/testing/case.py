# SPDX-License-Identifier: Apache-2.0
"""A case that an implementation is held against fp64 by: its inputs in guarded memory, and the check of its results.

Inputs are random numbers of a fixed seed, made on the CPU: they are those of every device.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mpkernels.testing.memory import Memory


@dataclass(frozen=True)
class Case:
    """arguments(memory, random): of the op. written: places of the tensors or lists that it writes.

    check(before, after, results, device): AssertionError where the results, or what was written, are wrong.
    call: the call's key without the device.
    parts: the arguments of calls whose first results, one behind the other, have to be the bits of the whole call's.
    """

    name: str
    arguments: Callable[[Memory, torch.Generator], tuple]
    check: Callable[[tuple, tuple, tuple, torch.device], None]
    written: tuple[int, ...] = ()
    call: tuple = (torch.float32,)
    parts: Callable[[tuple], Iterator[tuple]] | None = None

    def make(self, memory: Memory) -> tuple:
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(self.name.encode()))
        return self.arguments(memory, generator)
