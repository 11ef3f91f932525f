# SPDX-License-Identifier: Apache-2.0
"""linear_act's C++ loops on the CPU, those of every instruction set that is here, against fp64."""

import itertools

import pytest
import torch

from mpkernels import _native
from mpkernels.ops.linear_act import Activation
from tests import bounds
from tests.linear_act_cases import bf16, data, f16, f32, f64, same_bits

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason=f"native: {_native.why_not()}")

NONE, RELU = Activation.NONE, Activation.RELU
# dtype of both operands, of the arithmetic
COMBINATIONS = ((f16, f16), (bf16, bf16), (f32, f32), (f32, f16), (f32, bf16), (f16, f32), (bf16, f32))
SHAPES = (
    (1, 1, 1),
    (1, 300, 700),
    (2, 33, 31),
    (3, 17, 64),
    (4, 9, 1000),
    (5, 7, 3),
    (14, 32, 256),
    (29, 65, 257),
    (200, 300, 513),
)


def multiply(a, b, bias, compute, out_dtype, activation=NONE, *, batch_invariant=False, lanes=0):
    out = torch.full((a.shape[0], b.shape[0]), torch.nan).to(out_dtype)
    args = (a, b, bias, compute, activation == RELU, batch_invariant, out, lanes)
    torch.ops.mpkernels_C.linear_act_multiply(*args)
    return out


def is_here(lanes: int) -> bool:
    try:
        multiply(torch.ones(1, 1), torch.ones(1, 1), None, f32, f32, lanes=lanes)
    except RuntimeError as error:
        if f"no vectors of {lanes} fp32" not in str(error):
            raise
        return False
    return True


@pytest.fixture(params=[4, 8, 16], ids=["any CPU", "AVX2", "AVX-512"])
def lanes(request) -> int:
    if request.param != 4 and not is_here(request.param):
        pytest.skip(f"this CPU has no vectors of {request.param} fp32")
    return request.param


def matrix(shape, dtype, generator, transposed=False):
    made = data(shape[::-1] if transposed else shape, dtype, "normal", generator)
    return made.t() if transposed else made


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_linear_act_cpu_matches_reference(combination, lanes, generator):
    dtype, compute = combination
    turns = itertools.cycle(itertools.product((NONE, RELU), (None, f32, f16), (f16, bf16, f32, f64)))
    for shape, transposed in itertools.product(SHAPES, itertools.product((False, True), repeat=2)):
        M, N, K = shape
        activation, bias_dtype, out_dtype = next(turns)
        a, b = matrix((M, K), dtype, generator, transposed[0]), matrix((N, K), dtype, generator, transposed[1])
        bias = None if bias_dtype is None else data((N,), bias_dtype, "normal", generator)
        for batch_invariant in (False, True):
            out = multiply(a, b, bias, compute, out_dtype, activation, batch_invariant=batch_invariant, lanes=lanes)
            bounds.check_forward(out, a, b, bias, activation, compute, random_sign=True)


@pytest.mark.parametrize("K", [300, 4096, 16384])
def test_linear_act_cpu_is_no_worse_than_torch(K, lanes, generator):
    """A few rows beside torch's of as few; a row that is the same among many beside torch's among many.

    MKL with AVX-512 sums the products of a few rows in lanes along K, which is more exact than any GEMM.
    """
    a, b = matrix((64, K), f32, generator), matrix((48, K), f32, generator)
    few = a[:4]
    out = multiply(few, b, None, f32, f32, lanes=lanes)
    bounds.check_not_worse_than(out, few @ b.t(), few, b, None, NONE, f32)
    for rows in (few, a):
        out = multiply(rows, b, None, f32, f32, batch_invariant=True, lanes=lanes)
        bounds.check_not_worse_than(out, (a @ b.t())[: len(rows)], rows, b, None, NONE, f32)


@pytest.mark.parametrize("M", [1, 4, 5, 200])
def test_linear_act_cpu_threads_do_not_matter(M, lanes, generator):
    """Nor do neighbours: a column of out alone has the bits that it has among others."""
    a, b = matrix((M, 700), f16, generator), matrix((600, 700), f16, generator)
    out, before = multiply(a, b, None, f16, f32, lanes=lanes), torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert same_bits(multiply(a, b, None, f16, f32, lanes=lanes), out)
    finally:
        torch.set_num_threads(before)
    assert same_bits(multiply(a, b[:1], None, f16, f32, lanes=lanes), out[:, :1])


def test_linear_act_cpu_instruction_sets_agree_bitwise_where_they_fuse_multiply_and_add(generator):
    """AVX-512 widens what AVX2 does: one chain of sums per element."""
    if not is_here(16):
        pytest.skip("this CPU has no AVX-512")
    a, b = matrix((37, 600), f16, generator), matrix((50, 600), f16, generator)
    assert same_bits(*(multiply(a, b, None, f16, f32, lanes=lanes) for lanes in (8, 16)))


@pytest.mark.parametrize("M", [1, 7])
def test_linear_act_cpu_nonfinite(M, lanes, generator):
    """NaN and inf reach their own elements and no others, past ReLU too; an overflow is inf where it is rounded."""
    a, b = matrix((M, 40), f16, generator), matrix((20, 40), f16, generator)
    b[3, 39], b[5, 0], b[6, 1] = torch.nan, torch.inf, -torch.inf
    a[:, :2] = 1
    out = multiply(a, b, None, f16, f16, RELU, lanes=lanes)
    assert out[:, 3].isnan().all()
    assert (out[:, 5] == torch.inf).all()
    assert (out[:, 6] == 0).all()
    assert out.isnan().sum() == M
    assert (multiply(a * 0 + 60000, b[:1] * 0 + 1, None, f16, f16, lanes=lanes) == torch.inf).all()
    nan = torch.tensor([[0x7F800001]], dtype=torch.int32).view(f32)  # whose payload a rounding to bf16 would carry away
    assert multiply(nan.expand(M, 8).contiguous(), torch.ones(1, 8), None, bf16, f32, lanes=lanes).isnan().all()


def test_linear_act_cpu_empty(lanes):
    for M, N, K in itertools.product((0, 3), repeat=3):
        out = multiply(torch.ones(M, K), torch.ones(N, K), torch.ones(N), f32, f32, lanes=lanes)
        assert torch.equal(out, torch.full((M, N), K + 1.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.ones(2, 5)}, "as large as the product"),
        ({"a": torch.ones(2, 4, dtype=f64)}, "a must be a matrix in the compute dtype or fp32"),
        ({"b": torch.ones(3, 4, dtype=bf16), "compute": f16}, "b must be a matrix in the compute dtype or fp32"),
        ({"b": torch.ones(64).as_strided((3, 4), (16, 2))}, "without gaps"),
        ({"bias": torch.ones(2)}, "bias must be contiguous and as long"),
        ({"lanes": 5}, "no vectors of 5 fp32"),
    ],
)
def test_linear_act_cpu_refuses(change, message):
    """What raw pointers need to be true; users meet the checks of the op before."""
    good = {"a": torch.ones(2, 4), "b": torch.ones(3, 4), "bias": None, "compute": f32, "out_dtype": f32}
    with pytest.raises(RuntimeError, match=message):
        multiply(**good | change)
