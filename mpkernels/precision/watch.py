# SPDX-License-Identifier: Apache-2.0
"""watch: in training, the largest magnitudes of what every linear returns and hands back, kept on the device."""

import math
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn

from mpkernels.amp import GradScaler
from mpkernels.amp.skip_watch import copy_to_host
from mpkernels.nn.convert.linears import is_linear, uncompiled, why_not
from mpkernels.nn.linear import is_converted, is_watched
from mpkernels.precision import watch_report
from mpkernels.precision.adapt import LAG, Adapt, Adaptation
from mpkernels.precision.capture import check_is_module
from mpkernels.precision.tables import shown
from mpkernels.precision.taps import COLUMNS, NOTHING, InputTap, Tap, end_step_of
from mpkernels.precision.watch_report import WatchReport


def watch(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, scaler: GradScaler | None = None, *,
    adapt: Adapt | None = None, process_group: "distributed.ProcessGroup | None" = None,
) -> "Watch":  # fmt: skip
    """Keep the largest magnitudes of out and grad_x of every linear of `model`, on the device and without waiting for it.

    optimizer, scaler: a step ends with `scaler.update()`, so that skipped steps are steps too; without a scaler, or with one
    that is not enabled, with `optimizer.step()`; without either all that runs is one step. With the scaler
    `scaler.overflow_report(optimizer)` says which layer was the first, and whether in forward or backward.
    adapt: an `mpk.Adapt`: layers change their policy where they overflow, by what was seen four steps ago, which is on the host
    by then: the same steps give the same changes. The optimizer stays valid. Something has to skip steps that overflow: the
    scaler, or an optimizer of mpkernels with skip_nonfinite=True. Not inside a CUDA graph, where a policy is frozen.
    process_group: the ranks whose magnitudes count together: one all-reduce of the table in each step. With adapt on several
    ranks it has to be there, under DDP too, so that all change alike.
    nn.Linear and MPLinear alike, and nn.MultiheadAttention as a whole. Calls in evaluation without gradients do not count.
    Make it once the model is on its device and converted, and before a compiled model is called.
    Raises TypeError for what is no module, optimizer, scaler of mpkernels or group, ValueError for a model without linears, for
    ranks whose layers differ, and for adapt where it has no layer to change, nothing that skips, or no group; RuntimeError for
    a model on meta or on several devices, and where there is a watch already.
    """
    check_is_module("watch", model)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        inner = ": pass the one inside it, its .optimizer" if hasattr(optimizer, "optimizer") else ""
        raise TypeError(f"watch: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}{inner}")
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"watch: scaler must be an mpkernels.GradScaler, got {type(scaler).__module__}.{type(scaler).__name__}")
    if process_group is not None and not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(f"watch: process_group must be a ProcessGroup that this rank is in, got {process_group!r}")
    if adapt is not None:
        _check_adapt(adapt, optimizer, scaler, process_group)
    return Watch(uncompiled(model), optimizer, scaler, adapt, process_group)


class Watch:
    """What `mpk.watch` returns. Everything it has put on the model is gone after `close()`, or after its `with` block.

    It lives as long as what it was given: the scaler, or the optimizer without one. With neither, keep it: once it is garbage,
    it is closed.
    """

    def __init__(self, model: nn.Module, optimizer, scaler: GradScaler | None, adapt: Adapt | None, process_group) -> None:
        found = list(_watched(model))
        if not found:
            raise ValueError("watch: the model has no linear: there is nothing to watch")
        _check_not_watched(found, scaler)
        device, dtype = _device_and_dtype(found)
        _check_ranks([name for name, _, _ in found], process_group)
        table = torch.full((1 + len(found), COLUMNS), NOTHING, dtype=dtype, device=device)
        self._called: list[int] = []  # the rows of layers in the order of their first calls
        self._taps = [Tap(*each, table, row, self._called, adapt is not None) for row, each in enumerate(found, 1)]
        least_scale = 1.0 if scaler is None else max(1.0, scaler._min_scale)
        self._adaptation = None if adapt is None else Adaptation(adapt, self._taps, least_scale)
        self._pending: deque[_OnHost] = deque()  # tables of the last steps, with adapt
        self._scaler, self._group, self._steps = scaler, process_group, 0
        self._table, self._last, self._move_table = table, table.clone(), end_step_of(table)
        self._order: list[int] | None = None  # that at the end of the first step
        handles = [model.register_forward_pre_hook(InputTap(table), with_kwargs=True)]
        for tap in self._taps:
            handles += tap.register()
        if scaler is not None:
            scaler._layer_watch = self
        if optimizer is not None and (scaler is None or not scaler.is_enabled()):
            handles.append(optimizer.register_step_post_hook(lambda *_: self._end_step(None)))
        self._remove_hooks = weakref.finalize(self, _remove, handles)  # which hold no module: it would never be garbage
        self._remove_hooks.atexit = False

    # ----- public ---------------------------------------------------------------

    def report(self) -> WatchReport:
        """The last step that has ended, or what has run so far where none has; print it. Waits for the device.

        Raises RuntimeError once the watch is closed.
        """
        self._check_is_open()
        rows = (self._last if self._steps else self._table).tolist()
        changes = () if self._adaptation is None else tuple(self._adaptation.changes)
        return watch_report.report(self._taps, rows, self._current_order(), self._steps, changes)

    def close(self) -> None:
        """Take every hook off the model, the optimizer and the scaler; again, it does nothing."""
        self._remove_hooks()
        if self._scaler is not None and self._scaler._layer_watch is self:
            self._scaler._layer_watch = None

    def __enter__(self) -> "Watch":
        self._check_is_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self):
        raise TypeError("watch: it belongs to one model and is neither copied nor pickled: keep its state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """How many steps have ended, the tables, and what adapt has done; `torch.load(weights_only=True)` reads it.

        Waits for the device. Raises RuntimeError once the watch is closed.
        """
        self._check_is_open()
        return {
            "layers": [tap.name for tap in self._taps],
            "steps": self._steps,
            "order": self._order,
            "table": self._table.to("cpu", copy=True),
            "last": self._last.to("cpu", copy=True),
            "adapt": None if self._adaptation is None else self._adaptation.state_dict(),
            "pending": [torch.tensor(rows.read(), dtype=self._table.dtype, device="cpu") for rows in self._pending],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict()` returned; with adapt, layers have the policies again that they had then.

        Raises TypeError for what is no such dict, ValueError for one of other layers, RuntimeError once the watch is closed.
        Nothing is loaded then.
        """
        self._check_is_open()
        self._check_state(state_dict)
        self._steps, order = state_dict["steps"], state_dict["order"]
        self._order = None if order is None else list(order)
        self._table.copy_(state_dict["table"])
        self._last.copy_(state_dict["last"])
        self._pending = deque(map(_OnHost, state_dict["pending"]))
        if self._adaptation is not None:
            self._adaptation.load_state_dict(state_dict["adapt"])

    # ----- what ends a step, and what the scaler asks ---------------------------------------------------------------

    def _end_step(self, scale: torch.Tensor | None) -> float | None:
        """scale: that of the step. The scale to go back to, or None. Without adapt nothing waits for the device."""
        if self._group is not None:  # as bits, which order as magnitudes do, with inf and a NaN without a sign on top
            self._table.masked_fill_(self._table.isnan(), math.nan)
            bits = self._table.view(torch.int64 if self._table.dtype == torch.float64 else torch.int32)
            distributed.all_reduce(bits, distributed.ReduceOp.MAX, self._group)
        self._move_table(self._table, self._last, scale)
        if self._order is None:
            self._order = self._current_order()
            if self._group is not None:  # where layers are called by what the data is, ranks have other orders
                order = torch.tensor(self._order, dtype=torch.int64, device=self._table.device)
                distributed.broadcast(order, distributed.get_global_rank(self._group, 0), self._group)
                self._order = order.tolist()
        self._steps += 1
        return None if self._adaptation is None else self._adapt()

    def _adapt(self) -> float | None:
        self._pending.append(_OnHost(self._last))
        if len(self._pending) <= LAG:
            return None
        rows = self._pending.popleft().read()
        return self._adaptation.decide(self._steps, self._steps - LAG, rows, self._order)

    def _sentence(self, has_ended: bool) -> str | None:
        """What was the first inf or NaN of the step, which has ended or is about to; None without one. Waits for the device."""
        rows = (self._last if has_ended else self._table).tolist()
        return watch_report.sentence(self._taps, rows, self._current_order())

    # ----- inside ---------------------------------------------------------------

    def _check_is_open(self) -> None:
        if not self._remove_hooks.alive:
            raise RuntimeError("watch: it is closed: make a new one with mpk.watch(model, ...)")

    def _check_state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"watch: state_dict must be what a watch's state_dict() returned, got {type(state).__name__}")
        if missing := [name for name in self.state_dict() if name not in state]:
            raise ValueError(f"watch: state_dict lacks {', '.join(missing)}: it is not that of a watch")
        for name in ("layers", "pending"):
            if not isinstance(state[name], list):
                raise ValueError(f"watch: {name} of the state_dict must be a list, got {type(state[name]).__name__}")
        names, steps, order = [tap.name for tap in self._taps], state["steps"], state["order"]
        if state["layers"] != names:
            other = set(map(str, state["layers"])) ^ set(names)
            raise ValueError(
                f"watch: state_dict is of other layers than the model has: {', '.join(sorted(other)) or 'in order'}"
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"watch: steps of the state_dict must be a natural number, got {steps!r}")
        if order is not None and (
            not isinstance(order, list)
            or not all(isinstance(row, int) for row in order)
            or sorted(order) != [tap.row for tap in self._taps]
        ):
            raise ValueError(f"watch: order of the state_dict must be the rows of {len(names)} layers, got {order!r}")
        tables = {
            "table": state["table"],
            "last": state["last"],
            **{f"pending[{i}]": t for i, t in enumerate(state["pending"])},
        }
        for name, table in tables.items():
            if not isinstance(table, torch.Tensor) or table.shape != self._table.shape:
                raise ValueError(f"watch: {name} of the state_dict must be a tensor {tuple(self._table.shape)}")
        if self._adaptation is not None:
            self._adaptation.check(state["adapt"])
        elif state["adapt"] is not None:
            raise ValueError("watch: state_dict is of a watch with adapt=, which this one is without")

    def _current_order(self) -> list[int]:
        """The rows in the order of first calls; layers that the first step did not call come last, as the model has them."""
        return self._order or list(dict.fromkeys([*self._called, *(tap.row for tap in self._taps)]))


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()


class _OnHost:
    """The rows of a table on their way to the host."""

    def __init__(self, table: torch.Tensor) -> None:
        self.rows, self.event = copy_to_host(table) if table.is_cuda else (table.tolist(), None)

    def read(self) -> list[list[float]]:
        """Waits for them, which after LAG steps is no wait."""
        if self.event is None:
            return self.rows
        self.event.synchronize()
        return self.rows.tolist()


def _check_adapt(adapt: object, optimizer, scaler: GradScaler | None, process_group) -> None:
    if not isinstance(adapt, Adapt):
        raise TypeError(f"watch: adapt must be an mpkernels.Adapt, got {type(adapt).__name__}")
    skips = (scaler is not None and scaler.is_enabled()) or getattr(optimizer, "skip_nonfinite", False)
    if not skips:
        raise ValueError(
            "watch: adapt: nothing skips a step that overflows, after which parameters are NaN: give the scaler, or an "
            "optimizer of mpkernels.optim with skip_nonfinite=True"
        )
    is_many = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if is_many and process_group is None:
        raise ValueError(
            f"watch: adapt on {distributed.get_world_size()} ranks: give process_group=, as torch.distributed.group.WORLD, "
            "so that all change alike"
        )


def _watched(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, why it cannot be converted or "")."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside.update(module.modules())
            yield name, module, why_not(model, f"{name}.out_proj".lstrip("."), module.out_proj)
        elif is_linear(module) and module not in inside:
            yield name, module, "" if is_converted(module) else why_not(model, name, module) or ""


def _check_not_watched(found: list[tuple[str, nn.Module, str]], scaler: GradScaler | None) -> None:
    for name, module, _ in found:
        if is_watched(module):
            raise RuntimeError(f"watch: {shown(name)} is watched already: close() that watch first")
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
