# SPDX-License-Identifier: Apache-2.0
"""linear_act of 8-bit operands with scales, by eager and by auto, against exact sums; what is wrong is rejected.

A scaled call is one of bf16 operands `q * scale`, which is exact in bf16, so the bounds are those of that call. Sums of
products of two e4m3 numbers, multiples of 2**-18 up to 2**18, are exact in fp64 up to K = 2**17, whatever the scales of rows.
"""

import contextlib
import math
from fractions import Fraction

import pytest
import torch

import mpkernels as mpk
from mpkernels.ops.linear_act import Activation, scaled_mm
from mpkernels.ops.quantize import reference as quantize_reference
from tests import bounds
from tests.linear_act_cases import bits_of, same_bits

pytestmark = pytest.mark.usefixtures("by_eager_and_auto")

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
NONE, RELU, GELU = Activation.NONE, Activation.RELU, Activation.GELU
SHAPES = ((33, 48, 64), (5, 7, 33), (1, 130, 17), (130, 3, 257), (2, 1, 1), (0, 4, 8), (4, 0, 8), (4, 5, 0))
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # none compares 8-bit tensors
quantize = mpk.functional.quantize
op = torch.ops.mpkernels.linear_act


@pytest.fixture(params=["row", "tensor"])
def scaling(request):
    return request.param


def operand(rows, K, dtype, scaling, generator, spread=4.0):
    """(q, scale) of rows of very different magnitudes, with zeros, outliers and what becomes subnormal."""
    values = torch.randn(rows, K, generator=generator) * torch.randn(rows, K, generator=generator).mul(spread / 2).exp()
    values *= torch.randn(rows, 1, generator=generator).mul(spread).exp()
    if rows > 2:
        values[1] = 0
    if K > 2:
        values[:, K // 2] = 0
        values[-1:, 0] *= 1e4
    return quantize(values, dtype, -1 if scaling == "row" else None)


def call(qx, sx, qw, sw, bias=None, activation=NONE, out_dtype=f32, save=0, **others):
    return op(
        qx, qw, bias, None, int(activation), qx.dtype, out_dtype, save, others.pop("batch_invariant", False),
        x_scale=sx, weight_scale=sw, **others,
    )  # fmt: skip


def exact_products(qx, sx, qw, sw):
    """Of e4m3fn, for K <= 2**17."""
    return qx.double() @ qw.double().T * sx.double() * sw.double().expand(len(qw), 1).T


def decoded(q, scale):
    return (q.float() * scale).to(bf16)


def check(out, qx, sx, qw, sw, bias, activation, random_sign=True):
    v = bounds.accumulator_roundoff(qx.device, bf16)
    bounds.check_forward(out, decoded(qx, sx), decoded(qw, sw), bias, activation, bf16, v, random_sign)


@pytest.mark.parametrize(
    "pair, shape",
    [((e4m3, e4m3), shape) for shape in SHAPES] + [(pair, SHAPES[1]) for pair in ((e5m2, e4m3), (e4m3, e5m2), (e5m2, e5m2))],
    ids=str,
)
def test_scaled_matches_reference(pair, shape, scaling, generator, device):
    M, N, K = shape
    qx, sx = (t.to(device) for t in operand(M, K, pair[0], scaling, generator))
    qw, sw = (t.to(device) for t in operand(N, K, pair[1], scaling, generator))
    bias = torch.randn(N, generator=generator).to(device)
    for i, activation in enumerate(Activation):
        out_dtype = (f32, bf16, f16)[i % 3]
        for out_bias in (None, bias, bias.half())[i % 2 :]:
            out, saved, x_compute = call(qx, sx, qw, sw, out_bias, activation, out_dtype, save=1)
            assert (out.shape, out.dtype, x_compute.numel()) == ((M, N), out_dtype, 0)
            check(out, qx, sx, qw, sw, out_bias, activation)
            if activation == RELU and M:
                assert torch.equal(torch.from_numpy(bits_of(saved, N))[:, :N], ~(out <= 0).cpu())
            elif activation > RELU:
                assert (saved.dtype, saved.shape) == (bf16, (M, N))
                check(saved, qx, sx, qw, sw, out_bias, NONE)


@pytest.mark.parametrize("leading", [(), (3,), (2, 0, 3), (2, 3)])
def test_scaled_leading_dimensions(leading, scaling, generator):
    x = torch.randn(*leading, 24, generator=generator)
    qx, sx = quantize(x, e4m3, -1 if scaling == "row" else None)
    qw, sw = operand(10, 24, e4m3, scaling, generator)
    out = call(qx, sx, qw, sw)[0]
    assert out.shape == (*leading, 10)
    flat = sx.reshape(-1, 1) if sx.dim() else sx
    assert same_bits(out.reshape(-1, 10), call(qx.reshape(-1, 24), flat, qw, sw)[0])


def test_scaled_layouts(generator):
    """As dgrad has its weight, and as slices of more lie."""
    qx, sx = operand(9, 40, e4m3, "row", generator)
    qw, sw = operand(24, 40, e4m3, "row", generator)
    expected = call(qx, sx, qw, sw)[0]
    spread = torch.zeros(9, 80, dtype=torch.uint8)
    spread[:, ::2] = qx.view(torch.uint8)
    for x in (qx.t().contiguous().t(), spread.view(e4m3)[:, ::2]):
        for weight in (qw, qw.t().contiguous().t()):
            for scale in (sw, sw.expand(24, 3)[:, 1:2]):
                check(call(x, sx, weight, scale)[0], qx, sx, qw, sw, None, NONE)
    assert same_bits(call(qx, sx, qw, sw)[0], expected)


@pytest.mark.parametrize("K", [1, 100, 1 << 17])
def test_scaled_sums_that_fit_are_exact(K, scaling, generator):
    """Bit for bit where the sum of magnitudes, in units of the least bit of any product, is below 2**24: no order rounds."""
    numbers = torch.tensor([0.0, 1, -1, 2, -2] if K > 1000 else [0.0, 0.5, -0.5, 1, 1.5, -1.5, 3, -3.5])
    x, w = (numbers[torch.randint(len(numbers), (n, K), generator=generator)] for n in (6, 9))
    x, w = (t * torch.exp2(torch.arange(len(t)) % 7.0 - 3)[:, None] for t in (x, w))
    (qx, sx), (qw, sw) = (quantize(t, e4m3, -1 if scaling == "row" else None) for t in (x, w))
    bias = torch.randn(9, generator=generator)
    exact = exact_products(qx, sx, qw, sw)
    unit = least_bit(qx)[:, None] * least_bit(qw)[None] * sx.double() * sw.double().expand(9, 1).T
    fits = (qx.double().abs() @ qw.double().abs().T) * sx * sw.expand(9, 1).T < 2**24 * unit
    assert fits.all() if K <= 100 else fits.float().mean() > 0.5
    assert torch.equal(call(qx, sx, qw, sw)[0][fits], exact.float()[fits])
    for out_dtype in (f16, bf16):
        assert torch.equal(call(qx, sx, qw, sw, None, NONE, out_dtype)[0][fits], exact.to(out_dtype)[fits])
    with_bias = call(qx, sx, qw, sw, bias)[0]
    assert torch.equal(with_bias[fits], (exact + bias.double()).float()[fits])


def least_bit(q):
    """Of each row of e4m3 numbers, the largest power of two that divides all of them; 2**20 where all are 0."""
    units = (q.double() * 2**9).long()
    return (units & -units).masked_fill(units == 0, 2**29).amin(1).double() / 2**9


@pytest.mark.parametrize("pair", [(e5m2, e4m3), (e5m2, e5m2)], ids=str)
def test_scaled_e5m2_against_integers(pair, generator):
    """Sums that fp64 may not hold, of sampled elements by Python's integers: bound 1, without an oracle that rounds."""
    K = 4096
    qx, sx = operand(20, K, pair[0], "row", generator, spread=2.0)
    qw, sw = operand(30, K, pair[1], "row", generator, spread=2.0)
    out = call(qx, sx, qw, sw)[0]
    units = lambda q: [int(value) for value in (q.double() * 2.0**16).tolist()]
    for m, n in torch.randint(20, (12, 2), generator=generator).tolist():
        products = [a * b for a, b in zip(units(qx[m]), units(qw[n]), strict=True)]
        scale = Fraction(sx[m].item()) * Fraction(sw[n].item()) / 2**32
        exact, magnitude = sum(products) * scale, sum(map(abs, products)) * scale
        allowed = abs(exact) / 2**24 + Fraction(bounds.gamma(K + 2, 2.0**-24)) * magnitude + Fraction(2) ** -149
        assert abs(Fraction(out[m, n].item()) - exact) <= allowed


def test_scaled_not_finite(scaling, generator):
    """A NaN scale, which is what quantize makes of inf and NaN, makes NaN of all that it scales and of nothing else."""
    x, w = torch.randn(6, 32, generator=generator), torch.randn(5, 32, generator=generator)
    x[2, 3], w[4, 1] = math.inf, math.nan
    axis = -1 if scaling == "row" else None
    for activation in Activation:
        (qx, sx), (qw, sw) = quantize(x, e4m3, axis), quantize(w, e4m3, axis)
        out = call(qx, sx, qw, sw, None, activation, save=1)[0]
        expected = torch.zeros(6, 5, dtype=torch.bool)
        expected[2], expected[:, 4] = True, True
        assert torch.equal(out.isnan(), expected if scaling == "row" else torch.ones_like(expected))


def test_scaled_at_the_ends_of_the_scales():
    """acc * x_scale comes first, and is a number of fp32 where the product of both scales is none."""
    scale = lambda k: torch.full((), 2.0**k)
    for value in (448.0, 2.0**-9):
        q = torch.tensor([[value]]).to(e4m3)
        for kx, kw in ((-126, 120), (100, -126), (-126, -30), (-126, -126), (100, 40), (127, 127), (109, 0), (110, 0)):
            expected = torch.tensor(value * value) * 2.0**kx * 2.0**kw
            assert call(q, scale(kx), q, scale(kw))[0].item() == expected.item()


def test_scaled_overflow_of_the_output(generator):
    qx, sx = quantize(torch.full((3, 64), 300.0), e4m3, -1)
    qw, sw = quantize(torch.full((2, 64), 300.0), e4m3, -1)
    assert torch.equal(call(qx, sx, qw, sw, None, NONE, f16)[0], torch.full((3, 2), math.inf, dtype=f16))
    assert call(qx, sx, qw, sw, None, NONE, f32)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [e4m3, e5m2])
def test_scaled_batch_invariant(dtype, scaling, generator):
    qx, sx = operand(70, 200, dtype, scaling, generator)
    qw, sw = operand(90, 200, e4m3, scaling, generator)
    full = call(qx, sx, qw, sw, batch_invariant=True)[0]
    for rows in (slice(0, 1), slice(3, 20), slice(69, 70)):
        alone = call(qx[rows], sx[rows] if sx.dim() else sx, qw, sw, batch_invariant=True)[0]
        assert same_bits(alone, full[rows])


# ----- what is wrong ---------------------------------------------------------------


def rejects(wrong, *args, **kwargs):
    with pytest.raises(AssertionError, match="bound"):
        check(wrong, *args, **kwargs)


def test_scaled_bounds_reject_a_bias_after_rounding(generator):
    qx, sx = operand(40, 256, e4m3, "row", generator, spread=1.0)
    qw, sw = operand(50, 256, e4m3, "row", generator, spread=1.0)
    bias = torch.randn(50, generator=generator)
    acc = exact_products(qx, sx, qw, sw).float()
    for dtype in (f16, bf16):
        check((acc + bias).to(dtype), qx, sx, qw, sw, bias, NONE)
        rejects((acc.to(dtype).float() + bias).to(dtype), qx, sx, qw, sw, bias, NONE)


def test_scaled_bounds_reject_sums_in_14_bits(generator):
    """As tensor cores of sm_89 and sm_90 sum where nothing is moved to fp32 on the way."""
    qx, sx = operand(20, 512, e4m3, "row", generator, spread=1.0)
    qw, sw = operand(30, 512, e4m3, "row", generator, spread=1.0)
    acc = torch.zeros(20, 30)
    for k in range(512):
        exact = acc + torch.outer(qx[:, k].float(), qw[:, k].float())
        acc = (exact.view(torch.int32) & ~0x3FF).view(f32)
    rejects(acc * sx * sw.T, qx, sx, qw, sw, None, NONE)


def test_layer_bounds_reject_other_formats_and_scales(generator):
    """Of sums so short that no error of one number hides behind another's: the operands as they were before eight bits."""
    x, w = torch.randn(200, 2, generator=generator), torch.randn(100, 2, generator=generator)

    def layer(dtype, quantized):
        (qx, sx), (qw, sw) = (quantized(t, dtype) for t in (x, w))
        return call(qx, sx, qw, sw)[0]

    def saturating(t, dtype):
        return t.clamp(-448, 448).to(dtype), torch.ones(())

    def not_a_power_of_two(t, dtype):
        scale = t.abs().amax(-1, keepdim=True) / 448
        return (t / scale).to(dtype), scale

    sound = lambda t, dtype: quantize(t, dtype, -1)
    bounds.check_quantized_product(layer(e4m3, sound), x, w, e4m3)
    with pytest.raises(AssertionError, match="bound of"):
        bounds.check_quantized_product(layer(e5m2, sound), x, w, e4m3)
    x[3, 1], expected = math.inf, torch.zeros(200, dtype=torch.bool)
    expected[3] = True
    assert torch.equal(layer(e4m3, sound).isnan().any(1), expected)
    assert not torch.equal(layer(e4m3, saturating).isnan().any(1), expected)
    for t in (w, w * 1000):
        _, scales = quantize_reference.quantize(t, e4m3, -1)
        assert torch.equal(sound(t, e4m3)[1].double(), scales)
        assert not torch.equal(not_a_power_of_two(t, e4m3)[1].double(), scales)


# ----- calls that do not fit ---------------------------------------------------------------


def scaled(**changed):
    qx, sx = quantize(torch.ones(3, 8), e4m3, -1)
    qw, sw = quantize(torch.ones(5, 8), e4m3, -1)
    arguments = dict(
        x=qx, weight=qw, bias=torch.ones(5), weight_copy=None, activation=0, compute_dtype=e4m3, out_dtype=f32, save=0,
        x_scale=sx, weight_scale=sw,
    )  # fmt: skip
    return op(**arguments | changed)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x_scale": None}, "weight_scale is given, x_scale is not"),
        ({"weight_scale": None}, "x_scale is given, weight_scale is not"),
        ({"x_scale": None, "weight_scale": None}, "x must be float16.* got torch.float8_e4m3fn, which needs a scale"),
        ({"x": torch.ones(3, 8)}, "x must be float8_e4m3fn or float8_e5m2, got torch.float32"),
        ({"weight": torch.ones(5, 8)}, "weight must be float8"),
        ({"weight": torch.ones(1, 5, 8).to(e4m3)}, r"weight must have shape \(N, K\), got \(1, 5, 8\)"),
        ({"compute_dtype": bf16}, "compute_dtype must be that of an x with a scale"),
        ({"compute_dtype": e5m2}, "compute_dtype must be that of an x with a scale"),
        ({"out_dtype": e4m3}, "out_dtype must be float16, bfloat16, float32 or float64, got torch.float8_e4m3fn"),
        ({"x_scale": torch.ones(3)}, r"x_scale must have shape \(3, 1\) or \(\), got \(3,\)"),
        ({"weight_scale": torch.ones(1, 8)}, r"weight_scale must have shape \(5, 1\) or \(\)"),
        ({"x_scale": torch.ones(3, 1, dtype=bf16)}, "x_scale must be float32, got torch.bfloat16"),
        ({"x_scale": torch.ones(3, 1, device="meta")}, "x is on cpu but x_scale is on meta"),
        ({"bias": torch.ones(5).to(e4m3)}, "bias must be float16"),
        ({"bias": torch.ones(4)}, "bias must have shape"),
        ({"weight_copy": torch.ones(5, 8, dtype=bf16)}, "a weight with a scale has no weight_copy"),
        ({"activation_grad_fused": True}, "no fused backward"),
        ({"prev_bias": torch.ones(8)}, "no fused backward"),
        ({"activation": 9}, "activation must be one of"),
        ({"save": 2}, "save must be 0 or 1"),
    ],
)
def test_scaled_refuses(changed, message):
    with pytest.raises(RuntimeError, match=message):
        scaled(**changed)


def test_scaled_has_no_backward():
    out = scaled(bias=torch.ones(5, requires_grad=True))[0]
    with pytest.raises(RuntimeError, match="a call with scales is not differentiable"):
        out.sum().backward()


def test_scaled_is_as_its_fake(scaling, generator):
    qx, sx = operand(6, 32, e4m3, scaling, generator)
    qw, sw = operand(5, 32, e4m3, scaling, generator)
    for activation in (NONE, RELU, GELU):
        arguments = (qx, qw, torch.ones(5), None, int(activation), e4m3, bf16, 1)
        torch.library.opcheck(op, arguments, {"x_scale": sx, "weight_scale": sw}, test_utils=CHECKS)
    compiled = torch.compile(lambda *t: call(*t)[0], backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(qx, sx, qw, sw), call(qx, sx, qw, sw)[0])


def test_scaled_under_vmap(scaling, generator):
    x = torch.randn(4, 6, 32, generator=generator)
    qw, sw = operand(5, 32, e4m3, scaling, generator)
    qx, sx = quantize(x, e4m3, -1) if scaling == "row" else torch.func.vmap(lambda t: quantize(t, e4m3))(x)
    out = torch.func.vmap(lambda q, s: call(q, s, qw, sw)[0])(qx, sx)
    assert same_bits(out, torch.stack([call(q, s, qw, sw)[0] for q, s in zip(qx, sx, strict=True)]))


# ----- torch's own product in eight bits, of GPUs, which torch emulates on a CPU --------------------------------------------


def whole_numbers(rows, columns, dtype, generator):
    return torch.randint(-4, 5, (rows, columns), generator=generator).float().to(dtype)


@pytest.mark.skipif(not scaled_mm._is_served(torch.device("cpu"), e4m3, e4m3), reason="this torch has no scaled_mm on a CPU")
def test_scaled_mm_multiplies_as_it_lies(generator, device):
    a, b = whole_numbers(7, 32, e4m3, generator).to(device), whole_numbers(48, 32, e4m3, generator).to(device)
    odd = torch.cat([a.flatten()[:1], a.flatten()])[1:].view(a.shape)
    for x in (a, a.t().contiguous().t(), odd):
        for weight in (b, b.t().contiguous().t()):
            out = scaled_mm.multiply(x, weight.t())
            assert out.dtype == f32
            assert torch.equal(out, a.float() @ b.float().t())


@pytest.mark.parametrize("shape, served", [((7, 48, 33), True), ((7, 40, 32), True), ((0, 48, 32), True), ((7, 48, 32), False)])
def test_scaled_mm_decodes_what_is_not_served(shape, served, monkeypatch, generator):
    """bf16 holds both formats; torch has that product with an fp32 result on GPUs alone."""
    (M, N, K), seen = shape, []
    monkeypatch.setattr(scaled_mm, "_is_served", lambda *_: served)
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out_dtype: seen.append((a.dtype, b.dtype)) or a.to(out_dtype) @ b.to(out_dtype)
    )
    a, b = whole_numbers(M, K, e5m2, generator), whole_numbers(N, K, e4m3, generator)
    assert torch.equal(scaled_mm.multiply(a, b.t()), a.float() @ b.float().t())
    assert seen == [(bf16, bf16)]


@pytest.mark.parametrize(
    ("error", "is_of_the_formats"),
    [
        (ValueError("Invalid scaling configuration"), True),
        (NotImplementedError("no Float8_e5m2 there"), True),
        (RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`"), True),
        (torch.OutOfMemoryError("2 MB"), False),
        (torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
    ],
)
def test_scaled_mm_is_tried_again_after_what_passes(error, is_of_the_formats, monkeypatch):
    """A GPU without memory at the first call would leave eight bits for good, and say nothing."""

    def fails(*_):
        raise error

    scaled_mm._is_served.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(scaled_mm, "_scaled_mm", fails)
        with contextlib.nullcontext() if is_of_the_formats else pytest.raises(type(error)):
            assert not scaled_mm._is_served(torch.device("cpu"), e4m3, e4m3)
    monkeypatch.setattr(scaled_mm, "_scaled_mm", lambda *_: None)
    assert scaled_mm._is_served(torch.device("cpu"), e4m3, e4m3) != is_of_the_formats
    scaled_mm._is_served.cache_clear()
