# SPDX-License-Identifier: Apache-2.0
"""sgd_ in fp64 (or wider), one tensor: b = momentum * b + (1 - dampening) * g; w -= lr * b."""


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
