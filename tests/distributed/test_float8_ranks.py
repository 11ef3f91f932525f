# SPDX-License-Identifier: Apache-2.0
"""Layers in eight bits on two ranks, by FSDP2 and by DDP: each quantizes the weight that was gathered as it is stored."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

import mpkernels as mpk
from tests.ranks import run_ranks
from tests.steps import raw

WORLD, ROWS, SIZES = 2, 16, (24, 32, 16, 4)
POLICIES = ("mixed_float8", "mixed_float8,batch_invariant", "mixed_float8,scaling=tensor")
SAVED = "mixed_float16,saved=float8_e4m3fn"  # by FSDP2 its gradients have 16 bits until they are reduced, as without `saved`


def made(policy: str) -> mpk.MPMLP:
    torch.manual_seed(0)
    return mpk.MPMLP(SIZES, policy=policy)


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(ROWS, SIZES[0], generator=generator), torch.randn(ROWS, SIZES[-1], generator=generator)


def by_fsdp(policy: str) -> nn.Module:
    model = made(policy)
    for module in (*(m for m in model if isinstance(m, mpk.MPLinear)), model):
        fully_shard(module, mp_policy=mpk.Policy.parse(policy).to_fsdp())
    return model


def by_ddp(policy: str) -> nn.Module:
    return nn.parallel.DistributedDataParallel(made(policy))


def gradients_are_the_mean_of_ranks(rank, wrap):
    """Bit for bit: the sum of two numbers of fp32 is one rounding, in either order."""
    for policy in (*POLICIES, SAVED) if wrap is by_ddp else POLICIES:
        model, grads = wrap(policy), []
        for other in range(WORLD):
            alone, (x, grad_out) = made(policy), batch(other)
            (alone(x) * grad_out).sum().backward()
            grads.append([p.grad for p in alone.parameters()])
        x, grad_out = batch(rank)
        out = model(x)
        (out * grad_out).sum().backward()
        for p, first, second in zip(model.parameters(), *grads, strict=True):
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert grad.dtype == torch.float32
            assert raw([grad]) == raw([(first + second) / WORLD]), policy


def a_step_is_skipped_by_all(rank):
    model = by_fsdp("mixed_float8")
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters()), mpk.GradScaler()
    before = raw(p.to_local() for p in model.parameters())
    x, grad_out = batch(rank)
    if rank == 1:
        x[3, 5] = torch.inf
    scaler.scale((model(x) * grad_out).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.last_step_skipped
    assert raw(p.to_local() for p in model.parameters()) == before


def dtensors_are_refused(rank):
    layer, mesh = mpk.MPLinear(8, 4, policy="mixed_float8"), init_device_mesh("cpu", (WORLD,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
    with pytest.raises(RuntimeError, match=r"DTensors cannot be computed in eight bits: .* or shard by FSDP2"):
        layer(torch.ones(3, 8))


@pytest.mark.parametrize("wrap", [by_fsdp, by_ddp])
def test_float8_gradients_over_ranks(wrap):
    run_ranks(WORLD, gradients_are_the_mean_of_ranks, wrap)


def test_float8_overflow_over_ranks():
    run_ranks(WORLD, a_step_is_skipped_by_all)


def test_float8_refuses_dtensors():
    run_ranks(WORLD, dtensors_are_refused)
