# SPDX-License-Identifier: Apache-2.0
"""find_nonfinite: planted layers are named, with direction and amax."""

import pytest
import torch
from torch import nn

import mpkernels as mpk


class Scale(nn.Module):
    """Multiplies in forward and in backward by numbers of its own."""

    def __init__(self, forward=1.0, backward=1.0):
        super().__init__()
        self.factors = forward, backward

    def forward(self, x):
        return _Scale.apply(x, *self.factors)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(x, forward, backward):
        return x * forward

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def model_with(middle, policy=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), middle, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return model if policy is None else mpk.convert(model, policy)


def step(model):
    return model(X).float().square().mean()


def test_find_nonfinite_finds_nothing():
    report = mpk.find_nonfinite(model_with(Scale()), step)
    assert report
    assert (report.module, report.direction, report.amax) == (None, None, None)
    assert str(report) == "every output and every gradient is finite"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_find_nonfinite_in_the_data(value):
    x = X.clone()
    x[3, 2] = value
    report = mpk.find_nonfinite(model_with(Scale()), lambda model: model(x).mean())
    assert (report.ok, report.module, report.direction) == (False, None, "data")
    assert str(report).startswith("in the data: the model (Sequential) was given ")


def test_find_nonfinite_says_that_a_module_read_minus_inf():
    x = torch.ones(2, 4)
    x[0, 0] = -torch.inf
    report = mpk.find_nonfinite(nn.Sequential(nn.Linear(4, 4)), lambda model: model(x).mean())
    assert report.module == "0"
    assert report.message.endswith("it read amax 1 and -inf"), report


def test_find_nonfinite_knows_attention_masks():
    """Whose -inf is no fault of the data; x beside it is looked at, too."""
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), X.view(2, 3, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    assert mask.isinf().any()
    for run in (lambda model, x: model(x, mask), lambda model, x: model(x, src_mask=mask)):
        assert mpk.find_nonfinite(model, lambda model, run=run: run(model, x).square().mean())
        report = mpk.find_nonfinite(model, lambda model, run=run: run(model, x / 0).square().mean())
        assert (report.ok, report.direction) == (False, "data")
    model.register_forward_hook(lambda module, args, out: out * torch.nan)
    report = mpk.find_nonfinite(model, lambda model: model(x, mask).square().mean())
    assert (report.module, report.amax) == ("", pytest.approx(x.abs().max().item()))


def test_find_nonfinite_of_float16_in_forward():
    """1e5 times what fits: the linear that multiplies it is the first whose output is inf, and what it read is said."""
    model = model_with(Scale(2e5), "mixed_float16")
    report = mpk.find_nonfinite(model, lambda model: model(X).float().mean())
    assert (report.module, report.direction) == ("3", "forward")
    assert report.amax == pytest.approx(model[:3](X).detach().abs().max().item())
    assert str(report).startswith("first in forward: 3 (MPLinear) returns inf at ")


def test_find_nonfinite_names_the_innermost():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), Scale(torch.inf)), nn.Linear(8, 4))
    assert mpk.find_nonfinite(model, step).module == "1.1"


def test_find_nonfinite_of_a_weight():
    model = model_with(Scale())
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    report = mpk.find_nonfinite(model, step)
    assert (report.module, report.direction) == ("3", "forward")
    assert str(report).endswith("; its weight is not finite")


def test_find_nonfinite_in_backward_only():
    report = mpk.find_nonfinite(model_with(Scale(backward=1e30)), lambda model: step(model) * 1e20)
    assert (report.module, report.direction) == ("2", "backward")
    assert str(report).startswith("first in backward: 2 (Scale): grad_x is inf at ")


def test_find_nonfinite_of_a_sibling():
    """Of a residual, the branch whose own gradient is inf is named, not that of the sum."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(8, 8), Scale(backward=torch.inf)

        def forward(self, x):
            return x + self.good(x) + self.bad(x)

    report = mpk.find_nonfinite(model_with(Residual()), step)
    assert (report.module, report.direction) == ("2.bad", "backward")


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.good, self.bad = nn.Linear(8, 8), Scale(backward=torch.inf)

    def forward(self, inputs):
        return inputs + self.good(input=inputs) + self.bad(x=inputs)


def test_find_nonfinite_of_arguments_by_name():
    report = mpk.find_nonfinite(ByName(), lambda model: model(inputs=X * torch.nan).sum())
    assert (report.module, report.direction) == (None, "data")
    report = mpk.find_nonfinite(model_with(ByName()), step)
    assert (report.module, report.direction) == ("2.bad", "backward")
    model = ByName()
    model.good.weight.data[0] = torch.nan
    report = mpk.find_nonfinite(model, lambda model: model(inputs=X).sum())
    assert (report.module, report.amax) == ("good", pytest.approx(X.abs().max().item()))


def test_find_nonfinite_of_the_loss():
    forward = mpk.find_nonfinite(model_with(Scale()), lambda model: model(X).mean() * torch.inf)
    assert (forward.ok, forward.module, forward.direction) == (False, None, "forward")
    assert "the loss is" in str(forward)
    assert "(the last, Sequential, returned amax " in str(forward)
    backward = mpk.find_nonfinite(model_with(Scale()), lambda model: (model(X) * 0).sqrt().sum())
    assert (backward.module, backward.direction) == ("5", "backward")
    assert "an operation after it that is no module" in str(backward)


def test_find_nonfinite_of_a_loss_scale():
    """The gradient of a parameter alone: x is the data, which has none."""
    torch.manual_seed(0)
    model = mpk.convert(nn.Sequential(nn.Linear(8, 4)), "mixed_float16,grad=float16")
    big = X * 1000
    assert mpk.find_nonfinite(model, lambda model: model(big).float().mean())
    report = mpk.find_nonfinite(model, lambda model: model(big).float().mean() * 65536)
    assert (report.module, report.direction) == ("0", "backward")
    assert "the gradient of its weight is inf" in str(report)


def test_find_nonfinite_refuses_a_step_without_the_model():
    with pytest.raises(RuntimeError, match="step called no module of the model: it must call the model that it is given"):
        mpk.find_nonfinite(nn.Sequential(nn.Linear(8, 8)), lambda _: step(nn.Linear(8, 8)))
