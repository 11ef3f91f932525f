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
    """A skipped step and the first one, on numbers for which every operation is exact: None, or what came out wrong.

    v is such that the new v is 16, sqrt(v) / sqrt(1 - beta2) is 8 and the denominator, with eps, 16.
    """
    from mpkernels.ops.adamw import op

    hyper = dict(beta1=0.5, beta2=0.75, eps=8.0, weight_decay=0.5, decoupled=True, maximize=False)
    scalar = {"dtype": torch.float32, "device": device}
    generator = torch.Generator("cpu").manual_seed(0)
    g = torch.tensor([1.0, -2.0, 4.0, -5.0, 7.0, 8.0], dtype=torch.float32, device="cpu").repeat(100)
    w, m = (torch.randint(-64, 65, g.shape, generator=generator, dtype=torch.int64, device="cpu").float() for _ in range(2))
    v = (64 - g * g) / 3
    master, exp_avg, exp_avg_sq, copy = (t.to(device, copy=True) for t in (w, m, v, w.half()))
    step, lr = torch.zeros((), **scalar), torch.tensor(2.0**-6, dtype=torch.float64, device="cpu")
    for found in (1.0, 0.0):
        op.function(backend)(
            [master], [(8 * g).to(device, torch.float16)], [exp_avg], [exp_avg_sq], [], [copy], [step], lr, **hyper,
            grad_scale=torch.full((), 8.0, **scalar), found_inf=torch.full((), found, **scalar),
        )  # fmt: skip
        if found and not torch.equal(master.cpu(), w):
            return "a skipped step wrote the master"
    exact = adamw(*(t.double().numpy() for t in (w, g, m, v)), None, 1, lr=lr.item(), **hyper)[:3]
    if not all(np.array_equal(t.cpu().double().numpy(), e) for t, e in zip((master, exp_avg, exp_avg_sq), exact, strict=True)):
        return "adamw_ differs from fp64 where fp32 is exact"
    if not torch.equal(copy, master.half()):
        return "the copy is not the master rounded"
    return None if int(step) == 1 else f"{int(step)} steps counted, 1 taken"
