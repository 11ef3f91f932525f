# SPDX-License-Identifier: Apache-2.0
"""linear_act's C++ GEMM on the CPU with 8-bit operands and scales, the micro-kernels of every ISA that this CPU has."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from mpkernels.ops.linear_act import Activation
from mpkernels.runtime import native
from tests import bounds
from tests.linear_act_cases import bf16, f16, f32, f64, same_bits
from tests.ops.linear_act.test_cpu import SHAPES, bf16_dot_isa, isa, multiply

__all__ = ["bf16_dot_isa", "isa"]

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"native: {native.why_not()}")

e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
ORACLES = {e4m3: ml_dtypes.float8_e4m3fn, e5m2: ml_dtypes.float8_e5m2}
PAIRS = ((e4m3, e4m3), (e5m2, e4m3), (e4m3, e5m2), (e5m2, e5m2))
NONE, RELU, GELU = Activation.NONE, Activation.RELU, Activation.GELU


def operand(rows, K, dtype, generator, transposed=False):
    """Numbers of all exponents that do not make sums overflow, subnormal ones too, and a power of two for each row."""
    exponents = torch.randint(-8, 6, (rows, K), generator=generator)
    q = (torch.randn((rows, K), generator=generator) * torch.exp2(exponents)).to(dtype)
    if transposed:
        q = q.view(torch.uint8).t().contiguous().t().view(dtype)
    return q, torch.exp2(torch.randint(-20, 20, (rows,), generator=generator).float())


def decoded(q, scale):
    return (q.float() * scale[:, None]).to(bf16)  # exact


@pytest.mark.parametrize("dtype", ORACLES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_linear_act_cpu_reads_every_8_bit_float(batch_invariant, dtype, isa):
    """Times a 1, beside zeros and alone, as a row and as a column of either operand."""
    q = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    exact = torch.from_numpy(q.numpy().view(ORACLES[dtype]).astype(np.float32))
    one = torch.ones(1, 1).to(dtype)
    columns = q.view(dtype)[:, None]
    for out in (multiply(columns, one, None, dtype, f32, batch_invariant=batch_invariant, isa=isa),
                multiply(one, columns, None, dtype, f32, batch_invariant=batch_invariant, isa=isa).t()):  # fmt: skip
        assert torch.equal(out[:, 0].nan_to_num(7), exact.nan_to_num(7))
    finite = q[exact.isfinite()]
    finite = torch.cat([finite, finite.new_zeros(-len(finite) % 32)]).view(-1, 32)
    expected = torch.from_numpy(finite.numpy().view(ORACLES[dtype]).astype(np.float32))
    eye = torch.eye(32).to(dtype)
    for matrix in (finite, finite.t().contiguous().t()):
        out = multiply(matrix.view(dtype), eye, None, dtype, f32, batch_invariant=batch_invariant, isa=isa)
        assert torch.equal(out, expected)
        out = multiply(eye, matrix.view(dtype), None, dtype, f32, batch_invariant=batch_invariant, isa=isa)
        assert torch.equal(out.t(), expected)
        out = multiply(eye[:3], matrix.view(dtype), None, dtype, f32, batch_invariant=batch_invariant, isa=isa)
        assert torch.equal(out.t(), expected[:, :3])


@pytest.mark.parametrize("dtype", ORACLES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_linear_act_cpu_reads_8_bit_nans_among_numbers(batch_invariant, dtype, isa):
    """Eight at a time and one at a time, in rows and in columns: in their own rows and columns alone."""
    q = torch.full((40, 43), 0x38, dtype=torch.uint8)  # 1 or 0.5
    q[3, 5], q[17, 42], q[39, 0] = 0x7F, 0xFF, 0x7F
    expected = torch.zeros(40, dtype=torch.bool)
    expected[[3, 17, 39]] = True
    other = torch.ones(9, 43).to(dtype)
    for matrix in (q.view(dtype), q.t().contiguous().t().view(dtype)):
        for M in (3, 9):
            out = multiply(matrix, other[:M], None, dtype, f32, batch_invariant=batch_invariant, isa=isa)
            assert torch.equal(out.isnan(), expected[:, None].expand(40, M))
            out = multiply(other[:M], matrix, None, dtype, f32, batch_invariant=batch_invariant, isa=isa)
            assert torch.equal(out.isnan(), expected.expand(M, 40))


def test_linear_act_cpu_with_scales_matches_reference(isa, generator):
    """A call of bf16 operands `q * scale`, which are exact."""
    turns = itertools.cycle(itertools.product((NONE, RELU, GELU), (None, f32, f16), PAIRS))
    out_dtypes = itertools.cycle((f16, bf16, f32, f64, f32))
    for shape, transposed in itertools.product(SHAPES, itertools.product((False, True), repeat=2)):
        M, N, K = shape
        (activation, bias_dtype, pair), out_dtype = next(turns), next(out_dtypes)
        a, a_scale = operand(M, K, pair[0], generator, transposed[0])
        b, b_scale = operand(N, K, pair[1], generator, transposed[1])
        bias = None if bias_dtype is None else torch.randn(N, generator=generator).to(bias_dtype)
        saved = torch.full((M, N), torch.nan, dtype=bf16) if activation == GELU else None
        operands = (decoded(a, a_scale), decoded(b, b_scale), bias)
        for batch_invariant in (False, True):
            out = multiply(
                a, b, bias, pair[0], out_dtype, activation,
                batch_invariant=batch_invariant, isa=isa, saved=saved, scales=(a_scale, b_scale),
            )  # fmt: skip
            bounds.check_forward(out, *operands, activation, bf16, random_sign=True)
            if saved is not None:
                bounds.check_forward(saved, *operands, NONE, bf16, random_sign=True)


@pytest.mark.parametrize("M", [2, 37])
def test_linear_act_cpu_with_scales_is_exact_where_fp32_is(M, isa, generator):
    """Small integers, scales from end to end, an odd K; the scale of a comes first."""
    a, b = (torch.randint(-8, 9, (rows, 517), generator=generator) for rows in (M, 45))
    acc = a.double() @ b.double().t()
    a_scale, b_scale = torch.exp2(torch.arange(M) % 90 - 45.0), torch.exp2(torch.arange(45) % 60 - 60.0)
    a_scale[0], b_scale[0] = 2.0**120, 2.0**-126
    a, b = a.float().to(e4m3), b.float().to(e4m3)
    out = multiply(a, b, None, e4m3, f32, isa=isa, scales=(a_scale, b_scale))
    expected = (acc.float() * a_scale[:, None]) * b_scale
    assert same_bits(out + 0.0, expected + 0.0)


def test_linear_act_cpu_nan_scales_reach_their_rows_and_columns(isa, generator):
    a, a_scale = operand(20, 40, e4m3, generator)
    b, b_scale = operand(35, 40, e4m3, generator)
    sound = multiply(a, b, None, e4m3, f32, RELU, isa=isa, scales=(a_scale, b_scale))
    a_scale[3], b_scale[7] = torch.nan, torch.nan
    out = multiply(a, b, None, e4m3, f32, RELU, isa=isa, scales=(a_scale, b_scale))
    expected = torch.zeros(20, 35, dtype=torch.bool)
    expected[3], expected[:, 7] = True, True
    assert torch.equal(out.isnan(), expected)
    assert same_bits(out[~expected], sound[~expected])


def test_linear_act_cpu_scales_are_of_the_whole_sum(generator):
    """Of many k-blocks, and of more columns and rows than a block has."""
    a, a_scale = operand(300, 700, e4m3, generator)
    b, b_scale = operand(600, 700, e4m3, generator)
    out = multiply(a, b, None, e4m3, f32, scales=(a_scale, b_scale))
    bounds.check_forward(out, decoded(a, a_scale), decoded(b, b_scale), None, NONE, bf16, random_sign=True)
    plain = multiply(a, b, None, e4m3, f32)
    assert same_bits(out, plain * a_scale[:, None] * b_scale)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scales": (torch.ones(2), None)}, "both operands have scales or neither has"),
        ({"scales": (torch.ones(3), torch.ones(3))}, "as many as rows of an operand"),
        ({"scales": (torch.ones(2), torch.ones(6)[::2])}, "scales must be contiguous"),
        ({"scales": (torch.ones(2), torch.ones(3, dtype=f64))}, "scales must be contiguous, fp32"),
        ({"b": torch.ones(3, 4)}, "b must be a matrix"),
        ({"compute": f32}, "must be a matrix in the compute dtype"),
    ],
)
def test_linear_act_cpu_refuses_scales(change, message):
    q = torch.ones(3, 4).to(e4m3)
    good = {"a": q[:2], "b": q, "bias": None, "compute": e4m3, "out_dtype": f32, "scales": (torch.ones(2), torch.ones(3))}
    with pytest.raises(RuntimeError, match=message):
        multiply(**good | change)
