# SPDX-License-Identifier: Apache-2.0
"""Gloo processes that must agree on found_inf, the scale and every step count.

Each test runs a function in processes of its own; `run_ranks` fails what raises on any rank and what hangs.
"""

import math
import time

import pytest
import torch
from torch import distributed

import mpkernels as mpk
from tests.distributed.sharded import Sharded, assert_agree, everything, everywhere, local, replicas_agree, step_by
from tests.ranks import run_ranks
from tests.steps import raw


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
