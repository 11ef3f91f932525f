# SPDX-License-Identifier: Apache-2.0
"""The cases that an implementation is held against fp64 by: its inputs in guarded memory, and the check of its results.

The same for the proof on a GPU, `python -m mpkernels` and the tests. Inputs are random numbers of a fixed seed, made on the
CPU: they are those of every device.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mpkernels.testing import linear_act_cases, step_cases, update_cases
from mpkernels.testing.memory import Memory


@dataclass(frozen=True)
class Case:
    """arguments(memory, random): of the op. written: places of the tensors or lists that it writes.

    check(before, after, results, device): AssertionError where the results, or what was written, are wrong.
    call: the call's key without the device, None where all serve it.
    parts: the arguments of calls whose first results, one behind the other, have to be the bits of the whole call's.
    """

    name: str
    arguments: Callable[[Memory, torch.Generator], tuple]
    check: Callable[[tuple, tuple, tuple, torch.device], None]
    written: tuple[int, ...] = ()
    call: tuple | None = None
    parts: Callable[[tuple], Iterator[tuple]] | None = None

    def make(self, memory: Memory) -> tuple:
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(self.name.encode()))
        return self.arguments(memory, generator)


def of(op: str, *, few: bool, full: bool = False) -> Iterator[Case]:
    """Cases of an op; `few`: small ones, for a CPU and for interpreters."""
    families = {
        "linear_act": linear_act_cases.forward,
        "linear_act_backward": linear_act_cases.backward,
        "grad_stats_": step_cases.grad_stats,
        "adamw_": update_cases.adamw,
        "sgd_": update_cases.sgd,
        "lion_": update_cases.lion,
        "update_scale_": step_cases.update_scale,
    }
    for name, parts in families[op](few, full):
        yield Case(name, **parts)


def sizes(op: str, device: torch.device) -> dict[str, Callable[[torch.device], tuple]]:
    """What a race is run on: a name and the arguments of the op, made on the device."""
    few = device.type == "cpu"
    return linear_act_cases.sizes(op, few) if op.startswith("linear") else step_cases.sizes(op, few)
