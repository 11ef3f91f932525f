# SPDX-License-Identifier: Apache-2.0
"""linear_act and linear_act_backward, by eager and by auto, against fp64: rounding, exact cases, mask, non-finite values."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpkernels.ops.linear_act.epilogues import Activation, acc_dtype
from tests import bounds
from tests.levels import each_once
from tests.linear_act_cases import (
    DTYPES,
    LAYOUTS,
    Case,
    Dtypes,
    backward,
    bf16,
    bits_of,
    data,
    f16,
    f32,
    f64,
    fixed_cases,
    forward,
    generated_case,
    run,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("by_eager_and_auto")

NONE, RELU = Activation.NONE, Activation.RELU
by_dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
sixteen_bits = pytest.mark.parametrize("dtype", [f16, bf16], ids=["fp16", "bf16"])


# ----- against fp64 ---------------------------------------------------------------


@by_dtypes
@pytest.mark.parametrize("activation", Activation)
def test_linear_act_matches_reference(dtypes, activation, generator, device):
    for shape in ((96, 80, 64), (7, 129, 300), (130, 3, 257)):
        for save, copy, bias in ((0, False, True), (1, True, False)):
            run(Case(*shape, dtypes, bias=bias, activation=activation, save=save, copy=copy), generator, device)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 16, 17, 32, 33, 65])
def test_linear_act_odd_shapes(rows, generator, device):
    for case in fixed_cases(rows):
        run_named(case, generator, device)


def seed(n: int):
    """Generated cases: a few in every run, more in the sweep, most before a release."""
    return pytest.param(n, marks=() if n < 6 else pytest.mark.sweep if n < 26 else pytest.mark.release)


@pytest.mark.parametrize("seed", [seed(n) for n in range(200)])
def test_linear_act_generated_shapes(seed, generator, device):
    random = np.random.default_rng(seed)
    for _ in range(100):
        run_named(generated_case(random), generator, device)


@pytest.mark.parametrize("name", ["float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "mixed_float32 inside"])
def test_linear_act_long_sums(name, generator, device):
    for shape in ((5, 6, 16384), (6, 16384, 5), (16384, 5, 6)):
        run(Case(*shape, DTYPES[name]), generator, device)


@pytest.mark.sweep
@by_dtypes
def test_linear_act_large_shapes(dtypes, generator, device):
    shapes = ((512, 640, 1024), (48, 48, 16384)), ((257, 129, 8191), (64, 4096, 1023))  # half of the dtypes each
    chosen = shapes[list(DTYPES.values()).index(dtypes) % 2]
    if dtypes.compute == f64:
        chosen = ((64, 80, 1024), (17, 33, 8191))  # longdouble products are slow
    for shape in chosen:
        run(Case(*shape, dtypes), generator, device)


def run_named(case, generator, device):
    """`run`, with the case in the message of what it raises."""
    try:
        run(case, generator, device)
    except Exception as error:
        raise AssertionError(f"{case}: {error}") from error


@sixteen_bits
@pytest.mark.parametrize("K", [1, 64, 1000, 1024])
def test_linear_act_correctly_rounded(dtype, K, generator):
    dtypes = Dtypes(dtype, f32, dtype, dtype, f32)
    x, weight, bias, _ = Case(256, 300, K, dtypes).tensors(generator)
    out = forward(x, weight, bias, dtypes, NONE)[0]
    bounds.check_correctly_rounded(out, x, weight, bias, NONE, dtype)


@pytest.mark.parametrize("dtype", [f16, bf16, f32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("activation", [NONE, RELU])
def test_linear_act_not_worse_than_torch(dtype, activation, generator, device):
    dtypes = Dtypes(dtype, dtype, dtype, dtype, dtype)
    for K in (31, 256, 1024):
        x, weight, bias, grad_out = Case(64, 96, K, dtypes).tensors(generator, device)
        out, saved, _ = forward(x, weight, bias, dtypes, activation)
        torchs = F.linear(x, weight, bias)
        torchs = torchs.relu() if activation else torchs
        bounds.check_not_worse_than(out, torchs, x, weight, bias, activation, dtype)
        grad_x = backward(grad_out, x, weight, saved, dtypes, NONE)[0]
        bounds.check_not_worse_than(grad_x, grad_out @ weight, grad_out, weight.T, None, NONE, dtype)


# ----- exact cases ---------------------------------------------------------------


@by_dtypes
def test_linear_act_small_integers_are_exact(dtypes, generator, device):
    integers = [torch.randint(-4, 5, s, generator=generator) for s in ((33, 1000), (45, 1000), (45,), (33, 45))]
    z = integers[0] @ integers[1].T + integers[2]
    kinds = (dtypes.x, dtypes.weight, dtypes.weight, dtypes.out)
    x, weight, bias, grad_out = (i.to(device, dtype) for i, dtype in zip(integers, kinds, strict=True))
    out, saved, x_compute = forward(x, weight, bias, dtypes)
    assert_rounds_to(out, z.relu())
    grads = backward(grad_out, x_compute if x_compute.numel() else x, weight, saved, dtypes)
    grad_z = torch.where(z > 0, integers[3], 0)
    for grad, expected in zip(grads, (grad_z @ integers[1], grad_z.T @ integers[0], grad_z.sum(0)), strict=True):
        assert_rounds_to(grad, expected)


def assert_rounds_to(tensor, integers):
    expected = bounds.rounded(integers.double().numpy(), tensor.dtype)
    np.testing.assert_array_equal(tensor.cpu().double().numpy(), expected)


@by_dtypes
@pytest.mark.parametrize("activation", [NONE, RELU])
def test_linear_act_powers_of_two_scale_exactly(dtypes, activation, generator, device):
    x, weight, _, _ = Case(33, 47, 129, dtypes, distribution="uniform").tensors(generator, device)
    x, weight = (t + torch.where(t < 0, -0.5, 0.5).to(t.dtype) for t in (x, weight))  # no subnormals when they are rounded
    out = forward(x, weight, None, dtypes, activation)[0]
    assert same_bits(forward(x * 16, weight, None, dtypes, activation)[0], out * 16)
    assert same_bits(forward(x, weight * 8, None, dtypes, activation)[0], out * 8)


@by_dtypes
def test_linear_act_identity_weight_returns_x(dtypes, generator, device):
    x = data((37, 65), dtypes.compute, "normal", generator).to(device, dtypes.x)
    weight = torch.eye(65, dtype=dtypes.weight, device=device)
    assert torch.equal(forward(x, weight, None, dtypes, NONE)[0].double(), x.to(dtypes.out).double())


@by_dtypes
def test_linear_act_permuted_rows(dtypes, generator, device):
    if dtypes.compute == f64 and device.type == "cpu":
        pytest.skip("MKL's fp64 GEMM gives a row other bits at another place")
    x, weight, bias, _ = Case(61, 47, 129, dtypes).tensors(generator, device)
    order = torch.randperm(61, generator=generator).to(device)
    assert same_bits(forward(x[order], weight, bias, dtypes)[0], forward(x, weight, bias, dtypes)[0][order])


@pytest.mark.parametrize("dtype", [f16, bf16, f32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("K", [0, 5])
def test_linear_act_bias_is_not_rounded_to_compute(dtype, K, device):
    """fp16 would make 1 + 2**-13 a 1, and 1e5 an inf."""
    bias = torch.tensor([1 + 2.0**-13, 1e5, -3e-9, 1 + 2.0**-23], device=device)
    dtypes = Dtypes(dtype, f32, dtype, f32, f32)
    out = forward(torch.zeros(2, K, dtype=dtype, device=device), torch.ones(4, K, device=device), bias, dtypes, NONE)[0]
    assert torch.equal(out, bias.expand(2, 4))


@sixteen_bits
def test_linear_act_small_weight_gradient_arrives(dtype, device):
    """1e-8 is less than half of fp16's least subnormal: it must come from the accumulator."""
    dtypes = Dtypes(dtype, f32, dtype, dtype, f32)
    small = torch.full((1, 1), 1e-4, dtype=dtype, device=device)
    weight = torch.ones(1, 1, device=device)
    _, grad_weight, _ = backward(small, small, weight, None, dtypes, NONE)
    assert grad_weight.dtype == f32
    assert torch.equal(grad_weight, small.float() * small.float())
    grads = [backward(small, small, weight, None, Dtypes(dtype, f32, dtype, dtype, g), NONE)[1] for g in (f16, f64)]
    assert grads[0].item() == 0
    assert grads[1].item() == grad_weight.item() != 0


def test_linear_act_small_unrounded_gradients_sum_into_grad_bias(device):
    """grad_z is rounded for the products only: 1e-8 in fp32 is 0 in fp16 and still moves the bias."""
    dtypes = Dtypes(f32, f32, f16, f32, f32)
    grad_out = torch.full((64, 1), 1e-8, device=device)
    x = torch.ones(64, 1, dtype=f16, device=device)
    _, grad_weight, grad_bias = backward(grad_out, x, torch.ones(1, 1, device=device), None, dtypes, NONE)
    assert grad_weight.item() == 0
    bounds.check_backward((None, None, grad_bias), grad_out, x, torch.ones(1, 1), None, f16)


@pytest.mark.parametrize("compute", [f16, bf16], ids=["fp16", "bf16"])
def test_linear_act_double_operands_are_rounded_once(compute, device):
    """Just above the middle between two 16-bit numbers; fp32 on the way makes it the middle, and that goes to even."""
    above_middle = 1 + float(bounds.unit_roundoff(compute)) + 2.0**-40
    expected = 1 + 2 * float(bounds.unit_roundoff(compute))
    one = torch.ones(1, 1, dtype=f64, device=device)
    dtypes = Dtypes(f64, f64, compute, f64, f64)
    for x, weight in ((one * above_middle, one), (one, one * above_middle)):
        assert forward(x, weight, None, dtypes, NONE)[0].item() == expected
    assert forward(one * above_middle, one, None, dtypes, NONE)[2].item() == expected
    grad_x, grad_weight, _ = backward(one * above_middle, one.to(compute), one, None, dtypes, NONE)
    assert grad_x.item() == grad_weight.item() == expected
    assert backward(one, one.to(compute), one * above_middle, None, dtypes, NONE)[0].item() == expected


@by_dtypes
def test_linear_act_compute_copies(dtypes, generator, device):
    """x_compute is x rounded, absent where nothing is to be rounded; a weight copy is read in place of the weight."""
    x, weight, bias, grad_out = Case(9, 33, 17, dtypes).tensors(generator, device)
    out, saved, x_compute = forward(x, weight, bias, dtypes)
    if dtypes.x == dtypes.compute:
        assert x_compute.shape == (0,)
    else:
        assert_rounds_to(x_compute, x.cpu())
        assert x_compute.dtype == dtypes.compute
    copy = torch.from_numpy(bounds.rounded(weight.cpu().double().numpy(), dtypes.compute)).to(device, dtypes.compute)
    by_copy = forward(x, torch.full_like(weight, torch.nan), bias, dtypes, copy=copy)
    assert same_bits(by_copy[0], out)
    operand = x_compute if x_compute.numel() else x
    grads = backward(grad_out, operand, weight, saved, dtypes)
    by_copy = backward(grad_out, operand, torch.full_like(weight, torch.nan), saved, dtypes, copy=copy)
    assert all(same_bits(a, b) for a, b in zip(by_copy, grads, strict=True))


# ----- shapes and layouts ---------------------------------------------------------------


@by_dtypes
def test_linear_act_empty(dtypes, device):
    """K = 0 is relu(bias); without rows or columns the gradients that are summed are zeros."""
    bias = torch.tensor([-1.0, 0.5, torch.nan], dtype=dtypes.weight, device=device)
    none = torch.empty(2, 0, dtype=dtypes.x, device=device)
    out, _, _ = forward(none, torch.empty(3, 0, dtype=dtypes.weight, device=device), bias, dtypes)
    assert same_bits(out, bias.relu().to(dtypes.out).expand(2, 3))
    for M, N, K in product((0, 3), (0, 5), (0, 7)):
        x, weight, bias, grad_out = Case(M, N, K, dtypes).tensors(torch.Generator(), device)
        for save in (0, 1):
            out, saved, x_compute = forward(x, weight, bias, dtypes, save=save)
            assert out.shape == (M, N)
            operand = x if dtypes.x == dtypes.compute else x_compute
            grads = backward(grad_out, operand, weight, saved if save else out, dtypes)
            assert [g.shape for g in grads] == [(M, K), (N, K), (N,)]
            if M == 0 or N == 0:
                assert not any(g.any() for g in grads)


@by_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_act_strided(dtypes, layout, generator, device):
    for lead in ((15,), (3, 5)):
        for save in (0, 1):
            run(Case(15, 37, 41, dtypes, lead=lead, layout=layout, save=save), generator, device)


@by_dtypes
def test_linear_act_strided_parameters_and_images(dtypes, generator, device):
    """Strided bias and mask, a 4-d channels_last x, a 1-d x."""
    x, weight, bias, grad_out = Case(24, 33, 5, dtypes, lead=(2, 3, 4)).tensors(generator, device)
    expected, saved, x_compute = forward(x, weight, bias, dtypes)
    wide_bias = torch.stack([bias, bias * torch.nan], 1)[:, 0]
    image = x.contiguous(memory_format=torch.channels_last)
    assert same_bits(forward(x, weight, wide_bias, dtypes)[0], expected)
    assert same_bits(forward(image, weight, bias, dtypes)[0], expected)
    bounds.check_forward(forward(x[0, 0, 0], weight, bias, dtypes)[0], x[0, 0, 0], weight, bias, RELU, dtypes.compute)
    operand = x_compute if x_compute.numel() else x
    grads = backward(grad_out, operand, weight, saved, dtypes)
    strided_mask = torch.stack([saved, ~saved], 2)[..., 0]
    for grad_like, mask in ((grad_out, strided_mask), (grad_out.contiguous(memory_format=torch.channels_last), saved)):
        again = backward(grad_like, operand, weight, mask, dtypes)
        assert all(same_bits(a, b) for a, b in zip(again, grads, strict=True))


@by_dtypes
def test_linear_act_deterministic(dtypes, generator, device):
    case = Case(67, 45, 513, dtypes)
    tensors = case.tensors(generator, device)
    results = []
    for _ in range(3):
        x, weight, bias, grad_out = (t.clone() for t in tensors)
        out, saved, x_compute = forward(x, weight, bias, dtypes)
        results.append((out, *backward(grad_out, x_compute if x_compute.numel() else x, weight, saved, dtypes)))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "dtypes", [*DTYPES.values(), Dtypes(bf16, f32, f16, bf16, f32)], ids=[*DTYPES, "mixed_float16 of bfloat16"]
)
def test_linear_act_any_subset_of_gradients(dtypes, generator, device):
    """Each gradient has the same bits whichever others are asked for; one that is not has no elements."""
    x, weight, bias, grad_out = Case(19, 33, 45, dtypes).tensors(generator, device)
    _, saved, x_compute = forward(x, weight, bias, dtypes)
    operand = x_compute if x_compute.numel() else x
    everything = backward(grad_out, operand, weight, saved, dtypes)
    for wanted in product((False, True), repeat=3):
        grads = backward(grad_out, operand if wanted[1] else None, weight, saved, dtypes, output_mask=wanted)
        for grad, full, want in zip(grads, everything, wanted, strict=True):
            assert same_bits(grad, full) if want else grad.shape == (0,) and grad.dtype == full.dtype


# ----- mask ---------------------------------------------------------------


@pytest.mark.parametrize("name, columns", each_once(DTYPES, (1, 31, 32, 33, 100, 128, 129, 300)))
def test_linear_act_mask_layout(name, columns, generator, device):
    """Bit j of word w is column 32w+j; rows start at 16 bytes; tail bits are 0, of a row of NaN too; nothing is saved without
    being asked for."""
    dtypes = DTYPES[name]
    x, weight, bias, _ = Case(5, columns, 9, dtypes).tensors(generator, device)
    x[3] = torch.nan
    out, saved, _ = forward(x, weight, bias, dtypes)
    assert saved.dtype == torch.int32
    assert saved.shape == (5, -(-columns // 32))
    assert saved.stride() == (-(-columns // 128) * 4, 1)
    bits = bits_of(saved, columns)
    np.testing.assert_array_equal(bits[:, :columns], ~(out <= 0).cpu().numpy())
    assert not bits[:, columns:].any()
    for other in (forward(x, weight, bias, dtypes, save=0), forward(x, weight, bias, dtypes, activation=NONE)):
        assert other[1].dtype == torch.int32
        assert other[1].shape == (0,)


@by_dtypes
def test_linear_act_mask_of_zeros_underflow_and_nan(dtypes, device):
    """1 at NaN; 0 at both zeros and where the output underflows: the mask is of the rounded output."""
    least = max(bounds.least_subnormal(d) for d in (dtypes.out, dtypes.weight, acc_dtype(dtypes.compute)))
    values = [1.0, -1.0, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, least, 0.75 * least, least / 4]
    expected = [1, 0, 0, 0, 1, 1, 0, 1, 1, 0]
    bias = torch.tensor(values, dtype=dtypes.weight, device=device)
    x, weight = torch.zeros(2, 3, dtype=dtypes.x, device=device), torch.zeros(10, 3, dtype=dtypes.weight, device=device)
    _, saved, _ = forward(x, weight, bias, dtypes)
    assert bits_of(saved, 10)[0, :10].astype(int).tolist() == expected


def test_linear_act_gradient_follows_the_mask(device):
    """0 at exactly 0, passed at NaN, selected and never multiplied: an inf behind a 0 stays out."""
    bias = torch.tensor([0.0, -1.0, torch.nan, 1.0], device=device)
    dtypes = DTYPES["float32"]
    x, weight = torch.zeros(1, 1, device=device), torch.ones(4, 1, device=device)
    out, saved, _ = forward(x, weight, bias, dtypes)
    for selector in (saved, out):
        for value in (3.0, torch.inf, torch.nan):
            grad_bias = backward(torch.full((1, 4), value, device=device), x, weight, selector, dtypes)[2]
            assert same_bits(grad_bias, torch.tensor([0.0, 0.0, value, value], device=device))
        blocked = torch.tensor([[torch.inf, torch.nan, 0.0, 0.0]], device=device)
        assert not any(g.any() for g in backward(blocked, x, weight, selector, dtypes))


# ----- non-finite ---------------------------------------------------------------


@by_dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("activation", Activation)
def test_linear_act_nonfinite(dtypes, value, activation, generator, device):
    """A NaN or inf reaches what it belongs to, through ReLU too, and no other row or column changes a bit."""
    x, weight, bias, grad_out = Case(21, 35, 40, dtypes).tensors(generator, device)
    clean = forward(x, weight, bias, dtypes, activation)[0]
    rows, columns = torch.arange(21, device=device) != 4, torch.arange(35, device=device) != 7
    bad_x, bad_weight, bad_bias = x.clone(), weight.clone(), bias.clone()
    bad_x[4, 9] = bad_weight[7, 3] = bad_bias[7] = value
    for args, kept in (
        ((bad_x, weight, bias), (rows, slice(None))),
        ((x, bad_weight, bias), (slice(None), columns)),
        ((x, weight, bad_bias), (slice(None), columns)),
    ):
        out = forward(*args, dtypes, activation)[0]
        bounds.check_forward(out, *args, activation, dtypes.compute, bounds.accumulator_roundoff(device, dtypes.compute))
        assert same_bits(out[kept], clean[kept])
    bad_grad = grad_out.clone()
    bad_grad[4, 7] = value
    operand = x.to(dtypes.compute)
    clean = backward(grad_out, operand, weight, None, dtypes, NONE)
    grads = backward(bad_grad, operand, weight, None, dtypes, NONE)
    assert not grads[0][4].isfinite().any()
    assert not grads[1][7].isfinite().any()
    assert not grads[2][7].isfinite()
    for grad, before, kept in zip(grads, clean, (rows, columns, columns), strict=True):
        assert same_bits(grad[kept], before[kept])


@pytest.mark.parametrize("dtype", [f16, bf16, f32], ids=["fp16", "bf16", "fp32"])
def test_linear_act_overflow(dtype, device):
    """fp16: 65520 is inf and all below it 65504, as round to nearest says, in out and in gradients."""
    top = torch.finfo(dtype).max
    edge = float(bounds.overflow_threshold(dtype))
    bias = torch.tensor([edge, np.nextafter(edge, 0), -edge, -np.nextafter(edge, 0), top], dtype=f64, device=device)
    expected = torch.tensor([torch.inf, top, -torch.inf, -top, top], dtype=dtype, device=device)
    zeros = torch.zeros(1, 1, dtype=f64, device=device)
    dtypes = Dtypes(f64, f64, f64, dtype, dtype)
    assert same_bits(forward(zeros, zeros.expand(5, 1), bias, dtypes, NONE)[0][0], expected)
    assert same_bits(forward(zeros, zeros.expand(5, 1), bias, dtypes, RELU)[0][0], expected.relu())
    grads = backward(bias[None], zeros + 1, zeros.expand(5, 1), None, dtypes, NONE)
    assert same_bits(grads[1][:, 0], expected)
    assert same_bits(grads[2], expected)


def test_linear_act_float16_overflow_from_the_accumulator(device):
    """255.75 * 256 + b in fp16 operands: the sum crosses 65520 in fp32 and only the store overflows."""
    x = torch.full((1, 256), 255.75, dtype=f16, device=device)
    for b, expected in ((48.0, torch.inf), (47.99, 65504.0), (-1e5, -34528.0)):
        bias = torch.tensor([b], device=device)
        out = forward(x, torch.ones(1, 256, device=device), bias, Dtypes(f16, f32, f16, f16, f32), NONE)[0]
        assert out.item() == expected
    wide = forward(x, torch.ones(1, 256, device=device), None, Dtypes(f16, f32, f16, f32, f32), NONE)[0]
    assert wide.item() == 255.75 * 256
