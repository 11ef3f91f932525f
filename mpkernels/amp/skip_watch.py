# SPDX-License-Identifier: Apache-2.0
"""The warning after many skipped steps in a row."""

import sys
import warnings

import torch

from mpkernels.amp.overflow_report import HOW_TO_SEARCH

MANY = 20  # skipped steps in a row: a scale of 2^16 is 2^-4 by then


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
            self._copy = self._updates, *copy_to_host(values)
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
                f"{scale:.9g} now. No scale helps where the forward or the data has inf or NaN: {HOW_TO_SEARCH}. "
                "scaler.overflow_report(optimizer) names the gradients.",
                stacklevel=callers_level(),
            )


def callers_level() -> int:
    """The stacklevel of the user's call, as seen from the caller: torch wraps methods in a number of frames of its own."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("mpkernels", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def copy_to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """A copy in pinned memory, and the event after which it is there."""
    with torch.cuda.device(values.device):
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event
