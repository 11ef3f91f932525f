# SPDX-License-Identifier: Apache-2.0
"""Tests of the step on many ranks: gloo processes that must agree on found_inf, the norm, the scale and every step count.

Each test runs a function in processes of its own; `run_ranks` fails what raises on any rank and what hangs.
"""

import copy
import itertools
import math
import time

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import mpkernels as mpk
from mpkernels.optim.grad_reading import GradReader, GradStats, combine_devices
from mpkernels.runtime import compute_copy
from tests.bounds import check_norm
from tests.ranks import gathered, run_ranks
from tests.steps import compute_copies, raw

# With 4 ranks 9 rows lie as 3, 3, 3 and 0; 2 rows and 1 row leave ranks empty in every world but one; 8 rows leave none.
SHAPES = ((8, 3), (9, 2), (2, 4), (1,), (0, 3))
OPTIMIZERS = {
    "AdamW": (mpk.optim.AdamW, {"lr": 0.01}),
    "amsgrad": (mpk.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "momentum": (mpk.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
}
# How parameters lie: mesh shape and dimension names, and the placements that they take in turn. "by hand": plain shards.
LAYOUTS = {
    "fsdp": (None, ((Shard(0),),)),
    "hsdp": ((2, 2), ((Replicate(), Shard(0)),)),
    "hsdp on one node": ((1, 2), ((Replicate(), Shard(0)),)),
    "mixed": ((2, 2), ((Shard(0), Shard(0)), (Shard(0), Replicate()), (Replicate(), Shard(0)), (Replicate(), Replicate()))),
    "replicated": (None, ((Replicate(),),)),
}
everywhere = pytest.mark.parametrize(
    "world, layout",
    [(2, "hsdp on one node"), (3, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "mixed"), (2, "replicated"), (3, "by hand")],
)


def values(seed: int, shape, dtype=torch.float32) -> torch.Tensor:
    """The same on all ranks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Sharded:
    """Parameters that lie as a layout says, and their gradients from the whole ones."""

    def __init__(self, layout: str, dtype=torch.float32, shapes=SHAPES):
        self.shapes, self.by_hand = shapes, layout == "by hand"
        if not self.by_hand:
            sizes, self.placements = LAYOUTS[layout]
            self.mesh = init_device_mesh("cpu", sizes or (distributed.get_world_size(),))
        self.params = [nn.Parameter(self.shard(i, values(i, shape, dtype))) for i, shape in enumerate(shapes)]
        self.options = {"process_group": distributed.group.WORLD} if self.by_hand else {}

    def shard(self, i: int, whole: torch.Tensor) -> torch.Tensor:
        if not self.by_hand:
            return distribute_tensor(whole, self.mesh, self.placements[i % len(self.placements)])
        parts = whole.tensor_split(distributed.get_world_size())
        return parts[distributed.get_rank()].clone()

    def give_grads(self, t: int, scale=1.0) -> None:
        for i, parameter in enumerate(self.params):
            parameter.grad = self.shard(i, values(100 * t + i, self.shapes[i]).mul(scale).to(parameter.dtype))

    def poison(self, value: float) -> None:
        """On this rank alone, as an overflow in a local reduction is."""
        local(self.params[0].grad).view(-1)[-1] = value

    def whole(self, tensors) -> list[torch.Tensor]:
        if not self.by_hand:
            return [t.full_tensor() for t in tensors]
        return [torch.cat(parts) for parts in zip(*gathered(t.detach() for t in tensors), strict=True)]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def everything(params, optimizer) -> list[bytes]:
    return raw(local(t) for p in params for t in (p, *(v for _, v in sorted(optimizer.state[p].items()))))


def assert_agree(*scalars) -> None:
    """Bit for bit on all ranks."""
    ranks = [raw(tensors) for tensors in gathered(torch.as_tensor(s) for s in scalars)]
    assert all(rank == ranks[0] for rank in ranks), gathered(scalars)


def never_comes(rank):
    if rank == 1:
        time.sleep(600)
    distributed.barrier()


def comes_to_grief(rank):
    if rank == 1:
        raise ValueError("on rank 1")


def test_what_hangs_or_raises_fails(monkeypatch):
    """Negative control of the tests below."""
    with pytest.raises(AssertionError, match="on rank 1"):
        run_ranks(2, comes_to_grief)
    monkeypatch.setattr("tests.ranks.LIMIT", 3)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] were not done"):
        run_ranks(2, never_comes)


# ----- found_inf ----------------------------------------------------------------------


def step_by(way: str, scaler, optimizer) -> None:
    if way == "scaler's clip":
        scaler.clip_grad_norm_(optimizer, 1.0)
    if way in ("unscale_", "torch's clip"):
        scaler.unscale_(optimizer)
    if way == "torch's clip":
        scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.step(optimizer)
    scaler.update()


def overflow_on_each_rank_in_turn(rank, layout, way, dtype):
    sharded = Sharded(layout, dtype)
    scaler = mpk.GradScaler(init_scale=1024.0)
    optimizer = mpk.optim.AdamW(sharded.params, max_norm=1.0 if way == "max_norm" else None, **sharded.options)
    scaler.scale(torch.zeros(()))
    sharded.give_grads(0, 1024.0)
    step_by(way, scaler, optimizer)
    for bad, value in enumerate((math.nan, math.inf, -math.inf, math.nan)[: distributed.get_world_size()]):
        before, scale = everything(sharded.params, optimizer), scaler.get_scale()
        sharded.give_grads(bad, scale)
        if rank == bad:
            sharded.poison(value)
        step_by(way, scaler, optimizer)
        assert everything(sharded.params, optimizer) == before
        assert scaler.get_scale() == scale / 2
        assert scaler.last_step_skipped
        report = scaler.overflow_report(optimizer)
        assert ("non-finite of" in report) == (rank == bad)
        assert report.startswith(f"step {2 * bad + 2} skipped at scale")
        sharded.give_grads(bad, scale / 2)
        step_by(way, scaler, optimizer)
        assert everything(sharded.params, optimizer) != before or not local(sharded.params[0]).numel()
        assert not scaler.last_step_skipped
    assert_agree(*scaler.state_dict().values(), *(optimizer.state[p]["step"] for p in sharded.params))
    replicas_agree(sharded, optimizer)


def replicas_agree(sharded, optimizer) -> None:
    """What two ranks both hold has the same bits on both."""
    if sharded.by_hand:
        return
    states = {}
    for p in sharded.params:
        first = sharded.mesh.get_coordinate()
        where = tuple(c for c, placement in zip(first, p.placements, strict=True) if not placement.is_replicate())
        states[len(states), where] = raw(local(t) for t in (p, *optimizer.state[p].values()))
    everywhere = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, states)
    for rank in everywhere:
        assert all(states.get(key, value) == value for key, value in rank.items())


def overflow_in_every_way(rank, layout):
    for way in ("step", "unscale_", "torch's clip", "scaler's clip", "max_norm"):
        overflow_on_each_rank_in_turn(rank, layout, way, torch.float32)
    overflow_on_each_rank_in_turn(rank, layout, "step", torch.float16)
    overflow_on_each_rank_in_turn(rank, layout, "torch's clip", torch.float16)


@everywhere
def test_every_rank_skips_where_one_overflows(world, layout):
    run_ranks(world, overflow_in_every_way, layout)


def overflow_without_a_scaler(rank, layout):
    sharded = Sharded(layout)
    optimizer = mpk.optim.AdamW(sharded.params, skip_nonfinite=True, **sharded.options)
    for bad in range(distributed.get_world_size()):
        sharded.give_grads(bad)
        optimizer.step()
        before = everything(sharded.params, optimizer)
        if rank == bad:
            sharded.poison(math.nan)
        optimizer.step()
        assert everything(sharded.params, optimizer) == before
    assert_agree(*(optimizer.state[p]["step"] for p in sharded.params))


@pytest.mark.parametrize("world, layout", [(3, "fsdp"), (4, "hsdp"), (3, "by hand")])
def test_every_rank_skips_without_a_scaler(world, layout):
    run_ranks(world, overflow_without_a_scaler, layout)


def overflow_under_torchs_scaler(rank):
    """torch takes the maximum itself, over the ranks that the first gradient is divided among."""
    sharded = Sharded("fsdp")
    optimizer, scaler = mpk.optim.AdamW(sharded.params), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for bad in range(distributed.get_world_size()):
        sharded.give_grads(bad, scaler.get_scale())
        if rank == bad:
            sharded.poison(math.inf)
        before, scale = raw(map(local, sharded.params)), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert raw(map(local, sharded.params)) == before
        assert scaler.get_scale() == scale / 2
        sharded.give_grads(bad, scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    assert_agree(scaler.get_scale(), *(optimizer.state[p]["step"] for p in sharded.params))


def test_every_rank_skips_under_torchs_scaler():
    run_ranks(3, overflow_under_torchs_scaler)


def a_rank_without_gradients(rank, layout):
    """The last rank has none: it still hears of found_inf, and joins in whatever the others do."""
    world = distributed.get_world_size()
    sharded, scaler = Sharded(layout), mpk.GradScaler(init_scale=1024.0)
    optimizer = mpk.optim.AdamW(sharded.params, **sharded.options)
    clipping = mpk.optim.AdamW(sharded.params, max_norm=1.0, **sharded.options)
    scaler.scale(torch.zeros(()))
    for way, opt in (("step", optimizer), ("unscale_", optimizer), ("scaler's clip", optimizer), ("step", clipping)):
        for value in (math.nan, 0.0):
            scale = scaler.get_scale()
            sharded.give_grads(0, scale)
            if rank == 0:
                sharded.poison(value)
            if rank == world - 1:
                opt.zero_grad()
            norm = scaler.clip_grad_norm_(opt, 1.0) if way == "scaler's clip" else None
            before = raw(map(local, sharded.params))
            step_by(way if norm is None else "step", scaler, opt)
            assert scaler.get_scale() == (scale / 2 if value else scale)
            assert (raw(map(local, sharded.params)) == before) == (value != 0 or rank == world - 1)
            if value == 0:
                assert_agree(scaler.get_scale(), *([] if norm is None else [norm]))
    of_one = mpk.optim.AdamW(sharded.params[:1], max_norm=1.0, **sharded.options)
    sharded.give_grads(0, scaler.get_scale())
    if rank == world - 1:
        of_one.zero_grad()
    step_by("step", scaler, of_one)


@pytest.mark.parametrize("world, layout", [(2, "fsdp"), (3, "by hand")])
def test_rank_without_gradients_hears_of_found_inf(world, layout):
    run_ranks(world, a_rank_without_gradients, layout)


def two_optimizers(rank):
    """One scaler: only the optimizer with the overflow skips, on all ranks, and the scale backs off once."""
    first, second, scaler = Sharded("fsdp"), Sharded("by hand"), mpk.GradScaler(init_scale=1024.0)
    optimizers = mpk.optim.AdamW(first.params), mpk.optim.SGD(second.params, lr=0.1, **second.options)
    scaler.scale(torch.zeros(()))
    for sharded in (first, second):
        sharded.give_grads(0, 1024.0)
    if rank == 1:
        second.poison(math.nan)
    before = raw(map(local, first.params)), raw(map(local, second.params))
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert raw(map(local, first.params)) != before[0]
    assert raw(map(local, second.params)) == before[1]
    assert scaler.get_scale() == 512.0


def test_two_optimizers_share_a_scaler():
    run_ranks(2, two_optimizers)


# ----- the norm ----------------------------------------------------------------------


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


# ----- the update ----------------------------------------------------------------------


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


def no_collective(*args, **kwargs):
    raise AssertionError("a collective on one rank")


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


# ----- DDP and FSDP2 ----------------------------------------------------------------------


class Net(nn.Sequential):
    """Every gradient of the weighted sum of its outputs is exact in fp32, whatever the order of the sums."""

    def __init__(self, policy="float32"):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(values(i, parameter.shape).mul(4).round().div(4))
        mpk.convert(self, policy)


def test_device_without_gradients_has_no_statistics():
    """What was read of a device that has no gradients this time is not among what is read now."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = mpk.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    plan, reader = optimizer._current_plan(), GradReader()
    plan.ranks.many, reader.stats = True, {torch.device("meta"): None}
    reader.clip_at_next_step(plan, None, 1.0)
    assert reader.stats.keys() == {parameter.device}


def batch(t: int, rows: int = 12):
    return values(t, (rows, 4)).mul(2).round(), values(t + 50, (rows, 3)).mul(2).round()


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


def sharded_net(policy: str, mesh=None) -> nn.Module:
    model = Net(policy)
    mesh = mesh or init_device_mesh("cpu", (distributed.get_world_size(),))
    mp_policy = mpk.Policy.parse(policy).to_fsdp()
    for module in (*(m for m in model if isinstance(m, nn.Linear)), model):
        fully_shard(module, mesh=mesh, mp_policy=mp_policy)
    return model


def train_net(model, optimizer, scaler, steps=30) -> list[float]:
    x, _ = batch(distributed.get_rank(), 32)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3].abs()], dim=1) / 4
    losses = []
    for _ in range(steps):
        loss = (model(x).float() - y).square().mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return losses


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


# ----- checkpoints ----------------------------------------------------------------------


def save_sharded(rank, folder, policy):
    model = sharded_net(policy)
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=0.02)
    train_net(model, optimizer, mpk.GradScaler(init_scale=1024.0), steps=3)
    checkpoint.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )
    whole = {n: [p.full_tensor(), *wholes(optimizer.state[p])] for n, p in model.named_parameters()}
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")
    before = everything(model.parameters(), optimizer)
    fresh = sharded_net(policy)
    loaded = load_checkpoint(fresh, folder)
    assert everything(fresh.parameters(), loaded) == before  # every bit, empty shards included
    again = mpk.optim.AdamW(fresh.named_parameters(), lr=0.02)
    again.load_state_dict(loaded.state_dict())
    assert everything(fresh.parameters(), again) == before
    losses = [train_net(m, o, mpk.GradScaler(init_scale=1024.0), steps=3) for m, o in ((model, optimizer), (fresh, again))]
    assert losses[0] == losses[1]


def wholes(state) -> list[torch.Tensor]:
    return [value.full_tensor() if isinstance(value, DTensor) else value for _, value in sorted(state.items())]


def load_checkpoint(model, folder):
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=0.5)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.02
    return optimizer


def load_elsewhere(rank, folder, policy, plain):
    model = Net(policy) if plain else sharded_net(policy)
    optimizer = load_checkpoint(model, folder)
    expected = torch.load(f"{folder}/whole.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        got = [parameter, *(value for _, value in sorted(optimizer.state[parameter].items()))]
        assert all(isinstance(t, DTensor) != plain or not t.dim() for t in got)
        assert raw(wholes(dict(enumerate(got)))) == raw(expected[name]), name
    train_net(model, optimizer, mpk.GradScaler(init_scale=1024.0), steps=1)


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_checkpoint_goes_to_another_number_of_ranks(policy, tmp_path):
    run_ranks(3, save_sharded, str(tmp_path), policy)
    run_ranks(2, load_elsewhere, str(tmp_path), policy, False)
    run_ranks(1, load_elsewhere, str(tmp_path), policy, True)


def options_of_torch(rank, policy):
    """Flattened, or whole on rank 0 alone and broadcast from there: every bit comes back."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model = sharded_net(policy)
    optimizer = mpk.optim.AdamW(model.parameters(), lr=0.02)
    train_net(model, optimizer, mpk.GradScaler(init_scale=1024.0), steps=3)
    for saving, loading in ((flat, flat), (whole, broadcast)):
        fresh = sharded_net(policy)
        loaded = mpk.optim.AdamW(fresh.parameters(), lr=0.5)
        set_model_state_dict(fresh, get_model_state_dict(model))
        state = get_optimizer_state_dict(model, optimizer, options=saving)
        set_optimizer_state_dict(fresh, loaded, state, options=loading)
        assert everything(fresh.parameters(), loaded) == everything(model.parameters(), optimizer)
        assert loaded.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_checkpoint_with_the_options_of_torch(policy):
    run_ranks(3, options_of_torch, policy)


def by_way_of_torch(rank):
    """Sharded fp32 states go to torch's AdamW and back."""
    sharded, other = Sharded("fsdp"), Sharded("fsdp")
    ours, theirs = mpk.optim.AdamW(sharded.params, lr=0.02), torch.optim.AdamW(other.params, lr=0.5)
    sharded.give_grads(0)
    ours.step()
    before = everything(sharded.params, ours)
    theirs.load_state_dict(ours.state_dict())
    again = mpk.optim.AdamW(sharded.params)
    again.load_state_dict(theirs.state_dict())
    assert everything(sharded.params, again) == before


def test_checkpoint_goes_by_way_of_torch():
    run_ranks(2, by_way_of_torch)


def state_dicts_between_layouts(rank):
    """`load_state_dict` itself takes whole tensors into DTensors, DTensors into plain parameters and into other layouts."""
    params = [Sharded(layout, torch.float16).params for layout in ("fsdp", "replicated", "mixed")]
    params.append([nn.Parameter(values(i, shape, torch.float16)) for i, shape in enumerate(SHAPES)])
    optimizers = [mpk.optim.AdamW(p) for p in params]
    for parameter in params[0]:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizers[0].step()
    for before, after in itertools.pairwise(optimizers):
        after.load_state_dict(before.state_dict())
    optimizers[0].load_state_dict(optimizers[-1].state_dict())
    states = [raw(t for p in group for t in wholes(o.state[p])) for group, o in zip(params, optimizers, strict=True)]
    assert states == states[:1] * len(states)


def test_state_dict_goes_between_layouts():
    run_ranks(4, state_dicts_between_layouts)
