# SPDX-License-Identifier: Apache-2.0
"""Run once, without a trace, what the first use of a kernel does: choose and load it, where capture and compile could not."""

import contextlib
import sys

import torch
from torch import nn

from mpkernels.runtime import resolve
from mpkernels.runtime.op import is_dtensor
from mpkernels.runtime.untouched import run_once


@torch._disable_dynamo
def warmup(model: nn.Module, example_inputs: object) -> None:
    """One forward and backward of `model`, so that its kernels are chosen and loaded before a capture or a compile.

    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, of the shapes that will come.
    Parameters, their gradients, buffers, modes and random numbers stay what they were, bit for bit; what the hooks of the
    model do is theirs. A compiled model runs uncompiled. Call it before DDP and `fully_shard`, on every rank.
    Raises TypeError for what is not a module, RuntimeError under capture and for a model that is distributed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"warmup: model must be a torch.nn.Module, got {type(model).__name__}")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup: call it before the capture, not inside")
    if wrapped := [name or type(m).__name__ for name, m in model.named_modules() if _is_wrapped(m)]:
        raise RuntimeError(f"warmup: {wrapped[0]} is distributed already: call it before DDP and fully_shard")
    with _uncompiled():
        run_once(model, example_inputs)
    for device, dtype in {(p.device, p.dtype) for p in model.parameters() if p.requires_grad}:
        for op in resolve.ops.values():
            if op.writes:  # the step's: those of the layers have just run, in their compute dtypes
                op.backend(device, dtype)


def _is_wrapped(module: nn.Module) -> bool:
    """DDP waits for gradients that never come; FSDP2 makes other tensors of its parameters."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return True
    return any(map(is_dtensor, module.parameters(recurse=False)))


def _uncompiled():
    """Let compiled functions run as they were written; where nothing loaded the compiler, there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
