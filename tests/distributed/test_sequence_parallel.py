# SPDX-License-Identifier: Apache-2.0
"""Tests of gradients that lie otherwise than their parameters, as torch's SequenceParallel leaves them, on 2 gloo ranks."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import mpkernels as mpk
from tests import bounds
from tests.ranks import run_ranks
from tests.steps import raw

MAKE = {"AdamW": (mpk.optim.AdamW, torch.optim.AdamW), "SGD": (mpk.optim.SGD, torch.optim.SGD)}
MAX_NORM = 0.5


class Block(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn(parameter.shape) / 4)
        self.to(dtype)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


def sharded(mesh) -> Block:
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    return parallelize_module(Block(), mesh, plan)


def trajectory(block, optimizer, scaler, rows, steps=4) -> list[torch.Tensor]:
    """All weights after each step, whole; `rows`: of the sequence that this rank has."""
    result = []
    for t in range(steps):
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(t)).to(next(block.parameters()).dtype)
        out = block(x[:, rows])
        loss = (out.to_local() if isinstance(out, DTensor) else out).square().sum()
        if scaler is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(block.parameters(), MAX_NORM)
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            if t == 1:
                assert any(isinstance(p, Partial) for p in block.norm.weight.grad.placements)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in block.parameters()]
        result.append(torch.cat([w.detach().double().flatten() for w in weights]))
    return torch.stack(result)


def sequence_parallel(rank, name):
    """The norm counts each gradient once, and replicas stay equal: torch's, of the whole model, with torch's clip."""
    mesh, (ours, theirs) = init_device_mesh("cpu", (2,)), MAKE[name]
    block = sharded(mesh)
    optimizer = ours(block.named_parameters(), lr=0.05, max_norm=MAX_NORM)
    got = trajectory(block, optimizer, mpk.GradScaler(init_scale=4.0), slice(2 * rank, 2 * rank + 2))
    whole = {}
    for dtype in (torch.float64, torch.float32):
        plain = Block(dtype)
        whole[dtype] = trajectory(plain, theirs(plain.parameters(), lr=0.05), None, slice(None)).numpy()
    bounds.check_trajectory(got.numpy(), whole[torch.float64], whole[torch.float32])
    local = block.norm.weight.to_local()
    other = local.clone()
    torch.distributed.broadcast(other, 0)
    assert raw([other]) == raw([local])


@pytest.mark.parametrize("name", MAKE)
def test_sequence_parallel_trains_as_the_whole_model(name):
    run_ranks(2, sequence_parallel, name)


def any_placement(rank):
    """What torch's optimizers take: sums, replicas of a shard, a shard of a replica; steps, clips and unscales alike."""
    mesh, value = init_device_mesh("cpu", (2,)), torch.arange(12.0).view(4, 3)
    grads = {
        "partial": (Replicate(), lambda: DTensor.from_local(value / 2, mesh, [Partial()])),
        "replica of a shard": (Shard(0), lambda: distribute_tensor(value, mesh, [Replicate()])),
        "shard of a replica": (Replicate(), lambda: distribute_tensor(value, mesh, [Shard(0)])),
        "another shard": (Shard(1), lambda: distribute_tensor(value, mesh, [Shard(0)])),
    }
    for way in ("step", "clip", "unscale"):
        params = [nn.Parameter(distribute_tensor(value + i, mesh, [where])) for i, (where, _) in enumerate(grads.values())]
        plain = [nn.Parameter(value + i) for i in range(len(grads))]
        both = []
        for some, make in ((params, [g for _, g in grads.values()]), (plain, [value.clone] * len(grads))):
            optimizer, scaler = mpk.optim.SGD(some, lr=0.5), mpk.GradScaler(init_scale=1.0)
            scaler.scale(torch.ones(()))
            for parameter, grad in zip(some, make, strict=True):
                parameter.grad = grad()
            if way == "clip":
                norm = scaler.clip_grad_norm_(optimizer, 1.0)
                assert norm.item() == math.sqrt(4 * 506), "squares of 0 to 11, of which all sums are exact"
            if way == "unscale":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            both.append(raw([p.full_tensor() if isinstance(p, DTensor) else p for p in some]))
        assert both[0] == both[1], way


def test_gradients_of_any_placement():
    run_ranks(2, any_placement)
