# SPDX-License-Identifier: Apache-2.0
"""adamw_ in fp64 (or wider), one tensor: w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)."""

import numpy as np


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
