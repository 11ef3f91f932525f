# SPDX-License-Identifier: Apache-2.0
"""DDP, FSDP1 and FSDP2 train, and writes of others and parameters that become DTensors are seen."""

import copy
import itertools
import math

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import mpkernels as mpk
from mpkernels.optim.grad_reading import GradReader
from mpkernels.runtime import compute_copy
from tests.bounds import check_norm
from tests.distributed.sharded import (
    Net,
    Sharded,
    assert_agree,
    batch,
    everything,
    local,
    no_collective,
    sharded_net,
    step_by,
    train_net,
)
from tests.ranks import run_ranks
from tests.steps import compute_copies, raw


def test_device_without_gradients_has_no_statistics():
    """What was read of a device that has no gradients this time is not among what is read now."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = mpk.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    plan, reader = optimizer._current_plan(), GradReader()
    plan.ranks.many, reader.stats = True, {torch.device("meta"): None}
    reader.clip_at_next_step(plan, None, 1.0)
    assert reader.stats.keys() == {parameter.device}


def ddp_is_one_process(rank):
    """SGD by whole eighths: all stays exact, so ranks that each see their part equal one that sees the whole batch."""
    world = distributed.get_world_size()
    alone, model = Net(), nn.parallel.DistributedDataParallel(Net())
    optimizers = mpk.optim.SGD(alone.parameters(), lr=0.125), mpk.optim.SGD(model.parameters(), lr=0.125)
    scalers = mpk.GradScaler(init_scale=64.0), mpk.GradScaler(init_scale=64.0)
    for t in range(3):
        x, weights = batch(t)
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
        losses = (alone(x) * weights).sum() / world, (model(x[mine]) * weights[mine]).sum()
        for loss, scaler, optimizer in zip(losses, scalers, optimizers, strict=True):
            scaler.scale(loss / 4).backward()
            all_reduce, distributed.all_reduce = distributed.all_reduce, no_collective
            scaler.step(optimizer)
            distributed.all_reduce = all_reduce
            scaler.update()
            optimizer.zero_grad()
    assert raw(alone.parameters()) == raw(model.parameters())
    for bad in range(world):  # DDP sums the NaN into every rank's gradients
        before = raw(model.parameters())
        x, weights = batch(9)
        scalers[1].scale((model(x) * weights).sum() * (math.nan if rank == bad else 1.0)).backward()
        scalers[1].step(optimizers[1])
        scalers[1].update()
        optimizers[1].zero_grad()
        assert raw(model.parameters()) == before
        assert scalers[1].get_scale() == 64.0 / 2 ** (bad + 1)
    assert_agree(*model.parameters())


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_is_one_process_with_the_whole_batch(world):
    run_ranks(world, ddp_is_one_process)


def fsdp_trains(rank, policy, sizes):
    mesh = None if sizes is None else init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    model = sharded_net(policy, mesh)
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=0.02, max_norm=10.0)
    scaler = mpk.GradScaler(init_scale=1024.0)
    losses = train_net(model, optimizer, scaler)
    assert losses[-1] < losses[0] / 2
    assert not compute_copies(optimizer)
    assert not any(layer in compute_copy._requests for layer in model.modules())
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in model.parameters())
    assert all(("master" in optimizer.state[p]) == (p.dtype == torch.float16) for p in model.parameters())
    scale = scaler.get_scale()
    for bad in range(distributed.get_world_size()):  # the reduction carries it to some ranks, found_inf to all
        before = everything(model.parameters(), optimizer)
        x, _ = batch(bad)
        scaler.scale(model(x).float().sum() * (math.inf if rank == bad else 1.0)).backward()
        step_by("step", scaler, optimizer)
        optimizer.zero_grad()
        assert everything(model.parameters(), optimizer) == before
        assert scaler.get_scale() == scale / 2 ** (bad + 1)
    assert_agree(scaler.get_scale(), *(p.full_tensor() for p in model.parameters()))
    clip_in_three_calls(model)


def clip_in_three_calls(model):
    """`unscale_`, torch's clip on DTensors, `step`; twice, because `unscale_` leaves fp32 gradients of 16-bit parameters."""
    optimizer, scaler = mpk.optim.SGD(model.parameters(), lr=0.01), mpk.GradScaler(init_scale=256.0)
    for t in range(2):
        scaler.scale(model(batch(t)[0]).float().sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = raw(map(local, model.parameters()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert raw(map(local, model.parameters())) != before
        assert not scaler.last_step_skipped


@pytest.mark.parametrize("policy", ["mixed_float16", "float16", "float32"])
@pytest.mark.parametrize("world, sizes", [(3, None), (4, (2, 2))])
def test_fsdp2_trains(policy, world, sizes):
    run_ranks(world, fsdp_trains, policy, sizes)


def fsdp1_trains(rank, policy):
    """Its parameters are parts of the originals, flat, some of them empty: trained as the whole ones by one process."""
    whole, model = Net(policy), Net(policy)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = mpk.optim.AdamW(sharded.parameters(), lr=0.02, process_group=distributed.group.WORLD)
    alone = mpk.optim.AdamW(whole.parameters(), lr=0.02)
    for t in range(3):
        for module, its in ((sharded, optimizer), (whole, alone)):
            module(
                batch(t)[0].to(whole[0].weight.dtype)
            ).float().sum().backward()  # the same batch on every rank: the mean of gradients is exact
            its.step()
            its.zero_grad()
        if t == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with FullyShardedDataParallel.summon_full_params(sharded):
        trained = [p.detach().clone() for p in model.parameters()]  # whose memory goes
    assert raw(trained) == raw(whole.parameters())
    assert any("master" in state for state in optimizer.state.values()) == (policy == "float16")


@pytest.mark.parametrize("policy", ["float16", "float32"])
def test_fsdp1_with_original_parameters_trains(policy):
    run_ranks(2, fsdp1_trains, policy)


# ----- writes of others, and parameters that become DTensors ------------------------------


def writes_to_local_tensors(rank, folder):
    """What `state_dict()` hands out of a DTensor has a version counter of its own, and `dcp.load` writes into that."""
    model = sharded_net("float16")
    optimizer = mpk.optim.SGD(model.named_parameters(), lr=0.0)
    model(batch(0)[0]).float().sum().backward()
    optimizer.step()
    checkpoint.save({n: torch.full_like(v, 2.0) for n, v in model.state_dict().items()}, checkpoint_id=folder)
    checkpoint.load(model.state_dict(), checkpoint_id=folder)
    for value, of in ((2.0, None), (3.0, lambda p: p.detach().to_local()), (4.0, lambda p: p.to_local()), (5.0, lambda p: p)):
        for p in model.parameters() if of else ():
            with torch.no_grad():
                of(p).fill_(value)
        assert all((v.full_tensor() == value).all() for v in optimizer.master_state_dict(model).values())
        optimizer.step()
        for p in model.parameters():
            assert (p.full_tensor() == value).all()
            assert (optimizer.state[p]["master"].full_tensor() == value).all()


def test_writes_to_local_tensors_are_taken_over(tmp_path):
    run_ranks(2, writes_to_local_tensors, str(tmp_path))


def writes_to_local_gradients(rank):
    """After the clip has read them, on one rank or on all: they are read again, and an inf skips the step of every rank."""
    sharded = Sharded("fsdp")
    optimizer = mpk.optim.SGD(sharded.params, lr=1.0)
    for write in (lambda g: g.to_local(), lambda g: g._local_tensor):
        for bad, alone in itertools.product((False, True), (False, True)):
            sharded.give_grads(0)
            scaler = mpk.GradScaler(init_scale=1.0)
            scaler.scale(torch.zeros(()))
            scaler.clip_grad_norm_(optimizer, 1.0)
            before = raw(map(local, sharded.params))
            grad = write(sharded.params[0].grad)
            with torch.no_grad():
                if rank == 0 or not alone:
                    grad.mul_(torch.inf if bad and rank == 0 else 2)
            whole = sharded.whole([p.grad for p in sharded.params])
            scaler.step(optimizer)
            scaler.update()
            assert (raw(map(local, sharded.params)) == before) == bad
            assert scaler.last_step_skipped == bad
            if not bad:
                exact = torch.cat([g.flatten().double() for g in whole]).norm().item()
                check_norm(optimizer.grad_norm.item(), exact, 64)


def test_writes_to_local_gradients_are_read_again():
    run_ranks(2, writes_to_local_gradients)


def becomes_sharded(rank, policy, stepped):
    """As accelerate does: the optimizer is made of plain parameters, which are replaced by DTensors in its groups."""
    model, twin = Net(policy), sharded_net(policy)
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=0.02, max_norm=1.0)
    if stepped:
        model(batch(0)[0]).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    named = {id(p): n for n, p in model.named_parameters()}
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.copy_(distribute_tensor(p.detach(), q.device_mesh, q.placements))
    other = mpk.optim.AdamW(twin.named_parameters(), lr=0.02, max_norm=1.0)
    other.load_state_dict(optimizer.state_dict())
    for module in (*(m for m in model if isinstance(m, nn.Linear)), model):
        fully_shard(module, mp_policy=mpk.Policy.parse(policy).to_fsdp())
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for i, old in enumerate(group["params"]):
            group["params"][i] = new = sharded[named[id(old)]]
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
    for t in range(3):
        for m, o in ((model, optimizer), (twin, other)):
            m(batch(t)[0]).float().sum().backward()
            o.step()
            o.zero_grad()
    assert everything(model.parameters(), optimizer) == everything(twin.parameters(), other)
    assert_agree(optimizer.grad_norm)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_plain_parameters_that_become_sharded(policy, stepped):
    run_ranks(2, becomes_sharded, policy, stepped)
