# SPDX-License-Identifier: Apache-2.0
"""update_scale_ in plain torch: scale * backoff at an overflow, * growth after growth_interval good steps."""

import torch

from mpkernels.ops.update_scale import ScaleCall
from mpkernels.runtime.fake import copy_


def update_scale_(call: ScaleCall) -> None:
    overflow, skipped = call.found_inf != 0, call.skipped
    good_steps = torch.where(overflow, 0, _count_up(call.growth_tracker))
    grow = good_steps.long() >= call.growth_interval  # which may be beyond int32
    hysteresis_left = call.hysteresis_tracker.clamp(min=0) - overflow.int()
    back_off = overflow & (hysteresis_left <= 0)

    scale = call.grad_scale.double()  # as torch: the factor is not rounded to fp32 before it is applied
    grown = (scale * call.growth_factor).clamp(max=call.max_scale)
    backed_off = (scale * call.backoff_factor).clamp(min=call.min_scale)
    copy_(call.grad_scale, torch.where(back_off, backed_off, torch.where(grow, grown, scale)))  # round: fp64 -> fp32
    copy_(call.growth_tracker, torch.where(grow, 0, good_steps))
    copy_(call.hysteresis_tracker, torch.where(grow, call.hysteresis, hysteresis_left.clamp(min=0)))
    more, in_a_row = _count_up(skipped).unbind()
    copy_(skipped, torch.stack([torch.where(overflow, more, skipped.select(0, 0)), torch.where(overflow, in_a_row, 0)]))


def _count_up(count: torch.Tensor) -> torch.Tensor:
    """One more, or as many as the dtype can say."""
    return count + (count < torch.iinfo(count.dtype).max).to(count.dtype)
