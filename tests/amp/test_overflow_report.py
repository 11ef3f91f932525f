# SPDX-License-Identifier: Apache-2.0
"""GradScaler.overflow_report: which gradients, and where it began."""

import math

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests.amp.scaling import give_grads, iteration
from tests.optimizers import parameters
from tests.steps import raw


def test_overflow_report_with_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters()), mpk.GradScaler()
    iteration(list(model.parameters()), optimizer, scaler)
    assert scaler.overflow_report(optimizer) == ""
    give_grads(list(model.parameters()), scaler, size=2.0)
    model[0].weight.grad[0] = torch.tensor([math.inf, -math.inf, math.nan])
    model[1].bias.grad[1] = math.nan
    scaler.step(optimizer)
    scaler.update()
    assert scaler.overflow_report(optimizer) == (
        "step 2 skipped at scale 65536: 1.bias has 1 non-finite of 2, amax 131072 of the finite ones\n"
        "step 2 skipped at scale 65536: 0.weight has 3 non-finite of 12, amax 131072 of the finite ones"
    )
    iteration(list(model.parameters()), optimizer, scaler)
    assert scaler.overflow_report(optimizer) == ""


def test_overflow_report_without_names():
    params, scaler = parameters(torch.float32, torch.float16), mpk.GradScaler(init_scale=2.0**21)
    optimizer = mpk.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}])
    scaler.scale(torch.zeros(()))
    params[1].grad = torch.full((5,), -math.inf, dtype=torch.float16)
    params[1].grad[3] = -2.0
    scaler.step(optimizer)
    assert scaler.overflow_report(optimizer) == (
        "step 1 skipped at scale 2097152: parameter 1 (5,) has 4 non-finite of 5, amax 2 of the finite ones"
    )


SEARCH = (
    ": this began in the forward, the loss or the data, unless the scale is far too large: check that the inputs and the loss "
    "are finite; mpkernels.find_nonfinite(model, step) names the first module that is not"
)


def overflown(model, scaler, poison=None) -> str:
    """The report after one step of a model of 4 classes; `poison` gets the input and the output, and returns the output."""
    generator = torch.Generator().manual_seed(0)
    optimizer = mpk.optim.AdamW(model.named_parameters())
    x, y = torch.randn(16, 8, generator=generator), torch.arange(16) % 4
    if poison == "data":
        x[3, 5] = math.nan
    loss = nn.functional.cross_entropy(model(x).float(), y)
    scaler.scale(loss * math.inf if poison == "loss" else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.overflow_report(optimizer)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize("poison", ["data", "loss", "middle"])
def test_overflow_report_of_what_began_in_forward_is_one_line(act, poison):
    torch.manual_seed(0)
    middle = (nn.Linear(16, 16), nn.LayerNorm(16), act(), nn.Linear(16, 16), act())
    model = nn.Sequential(nn.Linear(8, 16), act(), *middle, nn.Linear(16, 4))
    mpk.convert(model, "mixed_float16")
    if poison == "middle":
        model[3].register_forward_hook(lambda module, args, out: torch.where(torch.arange(16) == 5, math.nan, out))
    report = overflown(model, mpk.GradScaler(), poison)
    assert report.startswith("step 1 skipped at scale 65536: 7.bias has 4 non-finite of 4, no finite element, and ")
    assert report.endswith(f" other gradients have inf or NaN too{SEARCH}")
    assert "\n" not in report


def test_overflow_report_of_nan_in_the_data_under_a_linear_loss_is_one_line():
    """Gradients of biases are finite there: what comes from above is, and only inputs are NaN."""
    torch.manual_seed(0)
    model = mpk.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), "mixed_float16")
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters()), mpk.GradScaler(init_scale=8.0)
    scaler.scale(model(torch.full((4, 8), math.nan)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.overflow_report(optimizer) == (
        "step 1 skipped at scale 8: 2.weight has 64 non-finite of 64, no finite element, and 1 of 3 other gradients have "
        f"inf or NaN too{SEARCH}"
    )


def test_overflow_report_of_what_began_in_backward_goes_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), math.nan))
    model[0].weight.register_hook(lambda grad: torch.full_like(grad, math.inf))
    lines = overflown(model, mpk.GradScaler()).split("\n")
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["2.weight", "0.weight"]
    assert "has 16 non-finite of 256, amax " in lines[0]
    assert lines[1].endswith("0.weight has 128 non-finite of 128, no finite element")


def test_overflow_report_of_a_model_with_one_gradient():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    optimizer = mpk.optim.AdamW(params)
    give_grads(params, scaler, size=math.nan)
    scaler.step(optimizer)
    scaler.update()
    found = "step 1 skipped at scale 65536: parameter 0 (5,) has 5 non-finite of 5, no finite element"
    assert scaler.overflow_report(optimizer) == found + SEARCH


def test_overflow_report_of_another_optimizer_says_what_to_do():
    params, scaler = parameters(torch.float32), mpk.GradScaler()
    for make, name in ((torch.optim.AdamW, "AdamW"), (torch.optim.SGD, "SGD"), (torch.optim.RAdam, "RAdam")):
        instead = "AdamW" if name == "RAdam" else name
        message = f"needs an optimizer of mpkernels.optim, .* got torch.optim.{name}: train with mpkernels.optim.{instead}$"
        with pytest.raises(TypeError, match=message):
            scaler.overflow_report(make(params))
    with pytest.raises(
        TypeError, match=r"got \S*test_overflow_report.Lion: train with mpkernels.optim.Lion$"
    ):  # of lion-pytorch, say
        scaler.overflow_report(type("Lion", (), {})())
    wrapper = type("Wrapper", (), {})()
    wrapper.optimizer = mpk.optim.AdamW(params)
    with pytest.raises(TypeError, match=r"got \S*test_overflow_report.Wrapper: pass the one inside it, its \.optimizer$"):
        scaler.overflow_report(wrapper)


def test_overflow_report_without_a_scaler():
    params = parameters(torch.bfloat16)
    optimizer = mpk.optim.AdamW(params, skip_nonfinite=True)
    params[0].grad = torch.full_like(params[0], math.nan)
    before = raw(params)
    optimizer.step()
    assert raw(params) == before
    report = mpk.GradScaler(enabled=False).overflow_report(optimizer)
    assert report.startswith("step 1 skipped at scale none: parameter 0 (5,) has 5 non-finite of 5, no finite element")
