# SPDX-License-Identifier: Apache-2.0
"""The recipes of the optimizer step: ours, torch's, the pass structures of Apex, Megatron and DeepSpeed, and other packages.

"X's passes" is the order of X's passes over memory, with the same bytes, rebuilt from torch ops; it is not X, whose own kernels
compete where they can be imported.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import nn

import mpkernels as mpk
from bench.cases import Step
from bench.implementation import package
from mpkernels.ops import grad_stats
from mpkernels.runtime import compute_copy

LR, BETAS, EPS, DECAY, MAX_NORM = 1e-4, (0.9, 0.999), 1e-8, 1e-2, 1.0
SCALE = 1.0  # torch divides fp32 gradients by the scale in place, round after round
HYPER = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
LION_BETAS = (0.9, 0.99)
LION_HYPER = dict(lr=LR, betas=LION_BETAS, weight_decay=DECAY)


@dataclass
class Recipe:
    """step: one optimizer step. params: the model's, with gradients; masters: what the step updates, where it is not them.

    optimizer: of one of ours. layers: those that read its compute copies.
    """

    step: Callable[[], object]
    params: list[torch.Tensor]
    masters: Callable[[], list[torch.Tensor]] | None = None
    optimizer: torch.optim.Optimizer | None = None
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
    compute_copy.for_layer(layer, layer.weight, torch.float16)
    return layer


def ours(case, device) -> Recipe:
    """One read, one pass. fp32 parameters: as under mixed_float16, where a layer reads the 16-bit copy."""
    params = parameters(case, device, getattr(torch, case.grads))
    layers = [reader_of(p) for p in params] if case.grads == "float32" else []
    kind, hyper = (mpk.optim.Lion, LION_HYPER) if case.optimizer == "lion" else (mpk.optim.AdamW, HYPER)
    optimizer = kind(params, **hyper, max_norm=MAX_NORM if case.kind == "clip" else None)
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

    The gradients lie in one block of memory and are read as int32, which torch does as fast as it reads anything on a CPU.
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


class TorchLion(torch.optim.Optimizer):
    """Lion in fp32 by torch's foreach ops: torch itself has none."""

    def __init__(self, params):
        super().__init__(params, dict(LION_HYPER))

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        params, (beta1, beta2) = group["params"], group["betas"]
        grads = [p.grad for p in params]
        moments = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
        signs = torch._foreach_lerp(moments, grads, 1 - beta1)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, signs, alpha=-group["lr"])
        torch._foreach_lerp_(moments, grads, 1 - beta2)


def torch_lion(case, device) -> Recipe:
    """The autocast recipe with it: fp32 parameters and gradients, GradScaler."""
    params = parameters(case, device, torch.float32)
    return Recipe(by_torch(case, TorchLion(params), scaler_of(torch.amp.GradScaler, device)), params)


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
