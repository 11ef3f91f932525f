# SPDX-License-Identifier: Apache-2.0
"""Taps: what a watch puts on layers, to write the largest magnitudes of their tensors into a table on the device."""

import functools
import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from mpkernels.nn.linear import MPLinear
from mpkernels.optim.distributed import local
from mpkernels.precision.capture import tensors_of
from mpkernels.runtime import native, untouched
from mpkernels.runtime.fake import is_fake

OUT, GRAD_X, GRAD_WEIGHT, X, WEIGHT = range(5)
COLUMNS = 5
DATA, SCALE = range(2)  # of row 0, which is not a layer's: what the model was given, and the loss scale of the step
NOTHING = -1.0  # what no magnitude is as small as: nothing came


def counts(module: nn.Module) -> bool:
    """Whether a call is of training; not inside a transform of torch.func, whose values are not to leave it."""
    is_training = (module.training or torch.is_grad_enabled()) and not untouched.is_inside
    return is_training and not torch._C._are_functorch_transforms_active()


class Tap:
    """That of one layer; that of a copy of the layer, or of a pickled one, does nothing.

    why_not: why the layer cannot be converted, or "". called: the rows of all taps in the order of their first calls. dtype: of
    what that call returned. adapts: with adapt, grad_weight is written where there is no grad_x, and x and weight where
    `reads_operands`. may_be_captured: whether a call inside a CUDA graph is no error.
    """

    def __init__(
        self, name: str = "", module: nn.Module | None = None, why_not: str = "", table: torch.Tensor | None = None,
        row: int = 0, called: list[int] | None = None, adapts: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.module, self.why_not, self.table, self.row, self.called = name, module, why_not, table, row, called
        self.raise_ = None if table is None else raise_of(table)
        self.has_node = False  # linear_act's as that of the output, which can be asked for grad_x
        self.dtype: torch.dtype | None = None
        self.adapts, self.reads_operands = adapts, False
        self.may_be_captured = not (adapts and table.is_cuda)

    def __reduce__(self):
        return Tap, ()

    @property
    def is_watching(self) -> bool:
        return self.table is not None

    def register(self) -> list:
        """Handles to remove it by, which hold no module. An MPLinear asks it without a hook."""
        cls, is_replaced = type(self.module), "forward" in vars(self.module)
        self.has_node = not is_replaced and (cls.forward is MPLinear.forward or cls.__name__ == "MPConv1D")
        if not is_replaced and cls.forward is MPLinear.forward:
            self.module._observer = self
            return [_Observing(weakref.ref(self.module))]
        before = self.module.register_forward_pre_hook(self.before, with_kwargs=True)
        return [before, self.module.register_forward_hook(self.after)]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.table is None:
            return _remove_hooks_of(self, module)
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(given, torch.Tensor):
            return None
        x = self.enter(module, given)
        if x is given:
            return None
        return tuple(x if a is given else a for a in args), {name: x if a is given else a for name, a in kwargs.items()}

    def after(self, module: nn.Module, args: tuple, out: object) -> None:
        out = out if isinstance(out, torch.Tensor) else next(tensors_of(out), None)
        if out is not None and out.dtype in _LOOKED_AT:
            self.leave(module, out)

    def enter(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What the layer is to read: x, or where no node can be asked a view, whose gradient is the one that it alone gives."""
        asks_node = self.has_node and type(x) is torch.Tensor and not torch.compiler.is_compiling()
        if (asks_node and not self.reads_operands) or self.table is None or not counts(module):
            return x
        if self.reads_operands:
            self.write(X, x)
            self.write(WEIGHT, module.weight)
        if asks_node or not (x.requires_grad and torch.is_grad_enabled()):
            return x
        if x.is_nested and not self.has_node:  # torch has no backward of a view of what nn.Linear reads then
            return x
        return _GradX.apply(x, self.table, self.row)

    def leave(self, module: nn.Module, out: torch.Tensor) -> None:
        if self.table is None or not counts(module):
            return
        is_compiling = torch.compiler.is_compiling()
        if is_compiling or self.dtype is None:
            self.note(out.dtype)
        if not self.may_be_captured and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("watch: adapt cannot change what a CUDA graph has captured: capture without adapt=")
        if is_compiling:
            _raise_traced(self.table, self.row, OUT, out)
            return
        self.raise_(self.table, self.row, OUT, out)
        if self.has_node and hasattr(node := out.grad_fn, "on_grads"):
            node.on_grads = self.grads

    def note(self, dtype: torch.dtype) -> None:
        """That the layer is called, in which order, and what it returns."""
        if self.dtype is None:
            self.dtype = dtype
            self.called.append(self.row)

    note._dynamo_marked_constant = True  # called when a call is traced; see linear_act.saves_mask

    def grads(self, grad_x: torch.Tensor | None, grad_weight: torch.Tensor | None) -> None:
        if grad_x is not None:
            self.raise_(self.table, self.row, GRAD_X, grad_x)
        elif grad_weight is not None and self.adapts:
            self.raise_(self.table, self.row, GRAD_WEIGHT, grad_weight)

    def write(self, column: int, values: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            _raise_traced(self.table, self.row, column, values)
        else:
            self.raise_(self.table, self.row, column, values)


class _Observing(NamedTuple):
    """The handle of an MPLinear's observer, as torch's of a hook."""

    module: weakref.ref

    def remove(self) -> None:
        if (module := self.module()) is not None:
            vars(module).pop("_observer", None)


def _remove_hooks_of(tap: object, module: nn.Module) -> None:
    """From a copy of a module, whose hooks were copied with it and do nothing there."""
    if torch.compiler.is_compiling():
        return
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", hook) is tap]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


class _GradX(torch.autograd.Function):
    """x, and what of its gradient goes into a row."""

    @staticmethod
    def forward(ctx, x, table, row):
        ctx.table, ctx.row = table, row
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        _raise_traced(ctx.table, ctx.row, GRAD_X, grad)
        return grad, None, None


# ----- a cell is raised to the largest magnitude of some values, inf and NaN included -------------------------------------


def raise_of(table: torch.Tensor) -> Callable[..., None]:
    """(table, row, column, values). On a CPU one op instead of torch's five, the most of what a watch costs small layers."""
    return raise_native() if is_native(table) else _raise


def is_native(table: torch.Tensor) -> bool:
    return table.is_cpu and native.why_not() is None


@functools.cache
def raise_native() -> Callable[..., None]:
    """Once the library is loaded; what a call looks up costs small layers as much as the op."""
    amax_ = native.ops.amax_

    def raise_(table: torch.Tensor, row: int, column: int, values: torch.Tensor, *, ignores_minus_inf: bool = False) -> None:
        is_dense = type(values) is torch.Tensor and values.is_contiguous() and not values.is_nested
        if not is_dense or (ignores_minus_inf and values.is_neg()):
            values = _plain(values)
            if type(values) is not torch.Tensor:  # nothing of it need lie in memory: torch's ops know what it holds
                return _raise(table, row, column, values, ignores_minus_inf=ignores_minus_inf)
            values = values.contiguous().resolve_neg()
        amax_(values, table, row * COLUMNS + column, ignores_minus_inf)

    return raise_


def _raise(table: torch.Tensor, row: int, column: int, values: torch.Tensor, *, ignores_minus_inf: bool = False) -> None:
    if (values := _plain(values)).numel() and not is_fake(values):
        (low, high), cell = torch.aminmax(values), table[row, column]
        amax = high if ignores_minus_inf else torch.maximum(high, low.neg_())
        torch.maximum(cell, amax, out=cell)


def _raise_traced(table: torch.Tensor, row: int, column: int, values: torch.Tensor, *, ignores_minus_inf: bool = False) -> None:
    """In ops that a compiler takes."""
    if (values := _plain(values)).numel():
        low, high = torch.aminmax(values)
        amax = high if ignores_minus_inf else torch.maximum(high, -low)
        table[row, column] = torch.maximum(table[row, column], amax)


def _plain(values: torch.Tensor) -> torch.Tensor:
    """What of it lies here, dense."""
    values = values.detach()
    return values.values() if values.is_nested else local(values)


_LOOKED_AT = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of 8 bits torch has no maximum
_LAYOUTS = (torch.strided, torch.jagged)  # nor of sparse tensors


class InputTap:
    """The hook that looks at what a model is given, but for the -inf of attention masks; a copy of it does nothing."""

    def __init__(self, table: torch.Tensor | None = None) -> None:
        self.table = table
        if table is not None:
            self.raise_, self.device = raise_of(table), table.device

    def __reduce__(self):
        return InputTap, ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.table is None:
            return _remove_hooks_of(self, module)
        if not counts(module):
            return
        raise_ = _raise_traced if torch.compiler.is_compiling() else self.raise_
        for given in (*args, *kwargs.values()):
            for values in (given,) if type(given) is torch.Tensor else tensors_of(given):
                if values.dtype in _LOOKED_AT and values.layout in _LAYOUTS and values.device == self.device:
                    raise_(self.table, 0, DATA, values, ignores_minus_inf=True)


def end_step_of(table: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]:
    """(table, last, scale): move `table` to `last`, with the loss scale of the step, and begin anew."""
    if not is_native(table):
        return _end_step
    end_step_ = native.ops.end_step_

    def end_step(table: torch.Tensor, last: torch.Tensor, scale: torch.Tensor | None) -> None:
        end_step_(table, last, scale if scale is None or scale.is_cpu else scale.cpu(), SCALE, NOTHING)

    return end_step


def _end_step(table: torch.Tensor, last: torch.Tensor, scale: torch.Tensor | None) -> None:
    if scale is not None:
        table[0, SCALE].copy_(scale)
    last.copy_(table)
    table.fill_(NOTHING)


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
    if all(map(math.isfinite, itertools.chain(*rows))):
        return None
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
