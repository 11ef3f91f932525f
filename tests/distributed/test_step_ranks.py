# SPDX-License-Identifier: Apache-2.0
"""The update on many ranks is that of the unsharded run; what lies otherwise is refused; one rank calls no collective."""

import math

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import mpkernels as mpk
from tests.distributed.sharded import OPTIMIZERS, SHAPES, Sharded, everywhere, local, no_collective, step_by, values
from tests.ranks import run_ranks
from tests.steps import raw


def same_as_unsharded(rank, layout):
    """Same gradients, same bits: parameters, masters, moments and step counts, with an overflow on the way."""
    for name, dtype in [
        ("AdamW", torch.float32),
        ("AdamW", torch.float16),
        ("amsgrad", torch.bfloat16),
        ("momentum", torch.float16),
    ]:
        make, options = OPTIMIZERS[name]
        sharded = Sharded(layout, dtype)
        alone = [nn.Parameter(values(i, shape, dtype)) for i, shape in enumerate(SHAPES)]
        scalers = mpk.GradScaler(init_scale=64.0), mpk.GradScaler(init_scale=64.0)
        optimizers = make(sharded.params, **options, **sharded.options), make(alone, **options)
        for t in range(4):
            for scaler in scalers:
                scaler.scale(torch.zeros(()))
            sharded.give_grads(t, scalers[0].get_scale())
            for i, parameter in enumerate(alone):
                parameter.grad = values(100 * t + i, SHAPES[i]).mul(scalers[1].get_scale()).to(dtype)
            if t == 2:
                alone[0].grad[0, 0] = math.inf
                if rank == 0:
                    local(sharded.params[0].grad).view(-1)[0] = math.inf
            for scaler, optimizer in zip(scalers, optimizers, strict=True):
                scaler.step(optimizer)
                scaler.update()
        assert raw(sharded.whole(sharded.params)) == raw(alone)
        for key, value in optimizers[1].state[alone[0]].items():
            states = [optimizers[0].state[p][key] for p in sharded.params]
            expected = [optimizers[1].state[p][key] for p in alone]
            assert raw(states if key == "step" else sharded.whole(states)) == raw(expected), (name, key, value)


@everywhere
def test_update_is_that_of_the_unsharded_run(world, layout):
    run_ranks(world, same_as_unsharded, layout)


def grads_left_unscaled(rank):
    sharded, scaler = Sharded("fsdp"), mpk.GradScaler(init_scale=64.0)
    scaler.scale(torch.zeros(()))
    sharded.give_grads(0, 64.0)
    scaler.step(mpk.optim.AdamW(sharded.params, write_grads=True))
    written = raw(local(p.grad) for p in sharded.params)
    sharded.give_grads(0)
    assert written == raw(local(p.grad) for p in sharded.params)


def test_write_grads_unscales_dtensors():
    run_ranks(2, grads_left_unscaled)


def states_are_dtensors(rank):
    sharded = Sharded("mixed", torch.float16)
    optimizer = mpk.optim.AdamW(sharded.params, master_dtype=torch.float64)
    sharded.give_grads(0)
    optimizer.step()
    for parameter in sharded.params:
        state = dict(optimizer.state[parameter])
        assert not isinstance(state.pop("step"), DTensor)
        assert state.keys() == {"exp_avg", "exp_avg_sq", "master"}
        for tensor in state.values():
            assert isinstance(tensor, DTensor)
            assert (tensor.placements, tensor.shape, tensor.dtype) == (parameter.placements, parameter.shape, torch.float64)
    versions = [p._version for p in sharded.params]
    optimizer.step()
    assert all(p._version > version for p, version in zip(sharded.params, versions, strict=True))


def external_writes(rank):
    """Through the DTensor, through what it holds, unseen with the remedy, and by putting another tensor into it."""
    parameter = Sharded("fsdp", torch.float16).params[0]
    parameter.grad = torch.ones_like(parameter)
    optimizer = mpk.optim.SGD([parameter], lr=2.0**-12)  # lost in fp16
    optimizer.step()
    shard = local(parameter)
    with torch.no_grad():
        for value, write in (
            (2.0, lambda v: parameter.fill_(v)),
            (3.0, lambda v: parameter.to_local().fill_(v)),
            (4.0, lambda v: (shard.fill_(v), optimizer.sync_masters_())),
            (5.0, lambda v: setattr(parameter, "_local_tensor", torch.full_like(shard, v))),
        ):
            write(value)
            optimizer.step()
            assert (optimizer.state[parameter]["master"].to_local() == value - 2.0**-12).all()
            assert (parameter.to_local() == value).all()


def test_states_are_dtensors_as_their_parameter():
    run_ranks(4, states_are_dtensors)


def test_external_writes_to_dtensors_reach_the_masters():
    run_ranks(2, external_writes)


# ----- errors and no collectives ----------------------------------------------------------------


def bad_gradients(rank):
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(values(0, (4, 3)), mesh, [Replicate()]))
    optimizer = mpk.optim.AdamW([("scale.weight", parameter)])
    plain = nn.Parameter(values(0, (4, 3)))
    parameter.grad, before = values(1, (4, 3)), parameter.to_local().clone()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0 \(scale.weight\) has placements .*, expected .*Replicate"):
        optimizer.step()
    assert torch.equal(parameter.to_local(), before)
    assert not optimizer.state
    summed = nn.Parameter(DTensor.from_local(values(1, (4, 3)), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"parameter 0 has placements \(Partial"):
        mpk.optim.AdamW([summed])
    plain.grad = distribute_tensor(values(1, (4, 3)), mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0 has placements .*, expected \(\)"):
        mpk.optim.AdamW([plain]).step()


def test_gradients_that_lie_otherwise_are_refused():
    run_ranks(2, bad_gradients)


def test_process_group_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup"):
        mpk.optim.AdamW([nn.Parameter(torch.zeros(2))], process_group="world")


def one_rank_alone(rank):
    distributed.all_reduce = no_collective
    for layout in ("fsdp", "by hand"):
        sharded, scaler = Sharded(layout), mpk.GradScaler()
        optimizer = mpk.optim.AdamW(sharded.params, max_norm=1.0, **sharded.options)
        scaler.scale(torch.zeros(()))
        sharded.give_grads(0, 65536.0)
        step_by("step", scaler, optimizer)
        assert optimizer.state[sharded.params[0]]["step"] == 1


def test_one_rank_calls_no_collective():
    run_ranks(1, one_rank_alone)
