# SPDX-License-Identifier: Apache-2.0
"""Whether what mpk.advise and mpk.plan say is so: `python -m bench.precision [NAME ...] --out bench/results/precision.jsonl`.

One row a figure: what was measured, over how many cases, beside the goal. The load of the machine changes none of them but
`advise_time` and the seconds of `plan_7b`.
"""

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import mpkernels as mpk
from bench import models, rows
from bench.tables import goals, is_met
from bench.training import peak_bytes
from mpkernels.precision.plan import POLICIES
from tests import models as test_models
from tests.precision import measured

CPU = torch.device("cpu")
TRANSFORMERS = ("vit", "bert_gelu", "gpt2")  # of tests/models.py
OF_COST = ("mlp", "gpt2_tiny")  # of bench/models.py


def figure(what: str, value: float, goal: float, cases: int, *, at_least: bool = False) -> dict:
    return {"what": what, "value": value, "goal": goal, "at_least": at_least, "cases": cases}


# ----- advise ---------------------------------------------------------------


def loss_change() -> Iterator[dict]:
    yield from _loss_change("change of the loss", measured.FORMATS)


def loss_change_float8() -> Iterator[dict]:
    yield from _loss_change("change of the loss by operands of 8 bits", measured.EIGHT_BITS)


def _loss_change(what: str, formats: tuple[str, ...]) -> Iterator[dict]:
    found = [c for name in TRANSFORMERS for c in measured.loss_changes(name, 48, torch.float64, formats)]
    correlation, within = measured.agreement(found)
    yield figure(f"{what}, predicted and measured: Pearson's correlation", correlation, 0.95, len(found), at_least=True)
    yield figure("the same: share within a factor of 2", within, 0.85, len(found), at_least=True)


def bound() -> Iterator[dict]:
    yield from _bound("in random layers", measured.OF_BOUND)


def bound_float8() -> Iterator[dict]:
    yield from _bound("in random layers with operands of 8 bits", measured.EIGHT_BITS)


def _bound(where: str, formats: tuple[str, ...]) -> Iterator[dict]:
    layers, seeds = 10_000, 10
    found = [ratio for seed in range(seeds) for _, _, ratio in measured.bound_ratios(seed, layers, formats)]
    judged = [ratio for ratio in found if ratio is not None]
    yield figure(f"errors beyond their bound, {where}", sum(r > 1 for r in judged), 0, layers * seeds)
    yield figure("the largest error, in units of its bound", max(judged), 1, len(judged))


def advise_memory() -> Iterator[dict]:
    what = "peak of advise over that of an fp32 step, in tensors of the largest layer"
    for where, policies in (("", measured.FORMATS), (", with operands of 8 bits", measured.WITH_EIGHT_BITS)):
        excess = []
        for name in OF_COST:
            model, loss, step, advise = _of_cost(name, policies)
            step()
            over = peak_bytes(advise, CPU) - peak_bytes(step, CPU)
            excess.append(over / _largest_layer(model, loss))
        yield figure(f"{what}{where}", max(excess), 4, len(excess))


def advise_time() -> Iterator[dict]:
    ratios = []
    for name in OF_COST:
        *_, step, advise = _of_cost(name)
        fastest = [min(_cpu_seconds(work) for _ in range(5)) for work in (step, advise)]
        ratios.append(fastest[1] / fastest[0])
    yield figure("time of advise with 5 policies, in fp32 training steps", max(ratios), 10, len(ratios))


def _of_cost(name: str, policies: tuple[str, ...] = measured.FORMATS) -> tuple:
    """(model, loss, a step in fp32, advise of these policies)."""
    model, inputs, targets = models.make(name, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss = lambda model: F.cross_entropy(model(*inputs).flatten(0, -2), targets.flatten())

    def step():
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, loss, step, lambda: mpk.advise(model, loss, policies=policies, loss_budget=1e9)


def _largest_layer(model: torch.nn.Module, loss: Callable) -> int:
    """Bytes of x, weight, out and their gradients of the largest linear."""
    sizes = []

    def hook(module, args, out):
        sizes.append(2 * sum(t.nbytes for t in (*args, module.weight, out)))

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    loss(model)
    for handle in handles:
        handle.remove()
    return max(sizes)


def _cpu_seconds(work: Callable) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def training() -> Iterator[dict]:
    names, scales = test_models.CASES, (2.0**16, 2.0**20, 2.0**24)
    found = [measured.trainings(name, 80) for name in names]
    to_fp32, to_bf16 = (max(size(f[key]) / f["spread"] for f in found) for key, size in (("to_fp32", abs), ("to_bf16", float)))
    yield figure("loss as advised beside fp32's, same seeds, in the spread of fp32's", to_fp32, 1, len(found))
    yield figure("loss as advised less all-bf16's, same seeds, in the spread of fp32's", to_bf16, 1, len(found))
    steps = [measured.contradicted(name, scale) for name in names for scale in scales]
    yield figure("steps as advised with a gradient that is not finite", sum(bool(s[0]) for s in steps), 0, len(steps))
    yield figure("change of the loss as advised, in its budget", max(s[2] for s in steps), 1, len(steps))


# ----- plan ---------------------------------------------------------------

FIELDS = ("parameters", "gradients", "states", "copies", "activations", "temporaries", "peak")


def plan_tracker() -> Iterator[dict]:
    """Every policy and optimizer, and budgets around the peaks of real steps."""
    wrong, peaks = [], []
    for make_model, make_batch in measured.STEPS.values():
        plan = mpk.plan(make_model, make_batch, policies=POLICIES, optimizers=measured.OURS, batch_sizes=(16, 24, 64))
        for row in plan.rows:
            real = measured.of_real_steps(make_model, make_batch, row.batch_size, row.policy, row.optimizer)
            wrong += [abs(getattr(row, name) - real[name]) / real[name] for name in FIELDS if real[name]]
            peaks.append((row.peak, real["peak"]))
    yield figure("a category of memory beside that of real steps, at worst", max(wrong), 0.01, len(peaks))
    rng, budgets = random.Random(0), 200
    drawn = [(*rng.choice(peaks), rng.uniform(0.5, 1.5)) for _ in range(budgets)]
    over = sum(planned <= share * real < real for planned, real, share in drawn)
    yield figure("random budgets that fit by the plan, and did not", over, 0, budgets)


RESIDENT = """
import sys, torch, mpkernels as mpk
from pathlib import Path
from bench.precision import resident_case
policy, read = sys.argv[1], lambda field: next(
    int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
torch.set_num_threads(1)

def steps(width):
    make_model, make_batch = resident_case(width)
    model, x = mpk.convert(make_model(), policy), make_batch(256)
    optimizer, scaler = mpk.optim.AdamW(model.parameters()), mpk.GradScaler(enabled="float16" in policy)
    for _ in range(2):
        scaler.scale(model(x).float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

steps(64)
before = read("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
steps(4096)
print(read("VmHWM") - before)
"""


def resident_case(width: int) -> tuple[Callable, Callable]:
    """(make_model, make_batch) of 1 GiB and more at a width of 4096."""
    make_model = lambda: torch.nn.Sequential(
        torch.nn.Linear(width, 2 * width), torch.nn.ReLU(), torch.nn.Linear(2 * width, width)
    )
    return make_model, lambda n: torch.randn(n, width)


def plan_resident() -> Iterator[dict]:
    """The growth of a process, warmed by a small model."""
    wrong = []
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        done = rows.python("-c", RESIDENT, policy)
        (row,) = mpk.plan(*resident_case(4096), policies=[policy], batch_sizes=[256]).rows
        wrong.append(abs(row.peak - int(done)) / int(done))
    yield figure("the peak beside the growth of a process, cases above 1 GiB, at worst", max(wrong), 0.1, len(wrong))


def plan_7b() -> Iterator[dict]:
    """In a process of its own."""
    seconds, size = json.loads(rows.python("-c", "from bench.precision import of_7b; of_7b()").splitlines()[-1])
    yield figure("a plan of a 7B model: CPU seconds", seconds, 30, 1)
    yield figure("the same: peak of the process, GB", size / 1e9, 2, 1)


def of_7b() -> None:
    import transformers

    def batch(n):
        ids = torch.randint(32000, (n, 512))
        return {"input_ids": ids, "labels": ids}

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    seconds = _cpu_seconds(
        lambda: mpk.plan(lambda: transformers.LlamaForCausalLM(config), batch, policies=["mixed_bfloat16"], batch_sizes=[1])
    )
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


# ----- rows ---------------------------------------------------------------

MEASURES: dict[str, Callable[[], Iterator[dict]]] = {
    f.__name__: f for f in (
        loss_change, loss_change_float8, bound, bound_float8, advise_memory, advise_time, training, plan_tracker,
        plan_resident, plan_7b,
    )
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)}; all if none is given")
    parser.add_argument("--out", type=Path, help="a file of rows; those of the same names are replaced")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - MEASURES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    all_met = True
    for name in arguments.names or MEASURES:
        found = [{"case": f"precision/{name}", **row, **rows.environment(CPU)} for row in MEASURES[name]()]
        print(goals(found), flush=True)
        all_met &= all(map(is_met, found))
        if arguments.out:
            rows.merge(arguments.out, found)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
