# SPDX-License-Identifier: Apache-2.0
"""batch_invariant: a row of linear_act has the same bits whatever the other rows are, how many, and where it stands."""

import pytest
import torch

import mpkernels as mpk
from mpkernels.ops.linear_act import Activation
from tests.linear_act_cases import DTYPES, Case, forward, same_bits

pytestmark = pytest.mark.usefixtures("by_eager_and_auto")


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "mixed_float16", "float64"])
@pytest.mark.parametrize("sizes", [(5, 7), (33, 64), (1, 100), (300, 257)], ids=str)
def test_linear_act_batch_invariant(name, sizes, generator, device):
    dtypes, rows = DTYPES[name], 300
    x, weight, bias, _ = Case(rows, *sizes, dtypes).tensors(generator, device)
    call = lambda x: forward(x, weight, bias, dtypes, Activation.NONE, 0, batch_invariant=True)[0]
    out = call(x)
    for M in range(1, 71):
        assert same_bits(call(x[:M]), out[:M]), M
    for at in range(0, 64, 3):
        assert same_bits(call(torch.cat([x[70 : 70 + at], x[:1]]))[-1], out[0]), at
    order = torch.randperm(rows, generator=generator).to(device)
    assert same_bits(call(x[order]), out[order])


@pytest.mark.parametrize("policy", ["float16", "mixed_bfloat16", "float32"])
def test_linear_act_batch_invariant_policy(policy, generator):
    """Sampled one by one and trained in one batch of 4096: 0 bits apart."""
    layer = mpk.MPLinear(24, 16, activation="relu", policy=f"{policy},batch_invariant")
    assert layer.policy.batch_invariant
    x = torch.randn(4096, 24, generator=generator).to(layer.weight.dtype)
    out = layer(x)
    assert all(same_bits(layer(x[i : i + 1])[0], out[i]) for i in range(0, 4096, 61))
