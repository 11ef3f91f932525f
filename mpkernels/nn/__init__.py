# SPDX-License-Identifier: Apache-2.0
"""Layers, and the conversion of models to them."""

from mpkernels.nn.convert import convert, revert
from mpkernels.nn.convert.report import convert_report
from mpkernels.nn.linear import MPLinear, cached_weights
from mpkernels.nn.mlp import MPMLP
from mpkernels.nn.sequential import MPSequential
from mpkernels.nn.warmup import warmup

__all__ = ["MPMLP", "MPLinear", "MPSequential", "cached_weights", "convert", "convert_report", "revert", "warmup"]
