# SPDX-License-Identifier: Apache-2.0
"""mpkernels: mixed-precision training for PyTorch, done in kernels."""

from mpkernels import functional, nn, ops, optim
from mpkernels.amp import GradScaler
from mpkernels.nn import MPMLP, MPLinear, cached_weights, convert, convert_report, revert, warmup
from mpkernels.policy import Policy, default_policy, get_default_policy, set_default_policy
from mpkernels.precision import Adapt, advise, check_batch_invariant, find_nonfinite, plan, watch
from mpkernels.prove import prove
from mpkernels.runtime.compute_copy import refresh_
from mpkernels.runtime.resolve import is_available, why_not
from mpkernels.tune import tune

__version__ = "0.1.0"

__all__ = [
    "MPMLP",
    "Adapt",
    "GradScaler",
    "MPLinear",
    "Policy",
    "advise",
    "cached_weights",
    "check_batch_invariant",
    "convert",
    "convert_report",
    "default_policy",
    "find_nonfinite",
    "functional",
    "get_default_policy",
    "is_available",
    "nn",
    "ops",
    "optim",
    "plan",
    "prove",
    "refresh_",
    "revert",
    "set_default_policy",
    "tune",
    "warmup",
    "watch",
    "why_not",
]
