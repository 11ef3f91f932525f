# SPDX-License-Identifier: Apache-2.0
"""sgd_ in Triton: b = momentum * b + (1 - dampening) * g; w -= lr * b, all tensors of like dtypes at once.

Everything that decides lies on the device and is read there: no wait for it. Under TRITON_INTERPRET=1 it runs on the CPU.
"""

import torch

from mpkernels.ops.common import triton_table as table
from mpkernels.runtime.resolve import triton_why_not

try:
    from mpkernels.ops.common.triton_kernels import TYPES, advance
    from mpkernels.ops.sgd.kernels_triton import sgd_kernel
except ImportError:  # without Triton there is still `why_not`, which says so
    sgd_kernel = None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_why_not(device)


def sgd_(
    masters, grads, momentum_buffers, copies, steps, lr, momentum, dampening, weight_decay, nesterov, maximize,
    grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
):  # fmt: skip
    lists = [masters, grads, copies, *([momentum_buffers] if momentum_buffers else [])]
    lists, back = table.dense(lists, [tensors is not grads for tensors in lists])
    counts = table.numbers(map(torch.Tensor.data_ptr, steps), masters[0].device)
    arguments = table.lr_arguments("sgd_", lr, masters[0].device) | dict(
        steps_ptr=counts, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
        max_norm=0.0 if max_norm is None else max_norm, grad_scale_ptr=grad_scale, found_inf_ptr=found_inf,
        grad_norm_ptr=grad_norm, DECAY=weight_decay != 0, NESTEROV=nesterov, MAXIMIZE=maximize,
    )  # fmt: skip
    with torch.cuda.device_of(masters[0]):
        for launch in table.launches(lists):
            master, grad, copy = (TYPES[dtype] for dtype in launch.dtypes[:3])
            sgd_kernel[launch.grid](
                **launch.arguments, **arguments, master_type=master, grad_type=grad, copy_type=copy,
                state_type=TYPES[launch.dtypes[3]] if momentum_buffers else None,
            )  # fmt: skip
        advance(counts, found_inf, grad_scale)
    table.copy_back(back)
