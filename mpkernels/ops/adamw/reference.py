# SPDX-License-Identifier: Apache-2.0
"""adamw_ in fp64 (or wider), one tensor: w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)."""

import numpy as np
import torch


def adamw(w, g, m, v, vmax, t, *, lr, beta1, beta2, eps, weight_decay, decoupled, maximize=False):
    """(w, m, v, vmax) after step `t` (from 1), in the dtype of the numpy arrays; vmax is None without amsgrad.

    `g` is unscaled and clipped already. Source: torch.optim.AdamW.
    """
    g = -g if maximize else g
    if decoupled:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    vmax = None if vmax is None else np.maximum(vmax, v)
    denominator = np.sqrt(v if vmax is None else vmax) / np.sqrt(1 - beta2**t) + eps
    return w - lr / (1 - beta1**t) * m / denominator, m, v, vmax


def self_check(backend: str, device: torch.device) -> str | None:
    """Three steps, the second skipped, against fp64: None, or what came out wrong."""
    from mpkernels.ops.adamw import op

    generator = torch.Generator().manual_seed(0)
    hyper = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, decoupled=True, maximize=False)
    master = torch.randn(1000, generator=generator).to(device)
    grad = torch.randn(1000, generator=generator).to(device, torch.float16)
    state = [torch.zeros_like(master) for _ in range(2)]
    copy, steps = master.half(), torch.zeros(1, dtype=torch.int64, device=device)
    lr = torch.tensor(hyper.pop("lr"), dtype=torch.float64)
    w, m, v = (t.cpu().double().numpy() for t in (master, *state))
    for found in (0.0, 1.0, 0.0):
        op.function(backend)(
            [master], [grad], [state[0]], [state[1]], [], [copy], steps, lr, **hyper,
            grad_scale=torch.full((), 8.0, device=device), found_inf=torch.full((), found, device=device),
        )  # fmt: skip
        if not found:
            t = int(steps)
            w, m, v, _ = adamw(w, grad.cpu().double().numpy() / 8, m, v, None, t, lr=lr.item(), **hyper)
        if not np.allclose(master.cpu().double().numpy(), w, rtol=1e-6, atol=1e-6):
            return f"adamw_ differs from fp64 by {np.abs(master.cpu().double().numpy() - w).max():.1e}"
        if not torch.equal(copy, master.half()):
            return "the copy is not the master rounded"
    return None if int(steps) == 2 else f"{int(steps)} steps counted, 2 taken"
