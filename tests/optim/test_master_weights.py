# SPDX-License-Identifier: Apache-2.0
"""Tests of masters: a reader of them sees what was written to the parameters; master_weights swaps them in and back."""

import copy

import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.runtime import compute_copy
from tests.optimizers import everything
from tests.steps import DTYPES, raw

LR = 2.0**-13  # below half an ulp of fp16 near 1: masters and parameters differ


def trained(steps=3, **options):
    """Parameters of every dtype near 1, and an optimizer that has stepped."""
    params = [nn.Parameter(torch.linspace(1, 2, 50).to(dtype)) for dtype in DTYPES]
    optimizer = mpk.optim.AdamW(params, lr=LR, **options)
    train(params, optimizer, steps)
    return params, optimizer


def train(params, optimizer, steps=1):
    for _ in range(steps):
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("master_dtype", [torch.float32, torch.float64])
def test_masters_are_swapped_in_and_16_bits_come_back(master_dtype):
    params, optimizer = trained(master_dtype=None if master_dtype == torch.float32 else master_dtype)
    before, versions = everything(optimizer), [p._version for p in params]
    grads, places = [p.grad for p in params], [p.data_ptr() for p in params]
    masters = [optimizer.state[p].get("master") for p in params]
    with optimizer.master_weights():
        for parameter, master, dtype in zip(params, masters, DTYPES, strict=True):
            assert parameter.dtype == (dtype if master is None else master_dtype)
            assert isinstance(parameter, nn.Parameter)
            assert parameter.requires_grad
            assert master is None or torch.equal(parameter, master)
        assert not torch.equal(params[0].half().to(master_dtype), params[0])
    assert everything(optimizer) == before
    assert [p.dtype for p in params] == list(DTYPES)
    assert [p._version for p in params] == versions
    assert [p.data_ptr() for p in params] == places
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert all(optimizer.state[p].get("master") is m for p, m in zip(params, masters, strict=True))


def test_16_bits_come_back_after_an_exception():
    params, optimizer = trained()
    before = everything(optimizer)
    with pytest.raises(KeyError), optimizer.master_weights():
        raise KeyError
    assert everything(optimizer) == before
    train(params, optimizer)


def test_16_bits_come_back_when_a_swap_fails(monkeypatch):
    """The second parameter cannot be swapped: the first is swapped back."""
    params, optimizer = trained()
    before, swap, calls = everything(optimizer), torch._C._swap_tensor_impl, []

    def fails_second(a, b):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no swap")
        swap(a, b)

    monkeypatch.setattr(torch._C, "_swap_tensor_impl", fails_second)
    with pytest.raises(RuntimeError, match="no swap"), optimizer.master_weights():
        raise AssertionError("must not be reached")
    assert everything(optimizer) == before
    train(params, optimizer)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_training_is_that_without_a_swap(mode):
    swapping, plain = trained(0), trained(0)
    for _ in range(4):
        with mode(), swapping[1].master_weights():
            assert sum(p.double().sum() for p in swapping[0]) > 0
        for pair in (swapping, plain):
            train(*pair)
    assert everything(swapping[1]) == everything(plain[1])


def test_hooks_of_gradients_still_run_after_a_swap():
    """DDP's hooks sit on the node that accumulates the gradient: another dtype through .data would drop it."""
    (parameter, *_), optimizer = trained()
    parameter.grad, ran = None, []
    node = torch.autograd.graph.get_gradient_edge(parameter).node  # held, as DDP holds it
    node.register_hook(lambda *_: ran.append("node"))
    parameter.register_post_accumulate_grad_hook(lambda _: ran.append("post"))
    with optimizer.master_weights():
        parameter.sum().backward()
        assert (ran, parameter.grad.dtype) == ([], torch.float32)
    assert parameter.grad is None
    parameter.sum().backward()
    assert (sorted(ran), parameter.grad.dtype) == (["node", "post"], torch.float16)


def test_evaluation_ema_and_saving():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).half()
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=LR)
    train(list(model.parameters()), optimizer)
    wide = copy.deepcopy(model).float()
    wide.load_state_dict(optimizer.master_state_dict(model))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with optimizer.master_weights():
        ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        ema.update_parameters(model)
        assert torch.equal(model(x), wide(x))
        saved = {name: value.clone() for name, value in model.state_dict().items()}
    assert raw(saved.values()) == raw(wide.state_dict().values()) == raw(ema.module.state_dict().values())
    assert {p.dtype for p in ema.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_masters_that_are_swapped_in_have_what_was_written_before():
    params, optimizer = trained()
    with torch.no_grad():
        params[0].fill_(3.0)
    params[1].data.fill_(5.0)
    with optimizer.master_weights():
        assert (params[0] == 3).all()
        assert (params[1] == 5).all()


def test_writes_inside_reach_master_and_parameter():
    params, optimizer = trained()
    values = torch.linspace(1, 2, 50, dtype=torch.float64) + 2.0**-20
    with optimizer.master_weights(), torch.no_grad():
        for parameter in params:
            parameter.copy_(values)
    for parameter, dtype in zip(params, DTYPES, strict=True):
        master = optimizer.state[parameter].get("master", parameter)
        assert torch.equal(master, values.to(master.dtype))
        assert torch.equal(parameter, master.to(dtype))
    twins = [nn.Parameter(optimizer.state[p].get("master", p).detach().clone()) for p in params]
    for parameter in params:
        optimizer.state[parameter]["step"].zero_()
        optimizer.state[parameter]["exp_avg"].zero_()
        optimizer.state[parameter]["exp_avg_sq"].zero_()
    twin = mpk.optim.AdamW(twins, lr=LR)
    for group, owner in ((params, optimizer), (twins, twin)):
        train(group, owner)
    assert raw(optimizer.state[p].get("master", p) for p in params) == raw(twins)


def test_compute_copies_hold():
    layer = mpk.MPLinear(6, 5, policy="mixed_float16")
    optimizer = mpk.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(torch.ones(3, 6)).sum().backward()
        optimizer.step()
    copied = compute_copy.for_layer(layer, layer.weight, torch.float16)
    with optimizer.master_weights():
        assert copied.is_fresh()
        assert layer._weight_copy(layer.weight) is copied.tensor
    assert copied.is_fresh()


def test_before_the_first_step_there_is_nothing_to_swap_in():
    params, optimizer = trained(0)
    with optimizer.master_weights():
        assert [p.dtype for p in params] == list(DTYPES)


def test_refused_inside():
    _, optimizer = trained()
    scaler, before = mpk.GradScaler(), everything(optimizer)
    scaler.scale(torch.ones(()))
    state = optimizer.state_dict()
    calls = {
        "step": optimizer.step,
        "a scaler's": lambda: scaler.clip_grad_norm_(optimizer, 1.0),
        "load_state_dict": lambda: optimizer.load_state_dict(state),
        "add_param_group": lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        "a copy": lambda: copy.deepcopy(optimizer),
        "master_weights": lambda: optimizer.master_weights().__enter__(),
    }
    calls["step "] = lambda: scaler.step(optimizer)
    with optimizer.master_weights():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"^{name.strip()}.* is not possible inside master_weights\(\)"):
                call()
    assert everything(optimizer) == before
    scaler.step(optimizer)


def test_masters_of_dtensors_are_refused():
    """Their local tensors are elsewhere, and FSDP2 reads them from there."""
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        placed = [nn.Parameter(distribute_tensor(torch.ones(4).half(), mesh, [Shard(0)]))]
        optimizer = mpk.optim.AdamW(placed, lr=LR)
        train(placed, optimizer)
        with pytest.raises(RuntimeError, match="DTensors: use master_state_dict"), optimizer.master_weights():
            raise AssertionError("must not be reached")
        train(placed, optimizer)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("swapped", [True, False])
def test_graph_of_masters_does_not_outlive_a_step(swapped):
    """Its backward would be that of other weights: an error, as with a graph of the parameters."""
    layer = nn.Linear(3, 2, dtype=torch.float16)
    optimizer = mpk.optim.AdamW(layer.parameters(), lr=0.5)
    train(list(layer.parameters()), optimizer)
    x = torch.ones(1, 3, requires_grad=True)
    if swapped:
        with optimizer.master_weights():
            out = layer(x)
    else:
        out = torch.func.functional_call(layer, optimizer.master_state_dict(layer), x)
    train(list(layer.parameters()), optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ----- readers of masters ------------------------------------------------------------------------


def load(model):
    model.load_state_dict({name: torch.full_like(value, 3.0) for name, value in model.state_dict().items()})


def write_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)


def copy_in(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.full_like(parameter, 3.0))


def vector_in(model):
    """Each parameter's memory becomes a part of the vector's, which moves no version."""
    length = sum(parameter.numel() for parameter in model.parameters())
    nn.utils.vector_to_parameters(torch.full((length,), 3.0, dtype=torch.float16), model.parameters())


def swap(model):
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.full_like(parameter, 3.0)))


READERS = {
    "master_state_dict": lambda model, optimizer: optimizer.master_state_dict(model).values(),
    "state_dict": lambda model, optimizer: [s["master"] for s in optimizer.state_dict()["state"].values()],
    "copy": lambda model, optimizer: [s["master"] for s in copy.deepcopy(optimizer).state_dict()["state"].values()],
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("write", [load, write_in_place, copy_in, vector_in, swap])
@pytest.mark.parametrize("reader", READERS)
def test_readers_take_over_what_was_written(reader, write, loaded):
    model = nn.Linear(4, 3).half()
    optimizer = mpk.optim.AdamW(model.parameters(), lr=LR)
    train(list(model.parameters()), optimizer, 2)
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    kept = optimizer.state_dict()["state"]
    write(model)
    read = list(READERS[reader](model, optimizer))
    assert len(read) == 2
    assert all((master == 3).all() for master in read)
    assert reader == "copy" or all((kept[i]["master"] == 3).all() for i in range(2)), "what was handed out is live"


def test_readers_between_loading_the_optimizer_and_the_model_leave_masters():
    model = nn.Linear(4, 3).half()
    optimizer = mpk.optim.AdamW(model.parameters(), lr=LR)
    train(list(model.parameters()), optimizer, 2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    fresh = nn.Linear(4, 3).half()
    resumed = mpk.optim.AdamW(fresh.parameters(), lr=LR)
    resumed.load_state_dict(saved)
    resumed.state_dict()
    fresh.load_state_dict(weights)
    masters = resumed.master_state_dict(fresh).values()
    assert raw(masters) == raw(optimizer.state[p]["master"] for p in model.parameters())


def test_readers_leave_masters_that_were_not_written_over():
    """And their versions: a graph of masters survives a checkpoint."""
    params, optimizer = trained()
    masters = [optimizer.state[p]["master"] for p in params if "master" in optimizer.state[p]]
    before, versions = raw(masters), [m._version for m in masters]
    optimizer.state_dict()
    optimizer.master_state_dict(nn.Linear(1, 1))
    assert optimizer.check_masters() == []
    assert raw(masters) == before
    assert [m._version for m in masters] == versions


def through_data(parameter):
    parameter.data.fill_(5.0)


def through_numpy(parameter):
    parameter.detach().numpy().fill(5.0)


def through_dlpack(parameter):
    torch.from_dlpack(parameter.detach().__dlpack__()).fill_(5.0)


@pytest.mark.parametrize("write", [through_data, through_numpy, through_dlpack])
@pytest.mark.parametrize("named", [False, True])
def test_check_masters_names_what_strayed(named, write):
    layer = mpk.MPLinear(6, 5, policy="mixed_float16")
    narrow = nn.Linear(5, 2).half()
    model = nn.ModuleDict({"wide": layer, "narrow": narrow})
    optimizer = mpk.optim.AdamW(model.named_parameters() if named else model.parameters(), lr=LR)
    for _ in range(2):
        layer(torch.ones(1, 6)).sum().backward()
        for parameter in narrow.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert optimizer.check_masters() == []
    write_in_place(layer)
    write_in_place(narrow)
    assert optimizer.check_masters() == [], "the next step takes over what torch sees"
    optimizer.step()
    write(narrow.bias)
    write(layer.weight)
    strayed = ["wide.weight", "narrow.bias"] if named else ["parameter 0 (5, 6)", "parameter 3 (2,)"]
    assert optimizer.check_masters() == strayed
    optimizer.sync_masters_()
    assert optimizer.check_masters() == []
    assert (optimizer.state[narrow.bias]["master"] == 5).all()
    with torch.no_grad():
        narrow.bias.fill_(torch.nan)
    assert optimizer.check_masters() == []


@pytest.mark.parametrize("after", [False, True])
def test_masters_of_memory_that_processes_share_follow_every_write(after):
    """As in Hogwild training: what another process writes moves no version here."""
    params = [nn.Parameter(torch.ones(5).half())]
    optimizer = mpk.optim.SGD(params, lr=LR)
    if after:
        train(params, optimizer, 2)
    params[0].share_memory_()
    for value in (3.0, 5.0):
        train(params, optimizer, 2)
        params[0].detach().numpy().fill(value)
        train(params, optimizer, 1)
        assert (optimizer.state[params[0]]["master"] == value - LR).all()
    params[0].detach().numpy().fill(7.0)
    assert (optimizer.state_dict()["state"][0]["master"] == 7).all()
