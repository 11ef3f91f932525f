# SPDX-License-Identifier: Apache-2.0
"""Train a network on scikit-learn's digits under every policy, next to torch's own recipes, and compare them.

python examples/digits_mlp.py [--quick] [--policies mixed_float16 torch_autocast_fp16 ...] [--out demo]

8x8 images of digits, a 64-128-128-10 network with fused ReLU, AdamW, a loss scaler for 16-bit arithmetic. On a GPU if there
is one. Prints two tables; writes results.json, implementations.json and loss.png. What is measured and how stands in
digits_report.py, and under the tables.
"""

import argparse
import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import digits_report as report
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import mpkernels as mpk

POLICIES = (
    "float64", "float32", "mixed_float32", "mixed_float16", "mixed_bfloat16", "mixed_float8", "mixed_float8_hybrid", "float16",
    "bfloat16",
)  # fmt: skip
TORCH_RECIPES = {"torch_fp32": None, "torch_autocast_fp16": torch.float16, "torch_autocast_bf16": torch.bfloat16}
WIDTHS = (64, 128, 128, 10)
BATCH, LR = 64, 2e-3


@dataclass
class Run:
    """One network in training, under a policy or one of torch's recipes, and what became of it."""

    name: str
    policy: mpk.Policy | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: Callable = contextlib.nullcontext
    losses: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            out = self.model(x)
        return cross_entropy(out.to(torch.promote_types(out.dtype, torch.float32)), target)  # 16 bits would be too coarse

    def step(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = self.loss(x, target)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()

    def timed_step(self, x: torch.Tensor, target: torch.Tensor) -> None:
        start = report.clock(x.device)
        self.losses.append(self.step(x, target))
        self.seconds.append(report.clock(x.device) - start)

    @torch.no_grad()
    def test(self, x: torch.Tensor, target: torch.Tensor) -> None:
        self.model.eval()
        with self.autocast():
            self.accuracy = (self.model(x).argmax(1) == target).double().mean().item()
        self.model.train()


def network(seed: int) -> nn.Sequential:
    """fp32, the same for every recipe."""
    torch.manual_seed(seed)
    layers = [layer for K, N in itertools.pairwise(WIDTHS) for layer in (nn.Linear(K, N), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def make(name: str, seed: int, device: torch.device) -> Run:
    return (by_torch if name in TORCH_RECIPES else by_policy)(name, seed, device)


def by_policy(name: str, seed: int, device: torch.device) -> Run:
    """This project: convert the model, then make optimizer and scaler as ever."""
    policy = mpk.Policy.parse(name)
    model = network(seed).to(device, torch.promote_types(policy.param_dtype, torch.float32))
    model = mpk.convert(model, policy)  # a 16-bit policy rounds the parameters here, and keeps the rest for the masters
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=LR)
    return Run(name, policy, model, optimizer, mpk.GradScaler(enabled=policy.compute_dtype.itemsize == 2))


def by_torch(name: str, seed: int, device: torch.device) -> Run:
    """torch's documented recipe: fp32 parameters, autocast, GradScaler for fp16, AdamW."""
    narrow = TORCH_RECIPES[name]
    model = network(seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler(device.type, enabled=narrow == torch.float16)
    run = Run(name, None, model, optimizer, scaler)
    if narrow is not None:
        run.autocast = lambda: torch.autocast(device.type, narrow)
    return run


def digits(device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(x, target) to train on and to test on: 1,797 images, a quarter of them for the test."""
    x, target = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, target, test_size=0.25, random_state=0, stratify=target)
    x, x_test, target, target_test = (torch.from_numpy(part).to(device) for part in parts)
    return (x.float(), target), (x_test.float(), target_test)


def train(names: list[str], seeds: int, epochs: int, device: torch.device) -> dict[str, list[Run]]:
    """A run per recipe and seed. The recipes are interleaved, an epoch each, so that a slow moment of the machine hits all."""
    data, test_data = digits(device)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    steps = len(data[0]) // BATCH
    with tqdm(total=seeds * epochs * steps * len(names), unit="step", desc="training", disable=None, leave=False) as bar:
        for seed in range(seeds):
            for name in names:
                runs[name].append(make(name, seed, device))
            for epoch in range(epochs):
                generator = torch.Generator().manual_seed(1000 * seed + epoch)
                batches = torch.randperm(len(data[0]), generator=generator).to(device).split(BATCH)[:steps]
                for name in names:
                    bar.set_postfix_str(f"{name}, seed {seed + 1}/{seeds}, epoch {epoch + 1}/{epochs}")
                    for rows in batches:
                        runs[name][-1].timed_step(data[0][rows], data[1][rows])
                    bar.update(steps)
            for name in names:
                runs[name][-1].test(*test_data)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    all_recipes = [*POLICIES, *TORCH_RECIPES]
    parser.add_argument("--quick", action="store_true", help="3 epochs of one seed: to see that it runs")
    parser.add_argument(
        "--policies", nargs="+", choices=all_recipes, default=all_recipes, metavar="NAME", help=", ".join(all_recipes)
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results.json and loss.png")
    arguments = parser.parse_args()
    names = list(dict.fromkeys(arguments.policies))
    seeds, epochs = (1, 3) if arguments.quick else (3, 20)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # layers this small gain nothing from more, and waiting for a busy core costs milliseconds
    print(report.heading(device, WIDTHS, BATCH, seeds, epochs), flush=True)
    start = time.perf_counter()
    runs = train(names, seeds, epochs, device)
    batches = [tuple(part[:size].clone() for part in digits(device)[0]) for size in (BATCH, 2 * BATCH)]
    rows = [report.row(runs[name], functools.partial(make, name, 0, device), batches, epochs) for name in names]
    report.add_ratios(rows)
    implementations = report.implementations(device)
    report.write(arguments.out, rows, implementations)
    print(report.table(rows))
    print(report.implementation_table(implementations))
    print(report.summary(rows, time.perf_counter() - start, arguments.out))


if __name__ == "__main__":
    main()
