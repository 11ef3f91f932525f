# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step after each op, by torch's MemTracker, which is private and known to this file alone; its FLOPs.

What it does not see: memory that an op allocates and frees before it returns (a workspace of the GEMM, a cast inside an op),
gaps between the allocator's blocks, and what torch does not allocate (a CUDA context, NCCL's buffers).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from mpkernels.runtime import compute_copy


class Usage(NamedTuple):
    """Bytes that are allocated at one time, by what they are for."""

    parameters: int  # and buffers
    gradients: int
    optimizer: int  # all that is allocated in the optimizer's step: states, copies of weights, and what it frees again
    activations: int  # what forward makes, and its inputs
    temporaries: int  # what backward makes and frees again

    @property
    def total(self) -> int:
        return sum(self)


class Trace(NamedTuple):
    """The ops that ran, what was allocated after each, what they computed a step, and bytes of compute copies after them."""

    ops: list[str]
    usages: list[Usage]
    flops: int
    copies: int


def trace(model: nn.Module, inputs: Sequence[torch.Tensor], steps: Sequence[Callable[[], None]], device: torch.device) -> Trace:
    """Run `steps`, training steps of `model` on `inputs`, and say what lies on `device` after each op."""
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.utils.flop_counter import flop_registry

    tracker = MemTracker()
    tracker._update_peak_stats = lambda state: None  # the peaks of every module after every op: more time than all the rest
    tracker.track_external(model, *inputs)
    none = RemovableHandle(OrderedDict())
    for parameter in model.parameters():
        if not parameter.requires_grad:  # on which it would put hooks for the gradient too, and torch refuses them
            tracker._param_to_grad_hook_handles[parameter] = none, none
    recorder = _Recorder(tracker, device, flop_registry)
    with tracker, recorder:
        for step in steps:
            tracker.reset_mod_stats()  # it refuses a second call of the model otherwise
            step()
    copies = sum(copy.tensor.nbytes for copy in compute_copy.of_model(model))
    return Trace(recorder.ops, recorder.usages, recorder.flops // len(steps), copies)


_FIELDS = {
    "Parameter": "parameters", "Buffer": "parameters", "Gradient": "gradients", "Optstate": "optimizer",
    "Activation": "activations", "Other": "activations", "Temp": "temporaries",
}  # fmt: skip


class _Recorder(TorchDispatchMode):
    """Entered after the tracker, so that each op comes here first and has been counted when it returns."""

    def __init__(self, tracker: torch.nn.Module, device: torch.device, flop_formulas: Mapping[Any, Callable[..., int]]):
        super().__init__()
        self.tracker, self.device, self.flop_formulas = tracker, device, flop_formulas
        self.ops: list[str] = []
        self.usages: list[Usage] = []
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "prim":  # questions that only FakeTensors ask
            self.ops.append(str(func))
            self.usages.append(self._usage())
        if (formula := self.flop_formulas.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _usage(self) -> Usage:
        found = dict.fromkeys(Usage._fields, 0)
        for kind, size in self.tracker.get_tracker_snapshot().get(self.device, {}).items():
            name = getattr(kind, "value", kind)
            if name != "Total":
                found[_FIELDS[name]] += size
        return Usage(**found)
