# SPDX-License-Identifier: Apache-2.0
"""The global norm on many ranks is that of the whole gradient, the same on all."""

import math

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import mpkernels as mpk
from mpkernels.optim.grad_reading import GradStats, combine_devices
from tests.bounds import check_norm
from tests.distributed.sharded import Sharded, assert_agree, everything, everywhere, local, replicas_agree, values
from tests.ranks import run_ranks


def norm_of_the_whole(rank, layout):
    sharded = Sharded(layout)
    plain = [] if sharded.by_hand else [nn.Parameter(values(50, (3, 5)))]  # beside DTensors: the same on all ranks
    sharded.give_grads(0, 64.0)
    for parameter in plain:
        parameter.grad = values(51, (3, 5)) * 64.0
    params = [*sharded.params, *plain]
    wholes = [*sharded.whole(p.grad for p in sharded.params), *(p.grad for p in plain)]
    flat = torch.cat([g.double().reshape(-1) / 64.0 for g in wholes])
    scaler = mpk.GradScaler(init_scale=64.0)
    scaler.scale(torch.zeros(()))
    optimizer = mpk.optim.SGD(params, lr=0.0, **sharded.options)
    norm = scaler.clip_grad_norm_(optimizer, 1.0)
    clipping = mpk.optim.SGD(params, lr=0.0, max_norm=1.0, **sharded.options)
    scaler.step(clipping)
    for got in (norm, clipping.grad_norm):
        assert got.dtype == torch.float64
        check_norm(got.item(), math.sqrt(math.fsum((flat * flat).tolist())), flat.numel())
    assert_agree(norm, clipping.grad_norm)
    if sharded.by_hand:
        scaler.unscale_(optimizer)
        check_norm(scaler.clip_grad_norm_(optimizer, 1.0).item(), norm.item(), flat.numel())


@everywhere
def test_norm_is_that_of_the_whole_gradient(world, layout):
    run_ranks(world, norm_of_the_whole, layout)


def norm_over_two_meshes(rank):
    """Some parameters lie over the whole mesh, some over a slice of it, some over all ranks in a row."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [(mesh["tp"], [Shard(0)]), (mesh, [Shard(0), Shard(1)]), (mesh["dp"], [Shard(0)]), (mesh["tp"], [Replicate()])]
    params = [nn.Parameter(distribute_tensor(values(i, (5, 3)), m, p)) for i, (m, p) in enumerate(layouts)]
    for i, (parameter, (m, p)) in enumerate(zip(params, layouts, strict=True)):
        parameter.grad = distribute_tensor(values(10 + i, (5, 3)), m, p)
    flat = torch.cat([values(10 + i, (5, 3)).double().reshape(-1) for i in range(len(layouts))])
    optimizer = mpk.optim.AdamW(params, max_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    check_norm(optimizer.grad_norm.item(), math.sqrt(math.fsum((flat * flat).tolist())), flat.numel())
    assert_agree(optimizer.grad_norm)
    for bad in range(4):
        before = everything(params, optimizer)
        if rank == bad:
            local(params[0].grad).view(-1)[0] = math.nan
        optimizer.step()
        assert everything(params, optimizer) == before
        params[0].grad = distribute_tensor(values(10, (5, 3)), *layouts[0])


def test_norm_and_verdict_over_two_meshes():
    run_ranks(4, norm_over_two_meshes)


def norms_beyond_the_squares(rank):
    """fp64 gradients whose squares would be 0 or inf, of several ranks."""
    for size in (2.0**-600, 1.0, 2.0**600):
        parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = mpk.optim.SGD([parameter], lr=1.0, max_norm=1.0, process_group=distributed.group.WORLD)
        parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
        assert optimizer.grad_norm.item() == 2 * size


def test_norm_of_ranks_neither_over_nor_underflows():
    run_ranks(2, norms_beyond_the_squares)


@pytest.mark.parametrize("size", [2.0**-1000, 2.0**-500, 1.0, 2.0**500, 2.0**1000])
def test_norm_of_devices_neither_over_nor_underflows(size):
    flag, norm = torch.zeros(()), torch.tensor(size, dtype=torch.float64)
    stats = [GradStats([], flag, flag, flag, norm * k, None) for k in (3, 4)]
    combine_devices(stats)
    assert stats[0].grad_norm.item() == 5 * size


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_norm_of_devices_keeps_what_is_not_finite(bad):
    flag = torch.zeros(())
    stats = [GradStats([], flag, flag, flag, torch.tensor(x, dtype=torch.float64), None) for x in (1.0, bad)]
    combine_devices(stats)
    assert not stats[0].grad_norm.isfinite()


def one_rank_drops_its_gradients(rank):
    """Between the clip and the step: the other one steps, clipped by the norm of what is left."""
    for enabled in (False, True):
        parameter = nn.Parameter(torch.zeros(4))
        optimizer = mpk.optim.SGD([parameter], lr=1.0, process_group=distributed.group.WORLD)
        scaler = mpk.GradScaler("cpu", init_scale=4.0, enabled=enabled)
        scaler.scale(torch.ones(()))
        parameter.grad = torch.full((4,), 8.0 if enabled else 2.0)
        assert scaler.clip_grad_norm_(optimizer, 1.0).item() == pytest.approx(4 * math.sqrt(2), rel=2**-40)
        if rank == 1:
            optimizer.zero_grad()
        scaler.step(optimizer)
        scaler.update()
        expected = 0.0 if rank == 1 else -2.0 / (4 + 1e-6)
        assert torch.equal(parameter.detach(), torch.full((4,), expected)), parameter
        optimizer.zero_grad()
        parameter.grad = torch.full((4,), 2.0 * (4 if enabled else 1))
        scaler.step(optimizer)  # the clip was for one step
        assert torch.equal(parameter.detach(), torch.full((4,), expected) - 2), parameter


def test_one_rank_drops_its_gradients_after_a_clip():
    run_ranks(2, one_rank_drops_its_gradients)


def rows_add_in_another_order(rank):
    """Each group rounds its sum in its own way, as a network with several rings may: replicas still get one clip factor."""
    sharded, all_reduce = Sharded("mixed"), distributed.all_reduce

    def rounding_otherwise(tensor, op, group):
        all_reduce(tensor, op, group=group)
        if op == distributed.ReduceOp.SUM:
            tensor[1] *= 1 + 2.0**-20 * min(distributed.get_process_group_ranks(group))

    distributed.all_reduce = rounding_otherwise
    optimizer = mpk.optim.SGD(sharded.params, lr=0.1, momentum=0.9, max_norm=1.0)
    sharded.give_grads(0)
    optimizer.step()
    assert_agree(optimizer.grad_norm)
    replicas_agree(sharded, optimizer)


def test_norm_agrees_where_groups_round_otherwise():
    run_ranks(4, rows_add_in_another_order)
