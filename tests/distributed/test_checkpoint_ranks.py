# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded parameters: to other numbers of ranks and layouts, and by way of torch."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import mpkernels as mpk
from tests.distributed.sharded import SHAPES, Net, Sharded, everything, sharded_net, train_net, values, wholes
from tests.ranks import run_ranks
from tests.steps import raw


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
