# SPDX-License-Identifier: Apache-2.0
"""advise on ten real models: what it advises trains as fp32 does, the step that it saw does not contradict it; its memory."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpkernels as mpk
from bench.training import peak_bytes
from tests.models import CASES
from tests.precision import measured

FAST = ("plain_mlp", "resnet")
by_name = pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.sweep) for n in CASES])


@by_name
@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**24])
def test_advised_steps_are_finite_and_within_the_budget(name, loss_scale):
    """At the larger scale all-fp16 is not: the advice is, which shows that it saw where."""
    not_finite, not_in_fp16, of_budget = measured.contradicted(name, loss_scale)
    assert not not_finite
    assert of_budget <= 1
    assert bool(not_in_fp16) == (loss_scale > 2**16)


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_advised_models_train_as_fp32(name):
    """Against fp32 and all-bf16 of the same seeds, within the spread of fp32's."""
    found = measured.trainings(name, 80)
    assert abs(found["to_fp32"]) <= found["spread"]
    assert found["to_bf16"] <= found["spread"]


@by_name
def test_advised_models_need_no_more_than_bfloat16(name):
    """Neither the bytes that a step holds nor those that its products read and write."""
    advice = measured.advised(name, 0)
    chosen, bf16 = ([advice[n].policies[p] for n, p in named] for named in (
        [(n, str(p)) for n, p in advice.policy.items()], [(n, "mixed_bfloat16") for n in advice.policy],
    ))  # fmt: skip
    for field in ("bytes", "traffic"):
        assert sum(getattr(row, field) for row in chosen) <= sum(getattr(row, field) for row in bf16)


@pytest.mark.parametrize("policies", [measured.FORMATS, measured.WITH_EIGHT_BITS], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("M, K, N", [(64, 512, 512), (512, 512, 512), (2048, 64, 256)])
def test_advise_needs_little_memory(M, K, N, policies):
    """Beside a step in fp32 at most 4 times the tensors of the largest layer, whether that is weight or activations."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 10)), torch.randn(M, K), torch.randint(10, (M,))

    def loss(model):
        return F.cross_entropy(model(x), y)

    def step():
        loss(model).backward()
        model.zero_grad()

    advise = functools.partial(mpk.advise, model, loss, policies=policies, loss_budget=1e9)
    over = peak_bytes(advise, torch.device("cpu")) - peak_bytes(step, torch.device("cpu"))
    assert over <= 4 * 2 * 4 * (M * K + K * N + M * N)
