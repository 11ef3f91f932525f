# SPDX-License-Identifier: Apache-2.0
"""An op that is made up, to see what is chosen for its calls: eager doubles, native triples, triton quadruples."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from mpkernels.runtime import resolve, tuned_table
from mpkernels.runtime.op import Op
from mpkernels.runtime.resolve import Implementation

FACTORS = {"eager": 2, "native": 3, "triton": 4}
_number = itertools.count()


class SizeKey(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    size: int = 8


class Call(NamedTuple):
    """The size decides in tables and in keys."""

    x: torch.Tensor

    @property
    def key(self) -> SizeKey:
        return SizeKey(self.x.device, self.x.dtype, self.x.numel())

    @property
    def gemm_key(self) -> tuple:
        return tuned_table.gemm_key("fprop", self.x.numel(), 1, 1, 0, self.x.dtype)


class Modules:
    """What `op._module` gives: a function that multiplies, and why_not by `reasons`, sentences or functions of a key."""

    def __init__(self, name: str):
        self.name, self.reasons = name, {}

    def __call__(self, implementation: Implementation) -> type:
        backend = implementation.backend

        def why_not(key):
            reason = self.reasons.get(backend)
            return reason(key) if callable(reason) else reason

        multiply = lambda call: call.x * FACTORS[backend]
        return type("Module", (), {"why_not": staticmethod(why_not), self.name: staticmethod(multiply)})


@contextlib.contextmanager
def made_op(*implementations: Implementation, call=Call, package: str = "nowhere") -> Iterator[Op]:
    """Whose implementations are there wherever they exist. package: where the sources are whose checksum a verdict has."""
    name = f"made_up_{next(_number)}"
    op = Op(
        f"{name}(Tensor x) -> Tensor",
        package,
        implementations,
        call=call,
        key=SizeKey,
        check=lambda call: None,
        fake=lambda call: call.x.new_empty(call.x.shape),
    )
    op._module = Modules(name)
    try:
        with mock.patch.object(Implementation, "why_not", return_value=None):
            yield op
    finally:
        del resolve.ops[name]
        resolve.choose.cache_clear()
