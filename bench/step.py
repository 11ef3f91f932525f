# SPDX-License-Identifier: Apache-2.0
"""The optimizer step against torch's recipes and the pass structures of Apex, Megatron and DeepSpeed: verdict, AdamW, weights.

Bytes are counted per parameter from what each pass reads and writes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from bench.cases import Step
from bench.implementation import OURS, Implementation, Missing, check_peer, numerics, with_forced
from bench.rows import free_bytes
from bench.step_recipes import (
    BETAS,
    DECAY,
    EPS,
    HYPER,
    LION_BETAS,
    LR,
    MAX_NORM,
    SCALE,
    Recipe,
    TorchLion,
    apex,
    apex_passes,
    bitsandbytes,
    classical,
    deepspeed_passes,
    fp32_parameters,
    megatron_passes,
    ours,
    plain_read,
    torch_compile,
    torch_lion,
    transformer_engine,
)  # fmt: skip
from mpkernels.ops.optimizer_update import reference
from tests import bounds

MANY = 2 * 10**7  # parameters from which only the fastest compete on a CPU
NEEDED = 24  # bytes per parameter that a recipe has at once: parameter, gradient, master, m, v, and a temporary
SAMPLED = 4096  # elements of a tensor that are compared with fp64
PLAIN_STEP = f"{OURS}, a plain step"  # beside one that clips or is skipped
PLAIN_READ = f"{OURS}, a plain read"  # in place of verdict and statistics


def recipes(case: Step, device: torch.device) -> dict[str, tuple[Callable, int]]:
    """name: (recipe, bytes per parameter, 0 where temporaries make it a matter of counting)."""
    if case.optimizer == "lion":
        return {OURS: (ours, 22), "fp32 parameters, foreach": (torch_lion, 0)}
    fused, foreach, loop = dict(fused=True), dict(foreach=True), dict(foreach=False, fused=False)
    narrow, plain, skipped = case.grads == "float16", case.kind == "plain", case.kind == "skipped"
    clip = 12 if case.kind == "clip" else 0  # norm R4, scaled R4 W4
    check, step = (2, 28) if narrow else (4, 30)
    all_compete = case.parameters < MANY or device.type == "cuda"
    found = {OURS: (ours, check if skipped else check + step)}
    if not plain:
        found[PLAIN_STEP] = (ours, check + step)
    elif narrow and device.type == "cpu" and case.parameters >= 10**7:
        found[PLAIN_READ] = (plain_read, check + step)
    if narrow:
        found["classical fp16 recipe"] = (functools.partial(classical, **fused), 20 if skipped else 48 + clip)
    found["fp32 parameters"] = (functools.partial(fp32_parameters, **fused), 8 if skipped else 36 + clip if clip else 40)
    if plain:
        if narrow:
            found["Apex's passes"] = (apex_passes, 34 - 2)  # the second write of the gradient is the first pass's here
        found["torch.compile"] = (torch_compile, check + step)
    if plain and all_compete:
        found["fp32 parameters, weights cast"] = (functools.partial(fp32_parameters, cast=True, **fused), 46)
        if narrow:
            found["Megatron's passes"] = (megatron_passes, 48)
            found["DeepSpeed's passes"] = (deepspeed_passes, 70)
            found["classical, foreach"] = (functools.partial(classical, **foreach), 0)
            found["classical, for-loop"] = (functools.partial(classical, **loop), 0)
        else:
            found["fp32 parameters, foreach"] = (functools.partial(fp32_parameters, **foreach), 0)
            found["fp32 parameters, for-loop"] = (functools.partial(fp32_parameters, **loop), 0)
    if plain:
        found["bitsandbytes"] = (bitsandbytes, 40)
        if narrow:
            found |= {"Apex": (apex, 34), "Transformer Engine": (transformer_engine, 34)}
    return found


# ----- implementations ---------------------------------------------------------------


def implementations(case: Step, device: torch.device) -> dict[str, Implementation]:
    """Those that ours is compared with itself by take its memory when they were checked."""
    plain, made = replace(case, kind="plain"), {}
    found = {
        name: implementation(plain if name == PLAIN_STEP else case, device, *how, name, made)
        for name, how in recipes(case, device).items()
    }
    return with_forced(found, lambda: implementation(case, device, *recipes(case, device)[OURS]), f"{case.optimizer}_", device)


def implementation(
    case: Step, device: torch.device, make: Callable, bytes_per_parameter: int, name: str = OURS, made: dict | None = None
) -> Implementation:
    """made: the recipes of the case by name, this one to come."""
    made = {} if made is None else made

    def run():
        made[name].step()

    def check() -> dict:
        needed, free = NEEDED * case.parameters, free_bytes(device)
        if needed > free:
            raise Missing(f"needs {needed / 1e9:.0f} GB where {free / 1e9:.0f} GB are free")
        made[name] = make(case, device)
        facts = _check(case, device, made[name], name.startswith(OURS))
        if name in (PLAIN_STEP, PLAIN_READ) and OURS in made:
            made[name].move_to(made[OURS])
        return {"bytes_per_parameter": bytes_per_parameter, **facts}

    return Implementation(run, check, bytes=bytes_per_parameter * case.parameters)


def _check(case: Step, device: torch.device, recipe: Recipe, ours: bool) -> dict:
    """The first step against fp64 in a part of the first and of the last tensor; a skipped one leaves every bit there."""
    of = (0, case.tensors - 1)
    part = lambda tensors: torch.cat([tensors[i].detach().flatten()[:SAMPLED].cpu() for i in of])
    w, g = part(recipe.params).float(), part([p.grad for p in recipe.params]).double() / SCALE
    factor = 1.0
    if case.kind == "clip":
        norm = math.sqrt(sum(_squares(p.grad) for p in recipe.params)) / SCALE
        factor = min(1.0, MAX_NORM / (norm + 1e-6))
    recipe.step()
    after = part(recipe.updated())
    if case.kind == "skipped":
        assert torch.equal(after, w), "a skipped step wrote the masters"
        return {}
    exact, fp32 = _reference(case, w, g * factor), _torch_fp32(case, w, g * factor)
    if ours:
        bounds.check_trajectory(*(t.double().numpy()[None] for t in (after, exact, fp32)))
        if recipe.masters is not None:
            assert torch.equal(part(recipe.params), after.half()), "the weights are not the masters rounded"
    else:
        check_peer(after - w, exact - w)
    return numerics(after, exact, torch.float32)


def _squares(grad: torch.Tensor) -> float:
    return sum(part.double().square().sum().item() for part in grad.flatten().split(1 << 26))


def _reference(case: Step, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    zeros = np.zeros(w.numel())
    if case.optimizer == "lion":
        hyper = dict(lr=LR, beta1=LION_BETAS[0], beta2=LION_BETAS[1], weight_decay=DECAY)
        return torch.from_numpy(reference.lion(w.double().numpy(), g.numpy(), zeros, 1, **hyper)[0])
    hyper = dict(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, decoupled=True)
    return torch.from_numpy(reference.adamw(w.double().numpy(), g.numpy(), zeros, zeros, None, 1, **hyper)[0])


def _torch_fp32(case: Step, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """torch's for-loop in fp32: what bound 8 compares with."""
    p = nn.Parameter(w.clone())
    p.grad = g.float()
    optimizer = TorchLion([p]) if case.optimizer == "lion" else torch.optim.AdamW([p], **HYPER, foreach=False)
    optimizer.step()
    return p.detach()
