# SPDX-License-Identifier: Apache-2.0
"""What a rule is: an optimizer's update as its op, its implementations and its tests are made of."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from mpkernels.runtime.resolve import Key

_SCHEMA_TYPES = {float: "float", bool: "bool"}
_SCALED = ("grad_scale", "found_inf", "grad_norm", "max_norm")


@dataclass(frozen=True)
class Fused:
    """torch's fused optimizer for a call: `torch.<name>`, called by update(indices, masters, grads, states, grad_scale=,
    found_inf=), whose lists are of the tensors of these indices. apart: of tensors that are not for one call, different values.
    """

    name: str
    update: Callable
    apart: list | None = None


@dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer's update. Its C++ is csrc/optimizer_update/<rule>.h, its formula in Triton is in kernels_triton.py.

    name: of the op. states: its lists of them; from `required_states` on they may be empty.
    parameters: the numbers of a call between lr and maximize.
    tensor_scalars: (call, lr, taken) -> numbers of each tensor, (n,) fp64; lr: 0-d fp64, taken: (n,) fp32.
    tensor_update: (call, scalars, g, w, *states) -> (w, *states) of one tensor in plain torch, scalars[k] those of the tensor,
    the states rounded to how they are stored; g is unscaled, clipped and negated with maximize.
    fused: (call, step) -> torch's own fused optimizer for it, or None. triton: (call) -> (numbers, flags) of the formula in
    Triton. check: raises on what only this rule refuses.
    """

    name: str
    states: tuple[str, ...]
    required_states: int
    parameters: dict[str, type]
    tensor_scalars: Callable
    tensor_update: Callable
    triton: Callable
    fused: Callable = lambda call, step: None
    check: Callable = lambda call: None

    @cached_property
    def schema(self) -> str:
        written = iter(map(chr, range(ord("a"), ord("z"))))
        lists = [(name, f"Tensor({next(written)}!)[]") for name in ("masters", *self.states, "copies", "steps")]
        lists.insert(1, ("grads", "Tensor[]"))
        numbers = [(name, _SCHEMA_TYPES[kind]) for name, kind in (self.parameters | {"maximize": bool}).items()]
        optional = [(f"{name}=None", "float?" if name == "max_norm" else "Tensor?") for name in _SCALED]
        arguments = [*lists, ("lr", "Tensor"), *numbers, *optional]
        return f"{self.name}({', '.join(f'{kind} {name}' for name, kind in arguments)}) -> ()"

    @cached_property
    def call(self) -> type:
        """The class of its calls: the arguments of the schema by name, in their order."""
        names = ["masters", "grads", *self.states, "copies", "steps", "lr", *self.parameters, "maximize", *_SCALED]
        fields = namedtuple("UpdateCall", names, defaults=[None] * len(_SCALED))
        return type("UpdateCall", (_UpdateCall, fields), {"__slots__": (), "rule": self, "num_lists": 3 + len(self.states)})


class _UpdateCall:
    """What follows from the arguments of a call.

    num_lists: how many come first, of one layout: masters, grads, states, copies. Then come steps, and numbers.
    """

    __slots__ = ()

    @property
    def key(self) -> Key:
        return Key(self.masters[0].device, self.masters[0].dtype)

    @property
    def states(self) -> tuple[list[torch.Tensor], ...]:
        return self[2 : 2 + len(self.rule.states)]

    @property
    def written(self) -> list[torch.Tensor]:
        return [tensor for tensors in (self.masters, *self.states, self.copies, self.steps) for tensor in tensors]
