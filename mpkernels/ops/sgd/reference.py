# SPDX-License-Identifier: Apache-2.0
"""sgd_ in fp64 (or wider), one tensor: b = momentum * b + (1 - dampening) * g; w -= lr * b."""

import numpy as np
import torch


def sgd(w, g, buffer, t, *, lr, momentum, dampening, weight_decay, nesterov, maximize=False):
    """(w, buffer) after step `t` (from 1), in the dtype of the numpy arrays; `g` is unscaled and clipped already.

    Source: torch.optim.SGD.
    """
    g = -g if maximize else g
    g = g + weight_decay * w
    if momentum:
        buffer = g if t == 1 else momentum * buffer + (1 - dampening) * g
        g = g + momentum * buffer if nesterov else buffer
    return w - lr * g, buffer


def self_check(backend: str, device: torch.device) -> str | None:
    """Three steps, the second skipped, against fp64: None, or what came out wrong."""
    from mpkernels.ops.sgd import op

    generator = torch.Generator().manual_seed(0)
    hyper = dict(momentum=0.9, dampening=0.1, weight_decay=0.1, nesterov=False, maximize=False)
    master = torch.randn(1000, generator=generator).to(device)
    grad = torch.randn(1000, generator=generator).to(device, torch.float16)
    buffer, copy = torch.zeros_like(master), master.half()
    steps, lr = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor(1e-2, dtype=torch.float64)
    w, b = (t.cpu().double().numpy() for t in (master, buffer))
    for found in (0.0, 1.0, 0.0):
        op.function(backend)(
            [master], [grad], [buffer], [copy], steps, lr, **hyper,
            grad_scale=torch.full((), 8.0, device=device), found_inf=torch.full((), found, device=device),
        )  # fmt: skip
        if not found:
            w, b = sgd(w, grad.cpu().double().numpy() / 8, b, int(steps), lr=lr.item(), **hyper)
        if not np.allclose(master.cpu().double().numpy(), w, rtol=1e-6, atol=1e-6):
            return f"sgd_ differs from fp64 by {np.abs(master.cpu().double().numpy() - w).max():.1e}"
        if not torch.equal(copy, master.half()):
            return "the copy is not the master rounded"
    return None if int(steps) == 2 else f"{int(steps)} steps counted, 2 taken"
