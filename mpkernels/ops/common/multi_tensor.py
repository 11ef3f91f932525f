# SPDX-License-Identifier: Apache-2.0
"""What the ops of a step share: their implementations, checks, and the one factor that unscales and clips."""

import torch

from mpkernels.ops.common.cast import DTYPES
from mpkernels.runtime.resolve import Implementation

IMPLEMENTATIONS = (
    Implementation("native", ("cpu", "cuda")),
    Implementation("eager", ("cpu", "cuda")),
    Implementation("triton", ("cuda", "cpu")),
)
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


def check_tensor(op: str, name: str, tensor, shape, dtype, device) -> None:
    """Raise RuntimeError unless `tensor` is None or has this shape, dtype and device."""
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise RuntimeError(
            f"{op}: {name} must be {tuple(shape)} {dtype} on {device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


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
