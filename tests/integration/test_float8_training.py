# SPDX-License-Identifier: Apache-2.0
"""Models that people train, in eight bits beside bf16: the same seeds, and no more apart than the seeds of fp32 are."""

import functools
import statistics

import pytest
import torch

import mpkernels as mpk
from tests.integration.test_real_models import train
from tests.models import CASES

SEEDS, STEPS, LAST = 3, 60, 10
SAVED = "mixed_bfloat16,saved=float8_e4m3fn"


@functools.cache
def final_losses(name: str, policy: str) -> list[float]:
    """Of each seed, the mean of the last losses."""
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        losses = train(mpk.convert(CASES[name].make(), policy), CASES[name], STEPS, 1.0)
        assert statistics.mean(losses[-LAST:]) < statistics.mean(losses[:LAST]), "it does not learn"
        found.append(statistics.mean(losses[-LAST:]))
    return found


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name, policy",
    [
        ("plain_mlp", "mixed_float8"), ("plain_mlp", "mixed_float8_hybrid"), ("plain_mlp", SAVED),
        ("bert_gelu", "mixed_float8"), ("bert_gelu", "mixed_float8_hybrid"), ("gpt2", "mixed_float8"), ("gpt2", SAVED),
    ],
)  # fmt: skip
def test_float8_trains_as_bfloat16(name, policy):
    fp32 = final_losses(name, "float32")
    pairs = zip(final_losses(name, policy), final_losses(name, "mixed_bfloat16"), strict=True)
    assert statistics.mean(eight - sixteen for eight, sixteen in pairs) <= max(fp32) - min(fp32)
