# SPDX-License-Identifier: Apache-2.0
"""Policies with saved_dtype: what backward keeps is in eight bits, what it computes is as in 16."""

import copy
import math

import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.ops.linear_act import Activation, activation_of, eight_bits
from mpkernels.ops.quantize import reference
from tests.linear_act_cases import same_bits
from tests.nn.test_float8 import ACTIVATIONS, kept_bytes, run

bf16, f16, f32, e4m3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
OP, OP_BACKWARD = torch.ops.mpkernels.linear_act, torch.ops.mpkernels.linear_act_backward
SAVED = "saved=float8_e4m3fn"
POLICIES = ("mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "mixed_bfloat16,grad=bfloat16")


def decoded(x, dtype):
    """q * scale as the reference has them, in `dtype`."""
    q, scale = reference.quantize(x.detach(), e4m3, -1)
    return (q * scale).to(dtype)


@pytest.mark.usefixtures("by_eager_and_auto", "joined")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("text", POLICIES)
def test_saved_dtype_matches_reference(text, activation, generator):
    """out is bit for bit that without, gradients are those of the decoded x and preactivation."""
    policy, code = mpk.Policy.parse(f"{text},{SAVED}"), activation_of(activation)
    compute, stored, grad_dtype = policy.compute_dtype, policy.param_dtype, policy.grad_dtype or policy.param_dtype
    for M, N, K in ((33, 48, 64), (5, 7, 130), (64, 3, 17)):
        layer = mpk.MPLinear(K, N, activation=activation, policy=policy)
        x, grad_out = (torch.randn(M, n, generator=generator).to(stored) for n in (K, N))
        out, *grads = run(layer, x, grad_out)
        weight, bias = layer.weight.detach(), layer.bias.detach()
        expected, saved, _ = OP(x, weight, bias, None, code, compute, out.dtype, 1)
        assert same_bits(out, expected)
        saved = decoded(saved, compute) if code > Activation.RELU else saved if code else None
        operand = decoded(x.to(compute), compute)
        expected = OP_BACKWARD(
            grad_out, operand, weight, None, saved, code, compute, x.dtype, grad_dtype, grad_dtype, [True] * 3
        )
        assert all(same_bits(grad, other) for grad, other in zip(grads, expected[:3], strict=True))


@pytest.mark.parametrize("K", [64, 512])
@pytest.mark.parametrize("text", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_saved_dtype_keeps_half(text, K, generator):
    dtype = mpk.Policy.parse(text).param_dtype
    x = torch.randn(128, K, generator=generator).to(dtype).requires_grad_()
    for activation, kept in ((None, 2 * 128 * K), ("relu", 2 * 128 * (K + 96)), ("gelu", 2 * 128 * (K + 96))):
        plain = kept_bytes(mpk.MPLinear(K, 96, activation=activation, policy=text), x)
        half = kept_bytes(mpk.MPLinear(K, 96, activation=activation, policy=f"{text},{SAVED}"), x)
        assert plain >= kept or activation == "relu"
        assert half <= 0.55 * kept


def test_saved_dtype_in_a_sequence(generator):
    """As its layers one by one, and with less kept than without."""
    torch.manual_seed(0)
    mlp = mpk.MPMLP([64, 128, 64, 8], policy=f"mixed_float16,{SAVED}")
    plain = mpk.MPMLP([64, 128, 64, 8], policy="mixed_float16")
    x = torch.randn(32, 64, generator=generator)
    assert kept_bytes(mlp, x) <= 0.6 * kept_bytes(plain, x)
    mlp(x).square().sum().backward()
    grads = [p.grad for p in mlp.parameters()]
    h, layers = x, [m for m in copy.deepcopy(mlp) if isinstance(m, mpk.MPLinear)]
    for layer in layers[:-1]:
        h = layer(h, out_dtype=f16)
    layers[-1](h, out_dtype=f32).square().sum().backward()
    for layer, weight, bias in zip(layers, grads[::2], grads[1::2], strict=True):
        assert same_bits(weight, layer.weight.grad)
        assert same_bits(bias, layer.bias.grad)


@pytest.mark.usefixtures("joined")
def test_saved_dtype_in_a_sequence_of_activations(generator):
    """No preactivation goes to the next layer's backward as it is, where kernels would fuse the two."""
    x, kept = torch.randn(32, 64, generator=generator), []
    for text in ("mixed_float16", f"mixed_float16,{SAVED}"):
        layers = [mpk.MPLinear(64, 64, activation=activation) for activation in ("gelu", "silu", None)]
        kept.append(kept_bytes(mpk.convert(nn.Sequential(*layers), text), x))
    assert kept[1] <= 0.55 * kept[0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_saved_dtype_not_finite_stays_visible(bad, generator):
    layer, x = mpk.MPLinear(24, 16, policy=f"mixed_float16,{SAVED}"), torch.randn(8, 24, generator=generator)
    x[3, 5] = bad
    _, _, grad_weight, _ = run(layer, x, torch.ones(8, 16))
    assert grad_weight.isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS[2:])
def test_saved_dtype_forgives_what_the_activation_forgives(activation):
    """A preactivation below all of float16 has the slope 0, as it has in 16 bits, and its row is finite; NaN stays NaN."""
    for text in ("mixed_float16", f"mixed_float16,{SAVED}"):
        layer = mpk.MPLinear(4, 3, bias=False, activation=activation, policy=text)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([-300.0, 0.125, 0.25])[:, None])
        for dtype in (f32, f16):
            out, grad_x, grad_weight, _ = run(layer, torch.full((2, 4), 100.0, dtype=dtype), torch.ones(2, 3, dtype=dtype))
            assert out.isfinite().all()
            assert grad_x.isfinite().all()
            assert (grad_weight[0] == 0).all()
            assert grad_weight[1:].isfinite().all()
            assert (grad_weight[1:] > 0).all()
        layer.weight.data[1, 1] = math.nan
        assert run(layer, torch.ones(2, 4), torch.ones(2, 3))[1].isnan().all()


def test_saved_dtype_at_the_ends_of_float16():
    """What eight bits round up to 65536 is 65504 again, which is nearer, and what is small is no 0 for a scale below fp16."""
    numbers = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(f16)
    numbers = numbers[numbers.isfinite()]
    for row in (numbers, numbers[-3000:], numbers[:1024], numbers[:2]):
        q, scale = eight_bits.encode(row[None], e4m3)
        back = eight_bits.decode(q, scale, f16)
        assert back.isfinite().all()
        assert ((back.double() - row.double()).abs() <= 2.0**-4 * row.double() + scale * 2.0**-10 + 2.0**-25).all()
    assert eight_bits.decode(*eight_bits.encode(torch.tensor([65504.0], dtype=f16), e4m3), f16).item() == 65504


# ----- where it runs ---------------------------------------------------------------


def test_saved_dtype_accumulates(generator):
    """With accumulate_grad the bits are those of autograd's own sum."""
    layer = mpk.MPLinear(24, 16, policy=f"mixed_bfloat16,accumulate_grad,{SAVED}")
    plain = copy.deepcopy(layer)
    plain.adopt(Activation.NONE, mpk.Policy.parse(f"mixed_bfloat16,{SAVED}"))
    for _ in range(3):
        x = torch.randn(9, 24, generator=generator)
        for module in (layer, plain):
            module(x).square().sum().backward()
    assert same_bits(layer.weight.grad, plain.weight.grad)


def test_saved_dtype_refuses():
    x = torch.ones(3, 8, dtype=bf16)
    with pytest.raises(RuntimeError, match="saved_dtype must be float8_e4m3fn or float8_e5m2, got"):
        OP(x, x, None, None, 0, bf16, bf16, 0, saved_dtype=bf16)
    q, one = x.to(e4m3), torch.ones(())
    with pytest.raises(RuntimeError, match="a call with scales has no backward and no saved_dtype"):
        OP(q, q, None, None, 0, e4m3, bf16, 0, x_scale=one, weight_scale=one, saved_dtype=e4m3)


@pytest.mark.parametrize(
    "text, message",
    [
        (f"float32,{SAVED}", "saved_dtype is for a compute_dtype of float16 or bfloat16, got torch.float32"),
        (f"mixed_float8,{SAVED}", "saved_dtype is for a compute_dtype of float16 or bfloat16, got torch.float8_e4m3fn"),
        ("mixed_float16,saved=fp8", "did you mean 'saved=float8_e4m3fn'"),
        ("mixed_float16,saved=float8_e5m2", "unknown policy"),
    ],
)
def test_saved_dtype_policy_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        mpk.Policy.parse(text)


@pytest.mark.parametrize("text", POLICIES)
def test_saved_dtype_policy_round_trip(text):
    policy = mpk.Policy.parse(f"{text},{SAVED}")
    assert str(policy) == f"{text},{SAVED}"
    assert mpk.Policy.parse(str(policy)) == policy
    assert policy.saved_dtype == e4m3
    if policy.grad_dtype is None:
        assert policy.to_fsdp() == mpk.Policy.parse(text).to_fsdp()
