# SPDX-License-Identifier: Apache-2.0
"""sgd_ in C++, one pass over all tensors: b = momentum * b + (1 - dampening) * g; w -= lr * b."""

import torch

from mpkernels.ops.common.layout import SameLayout, described, why_not_native


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return why_not_native(device)


def sgd_(
    masters, grads, momentum_buffers, copies, steps, lr, momentum, dampening, weight_decay, nesterov, maximize,
    grad_scale=None, found_inf=None, grad_norm=None, max_norm=None,
):  # fmt: skip
    layout = SameLayout(masters, grads, momentum_buffers, copies)
    taken = torch.ops.mpkernels_C.sgd_(
        *layout.tables, described(steps).table, masters[0], lr, momentum, dampening, weight_decay, nesterov, maximize,
        grad_scale, found_inf, grad_norm, max_norm,
    )  # fmt: skip
    if taken:  # always on a GPU, which does not tell; a skipped step has left the stand-ins as they were
        layout.write_back()
