# SPDX-License-Identifier: Apache-2.0
"""What is said of skipped steps: the report of which gradients were not finite, and the warning after many in a row."""

import sys
import warnings
from collections.abc import Iterator

import torch

from mpkernels.ops.common.multi_tensor import count_nonfinite
from mpkernels.optim import _ranks
from mpkernels.optim._base import Optimizer

MANY = 20  # skipped steps in a row: a scale of 2^16 is 2^-4 by then
MOST = 0.75  # of all gradients: that many are not finite where the forward made inf or NaN

_SEARCH = (
    "check that the inputs and the loss are finite; torch.autograd.set_detect_anomaly(True), or forward hooks that look at "
    "isfinite(), find the operation"
)


def report(optimizer: torch.optim.Optimizer) -> str:
    """See `GradScaler.overflow_report`."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"overflow_report needs an optimizer of mpkernels.optim, which counts what it reads, got {_full_name(optimizer)}: "
            + _instead(optimizer)
        )
    all_stats = list(optimizer._stats.values())
    if not any(stats.found_inf.item() for stats in all_stats):
        return ""
    grad_scale = all_stats[0].grad_scale
    scale = "none" if grad_scale is None else f"{grad_scale.item():.9g}"
    head = f"step {optimizer.steps_called} skipped at scale {scale}: "
    return "\n".join(head + line for line in _lines(optimizer, all_stats))


def _full_name(optimizer) -> str:
    kind = type(optimizer)
    public = getattr(torch.optim, kind.__name__, None) is kind
    return f"{'torch.optim' if public else kind.__module__}.{kind.__qualname__}"


def _instead(optimizer) -> str:
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        return "pass the one inside it, its .optimizer"
    name = type(optimizer).__name__
    return f"train with mpkernels.optim.{name if name in ('AdamW', 'Adam', 'SGD') else 'AdamW'}"


def _lines(optimizer: Optimizer, all_stats: list) -> list[str]:
    """One line where it began in the forward, else a line for each gradient that is not finite, in order of backward.

    What forward makes inf or NaN reaches the last layer's gradient, and from there most others: a ReLU may stop it. Under a
    loss that is linear in the output it reaches the weights alone, through the inputs of their layers.
    """
    names = optimizer._parameter_names()
    order = {key: i for i, key in enumerate(names)}
    found = [
        (order.get(id(p), -1), names.get(id(p), f"a replaced parameter {tuple(p.shape)}"), size, count, amax, p.dim() > 1)
        for stats in all_stats
        for p, count, amax in _counted(stats)
        if (size := _ranks.local(p).numel())
    ]
    found.sort(key=lambda row: -row[0])  # the last registered is the first that backward reaches
    bad = [f"{name} {_what_is_bad(size, count, amax)}" for _, name, size, count, amax, _ in found if count]
    if not bad and optimizer._ranks.many:
        return ["every gradient of this rank is finite: another rank's is not, or it is not once it is unscaled"]
    if not bad:
        return ["every gradient is finite, but not once it is unscaled"]
    last_is_bad, others = found[0][3] != 0, len(found) - 1
    a_whole_one = any(count == size for _, _, size, count, *_ in found)
    weights = [count == size for _, _, size, count, _, is_weight in found if is_weight]
    from_the_end = last_is_bad and a_whole_one and len(bad) >= MOST * len(found)
    if not (from_the_end or (len(weights) > 1 and all(weights))):
        return bad
    many = "all" if len(bad) == len(found) else f"{len(bad) - 1} of"
    too = f", and {many} {others} other gradients have inf or NaN too" if others else ""
    return [f"{bad[0]}{too}: this began in the forward, the loss or the data, unless the scale is far too large: {_SEARCH}"]


def _counted(stats) -> Iterator[tuple[torch.Tensor, int, float]]:
    """(parameter, non-finite elements, amax) of each; counted now where the op did not, -1 where the gradient is gone."""
    for p, count, amax in zip(stats.params, stats.nonfinite.tolist(), stats.amax.tolist(), strict=True):
        if count < 0 and p.grad is not None:
            with torch.no_grad():
                now, amax_now = (t.item() for t in count_nonfinite(_ranks.local(p.grad)))
            count, amax = (now, amax_now) if now else (count, amax)  # none: it is another gradient
        yield p, count, amax


def _what_is_bad(size: int, count: int, amax: float) -> str:
    if count < 0:
        return f"has non-finite of {size}, not counted: the gradient was replaced before this report"
    return f"has {count} non-finite of {size}, {_finite(size - count, amax)}"


def _finite(count: int, amax: float) -> str:
    return f"amax {amax:g} of the finite ones" if count else "no finite element"


class SkipWatch:
    """Warns once per run of skipped steps, without waiting for the device.

    The counter is looked at only when a run can be long enough since it was last known: in `MANY` updates without a skip
    once. On a GPU it is copied to pinned memory then, and read at a later update, when an event says that it is there.
    """

    def __init__(self):
        self._updates = 0
        self._due = MANY  # the update at which a run can be as long
        self._copy: tuple[int, torch.Tensor, torch.cuda.Event] | None = None  # of which update, and when it is there
        self._last = (0, 0)  # update and length of the run when the counter was last read
        self._warned = False  # of this run

    def after_update(self, skipped: torch.Tensor, scale: torch.Tensor) -> None:
        """To be called after each update with the scaler's counters."""
        self._updates += 1
        if self._copy is None and self._updates < self._due:
            return
        if skipped.is_cuda and torch.cuda.is_current_stream_capturing():  # a question about an event would end the capture
            return
        if self._copy is not None:
            update, values, event = self._copy
            if event.query():
                self._copy = None
                self._read(update, *values.tolist())
            return
        values = torch.stack([skipped[1].double(), scale.double()])  # fp64 holds both
        if values.is_cuda:
            self._copy = self._updates, *_copy_to_host(values)
        elif values.is_cpu and type(values) is torch.Tensor:
            self._read(self._updates, *values.tolist())

    def _read(self, update: int, in_a_row: float, scale: float) -> None:
        last_update, last = self._last
        goes_on = in_a_row >= last + update - last_update
        self._last = update, in_a_row
        self._warned &= goes_on
        self._due = update + (MANY - int(in_a_row) if in_a_row < MANY else MANY)
        if in_a_row >= MANY and not self._warned:
            self._warned = True
            warnings.warn(
                f"the last {in_a_row:.0f} steps were skipped: a gradient is inf or NaN each time, and the loss scale is "
                f"{scale:.9g} now. No scale helps where the forward or the data has inf or NaN: {_SEARCH}. "
                "scaler.overflow_report(optimizer) names the gradients.",
                stacklevel=_callers_level(),
            )


def _callers_level() -> int:
    """The stacklevel of the user's call, as seen from the caller: torch wraps methods in a number of frames of its own."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("mpkernels", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _copy_to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """A copy in pinned memory, and the event after which it is there."""
    with torch.cuda.device(values.device):
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event
