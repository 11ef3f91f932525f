# SPDX-License-Identifier: Apache-2.0
"""adamw_ in C++, one pass over all tensors: w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)."""

import torch

from mpkernels.ops.common.layout import SameLayout, described, why_not_native


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return why_not_native(device)


def adamw_(
    masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies, steps, lr, beta1, beta2, eps, weight_decay,
    decoupled, maximize, grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
):  # fmt: skip
    layout = SameLayout(masters, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, copies)
    taken = torch.ops.mpkernels_C.adamw_(
        *layout.tables,
        described(steps).table,
        masters[0],
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        decoupled,
        maximize,
        grad_scale,
        found_inf,
        grad_norm,
        max_norm,
    )
    if taken:  # always on a GPU, which does not tell; a skipped step has left the stand-ins as they were
        layout.write_back()
