# SPDX-License-Identifier: Apache-2.0
"""Every kernel of linear_act on Hopper at random sizes: 3 roles x tile configs x splits, each against fp64 on the device.

    python -m tests.device.sweep [--sizes N] [--rows FILE]      needs a GPU of compute capability 9.0

Operands are small integers, so that fp32 sums are exact in any order and a result has one right value: it is compared for
equality with the fp64 product, rounded once. Outputs are NaN before and lie between guard bands; operands that are views of a
wider matrix have NaN beside them; every run is repeated for equal bits.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mpkernels.ops.linear_act.sm90 import BLOCK_K, BLOCK_M, SUM_ROWS
from mpkernels.runtime import native

SIZES, MAX_SIZE = 2000, 700  # random sizes, and the largest M, N and K
GUARD = 4096  # bytes on either side of an output
TILES = ((128, False), (192, False), (192, True), (256, False))  # columns, and whether by ping-pong
CLUSTERS, SPLITS = (1, 2), (1, 2, 3, 8)
CONFIGS = list(itertools.product(TILES, CLUSTERS, SPLITS))
FACTS = ("is not the fp64 result rounded", "has other bits the second time", "wrote past an output", "wrote an operand")


class Memory:
    """Outputs between two guard bands: bytes are 0xFF (NaN, -1) inside and 0xA5 in the bands."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: list[torch.Tensor] = []

    def output(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.full((rows * columns * dtype.itemsize + 2 * GUARD,), 0xA5, dtype=torch.uint8, device=self.device)
        self.buffers.append(buffer)
        return buffer[GUARD:-GUARD].fill_(0xFF).view(dtype).view(rows, columns)

    def was_crossed(self) -> torch.Tensor:
        bands = torch.cat([band for buffer in self.buffers for band in (buffer[:GUARD], buffer[-GUARD:])])
        return (bands != 0xA5).any()


@dataclass(frozen=True)
class Problem:
    """x: (M, K), weight: (N, K), grad_z: (M, N) of integers up to 4; mask: of x, int32."""

    x: torch.Tensor
    weight: torch.Tensor
    grad_z: torch.Tensor
    bias: torch.Tensor
    positive: torch.Tensor
    mask: torch.Tensor

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.weight, self.grad_z, self.bias, self.mask


def problem(random: np.random.Generator, device: torch.device, max_size: int) -> Problem:
    M, N, K = int(random.integers(1, max_size + 1)), *(8 * int(random.integers(1, max_size // 8 + 1)) for _ in range(2))
    dtype = (torch.float16, torch.bfloat16)[random.integers(2)]

    def integers(rows: int, columns: int, limit: int = 4) -> torch.Tensor:
        """Half of the time a view of a wider matrix, which is NaN elsewhere."""
        values = torch.randint(-limit, limit + 1, (rows, columns), device=device).to(dtype)
        if random.random() < 0.5:
            return values
        wide = torch.full((rows, columns + 16), torch.nan, dtype=dtype, device=device)
        wide[:, 8:-8] = values
        return wide[:, 8:-8]

    x, weight, grad_z = integers(M, K), integers(N, K), integers(M, N)
    bias = integers(1, N)[0].to((dtype, torch.float32)[random.integers(2)])
    positive = x > 0
    return Problem(x, weight, grad_z, bias, positive, pack(positive))


def pack(positive: torch.Tensor) -> torch.Tensor:
    """Bit j of word i of a row is that of column 32 i + j; bits past the end are 0."""
    rows, columns = positive.shape
    bits = torch.nn.functional.pad(positive, (0, -columns % 32)).view(rows, -1, 32).to(torch.int32)
    return (bits << torch.arange(32, dtype=torch.int32, device=positive.device)).sum(-1, dtype=torch.int32)


def workspace(memory: Memory, splits: int, rows: int, columns: int) -> torch.Tensor:
    """For the parts of a split sum, each of whole tiles."""
    rows = -(-rows // (2 * BLOCK_M)) * 2 * BLOCK_M
    return memory.output(splits * rows, columns, torch.float32).view(splits, rows, columns)


def fprop(ops, p: Problem, memory: Memory, config: tuple[int, int, int, bool], splits: int, dtype: torch.dtype) -> Iterator:
    """Pairs of the result and the expected value."""
    (M, K), N, relu = p.x.shape, p.weight.shape[0], splits % 2 == 1
    out, mask = memory.output(M, N, dtype), memory.output(M, -(-N // 32), torch.int32)
    splits, epilogue = min(splits, -(-K // BLOCK_K)), (p.bias, relu)
    if splits == 1:
        ops.linear_act_fprop(p.x, p.weight, *epilogue, out, mask if relu else None, *config, 1)
    else:
        parts = workspace(memory, splits, M, N)
        ops.linear_act_fprop(p.x, p.weight, None, False, parts.flatten(0, 1), None, *config, splits)
        ops.linear_act_sum(parts[:, :M], out, *epilogue, mask if relu else None)
    exact = p.x.double() @ p.weight.double().t() + p.bias.double()
    exact = exact.relu() if relu else exact
    yield out, exact.to(dtype)
    if relu:
        yield mask, pack(exact > 0)


def dgrad(ops, p: Problem, memory: Memory, config: tuple[int, int, int, bool], splits: int, dtype: torch.dtype) -> Iterator:
    M, K, selects = *p.x.shape, splits % 2 == 1
    out, sums = memory.output(M, K, dtype), memory.output(-(-M // SUM_ROWS), K, torch.float32)
    splits = 1 if selects else min(splits, -(-p.grad_z.shape[1] // BLOCK_K))
    if splits == 1:
        ops.linear_act_dgrad(p.grad_z, p.weight, p.mask if selects else None, out, sums if selects else None, *config, 1)
    else:
        parts = workspace(memory, splits, M, K)
        ops.linear_act_dgrad(p.grad_z, p.weight, None, parts.flatten(0, 1), None, *config, splits)
        ops.linear_act_sum(parts[:, :M], out)
    exact = p.grad_z.double() @ p.weight.double()
    exact = exact * p.positive if selects else exact
    yield out, exact.to(dtype)
    if selects:
        yield sums, torch.nn.functional.pad(exact, (0, 0, 0, -M % SUM_ROWS)).view(-1, SUM_ROWS, K).sum(1).float()


def wgrad(ops, p: Problem, memory: Memory, config: tuple[int, int, int, bool], splits: int, dtype: torch.dtype) -> Iterator:
    (M, N), K = p.grad_z.shape, p.x.shape[1]
    splits = min(splits, -(-M // BLOCK_K))
    exact = p.grad_z.double().t() @ p.x.double()
    if splits == 1:
        out = memory.output(N, K, dtype)
        ops.linear_act_wgrad(p.grad_z, p.x, out, 1, *config)
        yield out, exact.to(dtype)
        return
    parts = workspace(memory, splits, N, K)
    ops.linear_act_wgrad(p.grad_z, p.x, parts.flatten(0, 1), splits, *config)
    yield parts[:, :N].sum(0), exact.float()


ROLES = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def faults(role: Callable, ops, p: Problem, *how) -> torch.Tensor:
    """A flag on the device for each of FACTS."""
    before = [bits(t).clone() for t in p.operands]
    runs, crossed = [], []
    for _ in range(2):
        memory = Memory(p.x.device)
        runs.append(list(role(ops, p, memory, *how)))
        crossed.append(memory.was_crossed())
    wrong = [~(got == right).all() for got, right in runs[0]]
    differ = [(bits(a) != bits(b)).any() for (a, _), (b, _) in zip(*runs, strict=True)]
    written = [(bits(t) != old).any() for t, old in zip(p.operands, before, strict=True)]
    return torch.stack([torch.stack(flags).any() for flags in (wrong, differ, crossed, written)])


def sweep(ops, device: torch.device, sizes: int, max_size: int = MAX_SIZE, blocks: int = 132) -> list[str]:
    """The faults, a line each, of `sizes` random sizes, which are spread over all roles and configs."""
    random, found = np.random.default_rng(0), []
    torch.manual_seed(0)
    for i in range(sizes):
        p = problem(random, device, max_size)
        said, flags = [], []
        for j, (name, role) in enumerate(ROLES.items()):
            (block_n, ping_pong), cluster, splits = CONFIGS[(i + 5 * j) % len(CONFIGS)]
            config = (block_n, cluster, int(random.choice((blocks, 2))), ping_pong)
            dtype = (p.x.dtype, torch.float32)[random.integers(2)]
            tile = f"{block_n}{' ping-pong' * ping_pong}"
            said.append(f"{name} of {sizes_of(p)}, {p.x.dtype} to {dtype}, tile {tile}, cluster {cluster}, splits {splits}")
            flags.append(faults(role, ops, p, config, splits, dtype))
        for what, row in zip(said, torch.stack(flags).tolist(), strict=True):  # one wait for the device a size
            found += [f"{what}: {fact}" for fact, is_so in zip(FACTS, row, strict=True) if is_so]
    return found


def sizes_of(p: Problem) -> str:
    return f"M={p.x.shape[0]} K={p.x.shape[1]} N={p.weight.shape[0]}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, default=SIZES)
    parser.add_argument("--rows", type=Path, help="a file of JSON lines to append the outcome to")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    reason = native.cuda_why_not(device)
    if reason is not None:
        print(f"sweep: native {reason}")
        return 1
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    wrong = sweep(native.ops, device, options.sizes, blocks=blocks)
    print("\n".join(wrong[:50]))
    if options.rows:
        with options.rows.open("a") as file:
            file.write(json.dumps({"part": "sweep", "sizes": options.sizes, "roles": len(ROLES), "wrong": wrong[:50]}) + "\n")
    print(f"{options.sizes} sizes x {len(ROLES)} roles: {len(wrong) or 'nothing'} wrong, run twice for equal bits")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
