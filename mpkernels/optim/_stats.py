# SPDX-License-Identifier: Apache-2.0
"""What one read of the gradients found, how several reads become one, and the clip that a read is for."""

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mpkernels.ops.grad_stats import grad_stats_
from mpkernels.optim import _ranks


@dataclass(eq=False)
class GradStats:
    """What one read of the gradients of one device found; see mpkernels.ops.grad_stats. All on the device."""

    params: list[torch.Tensor]
    found_inf: torch.Tensor  # on many ranks: any rank's
    amax: torch.Tensor
    nonfinite: torch.Tensor
    grad_norm: torch.Tensor | None
    grad_scale: torch.Tensor | None  # a copy: update() changes the scaler's


class Clip:
    """A clip that was asked for when these gradients were read, and is left to the step.

    It holds for as long as one of them is still there as it was read; then all that are there are clipped by their norm.
    Where all were replaced, or written since, it is dropped: torch, which clips at once, does not clip what comes after.

    It does not keep the gradients, and no weak reference to one, which would keep torch from swapping it: it knows them by
    their memory, a weak reference to which keeps its name from being given to another's.
    """

    def __init__(self, max_norm: float, grads: list[torch.Tensor]):
        self.max_norm = max_norm
        self._storages = [StorageWeakRef(_ranks.local(grad).untyped_storage()) for grad in grads]
        self._read = list(map(_what_was_read, grads))

    def is_gone(self, grads: list[torch.Tensor]) -> bool:
        """Whether none of those is among these as it was read; one of no gradients stays."""
        return bool(self._read) and set(self._read).isdisjoint(map(_what_was_read, grads))

    def is_stale(self, grads: list[torch.Tensor]) -> bool:
        """Whether one is another, or was written since."""
        return list(map(_what_was_read, grads)) != self._read


def _what_was_read(grad: torch.Tensor) -> tuple:
    """Where a gradient lies, and what changes when it is written, through what this rank holds of a DTensor too."""
    local = _ranks.local(grad)
    return local.untyped_storage()._cdata, local.storage_offset(), local._version, grad._version


def read(
    device, params: list[torch.Tensor], grads: list[torch.Tensor], grad_scale: torch.Tensor | None, norm: bool
) -> GradStats:
    """One read of `grads`, the (local) gradients of `params`; without any, what nothing found."""
    scale = scalar(grad_scale, device)
    make = torch.empty if params else torch.zeros  # the op writes all of them
    stats = GradStats(
        params=params,
        found_inf=make((), dtype=torch.float32, device=device),
        amax=make(len(params), dtype=torch.float64, device=device),
        nonfinite=make(len(params), dtype=torch.int64, device=device),
        grad_norm=make((), dtype=torch.float64, device=device) if norm else None,
        grad_scale=None if scale is None else scale.clone(),
    )
    if params:
        given = (grads, stats.grad_scale, stats.found_inf, stats.amax, stats.nonfinite, stats.grad_norm)
        grad_stats_(*given, checked=True)  # by the optimizer, by name
    return stats


def scalar(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A 1-element tensor as the ops take it: 0-d, on `device`, without waiting for either."""
    if tensor is None:
        return None
    if tensor.device != device:
        tensor = tensor.to(device, non_blocking=True)
    return tensor.reshape(()) if tensor.dim() else tensor


def joined(reads: list[GradStats]) -> GradStats:
    """What several reads on one device found."""
    if len(reads) == 1:
        return reads[0]
    return GradStats(
        params=[p for read in reads for p in read.params],
        found_inf=torch.stack([read.found_inf for read in reads]).amax(),
        amax=torch.cat([read.amax for read in reads]),
        nonfinite=torch.cat([read.nonfinite for read in reads]),
        grad_norm=reads[0].grad_norm,
        grad_scale=reads[0].grad_scale,
    )


def combine_devices(stats: list[GradStats]) -> None:
    """One verdict and one norm over several devices, held by the first."""
    first, here = stats[0], stats[0].found_inf.device
    first.found_inf = torch.stack([s.found_inf.to(here, non_blocking=True) for s in stats]).amax()
    if first.grad_norm is not None:
        first.grad_norm = torch.stack([s.grad_norm.to(here, non_blocking=True) for s in stats]).square().sum().sqrt()
