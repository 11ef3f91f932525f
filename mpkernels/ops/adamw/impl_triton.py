# SPDX-License-Identifier: Apache-2.0
"""adamw_ in Triton: w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps), all tensors of like dtypes at once.

Everything that decides lies on the device and is read there: no wait for it. Under TRITON_INTERPRET=1 it runs on the CPU.
"""

import math

import torch

from mpkernels.ops.common import triton_table as table
from mpkernels.runtime.resolve import triton_why_not

try:
    from mpkernels.ops.adamw.kernels_triton import adamw_kernel
    from mpkernels.ops.common.triton_kernels import TYPES, advance
except ImportError:  # without Triton there is still `why_not`, which says so
    adamw_kernel = None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_why_not(device)


def adamw_(
    masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, steps, lr, beta1, beta2, eps, weight_decay,
    decoupled, maximize, grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
):  # fmt: skip
    lists = [masters, grads, exp_avgs, exp_avg_sqs, copies, *([max_exp_avg_sqs] if max_exp_avg_sqs else [])]
    lists, back = table.dense(lists, [tensors is not grads for tensors in lists])
    counts = table.numbers(map(torch.Tensor.data_ptr, steps), masters[0].device)
    arguments = table.lr_arguments("adamw_", lr, masters[0].device) | dict(
        steps_ptr=counts, beta1=beta1, beta2=beta2, log2_beta1=_log2(beta1),
        log2_beta2=_log2(beta2), eps=eps, weight_decay=weight_decay if decoupled else 0.0,
        added_decay=0.0 if decoupled else weight_decay, max_norm=0.0 if max_norm is None else max_norm,
        grad_scale_ptr=grad_scale, found_inf_ptr=found_inf, grad_norm_ptr=grad_norm, AMSGRAD=bool(max_exp_avg_sqs),
        ADDS_DECAY=not decoupled and weight_decay != 0, MAXIMIZE=maximize,
    )  # fmt: skip
    with torch.cuda.device_of(masters[0]):
        for launch in table.launches(lists):
            master, grad, state, _, copy = (TYPES[dtype] for dtype in launch.dtypes[:5])
            adamw_kernel[launch.grid](
                **launch.arguments, **arguments, master_type=master, grad_type=grad, state_type=state, copy_type=copy
            )
        advance(counts, found_inf, grad_scale)
    table.copy_back(back)


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf
