# SPDX-License-Identifier: Apache-2.0
"""docs/savings.md and the measured table of docs/which-precision.md, from planted rows; the rows that are committed."""

import math
import statistics

import pytest
import torch

from bench import models, savings, which_precision
from bench.rows import RESULTS, read

ROW = {
    "case": "apps/gpt", "implementation": savings.FP32, "metric": "bits per byte", "higher_is_better": False,
    "scores": [3.0, 3.1, 3.2], "steps": 30, "skipped_steps": 0, "ms_per_step": 10.0, "ratio": 1.0, "ratio_p20": 1.0,
    "ratio_p80": 1.0, "note": "", "activation_bytes": 2**20, "peak_bytes": 2**21, "device": "a CPU", "threads": 1,
    "torch": "2.13", "date": "2026-01-01", "load": 1.2,
}  # fmt: skip
AUTOCAST = ROW | {"implementation": "torch autocast bf16", "ratio": 2.0, "ratio_p20": 1.5, "ratio_p80": 2.5}
OURS = ROW | {
    "implementation": "mixed_bfloat16", "scores": [2.9, 3.0, 3.1], "ratio": 0.9, "ratio_p20": 0.9, "ratio_p80": 0.9,
    "activation_bytes": 2**19, "peak_bytes": 2**20,
}  # fmt: skip
WORSE = OURS | {"implementation": "mixed_float16", "scores": [3.4, 3.4, 3.5], "activation_bytes": 2**20}


def test_savings_page_of_planted_rows():
    text = savings.page([ROW, AUTOCAST, OURS, WORSE])
    assert "Measured on a CPU, torch 2.13, 2026-01-01, 1 thread." in text
    assert "| language model | mixed_bfloat16 | +0.50 | 0.90 | 0.50 | 0.50 | 2.00 (1.50 to 2.50) | 1.00 | 1.00 |" in text
    assert "30 % less, or more than that, in 1 of 1." in text
    assert "0.90 to 0.90 of fp32's. By 5 % or more faster in four of five moments: language model (mixed_bfloat16),\n" in text
    assert ",\n  language model (mixed_float16)." in text
    assert "worse than fp32 by more than its spread: language model (mixed_float16: -1.67)." in text
    assert "bits per byte, less is better.\nfp32: 10 steps of 10 ms a seed, spread 0.2, kept 1 MiB, peak 2 MiB." in text
    assert "| torch fp32 | 3.1 |  | 1.00 | 1.00 | 1.00 | 0 |" in text


def test_savings_more_is_better_where_it_is():
    worse = OURS | {"higher_is_better": True}
    assert savings.change(worse, ROW | {"higher_is_better": True}) == pytest.approx(-0.5)


def test_savings_seeds_that_agree_have_no_spread():
    alike = ROW | {"scores": [3.0] * 3}
    assert savings.change(alike, alike) == 0
    assert savings.change(WORSE, alike) == -math.inf


def test_savings_a_recipe_without_a_score_has_an_empty_cell():
    assert "| torch autocast fp16 |  |  | 1.00 | 1.00 | 1.00 | 0 |" in savings.table(
        [ROW, ROW | {"implementation": "torch autocast fp16", "scores": []}]
    )


def test_savings_says_what_is_not_measured():
    assert "1 thread.\nNot measured yet: image classification, detection, generation, text" in savings.page([ROW, OURS])
    assert savings.same_bits([ROW]) == "Not measured yet."
    cartpole = [row | {"case": "apps/cartpole", "note": "0.1 % differ"} for row in (ROW, OURS)]
    assert "| mixed_bfloat16 | 0.90 | 0.1 % differ |" in savings.same_bits(cartpole)


def test_savings_rows_learn_like_fp32():
    """Paired seeds: ours in 16 bits is worse than fp32 by no more than the spread of fp32's own seeds."""
    tasks = savings.by_task(savings.rows())
    assert {f"apps/{task}" for task in tasks} == {row["case"] for row in savings.rows()}
    for task, of in tasks.items():
        assert of[0]["implementation"] == savings.FP32
        for row in savings.ours_in_16_bits(of):
            assert len(row["scores"]) == 3
            assert savings.change(row, of[0]) >= -1, (task, row["implementation"])
    kept = [savings.leanest(of)["activation_bytes"] / of[0]["activation_bytes"] for of in tasks.values()]
    assert statistics.median(kept) <= savings.CLAIMED


def test_which_precision_measures_a_step(monkeypatch):
    monkeypatch.setitem(models.MODELS, "cnn", lambda: models._cnn(2, 8, 4, 8, 3))
    monkeypatch.setattr(which_precision, "ROUNDS", 3)
    found = which_precision.measure("cnn")
    assert [row["implementation"] for row in found] == list(which_precision.RECIPES)
    assert [row["rounds"] for row in found] == [3] * (len(found) - 1) + [2]
    assert found[0]["ratio"] == 1
    assert found[0]["loss_distance"] == 0
    assert all(0 < row["loss_distance"] < torch.finfo(torch.bfloat16).eps for row in found[1:])
    first, second = which_precision.table(found).splitlines()[2:4]
    assert first.startswith(f"| {which_precision.MODELS['cnn']} | torch fp32 | ")
    assert second.startswith("|  | torch autocast bf16 | ")


def test_which_precision_has_every_model():
    found = read(RESULTS / "which_precision.jsonl")
    assert [row["case"] for row in found[:: len(which_precision.RECIPES)]] == [
        f"which_precision/{m}" for m in which_precision.MODELS
    ]
