# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on the CPU (forward, loss, backward, update) against torch's recipes.

python -m bench.step_training [--rounds 3]    one thread, process time; prints one JSON row per contender

Widths 784-1024-1024-1024-10 with ReLU, batch 256, cross entropy, AdamW; fp16 with a loss scaler. The losses of the first
step and after all steps stand in the rows: a recipe that is fast and does not learn would show there.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import mpkernels as mpk
from bench.rows import main
from bench.timing import interleave, ratio, summary

WIDTHS, BATCH = (784, 1024, 1024, 1024, 10), 256
CASE = f"training step, widths {'-'.join(map(str, WIDTHS))}, batch {BATCH}, AdamW, one thread, process time"
LR = 1e-4
FAST_STEPS = 5  # per round; torch's fp16 recipes take one, which lasts a hundred times as long
BASELINES = ("torch autocast fp16", "torch fp16 model, fp32 masters", "torch fp32")


def network() -> nn.Sequential:
    """The same weights for every contender."""
    torch.manual_seed(0)
    layers = [layer for K, N in itertools.pairwise(WIDTHS) for layer in (nn.Linear(K, N), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(BATCH, WIDTHS[0], generator=generator), torch.randint(0, WIDTHS[-1], (BATCH,), generator=generator)


@dataclass
class Contender:
    """`steps` training steps per call; keeps the losses."""

    step: Callable[[], torch.Tensor]
    steps: int = FAST_STEPS
    losses: list = field(default_factory=list)

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.losses.append(self.step().detach())


def contender(model, optimizer, scaler, autocast=contextlib.nullcontext, steps=FAST_STEPS) -> Contender:
    """The loop that all but the classical recipe share."""
    x, target = batch()

    def step():
        with autocast():
            out = model(x)
        loss = cross_entropy(out.float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    return Contender(step, steps)


def ours(policy: str) -> Contender:
    model = mpk.convert(network(), policy)
    optimizer = mpk.optim.AdamW(model.parameters(), lr=LR)
    scaler = mpk.GradScaler(enabled=mpk.Policy.parse(policy).compute_dtype.itemsize == 2)
    return contender(model, optimizer, scaler)


def torch_recipe(autocast: torch.dtype | None, steps: int = FAST_STEPS) -> Contender:
    """fp32 parameters; autocast and GradScaler as torch's documentation has them, AdamW with the fused kernel."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=autocast == torch.float16)
    context = contextlib.nullcontext if autocast is None else lambda: torch.autocast("cpu", autocast)
    return contender(model, optimizer, scaler, context, steps)


def classical() -> Contender:
    """fp16 model, fp32 masters kept by hand: gradients copied to fp32, unscale_, AdamW(fused), masters copied back."""
    model = network()
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    model.half()
    optimizer = torch.optim.AdamW(masters, lr=LR, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    x, target = batch()

    def step():
        loss = cross_entropy(model(x.half()).float(), target)
        scaler.scale(loss).backward()
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
        return loss

    return Contender(step, 1)


def fp32_by_onednn() -> Contender:
    """torch fp32 with the switch that sends its GEMMs to oneDNN: the toughest fp32 peer on CPUs where MKL is slow."""
    inner = torch_recipe(None)

    def step():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # NOTE: on a CPU with AMX this means bf16; see the losses
        try:
            return inner.step()
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = "none"

    return Contender(step)


def contenders() -> dict[str, Contender]:
    return {
        "mpkernels float16": ours("float16"),
        "mpkernels mixed_float16": ours("mixed_float16"),
        "mpkernels bfloat16": ours("bfloat16"),
        "mpkernels float32": ours("float32"),
        "torch fp32": torch_recipe(None),
        "torch fp32, oneDNN switch": fp32_by_onednn(),
        "torch autocast bf16": torch_recipe(torch.bfloat16),
        "torch autocast fp16": torch_recipe(torch.float16, steps=1),
        "torch fp16 model, fp32 masters": classical(),
    }


def rows(rounds: int):
    """One row per contender; ratios are taken within a round."""
    everyone = contenders()
    times = interleave(everyone, rounds)
    times = {name: [us / everyone[name].steps for us in each] for name, each in times.items()}
    for name, contender in everyone.items():
        yield {
            "case": CASE, "contender": name, **summary(times[name]),
            "ratio": {baseline: ratio(times, name, baseline) for baseline in BASELINES},
            "steps": len(contender.losses), "first_loss": contender.losses[0].item(), "last_loss": contender.losses[-1].item(),
        }  # fmt: skip


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows, rounds=3)
