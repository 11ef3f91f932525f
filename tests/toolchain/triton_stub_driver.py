# SPDX-License-Identifier: Apache-2.0
"""A GPU driver for Triton that compiles for a real architecture and launches nothing: what would be launched is noted.

NOTE: for a process of its own, without TRITON_INTERPRET: tests/toolchain/triton_launches.py is one.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import _allocation

THREADS = 1024  # of a block, at most


@dataclass
class Launch:
    """The kernel's name, the grid, which of the compiled it was, and the arguments: a tensor by its dtype."""

    name: str
    grid: tuple[int, int, int]
    function: int
    arguments: tuple


@dataclass
class StubDriver:
    """Triton's active driver, once `install` was called. launches: all of them, in order."""

    sm: int
    shared_bytes: int
    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self):
        self.target = GPUTarget("cuda", self.sm, 32)
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": self.shared_bytes}
        )
        self._functions = 0

    def install(self) -> None:
        triton.runtime.driver.set_active(self)

    def _load(self, name, kernel, shared, device):
        self._functions += 1
        return object(), self._functions, 0, 0, THREADS

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return self.target

    def launcher_cls(self, source, metadata):
        scratch = metadata.global_scratch_size

        def launch(x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
            if scratch:
                _allocation._allocator.get()(x * y * z * scratch, metadata.global_scratch_align, stream)
            noted = tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in arguments)
            self.launches.append(Launch(metadata.name, (x, y, z), function, noted))

        return launch
