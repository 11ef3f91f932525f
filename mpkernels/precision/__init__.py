# SPDX-License-Identifier: Apache-2.0
"""Which layer breaks, and why: questions about a model's numerics, answered by running it."""

from mpkernels.precision.invariance import check_batch_invariant
from mpkernels.precision.nonfinite import find_nonfinite
from mpkernels.precision.report import Report

__all__ = ["Report", "check_batch_invariant", "find_nonfinite"]
