# SPDX-License-Identifier: Apache-2.0
"""A ReLU that drops NaN and one that keeps it: what tests/toolchain/triton_aot.py must tell apart."""

import triton
import triton.language as tl


@triton.jit
def relu_that_drops_nan(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.maximum(tl.load(x_ptr + index), 0.0))


@triton.jit
def relu_that_keeps_nan(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.maximum(tl.load(x_ptr + index), 0.0, propagate_nan=tl.PropagateNan.ALL))


def cases(sm: int, every: bool):
    for kernel in (relu_that_drops_nan, relu_that_keeps_nan):
        yield kernel, {"x_ptr": "*fp32:16", "out_ptr": "*fp32:16"}, {"BLOCK": 128}, {}
