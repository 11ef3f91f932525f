# SPDX-License-Identifier: Apache-2.0
"""Taps: the hooks of a watch, which write the largest magnitudes of a layer's tensors into its row of a table on the device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mpkernels.optim.distributed import local
from mpkernels.precision.capture import tensors_of

OUT, GRAD_X, GRAD_WEIGHT, X, WEIGHT = range(5)
DATA, SCALE = range(2)  # of row 0, which is not a layer's: what the model was given, and the loss scale of the step
NOTHING = -1.0  # what no magnitude is as small as: nothing came


def counts(module: nn.Module) -> bool:
    """Whether a call is of training; not inside a transform of torch.func, whose values are not to leave it."""
    return (module.training or torch.is_grad_enabled()) and not torch._C._are_functorch_transforms_active()


class Tap:
    """The hooks of one layer; of a copy of the layer, or a pickled one, they do nothing.

    position: that of its first call among all layers' first calls. adapts: with adapt, grad_weight is written where there is no
    grad_x, and x and weight where `reads_operands`. may_be_captured: whether a call inside a CUDA graph is no error.
    """

    def __init__(
        self, name: str = "", module: nn.Module | None = None, table: torch.Tensor | None = None, row: int = 0,
        clock: Iterator[int] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.module, self.table, self.row, self.clock = name, module, table, row, clock
        self.cells = () if table is None else table[row].unbind()
        self.has_node = hasattr(module, "adopt")  # linear_act's, which can be asked for grad_x
        self.position: int | None = None
        self.adapts, self.reads_operands, self.may_be_captured = False, False, True

    def __reduce__(self):
        return Tap, ()

    def register(self) -> list:
        return [self.module.register_forward_pre_hook(self.enter), self.module.register_forward_hook(self.leave)]

    def enter(self, module: nn.Module, args: tuple) -> tuple | None:
        """Where the layer has no node to ask, it reads a view of its own, whose gradient is the one that it alone gives."""
        if not args or not isinstance(args[0], torch.Tensor) or self.table is None or not counts(module):
            return None
        x = args[0]
        if self.reads_operands:
            self.write(X, x)
            self.write(WEIGHT, module.weight)
        if self.has_node and type(x) is torch.Tensor and not x.is_nested and not torch.compiler.is_compiling():
            return None
        if not (x.requires_grad and torch.is_grad_enabled()):
            return None
        view = _GradX.apply(x, self.table, self.row)
        return tuple(view if argument is x else argument for argument in args)

    def leave(self, module: nn.Module, args: tuple, out: object) -> None:
        if self.table is None or not counts(module):
            return
        self.note()
        if not self.may_be_captured and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("watch: adapt cannot change what a CUDA graph has captured: capture without adapt=")
        if not isinstance(out, torch.Tensor):
            out = next(tensors_of(out), None)
        if out is None or not out.is_floating_point():
            return
        self.write(OUT, out)
        if self.has_node and not torch.compiler.is_compiling() and hasattr(out.grad_fn, "on_grads"):
            out.grad_fn.on_grads = self.grads

    def note(self) -> None:
        """That the layer is called, in which order."""
        if self.position is None:
            self.position = next(self.clock)

    note._dynamo_marked_constant = True  # called when a call is traced; see linear_act.saves_mask

    def grads(self, grad_x: torch.Tensor | None, grad_weight: torch.Tensor | None) -> None:
        if grad_x is not None:
            self.write(GRAD_X, grad_x)
        elif grad_weight is not None and self.adapts:
            self.write(GRAD_WEIGHT, grad_weight)

    def write(self, column: int, values: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            _write(self.table[self.row, column], values)
        else:
            write(self.cells[column], values)


class _GradX(torch.autograd.Function):
    """x, and what of its gradient goes into a row."""

    @staticmethod
    def forward(ctx, x, table, row):
        ctx.table, ctx.row = table, row
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        _write(ctx.table[ctx.row, GRAD_X], grad)
        return grad, None, None


def write(cell: torch.Tensor, values: torch.Tensor) -> None:
    """Raise `cell` to the largest magnitude of `values`; NaN and inf come through."""
    if (values := _plain(values)).numel():
        low, high = torch.aminmax(values)
        torch.maximum(cell, torch.maximum(high, low.neg_()), out=cell)


def _write(cell: torch.Tensor, values: torch.Tensor) -> None:
    """The same in ops that a compiler takes."""
    if (values := _plain(values)).numel():
        low, high = torch.aminmax(values)
        cell.copy_(torch.maximum(cell, torch.maximum(high, -low)))


def _plain(values: torch.Tensor) -> torch.Tensor:
    """What of it lies here, dense."""
    values = values.detach()
    if type(values) is torch.Tensor and not values.is_nested:
        return values
    return values.values() if values.is_nested else local(values)


def write_data(cell: torch.Tensor, inputs: object) -> None:
    """Raise `cell` to the largest of what the model was given. -inf is left out: attention masks are made of it."""
    for values in tensors_of(inputs):
        if values.is_floating_point() and values.device == cell.device and values.numel():
            torch.maximum(cell, _plain(values).max(), out=cell)


# ----- what a table says ---------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """The first inf or NaN of a step. row: of the layer; 0 where it is the data. amax: inf or NaN, that of `tensor`."""

    direction: Literal["data", "forward", "backward"]
    row: int
    tensor: str
    amax: float

    def __str__(self) -> str:
        return f"{self.tensor} has NaN" if math.isnan(self.amax) else f"{self.tensor} reaches inf"


def first_fault(rows: list[list[float]], order: list[int]) -> Fault | None:
    """rows: a table as lists. order: the rows of layers in the order of execution, of which backward is the reverse."""
    if not math.isfinite(rows[0][DATA]):
        return Fault("data", 0, "what the model was given", rows[0][DATA])
    for row in order:
        if not math.isfinite(rows[row][OUT]):
            return Fault("forward", row, "out", rows[row][OUT])
    for row in reversed(order):
        for tensor, column in (("grad_x", GRAD_X), ("grad_weight", GRAD_WEIGHT)):
            if not math.isfinite(rows[row][column]):
                return Fault("backward", row, tensor, rows[row][column])
    return None
