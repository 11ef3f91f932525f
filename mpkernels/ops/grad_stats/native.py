# SPDX-License-Identifier: Apache-2.0
"""grad_stats_ in C++: amax, count of non-finite, found_inf and norm, every gradient read once."""

from mpkernels.ops.common.layout import Tensors, described, is_dense
from mpkernels.ops.grad_stats import StatsCall
from mpkernels.runtime import native


def grad_stats_(call: StatsCall) -> None:
    grads = described(call.grads)
    if not grads.contiguous:
        grads = Tensors(grad if is_dense(grad) else grad.contiguous() for grad in grads)
    native.ops.grad_stats_(grads.table, *call[1:])
