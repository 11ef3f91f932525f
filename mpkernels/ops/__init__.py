# SPDX-License-Identifier: Apache-2.0
"""The ops, one folder each; importing this package registers them all."""

from mpkernels.ops import adamw, grad_stats, linear_act, sgd, update_scale

__all__ = ["adamw", "grad_stats", "linear_act", "sgd", "update_scale"]
