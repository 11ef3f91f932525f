# SPDX-License-Identifier: Apache-2.0
"""The optimizer step against torch's recipes and the pass structures of Apex, Megatron and DeepSpeed: verdict, AdamW, weights.

Bytes are counted per parameter from what each pass reads and writes. "X's passes" is the order of X's passes over memory,
with the same bytes, rebuilt from torch ops; it is not X, whose own kernels compete where they can be imported.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from torch import nn

import mpkernels as mpk
from bench.cases import Step
from bench.contender import OURS, Contender, Missing, check_peer, numerics, package, with_forced
from bench.rows import free_bytes
from mpkernels.ops import grad_stats
from mpkernels.ops.optimizer_update import reference
from mpkernels.runtime import compute_copy
from tests import bounds

LR, BETAS, EPS, DECAY, MAX_NORM = 1e-4, (0.9, 0.999), 1e-8, 1e-2, 1.0
MANY = 2 * 10**7  # parameters from which only the fastest compete on a CPU
NEEDED = 24  # bytes per parameter that a recipe has at once: parameter, gradient, master, m, v, and a temporary
SAMPLED = 4096  # elements of a tensor that are compared with fp64
SCALE = 1.0  # torch divides fp32 gradients by the scale in place, round after round
PLAIN_STEP = f"{OURS}, a plain step"  # beside one that clips or is skipped
PLAIN_READ = f"{OURS}, a plain read"  # in place of verdict and statistics
HYPER = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


@dataclass
class Recipe:
    """step: one optimizer step. params: the model's, with gradients; masters: what the step updates, where it is not them.

    optimizer: of one of ours. layers: those that read its compute copies.
    """

    step: Callable[[], object]
    params: list[torch.Tensor]
    masters: Callable[[], list[torch.Tensor]] | None = None
    optimizer: mpk.optim.AdamW | None = None
    layers: Sequence[nn.Module] = ()

    def updated(self) -> list[torch.Tensor]:
        return self.params if self.masters is None else self.masters()

    def move_to(self, other: "Recipe") -> None:
        """Take the memory of another of ours, but for gradients and step counts: where it lies decides as much as what runs."""
        for mine, its in zip(self.params, other.params, strict=True):
            mine.data = its.data
            state = other.optimizer.state[its]
            self.optimizer.state[mine] = {**state, "step": state["step"].clone()}


# ----- tensors ---------------------------------------------------------------


def parameters(case: Step, device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    """The same values and gradients for every recipe, in `dtype`; a skipped step has an inf in the last gradient."""
    generator = torch.Generator(device).manual_seed(0)
    size = case.parameters // case.tensors
    narrow = getattr(torch, case.grads)
    params = []
    for _ in range(case.tensors):
        value, grad = (torch.randn(size, device=device, generator=generator) for _ in range(2))
        params.append(nn.Parameter(value.mul_(0.02).to(dtype)))
        params[-1].grad = grad.mul_(8).to(narrow).to(dtype)
    if case.kind == "skipped":
        params[-1].grad[-1] = math.inf
    return params


def scaler_of(kind, device: torch.device):
    """A scaler that has seen a loss, and hardly moves when steps are skipped."""
    scaler = kind(device.type, init_scale=SCALE, backoff_factor=0.999)
    scaler.scale(torch.zeros((), device=device))
    return scaler


# ----- recipes ---------------------------------------------------------------


def reader_of(parameter: nn.Parameter) -> nn.Module:
    """A layer that has asked for the fp16 copy of its weight."""
    layer = nn.Module()
    layer.weight = parameter
    compute_copy.for_layer(layer, torch.float16)
    return layer


def ours(case, device) -> Recipe:
    """One read, one pass. fp32 parameters: as under mixed_float16, where a layer reads the 16-bit copy."""
    params = parameters(case, device, getattr(torch, case.grads))
    layers = [reader_of(p) for p in params] if case.grads == "float32" else []
    optimizer = mpk.optim.AdamW(params, **HYPER, max_norm=MAX_NORM if case.kind == "clip" else None)
    scaler = scaler_of(mpk.GradScaler, device)

    steps = itertools.count(1)

    def step():
        scaler.step(optimizer)
        scaler.update()
        if case.kind == "skipped" and not next(steps) % 10:  # or the scaler would warn of so many in a row
            scaler.skipped_in_a_row.zero_()

    if case.grads == "float32":
        return Recipe(step, params, optimizer=optimizer, layers=layers)
    return Recipe(step, params, lambda: [optimizer.state[p]["master"] for p in params], optimizer)


def plain_read(case, device) -> Recipe:
    """Ours, but instead of verdict and statistics one reduction by torch that reads the same bytes: what those cost beside it.

    The gradients lie in one piece of memory and are read as int32, which torch does as fast as it reads anything on a CPU.
    """
    recipe = ours(case, device)
    flat = torch.cat([p.grad.flatten() for p in recipe.params])
    for p, grad in zip(recipe.params, flat.split([p.numel() for p in recipe.params]), strict=True):
        p.grad = grad.view_as(p)
    words, step = flat.view(torch.int32), recipe.step

    def read(call):
        words.amax()
        call.found_inf.zero_()

    def step_with_plain_read():
        with mock.patch.object(grad_stats.op, "run_checked", read):
            step()

    return replace(recipe, step=step_with_plain_read)


def by_torch(case, optimizer, scaler):
    """What a user of torch's GradScaler writes."""

    def step():
        if case.kind == "clip":
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return step


def classical(case, device, **options) -> Recipe:
    """fp16 model, fp32 masters kept by hand: gradients copied to fp32, unscale_, AdamW, masters copied back."""
    model = parameters(case, device, torch.float16)
    masters = [nn.Parameter(p.detach().float()) for p in model]
    optimizer = torch.optim.AdamW(masters, **HYPER, **options)
    scaler = scaler_of(torch.amp.GradScaler, device)

    @torch.no_grad()
    def step():
        for p, master in zip(model, masters, strict=True):
            master.grad = p.grad.float()
        scaler.unscale_(optimizer)
        if case.kind == "clip":
            nn.utils.clip_grad_norm_(masters, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        for p, master in zip(model, masters, strict=True):
            p.copy_(master)

    return Recipe(step, model, lambda: masters)


def fp32_parameters(case, device, *, cast=False, **options) -> Recipe:
    """The autocast recipe: fp32 parameters and gradients, GradScaler, AdamW. cast: and autocast's casts of the weights."""
    params = parameters(case, device, torch.float32)
    step = by_torch(case, torch.optim.AdamW(params, **HYPER, **options), scaler_of(torch.amp.GradScaler, device))
    narrow = [torch.empty_like(p, dtype=torch.float16, requires_grad=False) for p in params] if cast else []

    @torch.no_grad()
    def step_and_cast():
        step()
        torch._foreach_copy_(narrow, params)

    return Recipe(step_and_cast if cast else step, params)


def update(p, g, master, exp_avg, exp_avg_sq, step_size, denominator):
    """AdamW of one tensor; compiled it is one loop over memory."""
    g = g.float()
    exp_avg.lerp_(g, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    master.mul_(1 - LR * DECAY).sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / denominator + EPS))
    p.copy_(master)


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=True)


def all_finite(g):
    return torch.isfinite(g).all()


def one_loop_per_tensor(case, device, check) -> Recipe:
    """check(grads) -> whether to skip, then `update`, compiled, tensor by tensor."""
    model = parameters(case, device, getattr(torch, case.grads))
    masters, weights = [p.detach() for p in model], [p.detach() for p in model]
    if case.grads == "float16":
        masters = [p.float() for p in masters]
    else:
        weights = [p.half() for p in weights]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(m) for m in masters] for _ in range(2))
    grads = [p.grad for p in model]
    taken = 0

    @torch.no_grad()
    def step():
        nonlocal taken
        if check(grads):
            return
        taken += 1
        step_size = torch.tensor(LR / (1 - BETAS[0] ** taken), device=device)
        denominator = torch.tensor(math.sqrt(1 - BETAS[1] ** taken), device=device)
        for tensors in zip(weights, grads, masters, exp_avgs, exp_avg_sqs, strict=True):
            compiled(update)(*tensors, step_size, denominator)

    return Recipe(step, model, lambda: masters)


def torch_compile(case, device) -> Recipe:
    return one_loop_per_tensor(
        case, device, lambda grads: not torch.stack([compiled(all_finite)(g) for g in grads]).all().item()
    )


def apex_passes(case, device) -> Recipe:
    """Apex, TransformerEngine (capturable, masters): the check reads and writes the gradients, then one pass."""
    found, one = torch.zeros((), device=device), torch.ones((), device=device)

    def check(grads):
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found.zero_(), one)
        return found.item()

    return one_loop_per_tensor(case, device, check)


def megatron_passes(case, device) -> Recipe:
    """Megatron's Float16Optimizer: gradients to fp32, the check on those, AdamW, masters copied back."""
    model = parameters(case, device, torch.float16)
    masters = [nn.Parameter(p.detach().float()) for p in model]
    optimizer = torch.optim.AdamW(masters, **HYPER, fused=True)
    found, inverse = torch.zeros((), device=device), torch.full((), 1 / SCALE, device=device)

    @torch.no_grad()
    def step():
        for master in masters:
            master.grad = torch.empty_like(master)
        torch._foreach_copy_([m.grad for m in masters], [p.grad for p in model])
        torch._amp_foreach_non_finite_check_and_unscale_([m.grad for m in masters], found.zero_(), inverse)
        if not found.item():
            optimizer.step()
            torch._foreach_copy_(model, masters)

    return Recipe(step, model, lambda: masters)


def deepspeed_passes(case, device) -> Recipe:
    """DeepSpeed's FP16_Optimizer: a sum per gradient on the host, to fp32, flattened, norm, unscaled, AdamW, copied back."""
    model = parameters(case, device, torch.float16)
    flat = nn.Parameter(torch.cat([p.detach().float() for p in model]))
    masters = list(flat.detach().split([p.numel() for p in model]))
    optimizer = torch.optim.AdamW([flat], **HYPER, fused=True)

    @torch.no_grad()
    def step():
        if not all(math.isfinite(float(p.grad.float().sum())) for p in model):
            return
        flat.grad = torch.cat([p.grad.to(torch.float32) for p in model])
        flat.grad.norm()
        flat.grad.mul_(1 / SCALE)
        optimizer.step()
        for p, master in zip(model, masters, strict=True):
            p.copy_(master)

    return Recipe(step, model, lambda: masters)


@package
def apex(case, device) -> Recipe:
    """NVIDIA's."""
    from apex.optimizers import FusedAdam

    model = parameters(case, device, torch.float16)
    optimizer = FusedAdam(model, **HYPER, capturable=True, master_weights=True)
    step = package(by_torch(case, optimizer, scaler_of(torch.amp.GradScaler, device)))
    return Recipe(step, model, lambda: optimizer.param_groups_master[0]["params"])


@package
def transformer_engine(case, device) -> Recipe:
    """NVIDIA's, with fp32 masters."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    model = parameters(case, device, torch.float16)
    optimizer = FusedAdam(model, **HYPER, capturable=True, master_weights=True)
    step = package(by_torch(case, optimizer, scaler_of(torch.amp.GradScaler, device)))
    return Recipe(step, model, lambda: [optimizer.state[p]["master_param"] for p in model])


@package
def bitsandbytes(case, device) -> Recipe:
    """fp32 parameters and states."""
    from bitsandbytes.optim import AdamW

    params = parameters(case, device, torch.float32)
    optimizer = AdamW(params, **HYPER, optim_bits=32)
    return Recipe(package(by_torch(case, optimizer, scaler_of(torch.amp.GradScaler, device))), params)


def recipes(case: Step, device: torch.device) -> dict[str, tuple[Callable, int]]:
    """name: (recipe, bytes per parameter, 0 where temporaries make it a matter of counting)."""
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


# ----- contenders ---------------------------------------------------------------


def contenders(case: Step, device: torch.device) -> dict[str, Contender]:
    """Those that ours is compared with itself by take its memory when they were checked."""
    plain, made = replace(case, kind="plain"), {}
    found = {
        name: contender(plain if name == PLAIN_STEP else case, device, *how, name, made)
        for name, how in recipes(case, device).items()
    }
    return with_forced(found, lambda: contender(case, device, *recipes(case, device)[OURS]), "adamw_", device)


def contender(
    case: Step, device: torch.device, make: Callable, bytes_per_parameter: int, name: str = OURS, made: dict | None = None
) -> Contender:
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

    return Contender(run, check, bytes=bytes_per_parameter * case.parameters)


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
    exact, fp32 = _reference(w, g * factor), _torch_fp32(w, g * factor)
    if ours:
        bounds.check_trajectory(*(t.double().numpy()[None] for t in (after, exact, fp32)))
        if recipe.masters is not None:
            assert torch.equal(part(recipe.params), after.half()), "the weights are not the masters rounded"
    else:
        check_peer(after - w, exact - w)
    return numerics(after, exact, torch.float32)


def _squares(grad: torch.Tensor) -> float:
    return sum(part.double().square().sum().item() for part in grad.flatten().split(1 << 26))


def _reference(w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    zeros = np.zeros(w.numel())
    hyper = dict(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, decoupled=True)
    return torch.from_numpy(reference.adamw(w.double().numpy(), g.numpy(), zeros, zeros, None, 1, **hyper)[0])


def _torch_fp32(w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """torch's for-loop in fp32: what bound 8 compares with."""
    p = nn.Parameter(w.clone())
    p.grad = g.float()
    torch.optim.AdamW([p], **HYPER, foreach=False).step()
    return p.detach()
