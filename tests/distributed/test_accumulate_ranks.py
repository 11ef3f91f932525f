# SPDX-License-Identifier: Apache-2.0
"""Weight gradients that backward adds in place, on two ranks by DDP and by FSDP2: micro-batches are one large batch."""

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mpkernels as mpk
from tests.ranks import run_ranks
from tests.steps import raw

WORLD, PARTS, ROWS, SIZES = 2, 4, 16, (4, 8, 6, 3)
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    """The same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).round()


def made(policy: str) -> mpk.MPMLP:
    """Of whole numbers: every sum over a batch is exact in fp32, in whatever order."""
    model = mpk.MPMLP(SIZES, policy=policy)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(whole_numbers(i, *parameter.shape))
    return model


def by_ddp(policy: str):
    yield nn.parallel.DistributedDataParallel(made(policy))
    yield nn.parallel.DistributedDataParallel(
        made(policy), gradient_as_bucket_view=True, find_unused_parameters=True, bucket_cap_mb=1e-6
    )


def by_static_ddp(policy: str):
    yield nn.parallel.DistributedDataParallel(made(policy), static_graph=True)


def by_fsdp(policy: str):
    for reshard in (True, False):
        model = made(policy)
        for module in (*(m for m in model if isinstance(m, mpk.MPLinear)), model):
            fully_shard(module, mp_policy=mpk.Policy.parse(policy).to_fsdp(), reshard_after_forward=reshard)
        yield model


@contextlib.contextmanager
def unreduced(model):
    """What DDP and FSDP2 have for gradients that are added up before ranks reduce them."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def watched(model) -> tuple[list[bool], object]:
    """Of each backward, whether autograd was left with a gradient of the first weight to add; and the node that tells."""
    added, weight = [], next(model.parameters())
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_prehook(lambda grads: added.append(grads[0] is not None))
    return added, node


def sums_over_ranks(rank, wrap, every_reduced):
    """Two steps, where DDP's buckets are the gradients the second one begins in them. every_reduced: each micro-batch, not
    the last alone."""
    x, weights = whole_numbers(50, ROWS, SIZES[0]), whole_numbers(51, ROWS, SIZES[-1])
    mine = list(zip(x.chunk(PARTS * WORLD), weights.chunk(PARTS * WORLD), strict=True))[rank::WORLD]
    for policy in POLICIES:
        alone = made(policy)
        (alone(x) * weights).sum().div(WORLD).backward()
        for model in wrap(f"{policy},accumulate_grad"):
            added, _node = watched(model)
            for step in range(2):
                for i, (part, weight) in enumerate(mine):
                    with contextlib.nullcontext() if every_reduced or i == PARTS - 1 else unreduced(model):
                        (model(part) * weight).sum().backward()
                grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
                assert raw(grads) == raw(p.grad for p in alone.parameters())
                model.zero_grad(set_to_none=step > 0)
            if wrap is not by_fsdp:
                assert added == [True] + [False] * (2 * PARTS - 1)


@pytest.mark.parametrize(
    "wrap, every_reduced", [(by_ddp, False), (by_ddp, True), (by_static_ddp, True), (by_fsdp, False), (by_fsdp, True)]
)
def test_accumulate_grad_sums_over_ranks(wrap, every_reduced):
    run_ranks(WORLD, sums_over_ranks, wrap, every_reduced)
