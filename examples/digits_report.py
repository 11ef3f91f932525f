# SPDX-License-Identifier: Apache-2.0
"""What digits_mlp.py measures and shows: memory, times, the implementations that served, tables, a plot.

Bytes are counted, not estimated: gradients and optimizer state from their tensors, what is saved for backward by
`torch.autograd.graph.saved_tensors_hooks`, the peak by the allocator (torch.profiler on a CPU).
"""

import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import linear

import mpkernels as mpk

BACKENDS = ("eager", "native", "triton")
MEMORY = ("parameters", "copies", "gradients", "masters", "moments")
LAYER = (256, 512, 512)  # M, K, N of the layer that every implementation runs
STEP = (16, 1 << 16)  # tensors, and elements of each, of the step that every implementation takes
GRAD_SCALE = 1024.0
REPEATS = 15

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on stderr otherwise


def clock(device: torch.device) -> float:
    """Seconds: CPU time on a CPU, where others may be running; on a GPU wall time, once it has finished."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# ----- a row of the first table ---------------------------------------------------------------------------------


def row(runs: list, make: Callable, batches: list[tuple[torch.Tensor, torch.Tensor]], epochs: int) -> dict:
    """What became of one recipe, over its seeds. `make`: a new run of it; `batches`: a batch, and one twice as large."""
    run, device = runs[-1], batches[0][0].device
    steps = len(run.losses) // epochs
    curves = torch.stack([torch.stack(r.losses).double().cpu() for r in runs])
    curve = curves.unflatten(1, (epochs, steps)).mean((0, 2)).tolist()
    warm = [seconds for r in runs for seconds in r.seconds[steps:]]
    skipped = sum(len(r.losses) - _steps_taken(r.optimizer) for r in runs)
    return {
        "policy": run.name,
        "device": device.type,
        "implementations": served_by(run, batches[0]),
        "first_loss": curves[:, 0].mean().item(),
        "last_loss": curve[-1],
        "losses": curve,
        "test_accuracy": statistics.mean(r.accuracy for r in runs),
        "test_accuracies": [r.accuracy for r in runs],
        "time": "wall time" if device.type == "cuda" else "CPU time",
        "steps": sum(len(r.losses) for r in runs),
        "skipped_steps": skipped,
        **memory(run, batches),
        "peak_bytes": peak_bytes(make, *batches[0]),
        "ms_per_step": statistics.median(warm) * 1e3,
    }


def _steps_taken(optimizer: torch.optim.Optimizer) -> int:
    return int(next(iter(optimizer.state.values()))["step"])


def add_ratios(rows: list[dict]) -> None:
    """Time per step over that of torch's recipes; None where such a recipe did not run."""
    times = {r["policy"]: r["ms_per_step"] for r in rows}
    for r in rows:
        for key, baseline in (("fp16", "torch_autocast_fp16"), ("bf16", "torch_autocast_bf16")):
            r[f"ratio_to_torch_{key}"] = r["ms_per_step"] / times[baseline] if baseline in times else None


def served_by(run, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, str]:
    """op -> implementation, for the ops that a step of this run calls."""
    if run.policy is None:
        return {}
    device, policy = batch[0].device, run.policy
    compute, master = policy.compute_dtype, torch.promote_types(policy.param_dtype, torch.float32)
    linears = ((mpk.ops.linear_act.forward_op, compute), (mpk.ops.linear_act.backward_op, policy.wgrad_dtype or compute))
    served = {op.name: op.backend(device, dtype) for op, dtype in linears}
    if gemm := gemm_by(lambda: run.step(*batch), device):
        served = {name: f"{backend} ({gemm})" for name, backend in served.items()}
    served["adamw_"] = mpk.ops.optimizer_update.adamw_.backend(device, master)
    if run.scaler.is_enabled():
        served["grad_stats_"] = mpk.ops.grad_stats.op.backend(device, policy.grad_dtype or policy.param_dtype)
        served["update_scale_"] = mpk.ops.update_scale.op.backend(device, torch.float32)
    return served


def gemm_by(call: Callable, device: torch.device) -> str:
    """On a CPU `eager` leaves the matrix product to a library, by its size and dtype: which one, as torch saw it."""
    if device.type != "cpu":
        return ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.name for event in profile.events()}
    libraries = {"oneDNN": {"mkldnn::_linear_pointwise"}, "torch's BLAS": {"aten::mm", "aten::addmm"}}
    found = [library for library, ops in libraries.items() if ops & names]
    return f"GEMM by {' and '.join(found)}" if found else ""


# ----- memory ---------------------------------------------------------------------------------------------------


def memory(run, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """Bytes per parameter by purpose, and bytes saved for backward per sample."""
    parameters = list(run.model.parameters())
    (saved, _), (saved_twice, loss) = (_saved_bytes(run, *batch) for batch in batches)
    per_sample = (saved_twice - saved) / len(batches[0][0])
    run.scaler.scale(loss).backward()
    state = [item for p in parameters for item in run.optimizer.state[p].items()]
    found = {
        "parameters": _bytes(parameters),
        "copies": 2 * saved - saved_twice,  # what is saved whatever the batch, parameters apart: weights, cast
        "gradients": _bytes(p.grad for p in parameters),
        "masters": _bytes(value for name, value in state if name == "master"),
        "moments": _bytes(value for name, value in state if name.startswith("exp_avg")),
    }
    count = sum(p.numel() for p in parameters)
    return {
        "bytes_per_parameter": {name: value / count for name, value in found.items()},
        "saved_bytes_per_sample": per_sample,
    }


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _saved_bytes(run, x: torch.Tensor, target: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Bytes that one forward saves, each storage once, parameters apart; and the loss, which holds them."""
    parameters = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.dim() and storage.data_ptr() not in parameters:  # a scalar is neither an activation nor a copy
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.loss(x, target)
    return sum(saved.values()), loss


def peak_bytes(make: Callable, x: torch.Tensor, target: torch.Tensor) -> int:
    """The most that the allocator had given out at once to a network that is made and takes three steps."""

    def life():
        run = make()
        for _ in range(3):
            run.step(x, target)

    gc.collect()  # what is freed later must not count
    if x.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        life()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        life()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # those inside of ops too
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


# ----- every implementation -------------------------------------------------------------------------------------


def implementations(device: torch.device) -> list[dict]:
    """One layer and one step through every implementation: median us, largest error against fp64, or why not."""
    layer_ops = (mpk.ops.linear_act.forward_op, mpk.ops.linear_act.backward_op)
    step_ops = (mpk.ops.grad_stats.op, mpk.ops.optimizer_update.adamw_)
    layer_case = "fp16 layer with ReLU, forward and backward, M={} K={} N={}".format(*LAYER)
    step_case = f"AdamW step, fp16 with fp32 masters, {STEP[0]} tensors of {STEP[1]}"
    rows = []
    for case, ops, run in ((layer_case, layer_ops, _run_layer), (step_case, step_ops, _run_step)):
        for backend in BACKENDS:
            why_not = next(filter(None, (op.why_not(backend, device, torch.float16) for op in ops)), None)
            found = {"us": None, "error": None, "note": why_not}
            if why_not is None:
                forced = ",".join(f"{op.name}={backend}" for op in ops)
                with mock.patch.dict(os.environ, MPKERNELS_BACKEND=forced):
                    found = run(device)
            rows.append({"case": case, "implementation": backend, **found})
    return rows


def _run_layer(device: torch.device) -> dict:
    """The largest error is of output and gradients, each over the largest element there."""
    generator, (M, K, N) = torch.Generator().manual_seed(0), LAYER
    x, weight, bias, grad_out = (
        torch.randn(shape, generator=generator).to(device, torch.float16).requires_grad_()
        for shape in ((M, K), (N, K), (N,), (M, N))
    )
    inputs, wide = (x, weight, bias), [t.detach().double().requires_grad_() for t in (x, weight, bias)]

    def layer():
        out = mpk.functional.linear_act(x, weight, bias, "relu")
        return out.detach(), *torch.autograd.grad(out, inputs, grad_out)

    expected = linear(*wide).relu()
    expected = (expected.detach(), *torch.autograd.grad(expected, wide, grad_out.double()))
    error = max(((a.double() - r).abs().max() / r.abs().max()).item() for a, r in zip(layer(), expected))
    return {"us": _median_us(layer, device), "error": error, "note": gemm_by(layer, device)}


def _run_step(device: torch.device) -> dict:
    """The largest error is of a master after one step."""
    generator, (count, size) = torch.Generator().manual_seed(0), STEP
    values, grads = (torch.randn(count, size, generator=generator).to(device, torch.float16) for _ in range(2))
    params = [torch.nn.Parameter(v.clone()) for v in values]
    wide = [torch.nn.Parameter(v.double()) for v in values]
    for p, w, g in zip(params, wide, grads):
        p.grad, w.grad = g, g.double() / GRAD_SCALE
    optimizer = mpk.optim.AdamW(params, lr=1e-3)
    scaler = mpk.GradScaler(init_scale=GRAD_SCALE)
    scaler.scale(torch.zeros((), device=device))

    def step():
        scaler.step(optimizer)
        scaler.update()

    step()
    torch.optim.AdamW(wide, lr=1e-3).step()
    masters = [optimizer.state[p]["master"] for p in params]
    error = max((m - w).abs().max().item() for m, w in zip(masters, wide))
    return {"us": _median_us(step, device), "error": error, "note": ""}


def _median_us(call, device: torch.device) -> float:
    times = []
    for _ in range(3 + REPEATS):
        start = clock(device)
        call()
        times.append((clock(device) - start) * 1e6)
    return statistics.median(times[3:])


# ----- what is shown --------------------------------------------------------------------------------------------


def heading(device: torch.device, widths: tuple, batch: int, seeds: int, epochs: int) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, one thread"
    return f"Digits, {'-'.join(map(str, widths))} with ReLU, batch {batch}, AdamW, {epochs} epochs, {seeds} seeds, on {where}\n"


def table(rows: list[dict]) -> str:
    """The first table and what its columns mean."""
    letters: dict[str, str] = {}
    lines = [
        f"{'':24}{'loss':^13} {'test':>6} {'steps':>6} {'bytes per parameter':^30} {'saved/':>7} {'peak':>6} {'ms':>6}"
        f" {'time / torch':>13}",
        f"{'policy or recipe':20}{'ops':>3} {'first':>6} {'last':>6} {'acc. %':>6} {'skip':>6} "
        + "".join(f"{word:>5}" for word in ("par", "copy", "grad", "mast", "mom", "sum"))
        + f" {'sample':>7} {'KiB':>6} {'/step':>6} {'fp16':>6} {'bf16':>6}",
    ]
    for r in rows:
        letter = letters.setdefault(_served(r["implementations"]), chr(ord("A") + len(letters)))
        lines.append(f"{r['policy']:20}{letter:>3} {_figures(r)}")
    return "\n".join([*lines, "", *_legend(letters, rows[0]["time"]), ""])


def _figures(r: dict) -> str:
    parts = [r["bytes_per_parameter"][name] for name in MEMORY]
    ratios = [r[f"ratio_to_torch_{key}"] for key in ("fp16", "bf16")]
    columns = [
        f"{r['first_loss']:6.3f} {r['last_loss']:6.4f} {100 * r['test_accuracy']:6.2f} {r['skipped_steps']:6} ",
        *(f"{part:5.1f}" if part >= 0.05 else f"{'-':>5}" for part in [*parts, sum(parts)]),
        f" {r['saved_bytes_per_sample']:7.0f} {r['peak_bytes'] / 1024:6.0f} {r['ms_per_step']:6.2f}",
        *(f"{'-':>7}" if ratio is None else f"{ratio:7.2f}" for ratio in ratios),
    ]
    return "".join(columns)


def _served(implementations: dict[str, str]) -> str:
    """`eager (GEMM by oneDNN): linear_act, linear_act_backward; native: adamw_`."""
    by_backend: dict[str, list[str]] = {}
    for op, backend in implementations.items():
        by_backend.setdefault(backend, []).append(op)
    return "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in by_backend.items()) or "torch's own"


def _legend(letters: dict[str, str], clock: str) -> list[str]:
    served = [f"{f'ops = {letter}':13} {text}" for text, letter in letters.items()]
    return [
        *served,
        "loss          of the first step, and mean of the last epoch; both and the accuracy are means of the seeds",
        "copy          weights cast for the matrix product: kept by our optimizer, made in every step by autocast",
        "saved/sample  bytes that one sample keeps from forward to backward, each storage counted once",
        "peak          the most that the allocator had given out at once, temporaries included",
        f"ms/step       median {clock} of whole steps, the first epoch left out; the recipes are interleaved by epoch",
    ]


def implementation_table(rows: list[dict]) -> str:
    """The second table."""
    lines = ["One layer and one step through every implementation (largest error: against fp64)"]
    for case, group in itertools.groupby(rows, key=lambda r: r["case"]):
        lines += ["", f"{case:68} {'median us':>10} {'largest error':>14}"]
        for r in group:
            figures = f"{'-':>10} {'-':>14}" if r["us"] is None else f"{r['us']:10.0f} {r['error']:14.1e}"
            lines.append(f"  {r['implementation']:8}{(r['note'] or ''):58} {figures}".rstrip())
    return "\n".join([*lines, ""])


def summary(rows: list[dict], seconds: float, out: Path) -> str:
    """One line: what happened and where it lies."""
    accuracy = {r["policy"]: r["test_accuracy"] for r in rows}
    narrow = [a for name, a in accuracy.items() if name.endswith("float16") and not name.startswith("torch")]
    story = f"Trained in {seconds:.0f} s, {sum(r['skipped_steps'] for r in rows)} steps skipped"
    if narrow and "float32" in accuracy:
        story += f", 16-bit accuracy at worst {100 * (min(narrow) - accuracy['float32']):+.2f} points from fp32's"
    return f"{story}: {out}/results.json, {out}/loss.png"


def write(out: Path, rows: list[dict], implementation_rows: list[dict]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("results", rows), ("implementations", implementation_rows)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(rows, out / "loss.png")


def plot(rows: list[dict], path: Path) -> None:
    """Mean training loss by epoch, and how far each is from the first recipe's; torch's are dashed."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for r in rows:
        epochs = range(1, len(r["losses"]) + 1)
        line = "--" if r["policy"].startswith("torch") else "-"
        above.semilogy(epochs, r["losses"], line, label=r["policy"], linewidth=1.3)
        below.plot(epochs, [100 * (a / b - 1) for a, b in zip(r["losses"], rows[0]["losses"])], line, linewidth=1.3)
    above.set(ylabel="training loss, mean of the seeds", title="Digits under every policy")
    below.set(xlabel="epoch", ylabel=f"% from {rows[0]['policy']}")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.legend(fontsize=8)
    figure.savefig(path, dpi=120)
