# SPDX-License-Identifier: Apache-2.0
"""advise, plan and watch of policies of eight bits: ranges are those of what scales them, errors within their bound."""

import pytest
import torch
from torch import nn

import mpkernels as mpk

POLICIES = ("float32", "mixed_bfloat16", "mixed_float8", "mixed_float8_hybrid", "mixed_bfloat16,saved=float8_e4m3fn")


def made(scale: float = 1.0):
    """A model whose first layer reads numbers that no 8-bit format holds, and its step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = scale * torch.randn(64, 48), torch.randint(4, (64,))
    x[3] *= 1e-4
    return model, lambda model: nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_advise_judges_eight_bits(scale):
    model, step = made(scale)
    advice = mpk.advise(model, step, policies=POLICIES, loss_budget=1e9)
    for name in ("0", "2", "4"):
        rows = advice[name].policies
        for policy in POLICIES:
            assert 0 < rows[policy].bound_ratio <= 1
            assert rows[policy].range["x"].overflows == 0
        for eight in ("mixed_float8", "mixed_float8_hybrid"):
            assert rows[eight].error["out"] > 4 * rows["mixed_bfloat16"].error["out"]
            assert rows[eight].bytes < 0.7 * rows["mixed_bfloat16"].bytes
            assert rows[eight].traffic < rows["mixed_bfloat16"].traffic
        saved, plain = rows["mixed_bfloat16,saved=float8_e4m3fn"], rows["mixed_bfloat16"]
        assert saved.bytes < plain.bytes
        assert saved.error["out"] == plain.error["out"]
        assert saved.error["grad_weight"] > plain.error["grad_weight"]
        assert "float8" in advice.policy[name]
    mpk.convert(model, advice.policy)


def test_advise_keeps_eight_bits_where_memory_asks_for_it():
    """With saved_dtype there are passes more, and gradients off by more: no policy for where the other one fits as well."""
    model, step = made()
    plain, saved = "mixed_bfloat16", "mixed_bfloat16,saved=float8_e4m3fn"
    for policies in ((saved, plain), (plain, saved)):
        advice = mpk.advise(model, step, policies=policies, loss_budget=1e9)
        assert set(advice.policy.values()) == {plain}
        held = sum(advice[name].policies[saved].bytes for name in advice.policy)
        tight = mpk.advise(model, step, policies=policies, loss_budget=1e9, memory=held)
        assert set(tight.policy.values()) == {saved}


@pytest.mark.sweep
def test_plan_knows_what_eight_bits_keep():
    make_model = lambda: nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    policies = (
        "mixed_float16,output=float16",
        "mixed_float8,output=float16",
        "mixed_float16,output=float16,saved=float8_e4m3fn",
    )
    plan = mpk.plan(make_model, lambda n: torch.randn(n, 256), policies=policies, batch_sizes=[4096])
    sixteen, *eight = (row.activations for row in plan.rows)
    inputs = 8 * 4096 * 256 * 2  # of the layers, in 16 bits
    assert all(0.45 * inputs <= sixteen - kept <= 0.5 * inputs for kept in eight)


def test_watch_has_the_room_of_scaled_operands():
    model, step = made(1e4)
    watch = mpk.watch(mpk.convert(model, "mixed_float8"))
    step(model).backward()
    assert all(layer.room > 50 for layer in watch.report().layers if layer.room is not None)
    assert [layer.grad_x is not None for layer in watch.report().layers] == [False, True, True]
    watch.close()
