# SPDX-License-Identifier: Apache-2.0
"""Whole training steps (forward, loss, backward, optimizer) of converted models against torch's recipes.

Losses and peak memory stand in the rows: what is fast and does not learn would show there.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import mpkernels as mpk
from bench import limits, models
from bench.cases import Training
from bench.implementation import OURS, Implementation, Missing, package, with_forced
from bench.linear_act import onednn_fp32
from tests import bounds

LR = 1e-4
LOSSES = 6  # that every implementation gets to: two steps for its memory, one to warm up, three rounds at least
Step = Callable[[], torch.Tensor]


def loop(model, optimizer, scaler, inputs, targets, context=contextlib.nullcontext, entropy=cross_entropy, parts=1) -> Step:
    """One training step as every recipe but the classical has it, in so many micro-batches; returns the loss."""
    batches = list(zip(*(tensor.chunk(parts) for tensor in (*inputs, targets)), strict=True))

    def step():
        losses = []
        for *inputs, targets in batches:
            with context():
                out = model(*inputs)
            loss = entropy(out.float().flatten(0, -2), targets.flatten()) / parts
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return sum(losses)

    return step


def ours(name, device, policy: str, *, compiled=False, autocast=False, watch: dict | None = None, parts=1) -> Step:
    """watch: the options of a watch, None without one."""
    model, inputs, targets = models.make(name, device)
    model = mpk.convert(model, policy)
    if mpk.Policy.parse(policy).param_dtype != torch.float32:
        inputs = tuple(t.to(mpk.Policy.parse(policy).param_dtype) if t.is_floating_point() else t for t in inputs)
    optimizer = mpk.optim.AdamW(model.parameters(), lr=LR)
    narrow = mpk.Policy.parse(policy).compute_dtype
    scaler = mpk.GradScaler(device.type, enabled=narrow == torch.float16)
    if watch is not None:
        mpk.watch(model, optimizer, scaler, **watch)
    context = functools.partial(torch.autocast, device.type, narrow) if autocast else contextlib.nullcontext
    return loop(torch.compile(model) if compiled else model, optimizer, scaler, inputs, targets, context, parts=parts)


def by_torch(name, device, narrow: torch.dtype | None, *, compiled=False, onednn=False, entropy=cross_entropy, parts=1) -> Step:
    """fp32 parameters; autocast and GradScaler as torch's documentation has them, AdamW with the fused kernel."""
    model, inputs, targets = models.make(name, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=narrow == torch.float16)
    context = contextlib.nullcontext if narrow is None else functools.partial(torch.autocast, device.type, narrow)
    step = loop(torch.compile(model) if compiled else model, optimizer, scaler, inputs, targets, context, entropy, parts)

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


@package
def with_liger(name, device, narrow: torch.dtype) -> Step:
    """The best of torch with Liger's cross entropy, which makes its gradient in the logits' place."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return by_torch(name, device, narrow, compiled=True, entropy=LigerCrossEntropyLoss())


def recipes(case: Training, device: torch.device) -> dict[str, tuple]:
    """name: (what makes its step, its arguments, what torch's own GEMMs multiply in)."""
    f16, bf16, f32, on_gpu = torch.float16, torch.bfloat16, torch.float32, device.type == "cuda"
    if case.parts > 1:
        of_parts = {"parts": case.parts}
        return {
            OURS: (ours, ("mixed_float16,accumulate_grad",), of_parts, f32),
            f"{OURS}, autograd adds": (ours, ("mixed_float16",), of_parts, f32),
            f"{OURS} mixed_bfloat16": (ours, ("mixed_bfloat16,accumulate_grad",), of_parts, f32),
            f"{OURS} mixed_bfloat16, autograd adds": (ours, ("mixed_bfloat16",), of_parts, f32),
            "torch fp32": (by_torch, (None,), of_parts, f32),
            "torch autocast bf16": (by_torch, (bf16,), of_parts, bf16),
            "torch autocast fp16": (by_torch, (f16,), of_parts, f16),
        }
    found = {
        OURS: (ours, ("mixed_float16",), {}, f32),
        f"{OURS} float16": (ours, ("float16",), {}, f32),
        f"{OURS} mixed_bfloat16": (ours, ("mixed_bfloat16",), {}, f32),
        "torch fp32": (by_torch, (None,), {}, f32),
        "torch autocast bf16": (by_torch, (bf16,), {}, bf16),
        "torch autocast fp16": (by_torch, (f16,), {}, f16),
        "torch fp16 model, fp32 masters": (classical, (), {}, f16),
    }
    if not on_gpu:
        found[f"{OURS} mixed_bfloat16 in autocast"] = (ours, ("mixed_bfloat16",), dict(autocast=True), bf16)
        found["torch fp32, oneDNN"] = (by_torch, (None,), dict(onednn=True), f32)
    if case.compiled:
        found[f"{OURS}, compiled"] = (ours, ("mixed_float16",), dict(compiled=True), f32)
        found["torch fp32, compiled"] = (by_torch, (None,), dict(compiled=True), f32)
        found["torch autocast fp16, compiled"] = (by_torch, (f16,), dict(compiled=True), f16)
        found["torch autocast bf16, compiled"] = (by_torch, (bf16,), dict(compiled=True), bf16)
        found["torch autocast bf16, compiled, Liger"] = (with_liger, (bf16,), {}, bf16)
    if on_gpu:
        found[f"{OURS} in autocast"] = (ours, ("mixed_float16",), dict(autocast=True), f32)
        found[f"{OURS} in autocast, compiled"] = (ours, ("mixed_float16",), dict(autocast=True, compiled=True), f32)
    return found


def implementations(case: Training, device: torch.device) -> dict[str, Implementation]:
    with FlopCounterMode(display=False) as counter:
        fp32_loss = by_torch(case.model, device, None)().item()
    flops = counter.get_total_flops()

    def of(name, how, arguments, options, multiplied) -> Implementation:
        make = functools.partial(how, case.model, device, *arguments, **options)
        return implementation(device, name, make, fp32_loss, flops, multiplied)

    found = {name: of(name, *recipe) for name, recipe in recipes(case, device).items()}
    return with_forced(found, lambda: of(OURS, *recipes(case, device)[OURS]), "linear_act", device)


def implementation(device, name: str, make: Callable[[], Step], fp32_loss: float, flops: int, multiplied) -> Implementation:
    step, losses = None, []

    def run():
        losses.append(step())

    def make_and_run() -> None:
        nonlocal step
        step = make()
        run()
        run()

    def check() -> dict:
        if slow := limits.too_slow(device, multiplied, "both", flops):
            raise Missing(slow)
        peak = peak_bytes(make_and_run, device)
        bounds.check_loss(losses[0].item(), fp32_loss, torch.bfloat16 if "bf" in name else torch.float16)
        return {"peak_bytes": peak, "fp32_loss": fp32_loss}

    def after() -> dict:
        return {"steps": LOSSES, "first_loss": losses[0].item(), "last_loss": losses[LOSSES - 1].item()}

    gemm = "bfloat16" if "bf" in name else "float32" if "fp32" in name.split(",")[0] else "float16"
    return Implementation(run, check, flops=flops, gemm=gemm, timed="all", after=after)


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The most that the allocator had given out at once, beyond what it had before: of making a model and two steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to the terminal at each start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    # NOTE: profile.events() keeps of these only what was allocated outside of any op.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
