# SPDX-License-Identifier: Apache-2.0
"""The examples run, write what they say, and learn: every 16-bit policy about as well as fp32."""

import importlib.util
import json
import math
import re
import subprocess
import sys

import pytest
import torch

from mpkernels import Policy
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"
EIGHT_BITS = ("mixed_float8", "mixed_float8_hybrid")
POLICIES = (
    "float64", "float32", "mixed_float32", "mixed_float16", "mixed_bfloat16", *EIGHT_BITS, "float16", "bfloat16",
)  # fmt: skip
TORCH_RECIPES = ("torch_fp32", "torch_autocast_fp16", "torch_autocast_bf16")
NARROW = tuple(name for name in POLICIES if Policy.parse(name).compute_dtype.itemsize == 2)
TERMINAL = 120  # columns

FIGURES = ("first_loss", "last_loss", "test_accuracy", "saved_bytes_per_sample", "peak_bytes", "ms_per_step")
RATIOS = ("ratio_to_torch_fp16", "ratio_to_torch_bf16")


def example(name, *arguments):
    """What the example prints."""
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digits(out, *arguments):
    """The printed text and the rows of results.json by policy."""
    text = example("digits_mlp.py", "--out", out, *arguments)
    return text, {row["policy"]: row for row in json.loads((out / "results.json").read_text())}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, *digits(out, "--quick")


def test_examples_digits_rows(quick):
    _, _, rows = quick
    assert tuple(rows) == POLICIES + TORCH_RECIPES
    for name, row in rows.items():
        figures = [row[key] for key in FIGURES + RATIOS] + list(row["bytes_per_parameter"].values())
        assert all(math.isfinite(figure) for figure in figures), name
        assert row["last_loss"] < row["first_loss"] / 2, name
        assert len(row["test_accuracies"]) == 1
        assert bool(row["implementations"]) == (name in POLICIES)
        if name in POLICIES and row["device"] == "cpu":
            assert re.match(r"native$|eager \(GEMM by ", row["implementations"]["linear_act"]), name


def test_examples_digits_bytes(quick):
    """What the policies' table says, in bytes per parameter; a copy is of weights alone, and parameters have biases."""
    _, _, rows = quick
    expected = {  # parameters, gradients, masters, moments
        "float64": (8, 8, 0, 16),
        "float32": (4, 4, 0, 8),
        "mixed_float32": (8, 8, 0, 16),
        "mixed_float16": (4, 4, 0, 8),
        "mixed_bfloat16": (4, 4, 0, 8),
        **dict.fromkeys(EIGHT_BITS, (4, 4, 0, 8)),
        "float16": (2, 2, 4, 8),
        "bfloat16": (2, 2, 4, 8),
    }
    copies = {"mixed_float32": 4, "mixed_float16": 2, "mixed_bfloat16": 2}
    for name, sizes in expected.items():
        found = rows[name]["bytes_per_parameter"]
        assert tuple(found[key] for key in ("parameters", "gradients", "masters", "moments")) == sizes, name
        assert 0.98 * copies.get(name, 0) <= found["copies"] <= copies.get(name, 0), name
    for name in NARROW:
        assert rows[name]["saved_bytes_per_sample"] < 0.6 * rows["float32"]["saved_bytes_per_sample"]
    for name in EIGHT_BITS:
        assert rows[name]["saved_bytes_per_sample"] < 0.65 * rows["mixed_float16"]["saved_bytes_per_sample"]


def test_examples_digits_output(quick):
    out, text, rows = quick
    lines = text.splitlines()
    assert max(map(len, lines[:-1])) <= TERMINAL
    assert all(any(line.startswith(name) for line in lines) for name in rows)
    assert str(out / "results.json") in lines[-1]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_examples_digits_every_implementation(quick):
    out, _, _ = quick
    rows = json.loads((out / "implementations.json").read_text())
    assert len(rows) == 6
    for row in rows:
        assert (row["us"] is None) == (row["error"] is None)
        assert row["us"] is not None or row["note"]
    assert [row["us"] is not None for row in rows if row["implementation"] == "eager"] == [True, True]


@pytest.mark.sweep
def test_examples_digits_narrow_policies_learn_like_fp32(tmp_path):
    _, rows = digits(tmp_path, "--policies", "float32", *NARROW, *EIGHT_BITS)
    for name in NARROW + EIGHT_BITS:
        assert len(rows[name]["test_accuracies"]) == 3
        assert rows[name]["test_accuracy"] >= rows["float32"]["test_accuracy"] - 0.01, name
        assert rows[name]["steps"] > 3 * 100
        assert rows[name]["skipped_steps"] == 0, name
    assert rows["float32"]["test_accuracy"] > 0.95
    assert rows["float32"]["ratio_to_torch_fp16"] is None


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_digits_peak_is_of_what_is_there_at_once():
    """Of two temporaries of one op, one after the other, one."""

    class Run:
        def step(self, x, target):
            with torch.profiler.record_function("an op"):
                for _ in range(2):
                    torch.empty(1 << 20)

    assert module_of("digits_report").peak_bytes(Run, torch.ones(1), torch.ones(1)) == 4 << 20


def test_examples_regression_output():
    *epochs, test = example("regression_mlp.py").splitlines()
    check_epochs(epochs)
    assert float(re.fullmatch(r"Test loss: (\d+\.\d{4})", test)[1]) < 0.5


@pytest.mark.parametrize("policy", POLICIES)
def test_examples_regression_learns(policy, capsys):
    module = module_of("regression_mlp")
    assert policy in module.POLICIES
    assert module.train(Policy.parse(policy)) < 0.5
    check_epochs(capsys.readouterr().out.splitlines())


def check_epochs(lines):
    found = [re.fullmatch(r"Epoch \[(\d+)/10\], Loss: (\d+\.\d{4})", line) for line in lines]
    assert [int(match[1]) for match in found] == list(range(1, 11))
    losses = [float(match[2]) for match in found]
    assert losses[-1] < losses[0] / 5


def test_examples_sampling_and_training_agree():
    lines = example("rl_logprob.py", "--rounds", "2", "--samples", "512").splitlines()
    assert len(lines) == 4
    for number, line in enumerate(lines[:2], start=1):
        assert re.fullmatch(rf"Round \[{number}/2\], reward 0\.\d+, .* differ: 0 of 3072, by at most 0\.0e\+00", line), line
    for line, dtype in zip(lines[2:], ("float16", "bfloat16"), strict=True):
        assert re.fullmatch(rf"torch {dtype}: .* differ: \d+ of 3072, by at most \S+", line), line
