# SPDX-License-Identifier: Apache-2.0
"""linear_act's C++ GEMM on the CPU, the micro-kernels of every ISA that this CPU has, against fp64."""

import enum
import itertools

import pytest
import torch

from mpkernels.ops.linear_act import Activation, forward_op
from mpkernels.ops.linear_act.call import ForwardCall
from mpkernels.runtime import native
from tests import bounds
from tests.linear_act_cases import bf16, data, f16, f32, f64, same_bits

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"native: {native.why_not()}")

NONE, RELU = Activation.NONE, Activation.RELU


class Isa(enum.IntEnum):
    """As csrc/linear_act/cpu/isa.h numbers them."""

    AUTO, PORTABLE, PORTABLE_VNNI, AVX2, AVX512, AVX512_BF16, AMX = range(7)


BF16_DOT = (Isa.PORTABLE_VNNI, Isa.AVX512_BF16, Isa.AMX)
# dtype of both operands, compute dtype
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


def multiply(
    a, b, bias, compute, out_dtype, activation=NONE, *, batch_invariant=False, isa=Isa.AUTO, saved=None, scales=(None, None)
):  # fmt: skip
    out = torch.full((a.shape[0], b.shape[0]), torch.nan).to(out_dtype)
    args = (a, b, bias, compute, activation, batch_invariant, out, saved, *scales, isa)
    native.ops.linear_act_multiply(*args)
    return out


def is_supported(isa: Isa) -> bool:
    try:
        multiply(torch.ones(1, 1), torch.ones(1, 1), None, f32, f32, isa=isa)
    except RuntimeError as error:
        if f"does not support ISA {isa:d}" not in str(error):
            raise
        return False
    return True


def supported(isa: Isa) -> Isa:
    """Skips where this CPU lacks it; the portable ones are everywhere."""
    if isa > Isa.PORTABLE_VNNI and not is_supported(isa):
        pytest.skip(f"this CPU has no {isa.name}")
    return isa


@pytest.fixture(params=list(Isa)[1:], ids=lambda isa: isa.name)
def isa(request) -> Isa:
    return supported(request.param)


@pytest.fixture(params=BF16_DOT, ids=lambda isa: isa.name)
def bf16_dot_isa(request) -> Isa:
    return supported(request.param)


def matrix(shape, dtype, generator, transposed=False):
    made = data(shape[::-1] if transposed else shape, dtype, "normal", generator)
    return made.t() if transposed else made


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_linear_act_cpu_matches_reference(combination, isa, generator):
    dtype, compute = combination
    turns = itertools.cycle(itertools.product((NONE, RELU), (None, f32, f16), (f16, bf16, f32, f64)))
    for shape, transposed in itertools.product(SHAPES, itertools.product((False, True), repeat=2)):
        M, N, K = shape
        activation, bias_dtype, out_dtype = next(turns)
        a, b = matrix((M, K), dtype, generator, transposed[0]), matrix((N, K), dtype, generator, transposed[1])
        bias = None if bias_dtype is None else data((N,), bias_dtype, "normal", generator)
        for batch_invariant in (False, True):
            out = multiply(a, b, bias, compute, out_dtype, activation, batch_invariant=batch_invariant, isa=isa)
            bounds.check_forward(out, a, b, bias, activation, compute, random_sign=True)


@pytest.mark.parametrize("K", [300, 4096, 16384])
def test_linear_act_cpu_is_no_worse_than_torch(K, isa, generator):
    """A few rows beside torch's of as few; rows that are the same in any batch beside torch's in a large one.

    MKL with AVX-512 sums the products of a few rows in vectors along K, which is more exact than any GEMM.
    """
    a, b = matrix((64, K), f32, generator), matrix((48, K), f32, generator)
    few = a[:4]
    out = multiply(few, b, None, f32, f32, isa=isa)
    bounds.check_not_worse_than(out, few @ b.t(), few, b, None, NONE, f32)
    out = multiply(a, b, None, f32, f32, batch_invariant=True, isa=isa)
    bounds.check_not_worse_than(out, a @ b.t(), a, b, None, NONE, f32)
    assert same_bits(multiply(few, b, None, f32, f32, batch_invariant=True, isa=isa), out[:4])


@pytest.mark.parametrize("M", [1, 4, 5, 200])
@pytest.mark.parametrize("dtype", [f16, bf16])
def test_linear_act_cpu_threads_do_not_matter(M, dtype, isa, generator):
    """Nor do neighbours: a column of out alone has the bits that it has among others."""
    a, b = matrix((M, 700), dtype, generator), matrix((600, 700), dtype, generator)
    out, before = multiply(a, b, None, dtype, f32, isa=isa), torch.get_num_threads()
    try:
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert same_bits(multiply(a, b, None, dtype, f32, isa=isa), out)
    finally:
        torch.set_num_threads(before)
    assert same_bits(multiply(a, b[:1], None, dtype, f32, isa=isa), out[:, :1])


def test_linear_act_cpu_isas_with_fma_agree_bitwise(generator):
    """AVX-512 only has wider vectors than AVX2: an element is one chain of fused multiply-adds in both."""
    if not is_supported(Isa.AVX512):
        pytest.skip("this CPU has no AVX-512")
    a, b = matrix((37, 600), f16, generator), matrix((50, 600), f16, generator)
    assert same_bits(*(multiply(a, b, None, f16, f32, isa=isa) for isa in (Isa.AVX2, Isa.AVX512)))


@pytest.mark.parametrize(
    "exponents", [(-133, 0), (-126, 0), (0, -126), (-64, -64), (-50, -50), (-133, 60), (60, -133)], ids=str
)
@pytest.mark.parametrize("transposed", list(itertools.product((False, True), repeat=2)), ids=str)
def test_linear_act_cpu_bf16_dot_flushes_nothing(transposed, exponents, bf16_dot_isa, generator):
    """VDPBF16PS and TDPBF16PS flush subnormal operands, products and sums to 0: bound 1 holds all the same.

    Everything in the first k-block is small, and the products of one row cancel; after it, single elements are small.
    """
    a, b = matrix((40, 768), bf16, generator, transposed[0]), matrix((70, 768), bf16, generator, transposed[1])
    small_a, small_b = (2.0**exponent for exponent in exponents)
    a[:, :256] *= small_a
    b[:, :256] *= small_b
    a[7, :256], b[9, :256] = small_a, torch.tensor([small_b, -small_b], dtype=bf16).repeat(128)
    a[3, 300], b[65, 520], a[5, 256:] = small_a, small_b, 0
    for K in (256, 768):
        out = multiply(a[:, :K], b[:, :K], None, bf16, f32, isa=bf16_dot_isa)
        bounds.check_forward(out, a[:, :K], b[:, :K], None, NONE, bf16)


@pytest.mark.parametrize("exponent", range(-132, -95, 3))
def test_linear_act_cpu_bf16_dot_is_not_used_where_it_would_flush(exponent, bf16_dot_isa, generator):
    """Operands of one magnitude, so that the smallest of them bounds all products tightly; half of the sums cancel."""
    a, b = (matrix((rows, 64), bf16, generator).sign() for rows in (40, 70))
    a *= 2.0 ** (exponent // 2) * (1 + torch.randint(0, 128, a.shape, generator=generator) / 128)
    b *= 2.0 ** (exponent - exponent // 2) * (1 + torch.randint(0, 128, b.shape, generator=generator) / 128)
    b[::2, 32:] = -b[::2, :32]
    a[:, 32:] = a[:, :32] * (1 + 2.0**-7)
    assert (a != 0).all()
    out = multiply(a, b, None, bf16, f32, isa=bf16_dot_isa)
    bounds.check_forward(out, a, b, None, NONE, bf16)


@pytest.mark.parametrize("K", [1, 33, 40])
def test_linear_act_cpu_bf16_dot_pads_with_zeros(K, bf16_dot_isa, generator):
    """K that is no multiple of an instruction's, where scratch memory held NaN."""
    nan = torch.full((8, 64), torch.nan, dtype=bf16)
    assert multiply(nan, nan, None, bf16, f32, isa=bf16_dot_isa).isnan().all()
    a, b = matrix((8, K), bf16, generator), matrix((8, K), bf16, generator)
    bounds.check_forward(multiply(a, b, None, bf16, f32, isa=bf16_dot_isa), a, b, None, NONE, bf16)


def test_linear_act_cpu_bf16_dot_is_exact_where_fp32_is(bf16_dot_isa, generator):
    """Small integers, a k-block of zeros, and an odd K."""
    a, b = (torch.randint(-8, 9, (M, 517), generator=generator).to(bf16) for M in (37, 45))
    a[:, :256] = 0
    exact = (a.double() @ b.double().t()).float()
    assert same_bits(multiply(a, b, None, bf16, f32, isa=bf16_dot_isa) + 0.0, exact + 0.0)


def test_linear_act_cpu_bf16_dot_is_not_used_for_batch_invariance(bf16_dot_isa, generator):
    """Whether it is safe depends on the other rows; under batch_invariant a row's bits do not."""
    a, b = matrix((40, 600), bf16, generator), matrix((70, 600), bf16, generator)
    alone = multiply(a[:1], b, None, bf16, f32, batch_invariant=True, isa=bf16_dot_isa)
    a[20] *= 2.0**-130
    assert same_bits(multiply(a, b, None, bf16, f32, batch_invariant=True, isa=bf16_dot_isa)[:1], alone)


@pytest.mark.parametrize("M", [1, 7])
@pytest.mark.parametrize("dtype", [f16, bf16])
def test_linear_act_cpu_nonfinite(M, dtype, isa, generator):
    """NaN and inf reach their own elements and no others, past ReLU too; an overflow is inf where it is rounded."""
    a, b = matrix((M, 40), dtype, generator), matrix((20, 40), dtype, generator)
    b[3, 39], b[5, 0], b[6, 1] = torch.nan, torch.inf, -torch.inf
    a[:, :2] = 1
    out = multiply(a, b, None, dtype, dtype, RELU, isa=isa)
    assert out[:, 3].isnan().all()
    assert (out[:, 5] == torch.inf).all()
    assert (out[:, 6] == 0).all()
    assert out.isnan().sum() == M
    large, one = torch.full((M, 40), torch.finfo(dtype).max, dtype=dtype), torch.ones(1, 40, dtype=dtype)
    assert (multiply(large, one, None, dtype, dtype, isa=isa) == torch.inf).all()
    nan = torch.tensor([[0x7F800001]], dtype=torch.int32).view(f32)  # whose payload a rounding to bf16 would carry away
    assert multiply(nan.expand(M, 8).contiguous(), torch.ones(1, 8), None, bf16, f32, isa=isa).isnan().all()


def test_linear_act_cpu_empty(isa):
    for M, N, K in itertools.product((0, 3), repeat=3):
        out = multiply(torch.ones(M, K), torch.ones(N, K), torch.ones(N), f32, f32, isa=isa)
        assert torch.equal(out, torch.full((M, N), K + 1.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.ones(2, 5)}, "as large as the product"),
        ({"a": torch.ones(2, 4, dtype=f64)}, "a must be a matrix in the compute dtype or fp32"),
        ({"b": torch.ones(3, 4, dtype=bf16), "compute": f16}, "b must be a matrix in the compute dtype or fp32"),
        ({"b": torch.ones(64).as_strided((3, 4), (16, 2))}, "without gaps"),
        ({"bias": torch.ones(2)}, "bias must be contiguous and as long"),
        ({"isa": 99}, "does not support ISA 99"),
    ],
)
def test_linear_act_cpu_refuses(change, message):
    """What raw pointers need to be true; users meet the checks of the op before."""
    good = {"a": torch.ones(2, 4), "b": torch.ones(3, 4), "bias": None, "compute": f32, "out_dtype": f32}
    with pytest.raises(RuntimeError, match=message):
        multiply(**good | change)


@pytest.mark.parametrize("out_dtype", [f32, f16, bf16], ids=str)
@pytest.mark.parametrize("compute", [f32, f16, bf16], ids=str)
@pytest.mark.parametrize("dtype", [f64, f32, f16, bf16], ids=str)
def test_x_is_not_cast_where_no_backward_reads_it(dtype, compute, out_dtype, generator):
    """The products round it as they read it. But for what oneDNN may multiply; to the same bits, with any layout."""
    function = forward_op.kernel("native", torch.device("cpu")).function
    weight, bias = matrix((9, 33), f32, generator), matrix((1, 9), f32, generator)[0]
    for transposed in (False, True):
        x = matrix((7, 33), dtype, generator, transposed)
        call = ForwardCall(x, weight, bias, None, NONE, compute, out_dtype, 0)
        expected, _, kept = function(call)
        got, _, x_compute = function(call._replace(keeps_x=False))
        assert same_bits(got, expected)
        assert (kept is None) == (dtype == compute)
        assert x_compute is None or out_dtype == bf16
