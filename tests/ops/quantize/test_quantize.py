# SPDX-License-Identifier: Apache-2.0
"""quantize against ml_dtypes, which shares no code with it, bit for bit, and against its own reference in fp64."""

import functools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import mpkernels as mpk
from mpkernels.ops.quantize import FORMATS, NAN, op, reference
from tests import bounds
from tests.dispatch_count import Counting
from tests.steps import force, targets

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
e4m3, e5m2 = FORMATS
NUMPY = {e4m3: ml_dtypes.float8_e4m3fn, e5m2: ml_dtypes.float8_e5m2}
quantize, dequantize = mpk.functional.quantize, mpk.functional.dequantize


@pytest.fixture(params=targets(op))
def device(request, monkeypatch):
    return force(op, request.param, monkeypatch)


@pytest.fixture(params=FORMATS, ids=["e4m3", "e5m2"])
def dtype(request):
    return request.param


def codes(q: torch.Tensor) -> torch.Tensor:
    return q.cpu().view(torch.uint8)


def by_ml_dtypes(y: torch.Tensor, dtype) -> torch.Tensor:
    """The bits of `y`, fp64 without NaN, cast by ml_dtypes."""
    return torch.from_numpy(y.numpy().astype(NUMPY[dtype]).view(np.uint8))


def check(x, dtype, axis=None) -> None:
    """Scales of the reference, and the bits of x / scale as ml_dtypes rounds it once from fp64."""
    q, scale = quantize(x, dtype, axis)
    x, scale = x.cpu().double(), scale.cpu()
    expected, scales = reference.quantize(x, dtype, axis)
    assert (q.dtype, q.shape, q.is_contiguous(), scale.dtype) == (dtype, x.shape, True, f32)
    assert torch.equal(scale.double().nan_to_num(7), scales.nan_to_num(7))
    finite = ~scale.isnan().expand(x.shape)
    rounded = by_ml_dtypes(torch.where(finite, x / scale.double(), 0.0), dtype)
    assert torch.equal(codes(q), torch.where(finite, rounded, NAN))
    assert torch.equal(q.cpu().double()[finite], expected[finite])


# ----- values ---------------------------------------------------------------


@pytest.mark.parametrize("source", [f16, bf16])
def test_quantize_every_16_bit_number(source, dtype, device):
    """All that are finite, in rows of one exponent each, so that every scale occurs; and all with one scale."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(source)
    x = x[x.isfinite()]
    check(x.to(device), dtype)
    for columns in (1, 2, 128, 1024):
        check(x[: len(x) // columns * columns].view(-1, columns).to(device), dtype, -1)


@pytest.mark.parametrize("source", [f16, bf16])
@pytest.mark.parametrize("exponent", range(-14, 16, 3))
def test_quantize_every_16_bit_number_below(source, exponent, dtype, device):
    """With each of several scales all that it divides, the subnormals of eight bits and what rounds to 0 among them."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(source)
    check(x[x.abs() <= 2.0**exponent].to(device), dtype)


def test_quantize_midpoints(dtype, device):
    """Between any two neighbours, exactly and one unit in the last place beside it, with scales far apart."""
    numbers = torch.arange(256).to(torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    middles = ((numbers[1:] + numbers[:-1]) / 2).float()
    up, down = (torch.nextafter(middles, torch.full_like(middles, way)) for way in (math.inf, -math.inf))
    x = torch.cat([numbers.float(), middles, up, down, torch.tensor([0.0, -0.0])])
    scales = torch.tensor([2.0**k for k in (-117, -40, -1, 0, 1, 60, 110)])
    rows = x * scales[:, None]
    check(rows.to(device), dtype, -1)
    _, scale = quantize(rows.to(device), dtype, -1)
    assert torch.equal(scale.cpu().flatten(), scales)


def test_quantize_random_bits(dtype, device, generator):
    """fp32 numbers of every exponent, the subnormal ones among them."""
    x = torch.randint(-(2**31), 2**31, (512, 129), generator=generator, dtype=torch.int64).to(torch.int32).view(f32)
    x = torch.where(x.isfinite(), x, 1.0)
    near = torch.exp2(torch.randint(-12, 12, (512, 129), generator=generator).float())
    check(x.to(device), dtype)
    for rows in (x, x[:, :1].clamp(-1e30, 1e30) * near, x[:, :2]):
        check(rows.contiguous().to(device), dtype, -1)


def test_quantize_scales_reach_the_largest(dtype, device):
    """amax ends in the upper binade of the format, and 1.75 * 2^k is the last that it holds."""
    ks = torch.exp2(torch.arange(-100, 128).double())
    for factor in (1.0, 1.75, math.nextafter(1.75, 2) + 2**-23, 1.9999998807907104):
        x = (ks * factor).float().unsqueeze(1)
        q, scale = quantize(x.to(device), dtype, -1)
        ratio = x.double() / scale.cpu().double()
        largest = torch.finfo(dtype).max
        assert (ratio <= largest).all()
        assert (2 * ratio > largest).all()
        assert (q.cpu().float() <= largest).all()


@pytest.mark.parametrize("x", [2.0**-149, 2.0**-126, 2.0**-140 * 3, torch.finfo(f32).max])
def test_quantize_at_the_ends_of_fp32(x, dtype, device):
    check(torch.tensor([x, -x, 0.0, x / 2], device=device), dtype)
    _, scale = quantize(torch.tensor([x], device=device), dtype)
    assert 2.0**-126 <= scale.item() <= 2.0**127


def test_quantize_within_its_bound(dtype, device, generator):
    x = torch.randn((64, 100), generator=generator) * torch.exp2(torch.randint(-20, 20, (64, 100), generator=generator).float())
    for axis in (None, 0, 1):
        q, scale = quantize(x.to(device), dtype, axis)
        back = dequantize(q, scale)
        bounds.check_quantized(back, x, scale, dtype)
        wrong = dequantize(q.view(torch.uint8).add(1).view(dtype), scale)
        with pytest.raises(AssertionError, match="bound"):
            bounds.check_quantized(wrong, x, scale, dtype)


def test_quantize_zeros_keep_their_sign(dtype, device):
    q, scale = quantize(torch.tensor([[0.0, -0.0], [-0.0, -0.0]], device=device), dtype, -1)
    assert codes(q).tolist() == [[0, 0x80], [0x80, 0x80]]
    assert scale.tolist() == [[1.0], [1.0]]
    q, _ = quantize(torch.tensor([1.0, -1e-20, 1e-20], device=device), dtype)
    assert codes(q)[1:].tolist() == [0x80, 0]


@pytest.mark.parametrize("source", [f16, bf16, f32])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
def test_quantize_keeps_an_overflow_visible(bad, source, dtype, device):
    """A row that is not finite is NaN, and the others are what they are without it."""
    x = torch.ones((33, 70), dtype=source, device=device)
    x[1, 33] = bad
    q, scale = quantize(x, dtype, -1)
    assert scale.isnan().flatten().tolist() == [i == 1 for i in range(33)]
    assert (codes(q)[1] == NAN).all()
    assert dequantize(q, scale).isnan().any(1).tolist() == [i == 1 for i in range(33)]
    for laid in (x, x.t().contiguous().t()):
        for axis in (0, 1):
            check(laid, dtype, axis)
    q, scale = quantize(x, dtype)
    assert scale.isnan().item()
    assert dequantize(q, scale).isnan().all()


# ----- shapes ---------------------------------------------------------------

SHAPES = [(), (1,), (5,), (1, 1), (3, 1), (1, 3), (33, 65), (2, 3, 5), (4, 1, 7), (2, 3, 4, 5), (1, 2000), (2000, 1), (70, 300)]


@pytest.mark.parametrize("source", [f16, bf16, f32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_shapes(shape, source, dtype, device, generator):
    x = torch.randn(shape, generator=generator).to(source).to(device)
    for axis in (None, *range(-max(len(shape), 1), max(len(shape), 1))):
        check(x, dtype, axis)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3)], ids=str)
def test_quantize_empty(shape, dtype, device):
    for axis in (None, *range(-len(shape), len(shape))):
        q, scale = quantize(torch.empty(shape, device=device), dtype, axis)
        assert (q.shape, q.dtype) == (shape, dtype)
        kept = list(shape)
        if axis is not None:
            kept[axis] = 1
        assert scale.shape == (() if axis is None else tuple(kept))
        assert (scale == 1).all()
        assert dequantize(q, scale).shape == shape


def test_quantize_any_layout(dtype, device, generator):
    whole = torch.randn((12, 10, 14), generator=generator).to(device)
    views = [whole.permute(2, 0, 1), whole[::2, 1:, ::3], whole[0].expand(3, 10, 14), whole[3:, 2:, 1:], whole.flip(0)]
    views.append(torch.complex(whole, whole).conj().imag)
    for x in views:
        for axis in (None, 0, 1, -1):
            check(x, dtype, axis)


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("source", [f16, bf16, f32])
def test_quantize_eager_reads_and_writes_little(source, axis, dtype):
    """x three times, the quotient in fp32 and q: of each number, on a GPU that no kernel was proven on."""
    with FakeTensorMode(), Counting() as counted:
        x = torch.empty((512, 1024), dtype=source, device="cuda")
        op.function("eager")(x, dtype, axis)
    assert counted.bytes_of(x.numel()) == x.numel() * (3 * x.itemsize + 2 * 4 + 3)


def test_quantize_leaves_its_input(dtype, device):
    x = torch.randn(50, device=device)
    before, version = x.clone(), x._version
    q, _ = quantize(x, dtype)
    assert torch.equal(x, before)
    assert x._version == version
    assert not q._is_view()


def test_quantize_default_dtype_and_flushed_subnormals(dtype, device, generator):
    x = torch.randn((9, 33), generator=generator).to(device)
    expected = [t.clone() for t in quantize(x, dtype, -1)]
    torch.set_default_dtype(f64)
    flushes = torch.set_flush_denormal(True)
    try:
        again = quantize(x, dtype, -1)
    finally:
        torch.set_default_dtype(f32)
        torch.set_flush_denormal(False)
    assert flushes or device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    assert torch.equal(codes(again[0]), codes(expected[0]))
    assert torch.equal(again[1], expected[1])


def test_quantize_a_row_does_not_depend_on_others(dtype, device, generator):
    x = torch.randn((40, 70), generator=generator).to(device)
    q, scale = quantize(x, dtype, -1)
    for i in range(0, 40, 13):
        alone = quantize(x[i : i + 1], dtype, -1)
        assert torch.equal(codes(alone[0]), codes(q[i : i + 1]))
        assert torch.equal(alone[1], scale[i : i + 1])


# ----- torch ---------------------------------------------------------------


def test_quantize_is_not_differentiable(dtype):
    """As torch.quantize_per_tensor: neither result requires grad. What the op itself returns says no in backward."""
    x = torch.randn(4, 5, requires_grad=True)
    assert not any(result.requires_grad for result in quantize(x, dtype, -1))
    straight_through = lambda x: (x + (dequantize(*quantize(x, dtype, -1)) - x).detach()).sum()
    straight_through(x).backward()
    assert torch.equal(x.grad, torch.ones(4, 5))
    once = lambda x: torch.func.grad(lambda x: dequantize(*quantize(x, dtype, -1)).square().sum() + x.sum())(x).sum()
    assert torch.equal(torch.func.grad(straight_through)(x.detach()), torch.ones(4, 5))
    assert torch.equal(torch.func.grad(once)(x.detach()), torch.zeros(4, 5))
    _, scale = torch.ops.mpkernels.quantize(x, dtype, -1)
    with pytest.raises(RuntimeError, match="quantize: the op is not differentiable"):
        scale.sum().backward()


def test_dequantize_passes_the_gradient_of_the_scale():
    q, scale = quantize(torch.randn(4, 5), e4m3, -1)
    scale.requires_grad_()
    dequantize(q, scale).sum().backward()
    assert torch.equal(scale.grad, q.float().sum(-1, keepdim=True))


@pytest.mark.parametrize("axis", [None, 0, 1, -1, -2])
def test_quantize_vmap(axis, dtype, device, generator):
    x = torch.randn((6, 5, 4), generator=generator).to(device)
    for in_dim in (0, 1, 2, -1):
        q, scale = torch.func.vmap(lambda one: quantize(one, dtype, axis), in_dims=in_dim)(x)
        each = [quantize(one, dtype, axis) for one in x.unbind(in_dim)]
        assert torch.equal(codes(q), torch.stack([codes(one) for one, _ in each]))
        assert torch.equal(scale, torch.stack([one for _, one in each]))


def test_quantize_vmap_of_numbers(dtype, device):
    x = torch.tensor([1.0, 0.0, math.inf], device=device)
    for axis in (None, 0, -1):
        q, scale = torch.func.vmap(functools.partial(quantize, dtype=dtype, axis=axis))(x)
        assert (q.shape, scale.shape) == ((3,), (3,))
        assert torch.equal(scale.isnan(), torch.tensor([False, False, True], device=device))
    with pytest.raises(IndexError, match=r"range of \[-1, 0\], but got 1"):
        torch.func.vmap(lambda one: quantize(one, dtype, 1))(x)


def test_quantize_compiles(dtype):
    def function(x):
        q, scale = quantize(x, dtype, -1)
        return q, scale, dequantize(q, scale) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 7)
        for ours, theirs in zip(compiled(x), function(x), strict=True):
            assert torch.equal(ours.float(), theirs.float())


def test_quantize_exports(dtype):
    class Model(torch.nn.Module):
        def forward(self, x):
            return dequantize(*quantize(x, dtype))

    x = torch.randn(3, 4)
    program = torch.export.export(Model(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    assert "mpkernels.quantize" in program.graph_module.code
    more = torch.randn(5, 4)
    assert torch.equal(program.module()(more), Model()(more))


# ----- what does not fit ---------------------------------------------------------------

GOOD = torch.ones(2, 3)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((GOOD.double(), e4m3), RuntimeError, "quantize: x must be float16, bfloat16 or float32, got torch.float64"),
        ((GOOD.int(), e4m3), RuntimeError, "got torch.int32"),
        ((GOOD.to(e4m3), e4m3), RuntimeError, "got torch.float8_e4m3fn"),
        ((GOOD.to_sparse(), e4m3), RuntimeError, "x must be a dense strided tensor, got layout torch.sparse_coo"),
        ((GOOD, f16), RuntimeError, "dtype must be float8_e4m3fn or float8_e5m2, got torch.float16"),
        ((GOOD, torch.float8_e4m3fnuz), RuntimeError, "got torch.float8_e4m3fnuz"),
        ((GOOD, e4m3, 2), IndexError, r"axis is out of range \(expected to be in range of \[-2, 1\], but got 2\)"),
        ((GOOD, e4m3, -3), IndexError, "but got -3"),
        ((torch.ones(()), e4m3, 1), IndexError, r"range of \[-1, 0\], but got 1"),
        (([1.0], e4m3), TypeError, "x must be a Tensor, got list"),
        ((GOOD, "e4m3"), TypeError, "dtype must be a torch.dtype, got str"),
        ((GOOD, e4m3, 1.0), TypeError, "axis must be an int or None, got float"),
    ],
)
def test_quantize_raises(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(*arguments)


@pytest.mark.parametrize(
    "q, scale, error, message",
    [
        (GOOD, torch.ones(()), RuntimeError, "dequantize: q must be float8_e4m3fn or float8_e5m2, got torch.float32"),
        (GOOD.to(e4m3), torch.ones((), dtype=f64), RuntimeError, "scale must be float32, got torch.float64"),
        (GOOD.to(e4m3), torch.ones(3), RuntimeError, r"scale must be 0-d, .* got \(3,\) for q of shape \(2, 3\)"),
        (GOOD.to(e4m3), torch.ones(3, 1), RuntimeError, r"got \(3, 1\) for q of shape \(2, 3\)"),
        (GOOD.to(e4m3), 1.0, TypeError, "scale must be a Tensor, got float"),
        (None, torch.ones(()), TypeError, "q must be a Tensor, got NoneType"),
    ],
)
def test_dequantize_raises(q, scale, error, message):
    with pytest.raises(error, match=message):
        dequantize(q, scale)
