# SPDX-License-Identifier: Apache-2.0
"""update_scale_ in plain torch: scale * backoff at an overflow, * growth after growth_interval good steps."""

import torch

from mpkernels.runtime.fake import copy_


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def update_scale_(
    grad_scale, growth_tracker, hysteresis_tracker, skipped, found_inf, growth_factor, backoff_factor, growth_interval,
    hysteresis, min_scale, max_scale,
):  # fmt: skip
    overflow = found_inf != 0
    good_steps = torch.where(overflow, 0, _count_up(growth_tracker))
    grow = good_steps.long() >= growth_interval  # which may be beyond int32
    hysteresis_left = hysteresis_tracker.clamp(min=0) - overflow.int()
    back_off = overflow & (hysteresis_left <= 0)

    scale = grad_scale.double()  # as torch: the factor is not rounded to fp32 before it is applied
    grown = (scale * growth_factor).clamp(max=max_scale)
    backed_off = (scale * backoff_factor).clamp(min=min_scale)
    copy_(grad_scale, torch.where(back_off, backed_off, torch.where(grow, grown, scale)))  # round: fp64 -> fp32
    copy_(growth_tracker, torch.where(grow, 0, good_steps))
    copy_(hysteresis_tracker, torch.where(grow, hysteresis, hysteresis_left.clamp(min=0)))
    more, in_a_row = _count_up(skipped).unbind()
    copy_(skipped, torch.stack([torch.where(overflow, more, skipped.select(0, 0)), torch.where(overflow, in_a_row, 0)]))


def _count_up(count: torch.Tensor) -> torch.Tensor:
    """One more, or as many as the dtype can say."""
    return count + (count < torch.iinfo(count.dtype).max).to(count.dtype)
