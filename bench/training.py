# SPDX-License-Identifier: Apache-2.0
"""Whole training steps (forward, loss, backward, optimizer) of converted models against torch's recipes.

Losses and peak memory stand in the rows: what is fast and does not learn would show there.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import mpkernels as mpk
from bench import models
from bench.cases import Training
from bench.contender import OURS, Contender
from bench.linear_act import onednn_fp32
from tests import bounds

LR = 1e-4
TORCH_FP16_ON_CPU = ("digits", "mlp")  # elsewhere torch's fp16 takes minutes there
SMALL = ("digits",)  # steps of microseconds: more of them in a round
Step = Callable[[], torch.Tensor]


def loop(model, optimizer, scaler, inputs, targets, context=contextlib.nullcontext) -> Step:
    """One training step as every recipe but the classical has it; returns the loss."""

    def step():
        with context():
            out = model(*inputs)
        loss = cross_entropy(out.float().flatten(0, -2), targets.flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(name, device, policy: str, *, compiled=False, autocast=False) -> Step:
    model, inputs, targets = models.make(name, device)
    model = mpk.convert(model, policy)
    if mpk.Policy.parse(policy).param_dtype != torch.float32:
        inputs = tuple(t.to(mpk.Policy.parse(policy).param_dtype) if t.is_floating_point() else t for t in inputs)
    optimizer = mpk.optim.AdamW(model.parameters(), lr=LR)
    narrow = mpk.Policy.parse(policy).compute_dtype
    scaler = mpk.GradScaler(device.type, enabled=narrow == torch.float16)
    context = functools.partial(torch.autocast, device.type, narrow) if autocast else contextlib.nullcontext
    return loop(torch.compile(model) if compiled else model, optimizer, scaler, inputs, targets, context)


def by_torch(name, device, narrow: torch.dtype | None, *, compiled=False, onednn=False) -> Step:
    """fp32 parameters; autocast and GradScaler as torch's documentation has them, AdamW with the fused kernel."""
    model, inputs, targets = models.make(name, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=narrow == torch.float16)
    context = contextlib.nullcontext if narrow is None else functools.partial(torch.autocast, device.type, narrow)
    step = loop(torch.compile(model) if compiled else model, optimizer, scaler, inputs, targets, context)

    def switched():
        with onednn_fp32():
            return step()

    return switched if onednn else step


def classical(name, device) -> Step:
    """fp16 model, fp32 masters kept by hand: gradients copied to fp32, unscale_, AdamW(fused), masters copied back."""
    model, inputs, targets = models.make(name, device)
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    model.half()
    optimizer = torch.optim.AdamW(masters, lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device.type)
    inputs = tuple(t.half() if t.is_floating_point() else t for t in inputs)

    def step():
        loss = cross_entropy(model(*inputs).float().flatten(0, -2), targets.flatten())
        scaler.scale(loss).backward()
        for p, master in zip(model.parameters(), masters, strict=True):
            master.grad, p.grad = p.grad.float(), None
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
        return loss.detach()

    return step


def recipes(case: Training, device: torch.device) -> dict[str, Callable[[], Step]]:
    """name: what makes its step."""
    f16, bf16, on_gpu = torch.float16, torch.bfloat16, device.type == "cuda"
    ways = {
        OURS: (ours, "mixed_float16", {}),
        f"{OURS} float16": (ours, "float16", {}),
        f"{OURS} mixed_bfloat16": (ours, "mixed_bfloat16", {}),
        "torch fp32": (by_torch, None, {}),
        "torch autocast bf16": (by_torch, bf16, {}),
    }
    if not on_gpu:
        ways["torch fp32, oneDNN"] = (by_torch, None, dict(onednn=True))
    if on_gpu or case.model in TORCH_FP16_ON_CPU:
        ways["torch autocast fp16"] = (by_torch, f16, {})
    if on_gpu:
        ways[f"{OURS} in autocast"] = (ours, "mixed_float16", dict(autocast=True))
        ways[f"{OURS} in autocast, compiled"] = (ours, "mixed_float16", dict(autocast=True, compiled=True))
        ways["torch autocast fp16, compiled"] = (by_torch, f16, dict(compiled=True))
        ways["torch autocast bf16, compiled"] = (by_torch, bf16, dict(compiled=True))
    made = {
        name: functools.partial(how, case.model, device, argument, **options) for name, (how, argument, options) in ways.items()
    }
    if on_gpu or case.model in TORCH_FP16_ON_CPU:
        made["torch fp16 model, fp32 masters"] = functools.partial(classical, case.model, device)
    return made


def contenders(case: Training, device: torch.device) -> dict[str, Contender]:
    fp32 = by_torch(case.model, device, None)().item()
    return {name: contender(case, device, name, make, fp32) for name, make in recipes(case, device).items()}


def contender(case: Training, device: torch.device, name: str, make: Callable[[], Step], fp32_loss: float) -> Contender:
    slow = (
        device.type == "cpu" and name in ("torch autocast fp16", "torch fp16 model, fp32 masters") and case.model not in SMALL
    )
    steps = 1 if slow else case.steps * (10 if case.model in SMALL else 1)
    step, losses = None, []

    def run():
        for _ in range(steps):
            losses.append(step())

    def check() -> dict:
        nonlocal step
        peak = peak_bytes(make, device)
        step = make()
        losses.append(step())
        narrow = torch.bfloat16 if "bf" in name else torch.float16
        bounds.check_loss(losses[0].item(), fp32_loss, narrow)
        return {"peak_bytes": peak, "fp32_loss": fp32_loss}

    def after() -> dict:
        return {"steps": len(losses), "first_loss": losses[0].item(), "last_loss": losses[-1].item()}

    return Contender(run, check, calls=steps, hide_launches=False, after=after)


def peak_bytes(make: Callable[[], Step], device: torch.device) -> int:
    """The most that the allocator had given out at once, from making the model to the end of its second step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _two_steps(make)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _two_steps(make)
    events = sorted((e for e in profile.events() if e.name == "[memory]"), key=lambda e: e.time_range.start)
    return max(itertools.accumulate(event.self_cpu_memory_usage for event in events))


def _two_steps(make: Callable[[], Step]) -> None:
    step = make()
    step()
    step()
