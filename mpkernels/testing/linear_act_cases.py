# SPDX-License-Identifier: Apache-2.0
"""Cases of linear_act and its backward: around the edges of tiles, special values, operands that lie oddly in memory."""

import functools
from collections.abc import Iterator

import torch

from mpkernels.ops.linear_act.call import BackwardCall
from mpkernels.ops.linear_act.epilogues import Activation, pack_mask, unpack_mask
from mpkernels.testing import bounds
from mpkernels.testing.case import Case

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
ROWS, COLUMNS = (1, 8, 127, 128, 129, 257, 1000), (8, 72, 264, 520)
UNEVEN = (33, 50, 41)  # which not every kernel takes
FEW = ((33, 50, 40), (1, 8, 72), (129, 72, 264))  # M, N, K
# So many tiles that each SM of a large GPU has several, and so many that it has one: of fprop, dgrad and wgrad.
MANY_TILES = ((16384, 768, 256), (16384, 256, 768), (256, 16384, 768), (1536, 1536, 264), (1536, 264, 1536), (264, 1536, 1536))
KINDS = ("special", "strided", "misaligned")  # besides plain
_SUM = BackwardCall._fields.index("grad_weight_sum")
LARGE = (32776, 65544, 8)  # more than 2^31 outputs


def _shapes(few: bool, full: bool) -> list[tuple[int, int, int]]:
    if few:
        return list(FEW)
    if full:
        return [(M, N, K) for M in ROWS for N in COLUMNS for K in COLUMNS] + [UNEVEN]
    return [(M, N, COLUMNS[(i + j) % len(COLUMNS)]) for i, M in enumerate(ROWS) for j, N in enumerate(COLUMNS)] + [UNEVEN]


def _families(few: bool, full: bool) -> Iterator[tuple[int, tuple[int, int, int], torch.dtype, str]]:
    shapes = _shapes(few, full)
    for i, shape in enumerate(shapes):
        for dtype in (f16, bf16):
            yield i, shape, dtype, "plain"
    for i, shape in enumerate(() if few else MANY_TILES):
        yield i, shape, (f16, bf16)[i % 2], "plain"
    M, N, K = shapes[0] if few else (257, 264, 520)
    for i, kind in enumerate(KINDS):
        for dtype in (f16, bf16):
            yield i, (M, N, K), dtype, kind


def named(M, N, K, dtype, kind) -> str:
    return f"M={M} N={N} K={K} {str(dtype).removeprefix('torch.')} {kind}"


def _matrix(rows: int, columns: int, dtype: torch.dtype, random: torch.Generator, kind: str) -> torch.Tensor:
    values = torch.randn((rows, columns), generator=random, dtype=f32, device="cpu").to(dtype)
    if kind == "special":
        values[0] = torch.nan
        values[rows // 2, columns // 2] = torch.inf
        values[rows - 1] = -0.0
    if kind == "strided":
        return values.t().contiguous().t()
    return values


def vector(length: int, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    return torch.randn((length,), generator=random, dtype=f32, device="cpu").to(dtype)


# ----- forward ---------------------------------------------------------------


def forward(few: bool, full: bool) -> Iterator[Case]:
    for i, (M, N, K), dtype, kind in _families(few, full):
        activation = Activation.NONE if i % 3 == 2 else Activation.RELU
        out_dtype = f32 if i % 4 == 1 else dtype
        bias_dtype = (f32, dtype, None)[i % 3]
        arguments = functools.partial(_forward_arguments, (M, N, K), dtype, out_dtype, bias_dtype, activation, kind)
        yield Case(named(M, N, K, dtype, kind), arguments, _check_forward, call=(dtype, out_dtype, activation, N, K))
    yield from _batch_invariant(few)
    if full:
        arguments = functools.partial(_forward_arguments, LARGE, f16, f16, f32, Activation.RELU, "plain")
        name = named(*LARGE, f16, "of more than 2^31 outputs")
        yield Case(name, arguments, _check_last_rows, call=(f16, f16, Activation.RELU, *LARGE[1:]))


def _batch_invariant(few: bool) -> Iterator[Case]:
    """A row has the same bits alone and among others, in fp32, where no rounding hides another order of the sum."""
    for M, N, K in FEW if few else ((33, 264, 520), (257, 72, 264), (1000, 520, 72), UNEVEN):
        for dtype in (f16, bf16):
            made = functools.partial(_forward_arguments, (M, N, K), dtype, f32, f32, Activation.RELU, "plain")
            arguments = lambda memory, random, made=made: (*made(memory, random), True)
            name, call = named(M, N, K, dtype, "batch_invariant"), (dtype, f32, Activation.RELU, N, K)
            yield Case(name, arguments, _check_forward, call=call, parts=_row_by_row)


def _row_by_row(arguments: tuple) -> Iterator[tuple]:
    x, *others = arguments
    for row in x.split(1):
        yield row, *others


def _forward_arguments(shape, dtype, out_dtype, bias_dtype, activation, kind, memory, random) -> tuple:
    M, N, K = shape
    shift = int(kind == "misaligned")
    x = memory.put(_matrix(M, K, dtype, random, kind), shift=shift)
    weight = memory.put(_matrix(N, K, dtype, random, "plain"), shift=shift)
    bias = None if bias_dtype is None else memory.put(vector(N, bias_dtype, random), shift=shift)
    return x, weight, bias, None, int(activation), dtype, out_dtype, int(activation == Activation.RELU)


def _check_forward(before, after, results, device) -> None:
    x, weight, bias, _, activation, compute_dtype, *_ = before
    out, saved, _ = results
    v = bounds.accumulator_roundoff(device, compute_dtype)
    bounds.check_forward(out, x, weight, bias, activation, compute_dtype, v, random_sign=True)
    check_saved_mask(out, saved)


def check_saved_mask(out: torch.Tensor, saved: torch.Tensor) -> None:
    if saved.numel():
        bits = unpack_mask(saved, saved.shape[1] * 32)
        assert torch.equal(bits[:, : out.shape[1]], ~(out <= 0)), "the mask is not that of the output"
        assert not bits[:, out.shape[1] :].any(), "bits of the mask behind the last column are not 0"


def _check_last_rows(before, after, results, device) -> None:
    x, weight, bias, _, activation, compute_dtype, *_ = before
    v = bounds.accumulator_roundoff(device, compute_dtype)
    for rows in (slice(0, 4), slice(-4, None)):
        bounds.check_forward(results[0][rows], x[rows], weight, bias, activation, compute_dtype, v, random_sign=True)


# ----- backward ---------------------------------------------------------------


def backward(few: bool, full: bool) -> Iterator[Case]:
    for i, (M, N, K), dtype, kind in _families(few, full):
        activation = Activation.NONE if i % 3 == 2 else Activation.RELU
        below = Activation.NONE if i % 4 == 3 else Activation.RELU
        grad_dtype = dtype if i % 2 else f32
        arguments = functools.partial(_backward_arguments, (M, N, K), dtype, grad_dtype, activation, below, kind)
        yield Case(named(M, N, K, dtype, kind), arguments, _check_backward, call=(dtype, dtype, activation, N, K))
    yield from _accumulated(few)


def _accumulated(few: bool) -> Iterator[Case]:
    """The gradient of the weight is added to what is there, which may begin at any element of a larger buffer."""
    shapes = FEW[:1] if few else ((33, 264, 520), (257, 72, 264), (1000, 520, 72), (4099, 128, 128), UNEVEN)
    for i, (M, N, K) in enumerate(shapes):
        for dtype in (f16, bf16):
            made = functools.partial(_backward_arguments, (M, N, K), dtype, f32, Activation.NONE, Activation.NONE, "plain")
            arguments = functools.partial(_with_sum, made, (N, K), i % 2)
            name, call = named(M, N, K, dtype, "accumulated"), (dtype, dtype, Activation.NONE, N, K)
            yield Case(name, arguments, _check_accumulated, written=(_SUM,), call=call)


def _with_sum(made, shape, shift, memory, random) -> tuple:
    return *made(memory, random), memory.put(_matrix(*shape, f32, random, "plain"), shift=shift)


def _check_accumulated(before, after, results, device) -> None:
    assert results[1].numel() == 0, "grad_weight is returned, although it was added"
    grad_out, x, weight, _, _, _, compute_dtype, *_ = before
    v = bounds.accumulator_roundoff(device, compute_dtype)
    bounds.check_backward((results[0], None, results[2]), grad_out, x, weight, None, compute_dtype, v, random_sign=True)
    check_sum(after[_SUM], before[_SUM], grad_out, x, compute_dtype, v)


def check_sum(after, before, grad_z, x, compute_dtype: torch.dtype, acc_roundoff: float) -> None:
    """`before` plus grad_z.T @ x, within the bounds of a product to which a bias is added."""
    operands = grad_z.reshape(-1, grad_z.shape[-1]).t(), x.reshape(-1, x.shape[-1]).t()
    bounds.check_forward(after, *operands, before, Activation.NONE, compute_dtype, acc_roundoff, random_sign=True)


def _backward_arguments(shape, dtype, grad_dtype, activation, below, kind, memory, random) -> tuple:
    M, N, K = shape
    shift = int(kind == "misaligned")
    grad_out = _matrix(M, N, dtype, random, "strided" if kind == "strided" else "plain")
    kept = _matrix(M, N, f32, random, "plain")
    if kind == "special" and activation:  # behind a 0 of the mask: selected, they are gone; multiplied, they are NaN
        grad_out[kept <= 0] = torch.inf
    x = memory.put(_matrix(M, K, dtype, random, "plain"), shift=shift)
    weight = memory.put(_matrix(N, K, dtype, random, "plain"), shift=shift)
    saved = memory.put(pack_mask(kept)) if activation else None
    saved_below = memory.put(pack_mask(_matrix(M, K, f32, random, "plain"))) if below else None
    dtypes = (dtype, grad_dtype, f32)
    return (
        memory.put(grad_out, shift=shift), x, weight, None, saved, int(activation), dtype, *dtypes, [True] * 3,
        saved_below, int(below), f32,
    )  # fmt: skip


def _check_backward(before, after, results, device) -> None:
    grad_out, x, weight, _, saved, _, compute_dtype, *_, saved_below, _, _ = before
    grad_x, grad_weight, grad_bias, grad_bias_below = results
    v = bounds.accumulator_roundoff(device, compute_dtype)
    positive = None if saved is None else unpack_mask(saved, weight.shape[0])
    below = None if saved_below is None else unpack_mask(saved_below, weight.shape[1])
    rest = (grad_out, x, weight, positive, compute_dtype, v)
    bounds.check_backward((None, grad_weight, grad_bias), *rest, random_sign=True)
    bounds.check_backward_below(
        (grad_x, grad_bias_below), grad_out, weight, positive, below, compute_dtype, v, random_sign=True
    )
