# SPDX-License-Identifier: Apache-2.0
"""Which layer breaks, and why, and what fits: questions about a model, answered by running it."""

from mpkernels.precision.adapt import Adapt, Change
from mpkernels.precision.advice import Advice, AdviceRow
from mpkernels.precision.advise import advise
from mpkernels.precision.invariance import check_batch_invariant
from mpkernels.precision.layer import PolicyRow
from mpkernels.precision.nonfinite import find_nonfinite
from mpkernels.precision.plan import Plan, PlanRow, plan
from mpkernels.precision.ranges import Range
from mpkernels.precision.report import Report
from mpkernels.precision.watch import Watch, watch
from mpkernels.precision.watch_report import LayerAmax, WatchReport

__all__ = [
    "Adapt", "Advice", "AdviceRow", "Change", "LayerAmax", "Plan", "PlanRow", "PolicyRow", "Range", "Report", "Watch",
    "WatchReport",
    "advise", "check_batch_invariant", "find_nonfinite", "plan", "watch",
]  # fmt: skip
