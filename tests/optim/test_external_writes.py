# SPDX-License-Identifier: Apache-2.0
"""Masters of 16-bit parameters follow what others write: torch's optimizers, swaps, loaded weights."""

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests.optimizers import parameters, set_grads, train


def half_trained(dtype=torch.float16):
    params = parameters(dtype, n=50)
    optimizer = mpk.optim.SGD(params, lr=2.0**-12)
    train(params, optimizer)
    return params[0], optimizer, optimizer.state[params[0]]["master"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters_follow_visible_writes(dtype):
    parameter, optimizer, master = half_trained(dtype)
    assert not torch.equal(master, parameter.float())
    expected = master.clone()
    with torch.no_grad():
        parameter[:10] = 3.0
    expected[:10] = 3.0
    set_grads([parameter])
    optimizer.step()
    assert torch.equal(master, expected - 2.0**-12 * parameter.grad.float())
    assert torch.equal(parameter, master.to(dtype))


def test_masters_follow_data_that_is_replaced():
    """As by nn.utils.vector_to_parameters: the address is another, the version is not."""
    parameter, optimizer, master = half_trained()
    version = parameter._version
    parameter.data = torch.full_like(parameter, 3.0)
    assert parameter._version == version
    set_grads([parameter])
    optimizer.step()
    assert torch.equal(master, 3 - 2.0**-12 * parameter.grad.float())


def test_masters_survive_a_swap_and_back():
    """EMA weights in, evaluation, the old ones back: no bit of the master is lost, though the version moved."""
    parameter, optimizer, master = half_trained()
    kept, bits = parameter.detach().clone(), master.clone()
    with torch.no_grad():
        parameter.fill_(9.0)
        parameter.copy_(kept)
    set_grads([parameter])
    parameter.grad.zero_()
    optimizer.step()
    assert torch.equal(master, bits)


READERS = {
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "check_masters": lambda optimizer: optimizer.check_masters(),
    "master_state_dict": lambda optimizer: optimizer.master_state_dict(nn.Linear(1, 1)),
    "master_weights": lambda optimizer: _enter_and_leave(optimizer.master_weights()),
    "sync_masters_": lambda optimizer: optimizer.sync_masters_(),
}


def _enter_and_leave(context):
    with context:
        pass


@pytest.mark.parametrize("reader", READERS)
def test_masters_survive_data_that_is_replaced_for_a_reader_and_put_back(reader):
    """EMA weights in by `.data`, a checkpoint, the old ones back: version and address are as before at the next step."""
    parameter, optimizer, _ = half_trained()
    data, kept = parameter.data, parameter.detach().clone()
    parameter.data = torch.full_like(parameter, 9.0)
    READERS[reader](optimizer)
    parameter.data = data
    set_grads([parameter])
    parameter.grad.zero_()
    optimizer.step()
    assert torch.equal(parameter, kept)


def test_masters_survive_data_that_is_replaced_for_a_step_of_another_plan_and_put_back():
    params = parameters(torch.float16, torch.float16)
    optimizer = mpk.optim.SGD(params, lr=2.0**-12)
    train(params, optimizer)
    parameter, kept = params[0], params[0].detach().clone()
    data, parameter.data = parameter.data, torch.full_like(parameter, 9.0)
    set_grads(params)
    params[1].grad = None
    optimizer.step()
    parameter.data = data
    set_grads(params)
    for p in params:
        p.grad.zero_()
    optimizer.step()
    assert torch.equal(parameter, kept)


def test_masters_follow_hidden_writes_after_sync():
    parameter, optimizer, master = half_trained()
    parameter.data.fill_(5.0)
    optimizer.sync_masters_()
    assert (master == 5).all()


def test_masters_follow_torch_optimizers():
    parameter, optimizer, master = half_trained()
    set_grads([parameter])
    torch.optim.SGD([parameter], lr=1.0).step()
    written = parameter.detach().clone()
    parameter.grad.zero_()
    optimizer.step()
    assert torch.equal(parameter, written)
    assert torch.equal(master.half(), written)


def test_masters_are_made_at_the_first_step():
    """Weights loaded after construction, before the first step, are what the master starts from."""
    params = parameters(torch.float16)
    optimizer = mpk.optim.SGD(params, lr=0.0)
    assert not optimizer.state
    params[0].data.fill_(2.5)
    set_grads(params)
    optimizer.step()
    assert optimizer.state[params[0]]["master"].tolist() == [2.5] * 5


@pytest.mark.parametrize("loaded", [False, True])
def test_masters_start_from_the_parameter(loaded):
    """From nothing that lies beside it: ranks whose parameters are equal, as DDP makes them, have equal masters."""
    model = mpk.convert(nn.Linear(3, 3), "float16")
    if loaded:
        model.load_state_dict(mpk.convert(nn.Linear(3, 3), "float16").state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = mpk.optim.SGD(model.parameters(), lr=0.0)
    set_grads(list(model.parameters()))
    optimizer.step()
    assert all(torch.equal(optimizer.state[p]["master"], b.float()) for p, b in zip(model.parameters(), before, strict=True))


def test_master_state_dict():
    model = mpk.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "float16")
    model.register_parameter("late", nn.Parameter(torch.ones(1).half()))
    optimizer = mpk.optim.SGD(model.parameters(), lr=1e-4)
    model[0].weight.grad = torch.ones(3, 3).half()
    optimizer.step()
    exported = optimizer.master_state_dict(model)
    assert exported.keys() == model.state_dict().keys()
    assert torch.equal(exported["0.weight"], optimizer.state[model[0].weight]["master"])
    assert exported["0.weight"].dtype == torch.float32
    assert torch.equal(exported["0.weight"].half(), model[0].weight)
    assert torch.equal(exported["late"], model.late)
