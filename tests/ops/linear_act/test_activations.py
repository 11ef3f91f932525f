# SPDX-License-Identifier: Apache-2.0
"""Activations of linear_act other than ReLU: values, slopes, what is saved, NaN and inf, the previous layer."""

import functools

import pytest
import torch
import torch.nn.functional as F

import mpkernels as mpk
from mpkernels.ops.linear_act import Activation, linear_act, reference
from tests import bounds
from tests.levels import each_once
from tests.linear_act_cases import (
    DTYPES,
    Case,
    Dtypes,
    backward,
    backward_below,
    bf16,
    f16,
    f32,
    f64,
    forward,
    grad_z_of,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("by_eager_and_auto")

NONE = Activation.NONE
TORCH = {
    Activation.RELU2: lambda z: z.relu().square(),
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: functools.partial(F.gelu, approximate="tanh"),
    Activation.SILU: F.silu,
}
by_activation = pytest.mark.parametrize("activation", TORCH, ids=lambda a: a.name.lower())
by_dtype = pytest.mark.parametrize("dtype", [f16, bf16, f32], ids=["fp16", "bf16", "fp32"])


@by_activation
def test_activation_reference_is_torchs_fp64(activation, generator):
    z = (torch.randn(3000, generator=generator, dtype=f64) * 4).requires_grad_()
    one = torch.ones(1, 1, dtype=f64)
    out = TORCH[activation](z)
    bounds.check_forward(reference.activate(z, activation)[:, None], z[:, None], one, None, activation, f64)
    bounds.check_forward(out[:, None], z[:, None], one, None, activation, f64)
    (grad,) = torch.autograd.grad(out.sum(), z)
    bounds.check_slope(grad[:, None], torch.ones_like(z), z[:, None].detach(), activation, f64, 2.0**-53)


@pytest.mark.parametrize("dtype", [f16, bf16], ids=["fp16", "bf16"])
@by_activation
def test_activation_not_worse_than_torch(activation, dtype, generator, device):
    """torch rounds x @ weight.T + bias to the dtype before the activation, the op does not."""
    dtypes = Dtypes(dtype, dtype, dtype, dtype, dtype)
    for K in (31, 256, 1024):
        x, weight, bias, _ = Case(64, 96, K, dtypes).tensors(generator, device)
        out = forward(x, weight, bias, dtypes, activation)[0]
        bounds.check_not_worse_than(out, TORCH[activation](F.linear(x, weight, bias)), x, weight, bias, activation, dtype)


@by_dtype
@by_activation
def test_activation_gradient_beside_the_exact_one(activation, dtype, generator, device):
    """From a preactivation that was rounded once: a third of a rounding of grad_z at most is lost."""
    dtypes = Dtypes(dtype, f32, dtype, dtype, f32)
    for K in (7, 300):
        x, weight, bias, grad_out = Case(96, 80, K, dtypes, distribution="uniform").tensors(generator, device)
        _, saved, _ = forward(x, weight, bias, dtypes, activation)
        grad_z = grad_z_of(grad_out, saved, activation, dtypes)
        v = bounds.accumulator_roundoff(device, dtype)
        args = (grad_out, x, weight, bias, activation, dtype, v)
        bounds.check_slope_of_exact(grad_z, *args)
        if dtype == f16 and K == 7:
            coarse = grad_z_of(grad_out, saved.bfloat16().half(), activation, dtypes)
            with pytest.raises(AssertionError, match="grad_z"):
                bounds.check_slope_of_exact(coarse, *args)


@by_activation
def test_activation_bounds_reject_another_activation(activation, generator):
    """GELU and its tanh form differ by 5e-4, which fp16 shows: no pair is taken for the other, in value or in slope."""
    x, weight, bias, grad_out = Case(96, 80, 40, DTYPES["float16"], distribution="uniform").tensors(generator)
    for other in TORCH.keys() - {activation}:
        out, saved, _ = forward(x, weight, bias, DTYPES["float16"], other)
        with pytest.raises(AssertionError, match="out, bound"):
            bounds.check_forward(out, x, weight, bias, activation, f16)
        with pytest.raises(AssertionError, match="grad_z"):
            bounds.check_slope(grad_z_of(grad_out, saved, other, DTYPES["float16"]), grad_out, saved, activation, f16, 2.0**-24)


@by_activation
@pytest.mark.parametrize("name", ["float64", "float32", "mixed_float16", "bfloat16"])
def test_activation_saves_the_pre_activation(activation, name, generator, device):
    """In compute_dtype, once, where a gradient may be asked for; without one nothing."""
    dtypes = DTYPES[name]
    x, weight, bias, _ = Case(6, 33, 9, dtypes, lead=(2, 3)).tensors(generator, device)
    _, saved, _ = forward(x, weight, bias, dtypes, activation)
    assert (saved.shape, saved.dtype) == ((6, 33), dtypes.compute)
    bounds.check_forward(saved, x, weight, bias, NONE, dtypes.compute, bounds.accumulator_roundoff(device, dtypes.compute))
    assert forward(x, weight, bias, dtypes, activation, save=0)[1].shape == (0,)
    found = []
    kwargs = {"activation": activation, "compute_dtype": dtypes.compute, "out_dtype": dtypes.out}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append((tuple(t.shape), t.dtype)), lambda t: t):
        linear_act(x, weight.requires_grad_(), bias, **kwargs)
    assert sorted(found, key=str) == sorted(
        [((2, 3, 9), dtypes.compute), ((33, 9), dtypes.weight), ((6, 33), dtypes.compute)], key=str
    )  # fmt: skip


@by_activation
def test_activation_backward_without_what_it_needs_raises(activation):
    """The output is not enough, and of its shape: it must not be taken for the preactivation."""
    x, weight = torch.ones(2, 4, requires_grad=True), torch.ones(3, 4)
    out, _, _ = torch.ops.mpkernels.linear_act(x, weight, None, None, int(activation), f32, f32, 0)
    with pytest.raises(RuntimeError, match=r"saved must be the preactivation \(2, 3\), got None"):
        out.sum().backward()


@by_activation
def test_activation_nan_and_inf(activation, device):
    """Values as torch's (fp64: its fp32 GELU on a CPU has NaN at inf); slopes at infinity are the limits."""
    z = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0, 88.0, -88.0, 7e4, -7e4], device=device)[:, None]
    one = torch.ones(1, 1, device=device)
    for name in ("float32", "mixed_float16"):
        dtypes = Dtypes(f32, f32, f32, f32, f32) if name == "float32" else Dtypes(f32, f32, f16, f32, f32)
        operand = z if name == "float32" else z.half().float()
        out, saved, _ = forward(operand, one, None, dtypes, activation)
        expected = TORCH[activation](operand.double()).float()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        slopes = grad_z_of(torch.ones_like(z), saved, activation, Dtypes(f32, f32, dtypes.compute, f32, f32)).flatten().tolist()
        assert slopes[0] != slopes[0]
        assert slopes[2] == slopes[4] == slopes[10] == 0
        if activation == Activation.RELU2:
            assert slopes[1] == torch.inf
            assert slopes[7] == 176
        else:
            assert slopes[1] == slopes[3] == slopes[7] == slopes[9] == 1
            assert slopes[5] == slopes[6] == 0.5


@by_activation
def test_activation_keeps_a_gradient_where_float16_overflows(activation, device):
    """z = 1e5 in the accumulator, inf where it is saved: out is finite in fp32 and so is the gradient."""
    layer = mpk.MPLinear(2, 1, bias=False, activation=activation.name.lower(), policy="mixed_float16", device=device)
    with torch.no_grad():
        layer.weight.fill_(250.0)
    x = torch.full((1, 2), 200.0, device=device, requires_grad=True)
    out = layer(x)
    out.backward(torch.full((1, 1), 2.0**-10, device=device))
    if activation != Activation.RELU2:
        assert out.item() == 1e5
        assert x.grad.tolist() == [[250.0 * 2**-10] * 2]


@by_activation
@pytest.mark.parametrize("name", ["float64", "float32", "mixed_float16", "mixed_bfloat16 inside"])
def test_activation_of_the_previous_layer(activation, name, generator, device):
    """Its slope in the dgrad epilogue: as grad_x unrounded times the slope, and the sums of that; at infinity the limit."""
    dtypes = DTYPES[name]
    acc = f64 if dtypes.compute == f64 else f32
    _, weight, _, grad_out = Case(37, 20, 33, dtypes).tensors(generator, device)
    x = torch.randn(37, 33, generator=generator).to(device, dtypes.compute)
    prev_saved = torch.randn(37, 33, generator=generator).to(device, dtypes.compute)
    prev_saved[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    wide = Dtypes(acc, dtypes.weight, dtypes.compute, dtypes.out, dtypes.grad)
    grads = backward_below(grad_out, x, weight, None, prev_saved, dtypes, NONE, activation)
    arrived = backward_below(grad_out, x, weight, None, None, wide, NONE, NONE)[0]
    assert grads[0][0, 0].isnan()
    assert grads[0][0, 1] == (arrived[0, 1] * (torch.inf if activation == Activation.RELU2 else 1)).to(dtypes.x)
    assert grads[0][0, 2] == 0
    v = bounds.accumulator_roundoff(device, dtypes.compute)
    rounded = dtypes.compute if dtypes.x != f32 else f32
    bounds.check_slope(grads[0][1:], arrived[1:], prev_saved[1:], activation, rounded, v)
    bounds.check_summed_slopes(grads[3][3:], arrived[:, 3:], prev_saved[:, 3:], activation, dtypes.compute, v)


@pytest.mark.parametrize("activation, policy", each_once(TORCH, ("float64", "mixed_float16")))
def test_activation_compiles_and_transforms(activation, policy, generator):
    """One graph with the bits of eager; torch.func.grad too, and gradients per sample."""
    layer = mpk.MPLinear(6, 5, activation=activation.name.lower(), policy=policy)
    x = torch.randn(4, 6, generator=generator).to(layer.weight.dtype)
    torch.compiler.reset()
    loss = lambda p, x: torch.func.functional_call(layer, p, (x,)).double().square().sum()
    loss(dict(layer.named_parameters()), x).backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(x).double().square().sum().backward()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    for grads in ({n: p.grad for n, p in layer.named_parameters()}, torch.func.grad(loss)(parameters, x)):
        assert all(same_bits(grads[name], expected[name]) for name in expected)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(4):
        single = torch.func.grad(loss)(parameters, x[i])
        assert all(grad[i].shape == single[name].shape for name, grad in each.items())
        bounds.check_not_worse_than(each["weight"][i], single["weight"], single["weight"], torch.eye(6), None, NONE, f32)


@by_activation
@by_dtype
def test_activation_of_numbers_at_the_formats_ends(activation, dtype, device):
    """The largest finite numbers and the smallest: finite where the fp64 value is, a multiple of the vector's length too."""
    large = torch.finfo(dtype).max
    values = [large, -large, large / 2, -large / 2, 3e4, -3e4, 1e-7, -1e-7, torch.finfo(dtype).tiny, 11.0, -11.0, 40.0, -40.0]
    dtypes = Dtypes(dtype, f32, dtype, f32, f32)
    for copies in (1, 64):
        z = torch.tensor(values * copies, dtype=dtype, device=device)[:, None]
        out, saved, _ = forward(z, torch.ones(1, 1, device=device), None, dtypes, activation)
        exact = reference.activate(z.double(), activation).float()
        assert torch.equal(out.isfinite(), exact.isfinite())
        bounds.check_forward(out, z, torch.ones(1, 1), None, activation, dtype)
        slopes = grad_z_of(torch.ones_like(out), saved, activation, dtypes)
        bounds.check_slope(slopes, torch.ones_like(out), saved, activation, dtype, 2.0**-24)


@pytest.mark.parametrize("saved_dtype", [f16, bf16, f32, f64], ids=["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("grad_dtype", [f16, bf16, f32, f64], ids=["fp16", "bf16", "fp32", "fp64"])
def test_relu_gradient_selects_by_an_output_of_any_dtype(grad_dtype, saved_dtype, device):
    """An inf or NaN behind a 0 is 0, and what is positive, however small, or NaN lets through."""
    smallest = bounds.least_subnormal(saved_dtype)
    outputs = torch.tensor([0.0, -0.0, -1.0, -smallest, smallest, 1.0, torch.inf, torch.nan], dtype=saved_dtype, device=device)
    for value in (torch.inf, torch.nan, 2.0, -bounds.least_subnormal(grad_dtype)):
        grad_out = torch.full((1, 8), value, dtype=grad_dtype, device=device)
        for column in range(8):  # one by one: 0 * inf in the product with the identity is NaN
            args = (
                grad_out[:, :1],
                None,
                torch.ones(1, 1, dtype=grad_dtype, device=device),
                outputs[None, column : column + 1],
            )
            dtypes = Dtypes(grad_dtype, f64, grad_dtype, grad_dtype, f64)
            grad_x, _, grad_bias = backward(*args, dtypes, output_mask=(True, False, True))
            kept = value if column >= 4 else 0.0
            expected = torch.tensor([[kept]], dtype=f64)
            assert same_bits(grad_x.cpu().double() + 0.0, expected)
            assert same_bits(grad_bias.cpu().double()[None] + 0.0, expected)
