# SPDX-License-Identifier: Apache-2.0
"""GradScaler: loss scaling without a host sync, with a report of what overflowed."""

from mpkernels.amp.scaler import GradScaler

__all__ = ["GradScaler"]
