# SPDX-License-Identifier: Apache-2.0
"""watch: in training, the largest magnitudes of what every linear returns and hands back, kept on the device."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from mpkernels.amp import GradScaler
from mpkernels.nn.convert.linears import why_not
from mpkernels.precision.capture import check_is_module, is_linear
from mpkernels.precision.report import Report
from mpkernels.precision.tables import table as as_text
from mpkernels.precision.taps import COLUMNS, DATA, GRAD_X, NOTHING, OUT, SCALE, Tap, counts, first_fault, write_data


def watch(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, scaler: GradScaler | None = None, *,
    process_group: "distributed.ProcessGroup | None" = None,
) -> "Watch":  # fmt: skip
    """Keep the largest magnitudes of out and grad_x of every linear of `model`, on the device and without waiting for it.

    optimizer, scaler: a step ends with `scaler.update()`, so that skipped steps are steps too; without a scaler, or with one
    that is not enabled, with `optimizer.step()`; without either all that runs is one step. With the scaler
    `scaler.overflow_report(optimizer)` says which layer was the first, and whether in forward or backward.
    process_group: the ranks whose magnitudes count together: one all-reduce of the table in each step.
    nn.Linear and MPLinear alike, and nn.MultiheadAttention as a whole. Calls in evaluation without gradients do not count.
    Make it once the model is on its device and converted, and before a compiled model is called.
    Raises TypeError for what is no module, optimizer, scaler of mpkernels or group, ValueError for a model without linears and
    for ranks whose layers differ, RuntimeError for a model on meta or on several devices, and where there is a watch already.
    """
    check_is_module("watch", model)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        inner = ": pass the one inside it, its .optimizer" if hasattr(optimizer, "optimizer") else ""
        raise TypeError(f"watch: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}{inner}")
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"watch: scaler must be an mpkernels.GradScaler, got {type(scaler).__module__}.{type(scaler).__name__}")
    if process_group is not None and not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(f"watch: process_group must be a ProcessGroup that this rank is in, got {process_group!r}")
    return Watch(getattr(model, "_orig_mod", model), optimizer, scaler, process_group)


@dataclass(frozen=True)
class LayerAmax:
    """A layer in the report of a watch, in one step.

    out, grad_x: the largest magnitudes, of gradients times the loss scale; inf or NaN where one is, None where nothing came.
    room: how often the larger of the two may double before it leaves the format that the layer computes in. note: why the
    layer cannot be converted, "" where it can.
    """

    name: str
    policy: str
    out: float | None
    grad_x: float | None
    room: float | None
    note: str


@dataclass(frozen=True)
class WatchReport(Report):
    """Printed, a table with a line per layer. module, direction: of the first inf or NaN of the step; amax: of that layer's
    out in backward. loss_scale: None without a scaler.
    """

    layers: tuple[LayerAmax, ...] = ()
    step: int = 0
    loss_scale: float | None = None


class Watch:
    """What `mpk.watch` returns. Everything it has put on the model is gone after `close()`, or after its `with` block."""

    def __init__(self, model: nn.Module, optimizer, scaler: GradScaler | None, process_group) -> None:
        found = list(_watched(model))
        if not found:
            raise ValueError("watch: the model has no linear: there is nothing to watch")
        _check_not_watched(found, scaler)
        device, dtype = _device_and_dtype(found)
        _check_ranks([name for name, _, _ in found], process_group)
        self._scaler, self._group, self._steps, self._is_open = scaler, process_group, 0, True
        self._notes = [note for _, _, note in found]
        self._table = torch.full((1 + len(found), len(COLUMNS)), NOTHING, dtype=dtype, device=device)
        self._last = self._table.clone()
        clock = itertools.count()
        self._taps = [Tap(name, module, self._table, row, clock) for row, (name, module, _) in enumerate(found, 1)]
        self._order: list[int] | None = None  # the rows as layers were first called; None: no step has ended
        self._data, self._scale = self._table[0, DATA], self._table[0, SCALE]
        self._handles = [model.register_forward_pre_hook(_Inputs(self._data), with_kwargs=True)]
        for tap in self._taps:
            self._handles += tap.register()
        if scaler is not None:
            scaler._layer_watch = self
        if optimizer is not None and (scaler is None or not scaler.is_enabled()):
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._end_step(None)))

    # ----- public ---------------------------------------------------------------

    def report(self) -> WatchReport:
        """The last step that has ended, or what has run so far where none has; print it. Waits for the device.

        Raises RuntimeError once the watch is closed.
        """
        self._check_is_open()
        rows, order = (self._last if self._steps else self._table).tolist(), self._current_order()
        fault, layers = first_fault(rows, order), tuple(self._layer(tap, rows[tap.row]) for tap in self._taps)
        scale = rows[0][SCALE] if rows[0][SCALE] != NOTHING else None
        step = f"step {self._steps}" if self._steps else "so far"
        at = "" if scale is None else f" at loss scale {scale:g}"
        head = f"{step}{at}: {self._say(rows, order) or 'every out and grad_x is finite'}"
        lines = [[_shown(layer.name), layer.policy, *map(_number, (layer.out, layer.grad_x)), _bits(layer.room), layer.note]
                 for layer in layers]  # fmt: skip
        text = as_text(["layer", "policy", "out", "grad_x", "room", ""], lines, 2)
        tap = None if fault is None or fault.row == 0 else self._taps[fault.row - 1]
        return WatchReport(
            fault is None, f"{head}\n{text}", None if tap is None else tap.name, None if fault is None else fault.direction,
            amax=rows[tap.row][OUT] if tap is not None and fault.direction == "backward" else None,
            layers=layers, step=self._steps, loss_scale=scale,
        )  # fmt: skip

    def close(self) -> None:
        """Take every hook off the model, the optimizer and the scaler; again, it does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._scaler is not None and self._scaler._layer_watch is self:
            self._scaler._layer_watch = None
        self._is_open = False

    def __enter__(self) -> "Watch":
        self._check_is_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """How many steps have ended, and the tables; for `torch.save`, and `torch.load(weights_only=True)`.

        Waits for the device. Raises RuntimeError once the watch is closed.
        """
        self._check_is_open()
        return {
            "layers": [tap.name for tap in self._taps],
            "steps": self._steps,
            "order": self._order,
            "table": self._table.to("cpu", copy=True),
            "last": self._last.to("cpu", copy=True),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict()` returned.

        Raises TypeError for what is no such dict, ValueError for one of other layers, RuntimeError once the watch is closed.
        Nothing is loaded then.
        """
        self._check_is_open()
        self._check_state(state_dict)
        self._steps, order = state_dict["steps"], state_dict["order"]
        self._order = None if order is None else list(order)
        self._table.copy_(state_dict["table"])
        self._last.copy_(state_dict["last"])

    # ----- what ends a step, and what the scaler asks ---------------------------------------------------------------

    @torch.no_grad()
    def _end_step(self, scale: torch.Tensor | None) -> None:
        """scale: that of the step. No host sync."""
        if scale is not None:
            self._scale.copy_(scale)
        if self._group is not None:  # as bits, which order as magnitudes do, with inf and NaN on top
            bits = self._table.view(torch.int64 if self._table.dtype == torch.float64 else torch.int32)
            distributed.all_reduce(bits, distributed.ReduceOp.MAX, self._group)
        self._last.copy_(self._table)
        self._table.fill_(NOTHING)
        if self._order is None:
            self._order = self._current_order()
        self._steps += 1

    def _sentence(self, has_ended: bool) -> str:
        """What was the first inf or NaN of the step, which has ended or is about to. Waits for the device."""
        rows = (self._last if has_ended else self._table).tolist()
        return self._say(rows, self._current_order()) or "out and grad_x of every linear are finite"

    # ----- inside ---------------------------------------------------------------

    def _check_is_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("watch: it is closed: make a new one with mpk.watch(model, ...)")

    def _check_state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"watch: state_dict must be what a watch's state_dict() returned, got {type(state).__name__}")
        if missing := [name for name in ("layers", "steps", "order", "table", "last") if name not in state]:
            raise ValueError(f"watch: state_dict lacks {', '.join(missing)}: it is not that of a watch")
        names = [tap.name for tap in self._taps]
        if state["layers"] != names:
            other = set(state["layers"]) ^ set(names)
            raise ValueError(
                f"watch: state_dict is of other layers than the model has: {', '.join(sorted(other)) or 'in order'}"
            )
        for name in ("table", "last"):
            if not isinstance(state[name], torch.Tensor) or state[name].shape != self._table.shape:
                raise ValueError(f"watch: {name} of the state_dict must be a tensor {tuple(self._table.shape)}")

    def _current_order(self) -> list[int]:
        """The rows in the order of first calls; layers that the first step did not call come last, as the model has them."""
        if self._order is not None:
            return self._order
        taps = sorted(self._taps, key=lambda tap: math.inf if tap.position is None else tap.position)
        return [tap.row for tap in taps]

    def _say(self, rows: list[list[float]], order: list[int]) -> str | None:
        fault = first_fault(rows, order)
        if fault is None:
            return None
        what = "has NaN" if math.isnan(fault.amax) else "reaches inf"
        if fault.direction == "data":
            return f"in the data: what the model was given {what}"
        name = _shown(self._taps[fault.row - 1].name)
        if fault.direction == "forward":
            return f"first in forward: {name} (out {what})"
        return f"first in backward: {name} (grad_x {what}); its output was fine (amax {rows[fault.row][OUT]:.3g})"

    def _layer(self, tap: Tap, row: list[float]) -> LayerAmax:
        out, grad_x = (None if value == NOTHING else value for value in (row[OUT], row[GRAD_X]))
        policy = getattr(tap.module, "policy", None)
        largest = max((v for v in (out, grad_x) if v is not None), default=None)
        room = None
        if largest is not None and 0 < largest < math.inf:
            dtype = next(tap.module.parameters()).dtype if policy is None else policy.compute_dtype
            room = math.log2(torch.finfo(dtype).max / largest)
        return LayerAmax(tap.name, "" if policy is None else str(policy), out, grad_x, room, self._notes[tap.row - 1])


class _Inputs:
    """The hook that looks at what the model is given; a copy of it does nothing."""

    def __init__(self, cell: torch.Tensor | None = None) -> None:
        self.cell = cell

    def __reduce__(self):
        return _Inputs, ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.cell is not None and counts(module):
            write_data(self.cell, (args, kwargs))


def _watched(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, why it cannot be converted or "")."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside.update(module.modules())
            yield name, module, why_not(model, f"{name}.out_proj".lstrip("."), module.out_proj)
        elif is_linear(module) and module not in inside:
            yield name, module, why_not(model, name, module) or ""


def _check_not_watched(found: list[tuple[str, nn.Module, str]], scaler: GradScaler | None) -> None:
    for name, module, _ in found:
        taps = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
        if any(isinstance(tap, Tap) and tap.table is not None for tap in taps):
            raise RuntimeError(f"watch: {_shown(name)} is watched already: close() that watch first")
    if scaler is not None and scaler._layer_watch is not None:
        raise RuntimeError("watch: the scaler has a watch already: close() that first, or give each model its scaler")


def _device_and_dtype(found: list[tuple[str, nn.Module, str]]) -> tuple[torch.device, torch.dtype]:
    """Where the table lies, and in what: fp64 where a parameter is."""
    parameters = [p for _, module, _ in found for p in module.parameters()]
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) != 1:
        raise RuntimeError(f"watch: the linears must be on one device, got {', '.join(devices)}")
    is_double = any(p.dtype == torch.float64 for p in parameters)
    return torch.device(devices[0]), torch.float64 if is_double else torch.float32


def _check_ranks(names: list[str], group) -> None:
    if group is None:
        return
    found: list[list[str]] = [[] for _ in range(distributed.get_world_size(group))]
    distributed.all_gather_object(found, names, group)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise ValueError(f"watch: rank {rank} of process_group has other linears than its rank 0: {len(theirs)} of them")


def _shown(name: str) -> str:
    return name or "the model"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _bits(room: float | None) -> str:
    return "" if room is None else f"{room:.1f} bits"
