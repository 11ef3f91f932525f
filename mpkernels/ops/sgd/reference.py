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
    """Three steps, the second skipped, on numbers for which every operation is exact: None, or what came out wrong."""
    from mpkernels.ops.sgd import op

    hyper = dict(momentum=0.5, dampening=0.25, weight_decay=0.5, nesterov=False, maximize=False)
    scalar = {"dtype": torch.float32, "device": device}
    generator = torch.Generator("cpu").manual_seed(0)
    w, g = (torch.randint(-64, 65, (1000,), generator=generator, dtype=torch.int64, device="cpu").float() for _ in range(2))
    master, buffer, copy = w.to(device, copy=True), torch.zeros_like(w, device=device), w.to(device, torch.float16)
    step, lr = torch.zeros((), **scalar), torch.tensor(2.0**-4, dtype=torch.float64, device="cpu")
    exact = (w.double().numpy(), np.zeros(1000))
    for found in (0.0, 1.0, 0.0):
        op.function(backend)(
            [master], [(8 * g).to(device, torch.float16)], [buffer], [copy], [step], lr, **hyper,
            grad_scale=torch.full((), 8.0, **scalar), found_inf=torch.full((), found, **scalar),
        )  # fmt: skip
        if not found:
            exact = sgd(exact[0], g.double().numpy(), exact[1], int(step), lr=lr.item(), **hyper)
        if not all(np.array_equal(t.cpu().double().numpy(), e) for t, e in zip((master, buffer), exact, strict=True)):
            return "sgd_ differs from fp64 where fp32 is exact"
        if not torch.equal(copy, master.half()):
            return "the copy is not the master rounded"
    return None if int(step) == 2 else f"{int(step)} steps counted, 2 taken"
