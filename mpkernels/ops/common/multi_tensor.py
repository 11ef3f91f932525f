# SPDX-License-Identifier: Apache-2.0
"""What the ops over lists of tensors share: checks, and the one factor that unscales and clips."""

from dataclasses import dataclass
from functools import cached_property

import torch

from mpkernels.ops.common.cast import DTYPES
from mpkernels.ops.common.memory import check_memory

MASTER_DTYPES = (torch.float32, torch.float64)
MOMENT_DTYPES = (*MASTER_DTYPES, torch.bfloat16)
CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


def check_list(op: str, name: str, tensors, like=None, *, dtypes=DTYPES, may_be_empty=False) -> None:
    """Raise RuntimeError unless `tensors` is a list of dense tensors that matches `like`, tensor by tensor.

    like: the list whose shapes and devices are wanted. may_be_empty: each may also have size 0.
    """
    if like is not None and len(tensors) != len(like):
        raise RuntimeError(f"{op}: {name} has {len(tensors)} tensors, expected {len(like)}")
    for i, tensor in enumerate(tensors):
        if tensor.layout != torch.strided:
            raise RuntimeError(f"{op}: {name}[{i}] must be a dense strided tensor, got layout {tensor.layout}")
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise RuntimeError(f"{op}: {name}[{i}] must be {allowed}, got {tensor.dtype}")
        device = (like or tensors)[0].device
        if tensor.device != device:
            raise RuntimeError(f"{op}: {name}[{i}] is on {tensor.device}, expected {device}")
        if like is None or (may_be_empty and tensor.numel() == 0):
            continue
        if tensor.shape != like[i].shape:
            raise RuntimeError(f"{op}: {name}[{i}] has shape {tuple(tensor.shape)}, expected {tuple(like[i].shape)}")


def _check_moments(op: str, moments: dict, masters) -> None:
    """All moments of a master have one dtype: its own or bf16."""
    first = next(iter(moments.values()), [])
    for name, tensors in moments.items():
        check_list(op, name, tensors, masters, dtypes=MOMENT_DTYPES)
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in (masters[i].dtype, torch.bfloat16):
                raise RuntimeError(f"{op}: {name}[{i}] is {tensor.dtype}, expected {masters[i].dtype} or torch.bfloat16")
            if tensor.dtype != first[i].dtype:
                raise RuntimeError(f"{op}: {name}[{i}] is {tensor.dtype}, expected {first[i].dtype} as the other moments")


def check_tensor(op: str, name: str, tensor, shape, dtype, device) -> None:
    """Raise RuntimeError unless `tensor` is None or has this shape, dtype and device."""
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise RuntimeError(
            f"{op}: {name} must be {tuple(shape)} {dtype} on {device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


def check_update(op, masters, grads, states, copies, steps, lr, grad_scale, found_inf, grad_norm, max_norm) -> None:
    """The checks that every update op shares. `states` maps names to lists; an empty list of a dict is absent."""
    if not masters:
        raise RuntimeError(f"{op}: masters is empty")
    device = masters[0].device
    check_list(op, "masters", masters, dtypes=MASTER_DTYPES)
    check_list(op, "grads", grads, masters)
    for i, (grad, master) in enumerate(zip(grads, masters, strict=True)):
        if grad.dtype.itemsize > master.dtype.itemsize:
            raise RuntimeError(f"{op}: grads[{i}] is {grad.dtype}, wider than {master.dtype} of its master")
    _check_moments(op, {name: tensors for name, tensors in states.items() if tensors}, masters)
    check_list(op, "copies", copies, masters, may_be_empty=True)
    if len(steps) != len(masters):
        raise RuntimeError(f"{op}: steps has {len(steps)} tensors, expected {len(masters)}")
    for i, step in enumerate(steps):
        check_tensor(op, f"steps[{i}]", step, (), torch.float32, device)
        if step.is_neg():
            raise RuntimeError(f"{op}: steps[{i}] is a lazily negated view: use its resolve_neg()")
    if lr.numel() != 1 or lr.dim() != 0 or lr.dtype not in MASTER_DTYPES:
        raise RuntimeError(f"{op}: lr must be a 0-d float32 or float64 tensor, got {tuple(lr.shape)} {lr.dtype}")
    if lr.device.type != "cpu" and lr.device != device:
        raise RuntimeError(f"{op}: lr must be on the CPU or on {device}, got {lr.device}")
    check_tensor(op, "grad_scale", grad_scale, (), torch.float32, device)
    check_tensor(op, "found_inf", found_inf, (), torch.float32, device)
    check_tensor(op, "grad_norm", grad_norm, (), torch.float64, device)
    if (grad_norm is None) != (max_norm is None):
        raise RuntimeError(f"{op}: grad_norm and max_norm go together")
    scalars = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf, "grad_norm": grad_norm}
    written = {"masters": masters, **states, "copies": copies, "steps": steps}
    check_memory(op, written=written, read={"grads": grads} | scalars)


def values_are_here(device: torch.device) -> bool:
    """Whether what a tensor holds can be looked at without waiting for a device."""
    return device.type == "cpu"


def inv_scale(grad_scale: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """1 / grad_scale as a 0-d fp64 tensor: the reciprocal is taken in fp64."""
    if grad_scale is None:
        return torch.ones((), dtype=torch.float64, device=device)
    return grad_scale.double().reciprocal()


def grad_factor(grad_scale, grad_norm, max_norm, device) -> torch.Tensor:
    """What a gradient is multiplied by, 0-d fp64: 1 / grad_scale, times min(1, max_norm / (grad_norm + 1e-6))."""
    factor = inv_scale(grad_scale, device)
    if max_norm is not None:
        factor = factor * (max_norm / (grad_norm + CLIP_EPS)).clamp(max=1.0)
    return factor


@dataclass(frozen=True)
class Step:
    """The scalars of an update in plain torch, on the device of the masters."""

    taken: torch.Tensor  # fp32: steps of each tensor before this one,
    later: torch.Tensor  # and after it
    skip: torch.Tensor | None  # `skip_flag`
    factor: torch.Tensor | None  # what gradients are multiplied by, fp64; None: by 1
    given_lr: torch.Tensor

    @classmethod
    def of(cls, steps, lr, grad_scale, found_inf, grad_norm, max_norm) -> "Step | None":
        """None where the step is known to be skipped."""
        device, skip, factor = steps[0].device, skip_flag(found_inf, grad_scale), None
        if skip is not None and values_are_here(device):
            if skip:
                return None
            skip = None
        if grad_scale is not None or max_norm is not None:
            factor = grad_factor(grad_scale, grad_norm, max_norm, device)
        taken = torch.stack(list(steps))
        return cls(taken, taken + 1, skip, factor, lr)  # counts in fp32, as torch's: they stay at 2^24

    @cached_property
    def counts(self) -> tuple[torch.Tensor, ...]:
        """`later`, one by one."""
        return self.later.unbind()

    @property
    def lr(self) -> torch.Tensor:
        return self.given_lr.to(self.taken.device, torch.float64)

    @cached_property
    def lr_of_fused(self) -> float | torch.Tensor:
        """As torch's fused optimizers take it: a number, or a tensor of a GPU in fp32, which they do not wait for."""
        return self.given_lr.item() if self.given_lr.device.type == "cpu" else self.given_lr.float()

    def signed_factor(self, maximize: bool) -> torch.Tensor:
        factor = inv_scale(None, self.taken.device) if self.factor is None else self.factor
        return -factor if maximize else factor

    def count(self, steps) -> None:
        """Advance `steps`, where the step is taken."""
        torch._foreach_copy_(list(steps), where_taken(self.skip, self.later, self.taken).unbind())


def where_taken(skip: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new`, or `old` bit for bit when the step is skipped; decided on the device."""
    return new if skip is None else torch.where(skip, old, new)


def skip_flag(found_inf: torch.Tensor | None, grad_scale: torch.Tensor | None) -> torch.Tensor | None:
    """0-d bool on the device: whether the step is skipped; None when nothing could ask for it."""
    skip = None if found_inf is None else found_inf != 0
    if grad_scale is None:
        return skip
    bad_scale = ((grad_scale > 0) & grad_scale.isfinite()).logical_not()  # NOTE: `~` fails as in `fake.copy_`
    return bad_scale if skip is None else skip | bad_scale


def count_nonfinite(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many elements are inf or NaN, and the largest magnitude of the others, fp64."""
    finite = grad.detach().isfinite()
    size = torch.where(finite, grad.detach().abs(), 0)
    return (~finite).sum(), size.max().double() if size.numel() else size.new_zeros((), dtype=torch.float64)
