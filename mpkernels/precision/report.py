# SPDX-License-Identifier: Apache-2.0
"""Report: what a check of a model found, as one sentence and as fields."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Report:
    """What a check of a model found. True where it found nothing; printed, the sentence that says what it found.

    module: the name of the first module, in the order in which modules ended, that shows the fault: "" is the model itself,
    None where no module does. direction: where it shows; "data": in what the model was given. rows: of
    `check_batch_invariant`, the smallest number of rows whose result differs. amax: of `find_nonfinite`, the largest
    magnitude of what that module read (in backward, of the gradient that it read).
    """

    ok: bool
    message: str
    module: str | None = None
    direction: Literal["data", "forward", "backward"] | None = None
    rows: int | None = None
    amax: float | None = None

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.message
