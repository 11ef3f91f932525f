# SPDX-License-Identifier: Apache-2.0
"""grads /= grad_scale, in place, in a part that allocates and one that writes."""

import torch

from mpkernels.ops.common.layout import overlaps
from mpkernels.ops.common.multi_tensor import inv_scale
from mpkernels.runtime.fake import copy_


class Unscaling:
    """What `write` needs to divide `grads`, of one device, unless the step is skipped: as torch's fused optimizers leave them.

    All of it is made here, before the first write of a step: `write` allocates nothing, so that no exception of the
    allocator can come between a step and its gradients.
    """

    def __init__(self, grads: list[torch.Tensor], grad_scale: torch.Tensor, found_inf: torch.Tensor | None):
        for grad in grads:
            if not grad.is_contiguous() and overlaps(grad):
                raise RuntimeError(
                    f"a gradient of shape {tuple(grad.shape)} overlaps itself (strides {grad.stride()}) and cannot be unscaled "
                    "in place: give the parameter a clone of it"
                )
        device = grads[0].device
        inv = inv_scale(grad_scale, device)
        if found_inf is not None:
            inv = torch.where(found_inf == 0, inv, 1.0)
        self._grads, self._inv = list(grads), {torch.float64: inv, torch.float32: inv.float()}
        narrow = [grad.numel() for grad in grads if grad.dtype.itemsize == 2]
        self._wide = torch.empty(max(narrow, default=0), dtype=torch.float32, device=device)

    def write(self) -> None:
        for grad in self._grads:
            if grad.dtype.itemsize > 2:
                grad.mul_(self._inv[grad.dtype])
            else:  # NOTE: 16 bits times a 0-d factor rounds the factor on CUDA
                wide = copy_(self._wide.narrow(0, 0, grad.numel()).view(grad.shape), grad)
                copy_(grad, wide.mul_(self._inv[torch.float32]))
