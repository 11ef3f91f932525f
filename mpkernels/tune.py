# SPDX-License-Identifier: Apache-2.0
"""The tuner: finds the fastest implementation of each GEMM of linear_act on this device, and checks before it times.

`python -m mpkernels tune --shapes 4096,1024,4096` or `mpk.tune(model, example_inputs)`. A candidate is out unless it is
within the bound of fp64, its mask is that of its output, and a second run gives the same bits; the others are timed cold
(the L2 is flushed before every run) in interleaved rounds. The table goes to the user's cache, and `auto` reads it.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpkernels.ops.linear_act import backward_op, forward_op, op_of, tile_config
from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.runtime import cache, tuned_table
from mpkernels.runtime.op import Op
from mpkernels.runtime.tuned_table import Entry, GemmKey
from mpkernels.runtime.untouched import run_once
from mpkernels.testing.timing import interleave

SHAPES = {  # M, K, N
    "cuda": ((4096, 1024, 4096), (16384, 1024, 4096), (4096, 4096, 4096), (8192, 8192, 8192)),
    "cpu": ((64, 256, 256),),
}
ROUNDS = 20


@dataclass
class Candidate:
    """One way to serve a problem. entries: the table under which it is run. reason: why it is out, None while it is not."""

    name: str
    backend: str
    entries: dict[GemmKey, Entry] = field(default_factory=dict)
    reason: str | None = None
    us: float | None = None


def tune(model: torch.nn.Module, example_inputs: object, *, rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Tune the GEMMs of one forward and backward of `model`, and return the entries written, by problem.

    Those of layers without an activation or with a ReLU: the others are served as without a table.
    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. Parameters, gradients, buffers and random
    numbers stay what they were. Raises RuntimeError under torch.compile and in CUDA graph capture, ValueError for fewer than
    one round.
    """
    _refuse_to_tune(rounds)
    return tune_problems(record(model, example_inputs), rounds=rounds)


def _refuse_to_tune(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"tune: rounds must be 1 or more, got {rounds}")
    if torch.compiler.is_compiling():
        raise RuntimeError("tune: cannot time kernels under torch.compile; call it before, on the model itself")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: cannot time kernels while a CUDA graph is captured; call it before the capture")


# ----- what to tune ---------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Notes the problems of the ops that are called, with the device and the largest number of rows of each."""

    def __init__(self):
        super().__init__()
        self.found: dict[tuple[torch.device, GemmKey], int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for op in (forward_op, backward_op):
            if function is getattr(torch.ops.mpkernels, op.name).default:
                call = op.call(*args)
                problem, device, rows = call.gemm_key, call.key.device, math.prod(args[0].shape[:-1])
                if problem is not None and call.key.activation <= Activation.RELU and args[0].numel():
                    self.found[device, problem] = max(rows, self.found.get((device, problem), 0))
        return function(*args, **(kwargs or {}))


def record(model: torch.nn.Module, example_inputs) -> dict[tuple[torch.device, GemmKey], int]:
    """The GEMMs of one forward and backward: (device, problem) -> rows."""
    recorder = _Recorder()
    with recorder:
        run_once(model, example_inputs)
    return recorder.found


def problems_of(shapes: Iterable[tuple[int, int, int]], device: torch.device) -> dict[tuple[torch.device, GemmKey], int]:
    """Layers with ReLU of (M, K, N) in fp16 and bf16, weight gradients in 16 and in 32 bits."""
    found = {}
    for M, K, N in shapes:
        for half in (torch.float16, torch.bfloat16):
            found[device, tuned_table.gemm_key("fprop", M, N, K, Activation.RELU, half, half, half)] = M
            for grad in (half, torch.float32):
                found[device, tuned_table.gemm_key("backward", M, N, K, Activation.RELU, half, half, half, grad)] = M
    return found


# ----- candidates ---------------------------------------------------------------


def _gemms(problem: GemmKey) -> list[GemmKey]:
    """The GEMMs that Triton chooses a tile for."""
    role, M, N, K, _, compute, weight, *rest = problem
    if role == "fprop":
        return [problem]
    grad_x, grad_weight = rest
    return [
        tuned_table.gemm_key("dgrad", M, N, K, 0, compute, weight, grad_x),
        tuned_table.gemm_key("wgrad", M, N, K, 0, compute, grad_weight),
    ]


def _triton_tiles(gemm: GemmKey, rows: int, device: torch.device) -> list[tuple[tuple[str, int], ...]]:
    """The tiles that Triton may run a GEMM with, as a table has them."""
    from mpkernels.ops.linear_act import triton

    role, _, N, K, _, compute, *dtypes = gemm
    sm, _, specializes = triton._device(device)
    weight = compute if role == "wgrad" or (rows >= triton.CAST_FIRST and sm in tile_config.TMA_SMS) else dtypes[0]
    a, b, out = {  # shapes and strides
        "fprop": (((rows, K), (K, 1)), ((K, N), (1, K)), (rows, N)),
        "dgrad": (((rows, N), (N, 1)), ((N, K), (K, 1)), (rows, K)),
        "wgrad": (((N, rows), (1, N)), ((rows, K), (K, 1)), (N, K)),
    }[role]
    Operand = tile_config.Operand
    operands = Operand(compute, *a, 0), Operand(weight, *b, 0), Operand(dtypes[-1], out, (out[1], 1), 0)
    by_tma = tile_config.tma_why_not(sm, *operands) is None
    found = [tile for flag in {specializes, False} for tile in tile_config.candidates(sm, flag, *operands, by_tma)]
    return [tuple(asdict(tile).items()) for tile in dict.fromkeys(found)]


def candidates_of(problem: GemmKey, device: torch.device, gemms: dict[GemmKey, Entry]) -> list[Candidate]:
    """Every backend of the op; Triton with the tiles of `gemms`. Those that cannot run have their reason."""
    op, compute = op_of(problem), problem[5]
    return [
        Candidate(backend, backend, gemms if backend == "triton" else {}, op.why_not(backend, device, compute))
        for backend in op.backends
    ]


# ----- one problem ---------------------------------------------------------------


def tune_problem(problem: GemmKey, rows: int, device: torch.device, rounds: int) -> dict[GemmKey, dict]:
    """The entries of one problem and of the GEMMs that Triton has a tile for; without a right candidate there is none."""
    from mpkernels.testing.gemm import Inputs

    inputs = Inputs.random(problem, rows, device)
    entries, chosen = {}, {}
    if op_of(problem).why_not("triton", device, problem[5]) is None:
        for i, gemm in enumerate(_gemms(problem)):
            output_mask = (True, True, True) if problem[0] == "fprop" else (i == 0, i == 1, False)
            options = [Entry("triton", tile) for tile in _triton_tiles(gemm, rows, device)]
            candidates = [Candidate(_name(entry.tile), "triton", {gemm: entry}) for entry in options]
            winner = _race(inputs, candidates, rounds, output_mask)
            if winner is not None:
                chosen |= winner.entries
                entries[gemm] = _entry(winner, winner.entries[gemm].tile, candidates)
    candidates = candidates_of(problem, device, chosen)
    winner = _race(inputs, candidates, rounds)
    if winner is not None:
        lost = entries.get(problem, {}).get("lost", {})
        entries[problem] = _entry(winner, chosen[problem].tile if problem in chosen else None, candidates)
        entries[problem]["lost"] |= lost
    return entries


def _name(tile: tuple[tuple[str, int], ...]) -> str:
    values = dict(tile)
    name = "triton {BLOCK_M}x{BLOCK_N}x{BLOCK_K} w{num_warps} s{num_stages}".format(**values)
    return name + (f" parts{values['SUBTILES']}{' specialized' * values['SPECIALIZE']}" if "SUBTILES" in values else "")


def _entry(winner: Candidate, tile: tuple | None, candidates: list[Candidate]) -> dict:
    """What a table keeps: the winner, Triton's tile for when it is forced, and of every other candidate why it lost."""
    lost = {c.name: c.reason or f"{c.us / winner.us:.2f} x the time: {c.us:.1f} us" for c in candidates if c is not winner}
    return {"backend": winner.backend, "tile": None if tile is None else dict(tile), "us": round(winner.us, 2), "lost": lost}


def _race(inputs, candidates, rounds, output_mask=(True, True, True)) -> Candidate | None:
    """Check, then time; the candidates get their reason or their time. The fastest, None where none is right."""
    runs = {}
    for candidate in candidates:
        if candidate.reason is None:
            run = _runner(inputs, candidate, output_mask)
            candidate.reason = _reject(run, inputs, output_mask)
            if candidate.reason is None:
                runs[candidate.name] = run
    times = interleave(runs, inputs.x.device, rounds)
    for candidate in candidates:
        if candidate.name in times:
            candidate.us = statistics.median(times[candidate.name])
    return min((c for c in candidates if c.us is not None), key=lambda c: c.us, default=None)


def _runner(inputs, candidate: Candidate, output_mask) -> Callable[[], tuple]:
    function, arguments = op_of(inputs.problem).function(candidate.backend), inputs.arguments(candidate.backend, output_mask)

    def run():
        with tuned_table.override(inputs.x.device, candidate.entries), torch.no_grad():
            return function(*arguments)

    return run


def _reject(run: Callable[[], tuple], inputs, output_mask) -> str | None:
    """Why a candidate is not to be timed, or None."""
    try:
        first = run()
        poison = [torch.full_like(t, -1) for t in first]  # memory that the second run may get, where it leaves a hole
        wrong = inputs.wrong(first, output_mask)
        del poison
        second = run()
        if wrong is None and not all(torch.equal(a, b) for a, b in zip(first, second)):
            return "rejected: two runs differ"
    except Exception as error:  # whatever a kernel raises that does not compile or fit
        return f"cannot run: {type(error).__name__}: {error}".splitlines()[0]
    return None if wrong is None else f"rejected: {wrong}"


# ----- all problems ---------------------------------------------------------------


def tune_problems(problems: dict[tuple[torch.device, GemmKey], int], *, rounds: int = ROUNDS, package=False) -> dict[str, dict]:
    """Tune and write; the entries written. package: into mpkernels/tuned/ as well, for all users of this GPU."""
    _refuse_to_tune(rounds)
    written = {}
    for (device, problem), rows in _progress(problems.items()):
        entries = tune_problem(problem, rows, device, rounds)
        if problem not in entries:
            print(f"tune: {tuned_table.key_to_str(problem)}: no candidate is right", file=sys.stderr)
        named = {tuned_table.key_to_str(p): entry for p, entry in entries.items()}
        for path in [tuned_table.own_file(device), *([tuned_table.packaged_file(device)] if package else [])]:
            if not tuned_table.save(path, device, named):
                reason = cache.untrusted_reason() or "disk full or permission denied"
                print(f"tune: {path} cannot be written: {reason}", file=sys.stderr)
        written |= named
        if device.type == "cuda" and problem in entries:
            _say_unproven(op_of(problem), entries[problem]["backend"], device)
    return written


def _say_unproven(op: Op, backend: str, device: torch.device) -> None:
    """A table decides among what is proven, and proves nothing."""
    if backend != "eager" and backend not in op.choices(op.name, device):
        command = f"python -m mpkernels prove{' --full' if backend == 'triton' else ''}"
        cache.warn_once(
            f"mpkernels: tune found {backend} to be the fastest {op.name}; auto takes it once it is proven: {command}"
        )


def _progress(items: Iterable) -> Iterable:
    """The items behind a progress bar, or a line for each where tqdm is not installed."""
    items = list(items)
    try:
        from tqdm import tqdm
    except ImportError:
        for i, item in enumerate(items):
            print(f"tune: {i + 1} of {len(items)}: {tuned_table.key_to_str(item[0][1])}", file=sys.stderr)
            yield item
        return
    with tqdm(items, desc="tune", unit="problem") as bar:
        for item in bar:
            bar.set_postfix_str(tuned_table.key_to_str(item[0][1]))
            yield item


def shown(entries: dict[str, dict]) -> str:
    """A user-facing table: each problem, its winner, and why the others lost."""
    lines = []
    for name, entry in sorted(entries.items()):
        lines.append(f"{name}: {_winner(entry)}, {entry.get('us', '?')} us")
        lines += [f"    {other}: {reason}" for other, reason in entry.get("lost", {}).items()]
    return "\n".join(map(_printable, lines))


def _winner(entry: dict) -> str:
    tile = entry.get("tile")
    if entry["backend"] != "triton" or tile is None:
        return entry["backend"]
    try:
        return _name(tuple(tile.items()))
    except KeyError:  # of another version of the kernels
        return f"triton {tile}"


def _printable(line: str) -> str:
    """What stands in a file could hold a terminal's control characters."""
    return "".join(c if c.isprintable() else "?" for c in line)


def main(arguments: list[str]) -> int:
    """`python -m mpkernels tune`."""
    parser = argparse.ArgumentParser(prog="python -m mpkernels tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="M,K,N", help="layers to tune; by default a few large ones")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed runs of each candidate")
    parser.add_argument("--package", action="store_true", help="write into mpkernels/tuned/ as well")
    parser.add_argument("--show", action="store_true", help="print the table there is, and tune nothing")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if options.show:
        entries = tuned_table.entries(device)
        print(shown(entries) if entries else f"no table for {tuned_table.name(device)}")
        return 0
    try:
        _refuse_to_tune(options.rounds)
        shapes = [_shape(text) for text in options.shapes or ()] or SHAPES[device.type]
    except ValueError as error:
        parser.error(str(error))
    print(shown(tune_problems(problems_of(shapes, device), rounds=options.rounds, package=options.package)))
    return 0


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--shapes: expected M,K,N, got {text!r}")
    return tuple(map(int, parts))
