# SPDX-License-Identifier: Apache-2.0
"""Host time of the optimizer step on the CPU: tensors of 16 elements, so that nothing but the way to the kernels counts.

python -m bench.step_host [--rounds 201]     one thread, process time; one JSON row per number of tensors and contender
"""

import torch

import mpkernels as mpk
from bench.rows import main
from bench.step import scaler_of
from bench.timing import interleave, summary

ELEMENTS, COUNTS = 16, (1, 100, 1000)


def step_of(count: int, dtype: torch.dtype, make, scaler=None):
    """A step of `count` tensors whose gradients are new tensors at every step, as zero_grad() leaves them."""
    params = [torch.nn.Parameter(torch.randn(ELEMENTS).to(dtype)) for _ in range(count)]
    grads = [[torch.randn(ELEMENTS).to(dtype) for _ in params] for _ in range(2)]
    optimizer = make(params)

    def step():
        grads.reverse()
        for p, grad in zip(params, grads[0], strict=True):
            p.grad = grad
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    return step


def contenders(count: int) -> dict:
    """Assigning the gradients, 0.1 us each, is part of all of them."""
    ours, torchs = (lambda p: mpk.optim.AdamW(p)), (lambda p: torch.optim.AdamW(p, fused=True))
    return {
        "mpkernels, step": step_of(count, torch.float16, ours),
        "mpkernels, scaler.step and update": step_of(count, torch.float16, ours, scaler_of(mpk.GradScaler)),
        "mpkernels, the same with max_norm=1": step_of(
            count, torch.float16, lambda p: mpk.optim.AdamW(p, max_norm=1.0), scaler_of(mpk.GradScaler)
        ),
        "torch AdamW(fused), step": step_of(count, torch.float32, torchs),
        "torch AdamW(fused), scaler.step and update": step_of(
            count, torch.float32, torchs, scaler_of(torch.amp.GradScaler)
        ),
    }  # fmt: skip


def rows(rounds: int):
    """One row per number of tensors and contender."""
    for count in COUNTS:
        times = interleave(contenders(count), rounds)
        for name, values in times.items():
            yield {"case": f"host time of a step, {count} tensors of {ELEMENTS}", "contender": name, **summary(values)}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows, rounds=201)
