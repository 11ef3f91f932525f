# SPDX-License-Identifier: Apache-2.0
"""linear_act's bf16 products that C++ leaves to oneDNN, against fp64; and those that it does not."""

import pytest
import torch

from mpkernels.ops.linear_act import Activation, backward_op, cpu, forward_op, onednn
from mpkernels.runtime import native
from tests import bounds
from tests.linear_act_cases import bf16, data, f16, f32, same_bits

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason=f"native: {native.why_not()}"),
    pytest.mark.skipif(not onednn.has_bf16_instructions(), reason="this CPU has no instructions for bf16"),
]
NONE, RELU = Activation.NONE, Activation.RELU
M, K, N = 40, 64, 50


@pytest.fixture
def seen(monkeypatch):
    """The dtypes of what oneDNN multiplied, of products of any size."""
    linear, seen = torch.ops.mkldnn._linear_pointwise, []
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: seen.append(args[0].dtype) or linear(*args))
    monkeypatch.setattr(cpu, "ONEDNN_SIZE", 1)
    monkeypatch.setattr(cpu, "ONEDNN_PRODUCTS", 1)
    return seen


def operands(generator, M=M, K=K, N=N):
    return data((M, K), bf16, "normal", generator), data((N, K), bf16, "normal", generator)


def forward(x, weight, bias=None, activation=NONE, compute=bf16, out=bf16, batch_invariant=False):
    args = (x, weight, bias, None, int(activation), compute, out, 0, batch_invariant)
    return forward_op.function("native")(*args)[0]


def grad_x(grad_out, weight, saved=None, activation=NONE):
    x = torch.zeros(grad_out.shape[0], weight.shape[1], dtype=bf16)
    args = (grad_out, x, weight, None, saved, int(activation), bf16, bf16, f32, f32, [True, True, True])
    return backward_op.function("native")(*args)


@pytest.mark.parametrize("activation", [NONE, RELU])
@pytest.mark.parametrize("bias_dtype", [None, bf16, f32])
def test_onednn_forward_rounds_once(activation, bias_dtype, seen, generator):
    x, weight = operands(generator, 300, 768, 70)
    bias = None if bias_dtype is None else data((70,), bias_dtype, "normal", generator)
    out = forward(x, weight, bias, activation)
    assert seen == [bf16]
    bounds.check_forward(out, x, weight, bias, activation, bf16)
    if activation == NONE:
        bounds.check_correctly_rounded(out, x, weight, bias, NONE, bf16)
    assert same_bits(out, forward(x, weight, bias, activation))


def test_onednn_dgrad_rounds_once(seen, generator):
    """And the two other gradients stay those of C++."""
    grad_out, weight = operands(generator, 300, 96, 70)[0], data((96, 70), bf16, "normal", generator)
    saved = data((300, 96), bf16, "normal", generator)
    got, grad_weight, grad_bias, _ = grad_x(grad_out, weight, saved, RELU)
    assert seen == [bf16]
    grad_z = torch.where(saved > 0, grad_out, 0)
    bounds.check_correctly_rounded(got, grad_z, weight.t(), None, NONE, bf16)
    assert grad_weight.dtype == grad_bias.dtype == f32
    assert same_bits(got, grad_x(grad_out, weight, saved, RELU)[0])


@pytest.mark.parametrize("exponents", [(-133, 100), (-60, 0), (0, -60), (-51, 51), (-50, -50), (-49, -52)], ids=str)
@pytest.mark.parametrize("bias", [None, 0.0, 2.0**-130, 2.0**-99, -(2.0**-120)])
def test_onednn_loses_nothing_small(exponents, bias, seen, generator):
    """Its instructions take what is below 2^-126 for 0."""
    a, b = (data((M, K), bf16, "normal", generator).sign() * 2.0**exponent for exponent in exponents)
    a[3], a[4, 1:], b[5] = 0, 0, 0
    bias = None if bias is None else torch.full((M,), bias)
    out = forward(a, b, bias)
    is_small = sum(exponents) < -100 or min(exponents) < -126 or (bias is not None and 0 < bias[0].abs() < 2.0**-100)
    assert seen == ([] if is_small else [bf16])
    bounds.check_forward(out, a, b, bias, NONE, bf16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_onednn_keeps_nan_and_inf_in_their_row(value, seen, generator):
    x, weight = operands(generator)
    clean = forward(x, weight, activation=RELU)
    x[7] = value
    out = forward(x, weight, activation=RELU)
    assert seen == [bf16, bf16]
    assert same_bits(torch.cat([out[:7], out[8:]]), torch.cat([clean[:7], clean[8:]]))
    assert same_bits(out[7].isnan(), (x[7].double() @ weight.double().t()).isnan())


@pytest.mark.parametrize("layout", ["transposed", "sliced", "bias"])
def test_onednn_takes_any_layout(layout, seen, generator):
    x, weight = operands(generator)
    bias = data((N,), f32, "normal", generator)
    expected = forward(x, weight, bias)
    if layout == "transposed":
        x, weight = (t.t().contiguous().t() for t in (x, weight))
    elif layout == "sliced":
        x = torch.cat([x, x], 1)[:, :K]
    else:
        bias = torch.stack([bias, bias], 1)[:, 0]
    out = forward(x, weight, bias)
    assert len(seen) == (1 if layout == "sliced" else 2)
    bounds.check_forward(out, x, weight, bias, NONE, bf16)
    assert layout == "sliced" or same_bits(out, expected)


def test_onednn_threads_do_not_matter(seen, generator):
    x, weight = operands(generator, 190, 544, 70)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward(x, weight))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 3
    assert all(same_bits(results[0], other) for other in results[1:])


OTHERS = {
    "K not whole": dict(K=50),
    "fp32 out": dict(out=f32),
    "fp32 weight": dict(weight=f32),
    "fp16": dict(compute=f16, x=f16, weight=f16),
    "gelu": dict(activation=Activation.GELU),
    "batch_invariant": dict(batch_invariant=True),
    "no instructions": {},
    "few rows": {},
    "few products": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_onednn_leaves_others_to_cpp(name, seen, generator, monkeypatch):
    options = dict(OTHERS[name])
    x, weight = operands(generator, K=options.pop("K", K))
    x, weight = x.to(options.pop("x", bf16)), weight.to(options.pop("weight", bf16))
    if name == "no instructions":
        monkeypatch.setattr(onednn, "has_bf16_instructions", lambda: False)
    if name == "few rows":
        monkeypatch.setattr(cpu, "ONEDNN_SIZE", M + 1)
    if name == "few products":
        monkeypatch.setattr(cpu, "ONEDNN_PRODUCTS", M * N * K + 1)
    out = forward(x, weight, **options)
    assert seen == []
    activation, compute = options.get("activation", NONE), options.get("compute", bf16)
    bounds.check_forward(out, x, weight, None, activation, compute)
