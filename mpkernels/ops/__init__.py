# SPDX-License-Identifier: Apache-2.0
"""The ops, one folder each; importing this package registers them all."""

from mpkernels.ops import grad_stats, linear_act, optimizer_update, quantize, update_scale

__all__ = ["grad_stats", "linear_act", "optimizer_update", "quantize", "update_scale"]
