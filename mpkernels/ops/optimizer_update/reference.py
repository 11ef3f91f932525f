# SPDX-License-Identifier: Apache-2.0
"""The rules in fp64 (or wider), one tensor after step `t` (from 1): w -= lr * d, d the rule's direction.

Numpy arrays in, and in their dtype out; `g` is unscaled and clipped already. Source: torch.optim.
"""

import numpy as np


def adamw(w, g, m, v, vmax, t, *, lr, beta1, beta2, eps, weight_decay, decoupled, maximize=False):
    """(w, m, v, vmax); vmax is None without amsgrad."""
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


def sgd(w, g, buffer, t, *, lr, momentum, dampening, weight_decay, nesterov, maximize=False):
    """(w, buffer); the buffer is not read at the first step."""
    g = -g if maximize else g
    g = g + weight_decay * w
    if momentum:
        buffer = g if t == 1 else momentum * buffer + (1 - dampening) * g
        g = g + momentum * buffer if nesterov else buffer
    return w - lr * g, buffer


def lion(w, g, m, t, *, lr, beta1, beta2, weight_decay, maximize=False):
    """(w, m)."""
    g = -g if maximize else g
    w = w * (1 - lr * weight_decay) - lr * np.sign(beta1 * m + (1 - beta1) * g)
    return w, beta2 * m + (1 - beta2) * g
