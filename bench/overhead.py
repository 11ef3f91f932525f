# SPDX-License-Identifier: Apache-2.0
"""What a call costs beside its arithmetic: calls on next to nothing, and the time from `import mpkernels` to a first step."""

import torch

import mpkernels as mpk
from bench import linear_act, rows, step, training
from bench.cases import LinearAct, Overhead, Step
from bench.implementation import OURS, Implementation

SMALL = (1, 8, 8)  # M, K, N
CALLS = 200
TENSORS = 400  # of the steps that follow
GROUPED = ("step of 400 groups", "step of 400, alternating")
ELEMENTS = 16  # of each tensor of a step
WATCH = "watch of "  # and the model of a training step
WATCHED, ADAPTED = f"{OURS}, watched", f"{OURS}, watched, adapt="

FIRST_STEP = """
import torch, time
torch.set_num_threads({threads})
now = time.process_time if {device!r} == "cpu" and {threads} == 1 else time.perf_counter
start = now()
{script}
x = torch.randn(32, 64, device={device!r})
with context():
    loss = model(x).float().square().mean()
scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()
if {device!r} == "cuda": torch.cuda.synchronize()
print(now() - start)
"""
NETWORK = "model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).to({device!r})"
SCRIPTS = {
    OURS: f"""
import contextlib, mpkernels as mpk
{NETWORK}
mpk.convert(model, "mixed_float16")
optimizer, scaler, context = mpk.optim.AdamW(model.parameters()), mpk.GradScaler({{device!r}}), contextlib.nullcontext
""",
    "torch autocast": f"""
{NETWORK}
optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler({{device!r}})
context = lambda: torch.autocast({{device!r}}, torch.float16)
""",
}


def implementations(case: Overhead, device: torch.device) -> dict[str, Implementation]:
    if case.what == "first_step":
        return {name: first_step(script, device) for name, script in SCRIPTS.items()}
    if case.what in GROUPED:
        return grouped_steps(case, device)
    if case.what.startswith(WATCH):
        return watched_steps(case.what.removeprefix(WATCH), device)
    if case.what.startswith("step"):
        tensors = int(case.what.removeprefix("step of "))
        found = step.implementations(Step(ELEMENTS * tensors, tensors), device)
        return many(found, ("classical fp16 recipe", "fp32 parameters"), 10)
    direction = "forward" if case.what == "forward" else "both"
    found = many(linear_act.implementations(LinearAct(direction, *SMALL), device), ("torch float16", "torch autocast"), CALLS)
    if not case.what.endswith("2 threads"):
        return found
    return {name: Implementation(by_two_threads(c.run), c.check, calls=c.calls, timed=c.timed) for name, c in found.items()}


def watched_steps(model: str, device: torch.device) -> dict[str, Implementation]:
    """A training step as it is, watched, and adapted; the losses have the same bits."""

    def implementation(watch: dict | None) -> Implementation:
        run = training.ours(model, device, "mixed_float16", watch=watch)

        def check() -> dict:
            assert run().item() == training.ours(model, device, "mixed_float16")().item()
            return {}

        return Implementation(run, check, timed="all")

    options = {OURS: None, WATCHED: {}, ADAPTED: {"adapt": mpk.Adapt()}}
    return {name: implementation(watch) for name, watch in options.items()}


def grouped_steps(case: Overhead, device: torch.device) -> dict[str, Implementation]:
    """A step of as many groups as tensors, or of one half of the tensors, then of the other, as experts alternate."""

    def implementation(make) -> Implementation:
        params = [torch.nn.Parameter(torch.randn(ELEMENTS, device=device)) for _ in range(TENSORS)]
        grads, alternate = [torch.randn_like(p) for p in params], case.what == GROUPED[1]
        optimizer = make([params] if alternate else [[p] for p in params])

        def step(of: int):
            for i, (parameter, grad) in enumerate(zip(params, grads, strict=True)):
                parameter.grad = grad if not alternate or i % 2 == of else None
            optimizer.step()

        return Implementation(lambda: (step(0), step(1)), calls=2, timed="host")

    groups = lambda members: [{"params": group} for group in members]
    return {
        OURS: implementation(lambda members: mpk.optim.AdamW(groups(members))),
        "torch fused": implementation(lambda members: torch.optim.AdamW(groups(members), fused=True)),
    }


def many(found: dict[str, Implementation], peers: tuple[str, ...], calls: int) -> dict[str, Implementation]:
    """Ours and some peers, `calls` at a time, with nothing counted: here the host is what is measured."""
    chosen = {name: implementation for name, implementation in found.items() if name.startswith(OURS) or name in peers}
    return {name: Implementation(repeat(c.run, calls), c.check, calls=calls, timed="host") for name, c in chosen.items()}


def repeat(run, calls: int):
    def runs():
        for _ in range(calls):
            run()

    return runs


def by_two_threads(run):
    """A parallel region that such a call opens costs more than the call."""

    def runs():
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            run()
        finally:
            torch.set_num_threads(before)

    return runs


def first_step(script: str, device: torch.device) -> Implementation:
    """In a process of its own, from after `import torch` to the end of the first step."""
    code = FIRST_STEP.format(script=script.format(device=device.type), device=device.type, threads=torch.get_num_threads())
    return Implementation(lambda: float(rows.python("-c", code)), timed="by itself")
