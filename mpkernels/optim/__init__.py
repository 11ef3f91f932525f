# SPDX-License-Identifier: Apache-2.0
"""Optimizers with torch's arguments whose step unscales, checks, clips, updates and writes the 16-bit copies."""

from mpkernels.optim.adamw import Adam, AdamW
from mpkernels.optim.lion import Lion
from mpkernels.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion"]
