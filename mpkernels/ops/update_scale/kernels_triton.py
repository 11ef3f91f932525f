# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of update_scale_: one program, one element of everything."""

import triton
import triton.language as tl

from mpkernels.ops.common.kernels_triton import double

MOST_INT32, MOST_INT64 = tl.constexpr(2**31 - 1), tl.constexpr(2**63 - 1)


@triton.jit
def count_up(count, MOST: tl.constexpr):
    """One more, or as many as the dtype can say."""
    return count + (count < MOST).to(count.dtype)


@triton.jit
def update_scale_kernel(
    grad_scale_ptr, growth_tracker_ptr, hysteresis_tracker_ptr, skipped_ptr, skipped_stride, found_inf_ptr,
    growth_factor: tl.float64, backoff_factor: tl.float64, growth_interval: tl.int64, hysteresis: tl.int32,
    min_scale: tl.float64, max_scale: tl.float64,
):  # fmt: skip
    # ----- load
    overflow = tl.load(found_inf_ptr) != 0  # NOTE: true for NaN
    scale = tl.load(grad_scale_ptr).to(tl.float64)
    hysteresis_left = tl.maximum(tl.load(hysteresis_tracker_ptr), 0) - overflow.to(tl.int32)
    good_steps = tl.where(overflow, 0, count_up(tl.load(growth_tracker_ptr), MOST_INT32))
    in_a_row = tl.where(overflow, count_up(tl.load(skipped_ptr + skipped_stride), MOST_INT64), 0)
    # ----- update
    grow = good_steps >= growth_interval
    grown, backed_off = scale * double(growth_factor), scale * double(backoff_factor)
    grown = tl.where(grown > double(max_scale), double(max_scale), grown)
    backed_off = tl.where(backed_off < double(min_scale), double(min_scale), backed_off)
    scale = tl.where(overflow & (hysteresis_left <= 0), backed_off, tl.where(grow, grown, scale))
    # ----- store
    tl.store(grad_scale_ptr, scale.to(tl.float32))  # round: fp64 -> fp32
    tl.store(growth_tracker_ptr, tl.where(grow, 0, good_steps))
    tl.store(hysteresis_tracker_ptr, tl.where(grow, hysteresis, tl.maximum(hysteresis_left, 0)))
    all_skipped = tl.load(skipped_ptr)
    tl.store(skipped_ptr, tl.where(overflow, count_up(all_skipped, MOST_INT64), all_skipped))
    tl.store(skipped_ptr + skipped_stride, in_a_row)
