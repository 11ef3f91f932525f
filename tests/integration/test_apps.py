# SPDX-License-Identifier: Apache-2.0
"""examples/apps: every task runs under every recipe and says what it cost; what it says is right on planted numbers."""

import importlib
import json
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.paths import ROOT

APPS = ROOT / "examples" / "apps"
OTHERS = ("layers", "report", "runner")
NAMES = sorted(path.stem for path in APPS.glob("*.py") if path.stem not in OTHERS)
KEYS = {"scores", "steps", "skipped_steps", "ms_per_step", "ratio", "activation_bytes", "peak_bytes", "device", "torch", "date"}


def run(*arguments):
    command = [sys.executable, APPS / "runner.py", "--quick", "--size", "tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture
def apps(monkeypatch):
    """A module of the folder by name, imported as the examples import each other."""
    monkeypatch.syspath_prepend(APPS)
    yield importlib.import_module
    for name in (*NAMES, *OTHERS):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", [n if n == "gpt" else pytest.param(n, marks=pytest.mark.sweep) for n in NAMES])
def test_apps_run(name, tmp_path, apps):
    done = run(name, "--out", tmp_path)
    if "skipped, it needs the data of" in done.stdout:
        pytest.skip(done.stdout.splitlines()[0])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "apps.jsonl").read_text().splitlines()]
    tasks = apps(name).TASKS
    assert [(row["case"], row["implementation"]) for row in rows] == [(f"apps/{t.name}", r) for t in tasks for r in t.recipes]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["steps"] == 2
        assert row["skipped_steps"] == 0
        assert row["activation_bytes"] > 0
        assert row["peak_bytes"] > row["activation_bytes"] / 2
        assert any(line.startswith(row["implementation"]) for line in done.stdout.splitlines())
    for task in tasks:
        assert (tmp_path / f"apps_{task.name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("chess",), "unknown task chess: choose from cartpole, detection, digits"),
        (("gpt", "--recipes", "float12"), "gpt: unknown recipe float12: choose from torch fp32, torch autocast bf16"),
    ],
)
def test_apps_bad_arguments(arguments, message, apps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["runner.py", *arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        apps("runner").main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Line:
    """A task that a linear can do; one whose data is missing."""

    @staticmethod
    def task(runner):
        class Task(runner.Task):
            name, metric, higher_is_better = "line", "error", False
            sizes: ClassVar = {"cpu": dict(batch=4, steps=7)}

            def model(self):
                return nn.Linear(3, 2, bias=False)

            def batches(self, model, seed):
                generator = torch.Generator().manual_seed(seed)
                while True:
                    yield (torch.randn(self.size.batch, 3, generator=generator),)

            def loss(self, model, x):
                return model(x).float().mean()

            def score(self, model):
                return model.weight.sum()

        return Task

    @staticmethod
    def without_data(runner):
        class Task(Line.task(runner)):
            def __init__(self, device, size):
                runner.data_folder("no_such_package")

        return Task


def test_apps_without_a_package(apps, tmp_path, monkeypatch, capsys):
    """A task whose data is not installed is skipped in a sentence, and the next one runs."""
    runner = apps("runner")
    monkeypatch.setattr(sys, "argv", ["line.py", "--quick", "--size", "cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(runner, "CHUNK", 2)
    runner.main(Line.without_data(runner), Line.task(runner))
    first, _, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("line: skipped, it needs the data of no_such_package, which is not installed: make apps, or pip")
    assert second.startswith("line, on ")
    assert len((tmp_path / "apps.jsonl").read_text().splitlines()) == len(runner.RECIPES)
    with pytest.raises(SystemExit, match="no task has its data"):  # with code 1, as for any sentence
        runner.main(Line.without_data(runner))


def test_apps_recipes_see_the_same(apps):
    """The same weights and batches, and every recipe takes the step."""
    runner = apps("runner")
    task = Line.task(runner)(torch.device("cpu"), "cpu")
    runs = {name: runner.Run(task, recipe, 3) for name, recipe in runner.RECIPES.items()}
    weight = runs[runner.FP32].model.weight.clone()
    for run_ in runs.values():
        assert torch.equal(run_.model.weight, weight.to(run_.model.weight.dtype))
        run_.step()
        assert not torch.equal(run_.model.weight, weight.to(run_.model.weight.dtype))
    batch = runs[runner.FP32].batch()[0]
    for name, run_ in runs.items():
        assert run_ is runs[runner.FP32] or torch.equal(run_.batch()[0], batch), name
        assert run_.skipped == 0
        assert run_.scaler.is_enabled() == ("fp16" in name or "float16" in name.replace("bfloat16", ""))


def test_apps_activation_bytes_are_those_of_a_batch(apps):
    """The input of a linear, at the width that it is kept in, without the weight and its casts."""
    runner = apps("runner")
    task = Line.task(runner)(torch.device("cpu"), "cpu")
    recipes = {name: recipe for name, recipe in runner.RECIPES.items() if "8" not in name}
    found = {name: runner.activation_bytes(runner.Run(task, recipe, 0)) for name, recipe in recipes.items()}
    assert found == {name: 4 * 3 * (4 if name == runner.FP32 else 2) for name in recipes}


def test_apps_times_are_ratios_in_the_same_moment(apps, monkeypatch):
    """A machine that is three times as slow for a while changes no ratio; the first chunk does not count."""
    runner = apps("runner")
    fp32 = [9.0] * runner.CHUNK + [1.0] * runner.CHUNK + [3.0] * 2 * runner.CHUNK
    found = runner.times([[9.0] * runner.CHUNK + [2 * s for s in fp32[runner.CHUNK :]]], [fp32])
    assert (found["ratio_p20"], found["ratio"], found["ratio_p80"]) == (2, 2, 2)
    assert found["ms_per_step"] == 6000


def test_apps_table_of_planted_rows(apps, tmp_path):
    report = apps("report")
    fp32 = {
        "case": "apps/planted", "implementation": "torch fp32", "metric": "error", "higher_is_better": False,
        "scores": [1.0, 2.0, 3.0], "steps": 9, "skipped_steps": 0, "ms_per_step": 10.0, "ratio": 1.0, "note": "",
        "activation_bytes": 2**20, "peak_bytes": 3 * 2**20, "device": "a CPU", "torch": "2.13", "date": "2026-01-01",
    }  # fmt: skip
    ours = fp32 | {
        "implementation": "mixed_float16", "scores": [0.5, 1.5, 2.5], "ratio": 0.5, "skipped_steps": 2,
        "activation_bytes": 2**19, "note": "said",
    }  # fmt: skip
    slow = fp32 | {"implementation": "torch autocast fp16", "scores": []}
    heading, _, first, second, third, note = report.table([fp32, ours, slow]).splitlines()
    assert heading == "planted, on a CPU; spread of fp32 over the seeds: 2"
    assert first.split() == ["torch", "fp32", "2.0000", "+0.0000", "10.00", "1.00", "1.00", "1.00", "3.00", "1.00", "0"]
    assert second.split() == ["mixed_float16", "1.5000", "+0.5000", "10.00", "0.50", "0.50", "0.50", "3.00", "1.00", "2"]
    assert third.split()[3:5] == ["-", "-"]
    assert note == "mixed_float16: said"
    report.write(tmp_path, [fp32])
    report.write(tmp_path, [fp32 | {"case": "apps/other"}])
    report.write(tmp_path, [ours, slow])
    written = [json.loads(line) for line in (tmp_path / "apps.jsonl").read_text().splitlines()]
    assert [row["case"] for row in written] == ["apps/other", "apps/planted", "apps/planted"]
    assert (tmp_path / "apps_planted.png").exists()


def test_apps_pole_falls_as_it_should(apps):
    """Alone, a pole leans further the way it leans; a push to the right moves the cart there and tips the pole to the left."""
    cartpole = apps("cartpole")
    state, fell = cartpole.push(torch.tensor([[0.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]), torch.tensor([False, True]))
    state, _ = cartpole.push(state, torch.tensor([False, True]))
    assert state[0, 2] > 0.1
    assert state[1, 0] > 0 > state[1, 2]
    assert not fell.any()
    _, fell = cartpole.push(torch.tensor([[2.5, 0.0, 0.0, 0.0], [0.0, 0.0, -0.3, 0.0]]), torch.tensor([True, True]))
    assert fell.all()


def test_apps_diffusion_samples(apps):
    """From noise alone to the digit that a denoiser always sees."""
    generation = apps("generation")
    digit = torch.linspace(-1, 1, generation.PIXELS)
    found = generation.sample(lambda x, t: digit.expand_as(x), 2, torch.device("cpu"))
    torch.testing.assert_close(found, digit.view(28, 28).expand(2, -1, -1))


def test_apps_16_bit_factors_find_what_was_planted(apps, monkeypatch):
    """A matrix of rank 2, by ALS with 16-bit storage: fp32 sums find it to the rounding of its factors."""
    factorization = apps("factorization")
    torch.manual_seed(0)
    wanted = torch.rand(20, 2) @ torch.rand(2, 30) + 1
    user, film = torch.cartesian_prod(torch.arange(20), torch.arange(30)).unbind(1)
    monkeypatch.setattr(factorization, "USERS", 20)
    monkeypatch.setattr(factorization, "FILMS", 30)
    monkeypatch.setattr(factorization, "held_out", lambda device: ([user, film, wanted.flatten()],) * 2)
    monkeypatch.setitem(factorization.Als.sizes, "tiny", dict(rank=3, steps=8))
    rows = {
        row["implementation"]: row
        for row in factorization.Als(torch.device("cpu"), "tiny").measure(factorization.Als.recipes, 1)
    }
    (fp32,), (half,) = (rows[name]["scores"] for name in ("torch fp32", "float16, fp32 sums"))
    assert fp32 < 0.15
    assert half == pytest.approx(fp32, rel=0.02)
    assert rows["float16, fp32 sums"]["activation_bytes"] * 2 == rows["torch fp32"]["activation_bytes"]
