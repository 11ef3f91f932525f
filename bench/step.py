# SPDX-License-Identifier: Apache-2.0
"""The optimizer step on the CPU against torch's recipes: unscale, check, AdamW, 16-bit weights.

python -m bench.step [--millions 10] [--rounds 9]     one thread, process time; one JSON row per case and contender
"""

import torch

import mpkernels as mpk
from bench.rows import main
from bench.timing import interleave, ratio, summary


def tensors(millions: int, count: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """`count` parameters of together `millions` * 1e6 elements, each with a gradient."""
    sizes = [millions * 10**6 // count] * count
    params = [torch.nn.Parameter((torch.randn(n) * 0.02).to(dtype)) for n in sizes]
    for p in params:
        p.grad = (torch.randn_like(p, dtype=torch.float32) * 8).to(dtype)
    return params


def scaler_of(kind):
    """A scaler that has seen a loss. Its scale is small: torch divides the fp32 gradients by it in place, round after round."""
    scaler = kind("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    return scaler


def ours(millions, count, **options):
    """fp16 parameters and gradients, fp32 masters: one read, one pass."""
    optimizer = mpk.optim.AdamW(tensors(millions, count, torch.float16), lr=1e-4, **options)
    scaler = scaler_of(mpk.GradScaler)

    def step():
        scaler.step(optimizer)
        scaler.update()

    return step


def classical(millions, count):
    """fp16 model, fp32 masters kept by hand: gradients copied to fp32, unscale_, AdamW(fused), masters copied back."""
    model = tensors(millions, count, torch.float16)
    masters = [torch.nn.Parameter(p.detach().float()) for p in model]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    scaler = scaler_of(torch.amp.GradScaler)

    @torch.no_grad()
    def step():
        for p, master in zip(model, masters, strict=True):
            master.grad = p.grad.float()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        for p, master in zip(model, masters, strict=True):
            p.copy_(master)

    return step


def fp32_parameters(millions, count):
    """The autocast recipe: fp32 parameters and gradients, GradScaler, AdamW(fused); it writes no 16-bit weights."""
    params = tensors(millions, count, torch.float32)
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    scaler = scaler_of(torch.amp.GradScaler)

    def step():
        scaler.step(optimizer)
        scaler.update()

    return step


def rows(millions: int, rounds: int):
    """One row per case and contender, ratios to the classical recipe taken within a round."""
    for count in (1, 300):
        contenders = {
            "mpkernels": ours(millions, count),
            "mpkernels, max_norm=1": ours(millions, count, max_norm=1.0),
            "classical fp16 recipe": classical(millions, count),
            "fp32 parameters": fp32_parameters(millions, count),
        }
        times = interleave(contenders, rounds)
        for name in contenders:
            yield {
                "case": f"AdamW step, {millions}e6 parameters in {count} tensors", "contender": name,
                "baseline": "classical fp16 recipe", **summary(times[name]),
                "ratio": ratio(times, name, "classical fp16 recipe"),
                "ratio_to_fp32_parameters": ratio(times, name, "fp32 parameters"),
            }  # fmt: skip


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows, millions=10, rounds=9)
