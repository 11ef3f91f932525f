# SPDX-License-Identifier: Apache-2.0
"""A short race of what a GPU is asked first: the GEMM's three roles, or the step, against torch and against a copy.

    python -m bench.race gemm|step [--rows FILE]

A copy moves as many bytes as the inputs and outputs have: what memory allows. Medians of interleaved rounds, the L2 swept
before each; results are not checked here, which tests/device/sweep.py and `python -m mpkernels prove` do. Rows are written
as they fall, the decisive ones first.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import rows, step
from bench.cases import Step
from bench.implementation import OURS
from bench.timing import Clock
from mpkernels.ops.linear_act import Activation, backward_op, forward_op

SHAPES = (  # M, K, N
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (4096, 1024, 4096),
    (2048, 2048, 2048),
    (8192, 4096, 11008),
    (512, 4096, 4096),
)
STEPS = ((10**8, 300), *((n, tensors) for n in (10**6, 10**7, 10**8, 10**9) for tensors in (1, 300, 10_000)))
STEP_BYTES = 30  # per parameter: the gradient twice, masters, moments and weights
ROUNDS = 11
TORCH_STEP = "GradScaler, fused AdamW"
COPY = "a copy"

Functions = dict[str, Callable[[], object]]


def copy_of(bytes_moved: int, device: torch.device) -> Callable[[], object]:
    to, given = (torch.ones(max(bytes_moved // 2, 1), dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: to.copy_(given)


def gemm(role: str, M: int, K: int, N: int, device: torch.device, backend: str) -> Functions:
    """fprop with bias, ReLU and its mask; dgrad with the mask and the column sums of the layer below; wgrad to fp32."""
    f16, f32, relu, none = torch.float16, torch.float32, Activation.RELU, Activation.NONE
    forward, backward = forward_op.function(backend), backward_op.function(backend)
    x, weight, bias, grad_z = (torch.randn(shape, device=device).to(f16) for shape in ((M, K), (N, K), (N,), (M, N)))
    copied = copy_of(2 * (x.numel() + weight.numel() + grad_z.numel() * (2 if role == "wgrad" else 1)), device)
    if role == "fprop":
        return {
            OURS: lambda: forward(x, weight, bias, None, int(relu), f16, f16, 1),
            "F.linear, relu": lambda: F.linear(x, weight, bias).relu_(),
            "_addmm_activation": lambda: torch._addmm_activation(bias, x, weight.t()),
            "F.linear": lambda: F.linear(x, weight, bias),
            COPY: copied,
        }
    dtypes, saved = (f16, f16, f32, f32), (x > 0).half()
    if role == "dgrad":
        mask = forward(x, torch.eye(K, device=device, dtype=f16), None, None, int(relu), f16, f16, 1)[1]
        below = (mask, int(relu), f32)

        def by_torch():
            grad_x = torch.ops.aten.threshold_backward(grad_z @ weight, saved, 0)
            return grad_x, grad_x.sum(0, dtype=f32)

        return {
            OURS: lambda: backward(grad_z, x, weight, None, None, int(none), *dtypes, [True, False, False], *below),
            "mm, threshold_backward, sum": by_torch,
            "mm": lambda: grad_z @ weight,
            COPY: copied,
        }
    runs = {
        OURS: lambda: backward(grad_z, x, weight, None, None, int(none), *dtypes, [False, True, False]),
        "mm to 16 bits": lambda: grad_z.t() @ x,
    }
    if device.type == "cuda":  # torch has it nowhere else
        runs["mm to fp32"] = lambda: torch.mm(grad_z.t(), x, out_dtype=f32)
    return runs | {COPY: copied}


def steps(parameters: int, tensors: int, device: torch.device) -> Functions:
    """scaler.step and scaler.update of 16-bit parameters with fp32 masters, and torch's of fp32 parameters."""
    recipes = step.recipes(Step(parameters, tensors), device)
    ours, theirs = (recipes[name][0](Step(parameters, tensors), device) for name in (OURS, "fp32 parameters"))
    return {OURS: ours.step, TORCH_STEP: theirs.step, COPY: copy_of(STEP_BYTES * parameters, device)}


def race(runs: Functions, device: torch.device, rounds: int) -> dict[str, float]:
    """Median us of each, interleaved; the first two rounds do not count."""
    clock, times = Clock(device, torch.get_num_threads()), {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            us = clock(run, "kernels")
            if i >= 2:
                times[name].append(us)
    return {name: statistics.median(us) for name, us in times.items()}


def cases(what: str, device: torch.device, backend: str) -> Iterator[tuple[str, Callable[[], Functions], float]]:
    """Name, what makes the implementations, and the operations of the case, 0 where bytes count."""
    if what == "step":
        for n, tensors in dict.fromkeys(STEPS):
            yield f"step of {n:.0e} in {tensors}", lambda n=n, tensors=tensors: steps(n, tensors, device), 0
        return
    for M, K, N in SHAPES:
        for role in ("fprop", "dgrad", "wgrad"):
            make = lambda role=role, sizes=(M, K, N): gemm(role, *sizes, device, backend)
            yield f"{role} M={M} K={K} N={N}", make, 2.0 * M * K * N


def run(what: str, device: torch.device, backend: str, file: Path | None, rounds: int = ROUNDS) -> list[str]:
    """A sentence per case: times the speed of each implementation, and TFLOP/s."""
    facts = rows.environment(device)
    said = []
    for name, make, operations in cases(what, device, backend):
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            us = race(make(), device, rounds)
        except torch.OutOfMemoryError as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            continue
        ours = us[OURS]
        rate = f", {operations / ours / 1e6:.0f} TFLOP/s" if operations else ""
        others = ", ".join(f"{other / ours:.2f} x {peer}" for peer, other in us.items() if peer != OURS)
        said.append(f"{name}: {ours:.0f} us{rate}, {others}")
        print(said[-1], flush=True)
        if file is not None:
            with file.open("a") as out:
                for peer, median in us.items():
                    row = {"part": what, "case": name, "implementation": peer, "us_p50": round(median, 2), "rounds": rounds}
                    tflops = {"tflop_s": round(operations / median / 1e6, 1)} if operations and peer != COPY else {}
                    out.write(json.dumps(row | tflops | facts) + "\n")
    return said


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.race", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("gemm", "step"))
    parser.add_argument("--rows", type=Path, help="a file of JSON lines to add the rows to")
    options = parser.parse_args(arguments)
    said = run(options.what, torch.device("cuda"), "native", options.rows)
    print(said[1] if options.what == "gemm" else said[0])  # the one by which it is judged: 4096^3, 1e8 in 300
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
