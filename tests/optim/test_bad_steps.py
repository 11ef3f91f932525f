# SPDX-License-Identifier: Apache-2.0
"""Parameters, options and gradients that make no step: a clear error, and nothing is written."""

import copy
import math

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests.optimizers import OURS, everything, ours, parameters, set_grads, train
from tests.steps import BAD_SCALES, DTYPES, raw

GOOD = nn.Parameter(torch.ones(3))
COMPLEX = torch.ones(3, dtype=torch.complex64)


@pytest.mark.parametrize(
    "params, error, message",
    [
        ([], ValueError, "empty parameter list"),
        ([torch.ones(3, requires_grad=True) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([1.0], TypeError, "optimizer can only optimize Tensors"),
        (torch.ones(3), TypeError, "params argument given to the optimizer should be an iterable"),
        ([("a", GOOD), ("b", nn.Parameter(COMPLEX))], ValueError, r"parameter 1 \(b\) must be .*got torch.complex64"),
        ([nn.Parameter(torch.ones(3).to_sparse())], ValueError, "parameter 0 must be a dense .*torch.sparse_coo"),
        ([nn.Parameter(torch.ones(1).expand(3))], ValueError, "parameter 0 overlaps itself"),
        ([nn.Parameter(torch.ones(5).as_strided((3, 3), (1, 1)))], ValueError, "parameter 0 overlaps itself"),
        ([{"params": [GOOD]}, {"params": [GOOD]}], ValueError, "some parameters appear in more than one parameter group"),
    ],
)
@ours
def test_bad_parameters(name, params, error, message):
    with pytest.raises(error, match=message):
        OURS[name](params)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_duplicate_parameter():
    with pytest.raises(ValueError, match=r"parameter 2 \(c\) stands twice in one group"):
        mpk.optim.AdamW([("a", GOOD), ("b", nn.Parameter(torch.ones(1))), ("c", GOOD)])


BAD_NUMBERS = (-1.0, math.nan, math.inf)


@pytest.mark.parametrize(
    "make, options, message",
    [
        *((m, {"lr": v}, f"Invalid learning rate: {v}") for m in (mpk.optim.AdamW, mpk.optim.SGD) for v in BAD_NUMBERS),
        (mpk.optim.AdamW, {"lr": torch.tensor(math.nan)}, "Invalid learning rate: nan"),
        (mpk.optim.SGD, {"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        *((mpk.optim.AdamW, {"eps": v}, f"Invalid epsilon value: {v}") for v in BAD_NUMBERS),
        *((mpk.optim.Adam, {"weight_decay": v}, f"Invalid weight_decay value: {v}") for v in BAD_NUMBERS),
        *((mpk.optim.AdamW, {"betas": (v, 0.9)}, f"Invalid beta parameter at index 0: {v}") for v in (1.0, *BAD_NUMBERS)),
        *((mpk.optim.AdamW, {"betas": (0.9, v)}, f"Invalid beta parameter at index 1: {v}") for v in (1.0, *BAD_NUMBERS)),
        *((mpk.optim.AdamW, {"betas": v}, "betas must be two numbers") for v in ((0.9,), (0.9, 0.99, 0.999))),
        *((mpk.optim.SGD, {"momentum": v}, f"Invalid momentum value: {v}") for v in BAD_NUMBERS),
        *((mpk.optim.SGD, {"dampening": v}, f"Invalid dampening value: {v}") for v in (math.nan, math.inf)),
        (mpk.optim.SGD, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        (mpk.optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum requires"),
        (mpk.optim.AdamW, {"master_dtype": torch.float16}, "master_dtype must be torch.float32 or .*got torch.float16"),
        *((mpk.optim.AdamW, {"max_norm": v}, "Invalid max_norm: ") for v in (0.0, -1.0, math.nan, "1", [1.0], 1j)),
    ],
)
def test_bad_hyperparameters(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([GOOD], **options)


def test_master_narrower_than_a_parameter():
    with pytest.raises(ValueError, match=r"master_dtype torch.float32 is narrower than torch.float64 of parameter 1 \(b\)"):
        mpk.optim.AdamW([("a", GOOD), ("b", nn.Parameter(torch.ones(1).double()))], master_dtype=torch.float32)


def test_bad_group_is_not_added():
    optimizer = mpk.optim.AdamW([GOOD])
    for group in ({"params": [nn.Parameter(COMPLEX)]}, {"params": [nn.Parameter(torch.ones(1))], "lr": -1.0}):
        with pytest.raises(ValueError, match=r"must be a dense|Invalid learning rate"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


def _sparse(params, optimizer):
    params[1].grad = torch.ones(5).to_sparse()


def _wide_grad(params, optimizer):
    params[1].grad, params[1].grad_dtype = None, None
    params[1].grad = torch.ones(5, dtype=torch.float64)


def _complex(params, optimizer):
    params[1].grad, params[1].grad_dtype = None, None
    params[1].grad = torch.ones(5, dtype=torch.complex64)


def _resized_grad(params, optimizer):
    params[1].grad.resize_(3)


def _retyped(params, optimizer):
    params[1].data, params[1].grad = params[1].data.half(), torch.ones(5).half()


def _resized(params, optimizer):
    params[1].data, params[1].grad = torch.ones(6), torch.ones(6)


def _shared(params, optimizer):
    params[1].data = params[2].data


def _shared_in_part(params, optimizer):
    params[2].data = torch.ones(8)[3:]
    params[1].data = params[2].data.as_strided((5,), (1,), 0)


def _float_grad_scale(params, optimizer):
    optimizer.grad_scale = 2.0


def _bad_lr(params, optimizer):
    optimizer.param_groups[1]["lr"] = torch.tensor(1)


def _bad_grad_scale(params, optimizer):
    optimizer.grad_scale = torch.ones(2)


def _wrong_grad_scale(params, optimizer):
    optimizer.grad_scale = torch.ones((), dtype=torch.float64)


def _wrong_found_inf(params, optimizer):
    optimizer.found_inf = torch.zeros((), dtype=torch.int32)


def _grad_scale_without_a_value(params, optimizer):
    optimizer.grad_scale = torch.ones((), device="meta")


def _found_inf_without_a_value(params, optimizer):
    optimizer.found_inf = torch.zeros((), device="meta")


def _zero_tensor(params, optimizer):
    params[1].grad = torch._efficientzerotensor((5,))


def _freed_gradient(params, optimizer):
    params[2].grad.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_sparse, r"the gradient of parameter 1 \(b\) must be a dense .*torch.sparse_coo"),
        (_complex, r"the gradient of parameter 1 \(b\) must be a dense floating-point .*torch.complex64"),
        (_wide_grad, r"the gradient of parameter 1 \(b\) is torch.float64, wider than its master, torch.float32: make"),
        (_resized_grad, r"the gradient of parameter 1 \(b\) must be .* of shape \(5,\), got \(3,\)"),
        (
            _retyped,
            r"parameter 1 \(b\) changed dtype since its state was made: torch.float32 then, torch.float16 now: make",
        ),
        (_resized, r"parameter 1 \(b\) changed shape since its state was made: .* has \(5,\), the parameter \(6,\): resize"),
        (_shared, r"^c shares memory with b"),
        (_shared_in_part, r"^c shares memory with b"),
        (_bad_lr, "Invalid learning rate: 1 .torch.int64 tensor .*: lr must be a finite number or a 1-element floating"),
        (_float_grad_scale, "grad_scale must be .* got 2.0"),
        (_bad_grad_scale, "grad_scale must be"),
        (_wrong_grad_scale, "grad_scale must be .*float32.*got .*float64"),
        (_wrong_found_inf, "found_inf must be"),
        (_grad_scale_without_a_value, "grad_scale must be .*on meta"),
        (_found_inf_without_a_value, "found_inf must be .*on meta"),
        (_zero_tensor, r"the gradient of parameter 1 \(b\) has no memory: .* ZeroTensor"),
        (_freed_gradient, r"the gradient of parameter 0 \(c\) has no memory: its storage was freed"),
    ],
)
@ours
def test_bad_steps_write_nothing(name, spoil, message):
    """What is bad is in the second parameter or in the second group, so that something could have been written before."""
    params = parameters(torch.float16, torch.float32, torch.float32)
    named = list(zip("abc", params, strict=True))
    optimizer = OURS[name]([{"params": named[:2]}, {"params": named[2:]}])
    train(params, optimizer, 1)
    set_grads(params, 1)
    spoil(params, optimizer)
    before = everything(optimizer)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=message):
            optimizer.step()
        assert everything(optimizer) == before


@pytest.mark.parametrize("steps", [0, 3])
@ours
def test_freed_parameter(name, steps):
    """What FSDP1 does to parameters that it does not need. A loop over raw pointers would end the process."""
    params = parameters(torch.float16, torch.float16)
    optimizer = OURS[name](params)
    train(params, optimizer, steps)
    set_grads(params, steps)
    first = [params[0], *(optimizer.state[params[0]].values() if steps else ())]
    before = raw(first)
    kept, storage = params[1].detach().clone(), params[1].untyped_storage()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="parameter 1 has no memory: its storage was freed"):
        optimizer.step()
    assert raw(first) == before
    assert bool(optimizer.state) == bool(steps)
    storage.resize_(kept.nbytes)
    params[1].data.copy_(kept)
    optimizer.step()
    twins = parameters(torch.float16, torch.float16)
    train(twins, OURS[name](twins), steps + 1)
    assert raw(params) == raw(twins)


@pytest.mark.parametrize("scale", BAD_SCALES)
@pytest.mark.parametrize("master", [None, torch.float64], ids=str)
@ours
def test_bad_value_of_grad_scale_is_an_overflow(name, master, scale):
    """On the optimizer, without a scaler: skipped, never applied, and the next step is taken."""
    params = parameters(*DTYPES)
    optimizer = OURS[name](params, master_dtype=master)
    train(params, optimizer, 1)
    set_grads(params, 1)
    before = everything(optimizer)
    optimizer.grad_scale = torch.tensor(scale)
    optimizer.step()
    assert everything(optimizer) == before
    optimizer.grad_scale = None
    optimizer.found_inf = torch.tensor(math.nan)  # not 0: a skip
    optimizer.step()
    assert everything(optimizer) == before
    optimizer.found_inf = None
    optimizer.step()
    assert everything(optimizer) != before


def test_parameters_beside_each_other_in_one_storage():
    """As views of a flat buffer, and interleaved: they share no element."""
    flat = torch.ones(20)
    params = [nn.Parameter(v) for v in (flat[:5], flat[5:10], flat[10::2], flat[11::2], flat[:0])]
    optimizer = mpk.optim.SGD(params, lr=1.0)
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not flat.any()


def test_step_inside_backward_without_a_scaler():
    """As torch's: an optimizer per parameter, run by the hook that its gradient has arrived; under a scaler see amp/."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    twin, x = copy.deepcopy(model), torch.ones(2, 3)
    optimizers = {p: mpk.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    model(x).sum().backward()
    optimizer = mpk.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).sum().backward()
    optimizer.step()
    assert raw(model.parameters()) == raw(twin.parameters())


def test_closure_under_a_scaler():
    optimizer = mpk.optim.SGD(parameters(torch.float32), lr=0.1)
    optimizer.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match="a closure cannot be used with loss scaling"):
        optimizer.step(lambda: None)
