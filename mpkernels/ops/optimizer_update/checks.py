# SPDX-License-Identifier: Apache-2.0
"""The checks of an update: they raise RuntimeError with the argument's name, before anything is written."""

import torch

from mpkernels.ops.common.memory import check_memory
from mpkernels.ops.common.multi_tensor import MASTER_DTYPES, MOMENT_DTYPES, check_list, check_tensor


def check_update(call) -> None:
    rule, op, masters = call.rule, call.rule.name, call.masters
    required = rule.states[: rule.required_states]
    if not all(call.states[: rule.required_states]):
        raise RuntimeError(f"{op}: {' and '.join(required)} must not be empty")
    rule.check(call)
    if not masters:
        raise RuntimeError(f"{op}: masters is empty")
    check_list(op, "masters", masters, dtypes=MASTER_DTYPES)
    check_list(op, "grads", call.grads, masters)
    for i, (grad, master) in enumerate(zip(call.grads, masters, strict=True)):
        if grad.dtype.itemsize > master.dtype.itemsize:
            raise RuntimeError(f"{op}: grads[{i}] is {grad.dtype}, wider than {master.dtype} of its master")
    states = dict(zip(rule.states, call.states, strict=True))
    _check_states(op, {name: tensors for name, tensors in states.items() if tensors}, masters)
    check_list(op, "copies", call.copies, masters, may_be_empty=True)
    _check_steps(op, call.steps, masters)
    _check_scalars(call)
    scalars = {name: getattr(call, name) for name in ("lr", "grad_scale", "found_inf", "grad_norm")}
    written = {"masters": masters, **states, "copies": call.copies, "steps": call.steps}
    check_memory(op, written=written, read={"grads": call.grads} | scalars)


def _check_states(op: str, states: dict, masters) -> None:
    """All states of a master have one dtype: its own or bf16."""
    first = next(iter(states.values()), [])
    for name, tensors in states.items():
        check_list(op, name, tensors, masters, dtypes=MOMENT_DTYPES)
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in (masters[i].dtype, torch.bfloat16):
                raise RuntimeError(f"{op}: {name}[{i}] is {tensor.dtype}, expected {masters[i].dtype} or torch.bfloat16")
            if tensor.dtype != first[i].dtype:
                raise RuntimeError(f"{op}: {name}[{i}] is {tensor.dtype}, expected {first[i].dtype} as the other states")


def _check_steps(op: str, steps, masters) -> None:
    if len(steps) != len(masters):
        raise RuntimeError(f"{op}: steps has {len(steps)} tensors, expected {len(masters)}")
    for i, step in enumerate(steps):
        check_tensor(op, f"steps[{i}]", step, (), torch.float32, masters[0].device)
        if step.is_neg():
            raise RuntimeError(f"{op}: steps[{i}] is a lazily negated view: use its resolve_neg()")


def _check_scalars(call) -> None:
    op, lr, device = call.rule.name, call.lr, call.masters[0].device
    if lr.numel() != 1 or lr.dim() != 0 or lr.dtype not in MASTER_DTYPES:
        raise RuntimeError(f"{op}: lr must be a 0-d float32 or float64 tensor, got {tuple(lr.shape)} {lr.dtype}")
    if lr.device.type != "cpu" and lr.device != device:
        raise RuntimeError(f"{op}: lr must be on the CPU or on {device}, got {lr.device}")
    for name, dtype in (("grad_scale", torch.float32), ("found_inf", torch.float32), ("grad_norm", torch.float64)):
        check_tensor(op, name, getattr(call, name), (), dtype, device)
    if (call.grad_norm is None) != (call.max_norm is None):
        raise RuntimeError(f"{op}: grad_norm and max_norm go together")
