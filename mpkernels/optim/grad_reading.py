# SPDX-License-Identifier: Apache-2.0
"""What is done to gradients before a step: one read for found_inf and the norm, a clip that waits for the step, unscaling."""

from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mpkernels.ops import grad_stats
from mpkernels.ops.common.layout import overlaps
from mpkernels.ops.common.multi_tensor import inv_scale, skip_flag
from mpkernels.optim.distributed import local, norm_of, squares_of
from mpkernels.optim.step_plan import StepPlan
from mpkernels.runtime.fake import copy_
from mpkernels.runtime.op import Op


@dataclass(eq=False)
class GradStats:
    """What one read of the gradients of one device found; see mpkernels.ops.grad_stats. All on the device."""

    params: list[torch.Tensor]
    found_inf: torch.Tensor  # on many ranks: any rank's
    amax: torch.Tensor
    nonfinite: torch.Tensor
    grad_norm: torch.Tensor | None
    grad_scale: torch.Tensor | None  # a copy: update() changes the scaler's


@dataclass(frozen=True)
class LastRead:
    """What is told of the last step: the statistics of its gradients, by device, and the names of the parameters by id."""

    stats: list[GradStats]
    steps_called: int
    names: dict[int, str]
    on_many_ranks: bool


class GradReader:
    """The gradients of one optimizer as of the last read.

    stats: by device; empty where no read says anything of the gradients of the next step. norm: of the last read that took it.
    """

    def __init__(self):
        self.stats: dict[torch.device, GradStats] = {}
        self.norm: torch.Tensor | None = None
        self._clip: PendingClip | None = None

    def forget(self) -> None:
        """Drop the statistics: the next step may be of other gradients."""
        self.stats = {}

    def found_inf_by_device(self) -> dict[torch.device, torch.Tensor]:
        return {device: stats.found_inf for device, stats in self.stats.items()}

    def read(self, plan: StepPlan, grad_scale: torch.Tensor | None, *, norm: bool, spare: dict | None = None) -> None:
        """Read all gradients once: the statistics of each, found_inf and (norm) their norm, over all devices and ranks.

        spare: `stats` of a read that nothing is told of any more.
        """
        self.stats, spare, squares, many = {}, spare or {}, {}, plan.ranks.many
        for r in plan.readings:
            stats = read_list(r.device, r.params, r.grads, grad_scale, norm, spare.get(r.device))
            if norm and many:
                square = squares_of(stats.grad_norm.to(plan.readings[0].device, non_blocking=True))
                squares[r.part] = squares[r.part] + square if r.part in squares else square
            before = self.stats.get(r.device)
            self.stats[r.device] = stats if before is None else _joined(before, stats)
        if len(self.stats) > 1:
            combine_devices(list(self.stats.values()))
        if many:
            first = self.stats[plan.readings[0].device]
            first.found_inf, first.grad_norm = plan.ranks.agree(first.found_inf, squares if norm else None)
        if norm and self.stats:
            self.norm = next(iter(self.stats.values())).grad_norm

    def read_for_step(
        self, plan: StepPlan, grad_scale: torch.Tensor | None, max_norm: float | None, *, check: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, float | None]:
        """What the step needs: found_inf (check), and the norm and bound of a clip, to `max_norm` or the pending one's.

        What the pending clip read holds for the step, but on many ranks: only a collective knows of another rank's writes.
        """
        clip = None if self._clip is None else self.clip_in_force(plan)
        max_norm = max_norm if clip is None else clip.max_norm
        if clip is None or not self.stats or plan.ranks.many:
            spare, self.stats = self.stats if check else None, {}  # no check: of unscaled gradients the report tells the former
            if check or max_norm is not None:
                self.read(plan, grad_scale, norm=max_norm is not None, spare=spare)
        found_inf = next(iter(self.stats.values())).found_inf if check and self.stats else None
        return found_inf, None if max_norm is None else self.norm, max_norm

    # ----- the pending clip ---------------------------------------------------------------------

    def clip_in_force(self, plan: StepPlan) -> "PendingClip | None":
        """The clip that waits for the step unless its gradients are gone; what was read is forgotten where they changed."""
        if self._clip is None:
            return None
        grads = plan.grads_of_params()
        if self._clip.is_gone(grads):
            return None
        if self._clip.is_stale(grads):
            self.stats = {}
        return self._clip

    def clip_at_next_step(self, plan: StepPlan, grad_scale: torch.Tensor | None, max_norm: float) -> None:
        """Read the gradients now and clip them to `max_norm` in the next step.

        A clip that is pending holds as well: torch's, which comes at once, is not undone by a wider one.
        """
        clip = self.clip_in_force(plan)
        self.read(plan, grad_scale, norm=True)
        if self.stats:
            self._clip = PendingClip(max_norm if clip is None else min(max_norm, clip.max_norm), plan.grads_of_params())

    def drop_clip(self) -> None:
        """To be called after the step."""
        self._clip = None

    # ----- unscaling ------------------------------------------------------------------------------

    def unscale(self, plan: StepPlan, grad_scale: torch.Tensor, op: Op) -> None:
        """Divide the gradients by `grad_scale`. 16-bit ones become fp32: nothing is rounded or lost."""
        clip = self.clip_in_force(plan)
        for parameter in plan.params:
            if parameter.grad.dtype.itemsize == 2:
                parameter.grad_dtype = None  # any: float32 would stick, and DDP refuse the next backward
                parameter.grad = parameter.grad.float()
        plan.rebuild_grads([plan.local(p.grad) for p in plan.params], op)
        self.read(plan, grad_scale, norm=clip is not None)
        for stats in self.stats.values():
            stats.found_inf = skip_flag(stats.found_inf, stats.grad_scale).float()
        unscalings = [Unscaling(lists.grads, scalar(grad_scale, lists.device), None) for lists in plan.updates]
        for unscaling in unscalings:  # what allocates came before: an exception leaves all gradients scaled
            unscaling.write()
        if clip is not None and plan.params:
            clip = PendingClip(clip.max_norm, plan.grads_of_params())
        self._clip = clip


class PendingClip:
    """A clip that was asked for when these gradients were read, and is left to the step.

    It holds for as long as one of them is still there as it was read; then all that are there are clipped by their norm.
    Where all were replaced, or written since, it is dropped: torch, which clips at once, does not clip what comes after.
    Where there are none it holds: on many ranks the others may have theirs, and the step is a collective.

    It does not keep the gradients, and no weak reference to one, which would keep torch from swapping it: it knows them by
    their memory, a weak reference to which keeps its name from being given to another's.
    """

    def __init__(self, max_norm: float, grads: list[torch.Tensor]):
        self.max_norm = max_norm
        self._storages = [StorageWeakRef(local(grad).untyped_storage()) for grad in grads]
        self._read = list(map(_version_and_place, grads))

    def is_gone(self, grads: list[torch.Tensor]) -> bool:
        """Whether there are gradients, but none of those as it was read; a clip of no gradients stays."""
        return bool(self._read and grads) and set(self._read).isdisjoint(map(_version_and_place, grads))

    def is_stale(self, grads: list[torch.Tensor]) -> bool:
        """Whether one is another, or was written since."""
        return list(map(_version_and_place, grads)) != self._read


def _version_and_place(grad: torch.Tensor) -> tuple:
    """Where a gradient lies, and what changes when it is written, through what this rank holds of a DTensor too."""
    shard = local(grad)
    return shard.untyped_storage()._cdata, shard.storage_offset(), shard._version, grad._version


def read_list(
    device: torch.device, params: list[torch.Tensor], grads: list[torch.Tensor], grad_scale: torch.Tensor | None, norm: bool,
    spare: GradStats | None = None,
) -> GradStats:  # fmt: skip
    """One read of `grads`, the (local) gradients of `params`; without any, statistics of nothing.

    spare: statistics whose tensors may be written again, but for what a scaler and users are given, found_inf and the norm.
    """
    make = torch.empty if params else torch.zeros  # the op writes all of them
    # Not on a GPU, where a captured graph owns what it writes; not what a mode has made.
    is_spare = spare is not None and spare.params is params and spare.amax.is_cpu
    is_spare = is_spare and type(spare.amax) is torch.Tensor and not spare.amax.is_inference()
    if (scale := scalar(grad_scale, device)) is not None:
        scale = spare.grad_scale.copy_(scale) if is_spare and spare.grad_scale is not None else scale.clone()
    stats = GradStats(
        params=params,
        found_inf=make((), dtype=torch.float32, device=device),
        amax=spare.amax if is_spare else make(len(params), dtype=torch.float64, device=device),
        nonfinite=spare.nonfinite if is_spare else make(len(params), dtype=torch.int64, device=device),
        grad_norm=make((), dtype=torch.float64, device=device) if norm else None,
        grad_scale=scale,
    )
    if params:
        given = (grads, stats.grad_scale, stats.found_inf, stats.amax, stats.nonfinite, stats.grad_norm)
        grad_stats.op.run_checked(grad_stats.StatsCall(*given))  # checked by the optimizer, by name
    return stats


def scalar(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A 1-element tensor as the ops take it: 0-d, on `device`, without waiting for either."""
    if tensor is None:
        return None
    if tensor.device != device:
        tensor = tensor.to(device, non_blocking=True)
    return tensor.reshape(()) if tensor.dim() else tensor


def _joined(first: GradStats, second: GradStats) -> GradStats:
    """What two reads on one device found; their norms are the caller's."""
    return GradStats(
        params=first.params + second.params,
        found_inf=torch.maximum(first.found_inf, second.found_inf),
        amax=torch.cat([first.amax, second.amax]),
        nonfinite=torch.cat([first.nonfinite, second.nonfinite]),
        grad_norm=first.grad_norm,
        grad_scale=first.grad_scale,
    )


def combine_devices(stats: list[GradStats]) -> None:
    """One found_inf and one norm over several devices, held by the first."""
    first, device = stats[0], stats[0].found_inf.device
    first.found_inf = torch.stack([s.found_inf.to(device, non_blocking=True) for s in stats]).amax()
    if first.grad_norm is not None:
        norms = torch.stack([s.grad_norm.to(device, non_blocking=True) for s in stats])
        first.grad_norm = norm_of(squares_of(norms))


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
