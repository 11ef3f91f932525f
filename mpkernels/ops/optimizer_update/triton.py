# SPDX-License-Identifier: Apache-2.0
"""The update of every rule in Triton, all tensors of like dtypes at once.

Everything that decides lies on the device and is read there: no wait for it. Under TRITON_INTERPRET=1 it runs on the CPU.
"""

import torch

from mpkernels.ops.common import triton_table as table
from mpkernels.ops.common.kernels_triton import TYPES, advance
from mpkernels.ops.common.layout import SameLayout
from mpkernels.ops.optimizer_update import kernels_triton as kernels

_PARAMETERS = 7  # that the kernel takes: p0 to p6


def update(call) -> None:
    name, device = call.rule.name, call.masters[0].device
    layout = SameLayout(*call[: call.num_lists])
    masters, grads, *states, copies = layout.lists
    counts = table.numbers(map(torch.Tensor.data_ptr, call.steps), device)
    arguments = table.lr_arguments(name, call.lr, device) | rule_arguments(call) | dict(
        steps_ptr=counts, max_norm=0.0 if call.max_norm is None else call.max_norm, grad_scale_ptr=call.grad_scale,
        found_inf_ptr=call.found_inf, grad_norm_ptr=call.grad_norm, MAXIMIZE=call.maximize,
    )  # fmt: skip
    with torch.cuda.device_of(call.masters[0]):
        for launch in table.launches([masters, grads, copies, *filter(None, states)]):
            master, grad, copy, *states = (TYPES[dtype] for dtype in launch.dtypes)
            types = dict(master_type=master, grad_type=grad, copy_type=copy, state_type=states[0] if states else None)
            kernels.update_kernel[launch.grid](**launch.arguments, **arguments, **types)
        advance(counts, call.found_inf, call.grad_scale)
    layout.write_back()


def rule_arguments(call) -> dict:
    """What the rule gives the kernel: its functions, its numbers and flags, and how many lists of states there are."""
    name, (parameters, flags) = call.rule.name.removesuffix("_"), call.rule.triton(call)
    parameters += (0.0,) * (_PARAMETERS - len(parameters))
    return {f"p{k}": parameter for k, parameter in enumerate(parameters)} | dict(
        scalars=getattr(kernels, f"{name}_scalars"), formula=getattr(kernels, f"{name}_formula"), FLAGS=flags,
        STATES=len(list(filter(None, call.states))),
    )  # fmt: skip
