# SPDX-License-Identifier: Apache-2.0
"""What the native update ops share: bring tensors of any layout to the one layout that a raw-pointer loop walks."""

import torch

from mpkernels import _native


def why_not_native(device: torch.device) -> str | None:
    """Why the step of the compiled library does not serve `device`, or None."""
    return _native.cuda_why_not(device) if device.type == "cuda" else _native.why_not()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order."""
    if tensor.is_contiguous():
        return True
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).is_contiguous()


class SameLayout:
    """The lists of an update, in which all tensors of one index lie in memory as their master does: dense stand-ins if need be.

    An empty list is absent, a tensor of size 0 is a copy that is not wanted; both stay.
    """

    @torch.no_grad()
    def __init__(self, masters: list[torch.Tensor], grads: list[torch.Tensor], *written: list[torch.Tensor]):
        self.lists = [masters, grads, *written]
        self._stand_ins = []
        if not all(tensor.is_contiguous() for tensors in self.lists for tensor in tensors):
            self.lists = [list(tensors) for tensors in self.lists]
            for i, master in enumerate(masters):
                self._align(i, master)

    def _align(self, i: int, master: torch.Tensor) -> None:
        strides = master.stride() if is_dense(master) else torch.empty(master.shape, device="meta").stride()
        for tensors in filter(None, self.lists):
            tensor = tensors[i]
            if tensor.numel() and tensor.stride() != strides:
                tensors[i] = torch.empty_strided(master.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
                if tensors is not self.lists[1]:  # gradients are never written
                    self._stand_ins.append((tensor, tensors[i]))

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the stand-ins to what they stand for."""
        for tensor, stand_in in self._stand_ins:
            tensor.copy_(stand_in)
