# SPDX-License-Identifier: Apache-2.0
"""When a clip that waits for the step is dropped. Who is without gradients keeps it: other ranks may have theirs."""

import torch

from mpkernels.optim.grad_reading import PendingClip


def test_clip_of_no_gradients_stays():
    assert not PendingClip(1.0, []).is_gone([torch.ones(3)])


def test_clip_stays_where_gradients_were_dropped():
    assert not PendingClip(1.0, [torch.ones(3)]).is_gone([])


def test_clip_is_gone_where_all_gradients_are_others_or_were_written():
    grads = [torch.ones(3), torch.ones(4)]
    clip = PendingClip(1.0, grads)
    assert not clip.is_gone(grads)
    assert clip.is_gone([torch.ones(3), torch.ones(4)])
    grads[0].mul_(2)
    assert not clip.is_gone(grads)
    assert clip.is_stale(grads)
    grads[1].mul_(2)
    assert clip.is_gone(grads)
