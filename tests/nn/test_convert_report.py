# SPDX-License-Identifier: Apache-2.0
"""Tests of convert_report: what runs with a linear and what does not."""

import pytest
import torch
from torch import nn

import mpkernels as mpk
from tests.nn.test_convert import Block


@pytest.mark.parametrize("activation", [torch.relu, nn.functional.gelu, torch.tanh, torch.Tensor.relu_])
def test_activations_in_a_forward_are_the_models(activation):
    """Nothing is read out of it: another function may stand there at the next call. The report has a hint."""
    model = mpk.convert(Block(activation), "float32")
    x = torch.randn(3, 6)
    expected = model.down(activation(model.up(x)))
    assert torch.equal(model(x), expected)
    model.activation = torch.sigmoid
    assert torch.equal(model(x), model.down(torch.sigmoid(model.up(x))))
    report = mpk.convert_report(model)
    assert [(row.activation, row.note) for row in report] == [(None, "")] * 2
    assert str(report).splitlines()[2].startswith("hint: activations that a forward() calls itself run apart")
    own = nn.ModuleList([mpk.MPLinear(6, 8, activation="relu")])
    assert "hint" not in str(mpk.convert_report(mpk.convert(own)))


def test_report_says_what_runs_with_a_linear_and_what_does_not():
    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU("tanh"), nn.Linear(6, 6), nn.SiLU(),
        nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(),
    )  # fmt: skip
    mpk.convert(model)
    model[11].register_forward_hook(lambda *args: None)
    rows = {row.name: (row.activation, row.note) for row in mpk.convert_report(model)}
    apart = '{} runs apart: MPLinear(activation="{}") would fuse it'
    assert rows == {
        "0": ("relu", "output float16: only 2 reads it"),
        "2": (None, "its " + apart.format("GELU", "gelu")),
        "4": (None, "its " + apart.format("GELU", "gelu_tanh")),
        "6": (None, "its " + apart.format("SiLU", "silu")),
        "8": (None, ""),
        "10": (None, "its " + apart.format("ReLU", "relu")),
    }
    half = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).half()
    assert [row.note for row in mpk.convert_report(mpk.convert(half, "mixed_float16"))] == [
        "its weight is float16, the policy's parameters are float32"
    ] * 2
