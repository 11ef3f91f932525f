# SPDX-License-Identifier: Apache-2.0
"""Tests of MPMLP on two ranks, by DDP and by FSDP2, beside its layers one by one in one process with the whole batch."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mpkernels as mpk
from mpkernels.ops import linear_act as ops
from tests.linear_act_cases import saving_masks
from tests.ranks import run_ranks
from tests.steps import raw

WORLD, ROWS, SIZES = 2, 12, (4, 8, 6, 3)
# relu2 squares: only fp32 holds its integers.
CASES = (("float32", "relu"), ("float32", "relu2"), ("mixed_float16", "relu"), ("mixed_bfloat16", "relu"))


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    """The same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).round()


def made(policy: str, activation: str) -> mpk.MPMLP:
    """Of whole numbers: every sum over the batch is exact in fp32, in whatever order, so ranks must agree in every bit."""
    model = mpk.MPMLP(SIZES, activation=activation, policy=policy)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(whole_numbers(i, *parameter.shape))
    return model


def by_ddp(policy: str, activation: str):
    yield nn.parallel.DistributedDataParallel(made(policy, activation))
    yield nn.parallel.DistributedDataParallel(
        made(policy, activation), gradient_as_bucket_view=True, find_unused_parameters=True, bucket_cap_mb=1e-6
    )


def by_fsdp(policy: str, activation: str):
    for reshard in (True, False):
        model = made(policy, activation)
        mp_policy = mpk.Policy.parse(policy).to_fsdp()
        for module in (*(m for m in model if isinstance(m, mpk.MPLinear)), model):
            fully_shard(module, mp_policy=mp_policy, reshard_after_forward=reshard)
        yield model


def join(found: list[int]) -> None:
    """What kernels do, in this process: see `joined` and `moved` of test_mpmlp.py."""
    execute = ops.backward_op.execute

    def record(call, kernel):
        *grads, grad_prev_bias = execute(call, kernel)
        found.extend([] if grad_prev_bias is None else [grad_prev_bias.shape[0]])
        return *grads, grad_prev_bias

    ops.forward_op._chosen, ops.backward_op.execute = saving_masks(), record


def is_one_process(rank, wrapped, joined):
    """Gradients and weights of two steps of SGD; gradients are halves, so steps by twice them stay among whole numbers."""
    moved, links = [], [6, 8] if joined else []
    if joined:
        join(moved)
    for policy, activation in CASES:
        for model in wrapped(policy, activation):
            alone = made(policy, activation)
            optimizers = [mpk.optim.SGD(m.parameters(), lr=2.0) for m in (alone, model)]
            for t in range(2):
                case = (policy, activation, t)
                x, weights = whole_numbers(10 + t, ROWS, SIZES[0]), whole_numbers(20 + t, ROWS, SIZES[-1])
                mine = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
                moved.clear()
                (nn.Sequential.forward(alone, x) * weights).sum().div(WORLD).backward()
                assert moved == [], case
                (model(x[mine]) * weights[mine]).sum().backward()
                assert moved == links, case
                check_same([p.grad for p in model.parameters()], [p.grad for p in alone.parameters()], case)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                check_same(model.parameters(), alone.parameters(), case)
                keep_small(*alone.parameters(), *model.parameters())


def keep_small(*parameters: torch.Tensor) -> None:
    with torch.no_grad():
        for parameter in parameters:
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).clamp_(-2, 2)


def check_same(got, expected, case) -> None:
    """Bit for bit, finite, and not because nothing happens."""
    expected = list(expected)
    assert all(t.any() and t.isfinite().all() for t in expected), case
    assert raw(t.full_tensor() if isinstance(t, DTensor) else t for t in got) == raw(expected), case


@pytest.mark.parametrize("joined", [False, True], ids=["one by one", "joined"])
@pytest.mark.parametrize("wrapped", [by_ddp, by_fsdp])
def test_ranks_are_one_process(wrapped, joined):
    run_ranks(WORLD, is_one_process, wrapped, joined)
