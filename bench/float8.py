# SPDX-License-Identifier: Apache-2.0
"""A linear in eight bits: the product of operands that have scales, and a layer's forward and backward, against bf16 and fp32.

All get the same x and weight, `q * scale`, which bf16 holds exactly.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn

import mpkernels as mpk
from bench.cases import Float8
from bench.implementation import OURS, Implementation, check_peer, sample, with_forced
from mpkernels.functional import dequantize, quantize
from mpkernels.ops.linear_act import Activation, linear_act, reference
from mpkernels.testing import scaled_cases
from tests import bounds

E4M3, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
IN_BF16 = f"{OURS} bfloat16"


def implementations(case: Float8, device: torch.device) -> dict[str, Implementation]:
    make = products if case.direction == "forward" else layers
    found = make(case, device)
    return with_forced(found, lambda: make(case, device)[OURS], "linear_act", device)


def operands(case: Float8, device: torch.device):
    """q and scale by row of x and of weight, and a bias in bf16, which torch's own op asks for."""
    x, weight = (torch.randn(rows, case.K, device=device) for rows in (case.M, case.N))
    return quantize(x, E4M3, -1), quantize(weight, E4M3, -1), torch.randn(case.N, device=device).to(BF16)


# ----- the product ---------------------------------------------------------------


def products(case: Float8, device: torch.device) -> dict[str, Implementation]:
    (q_x, x_scale), (q_weight, weight_scale), bias = operands(case, device)
    x, weight = dequantize(q_x, x_scale), dequantize(q_weight, weight_scale)
    rows = sample(case.M, case.K * case.N).to(device)
    v = scaled_cases.roundoff(device, case.K)

    def scaled(q_x, x_scale, q_weight, weight_scale):
        op = torch.ops.mpkernels.linear_act
        return op(q_x, q_weight, bias, None, 0, E4M3, BF16, 0, x_scale=x_scale, weight_scale=weight_scale)[0]

    def torch_scaled():
        scales = {"scale_a": x_scale, "scale_b": weight_scale.t()}
        return torch._scaled_mm(q_x, q_weight.t(), **scales, bias=bias, out_dtype=BF16)

    def in_bf16(x, weight):
        return linear_act(x, weight, bias, activation=Activation.NONE, compute_dtype=BF16, out_dtype=BF16)

    def implementation(function, *inputs, ours=False) -> Implementation:
        run = functools.partial(function, *inputs)

        def check() -> dict:
            out = run()[rows]
            if ours:
                bounds.check_forward(out, x[rows].to(BF16), weight.to(BF16), bias, Activation.NONE, BF16, v, random_sign=True)
            else:
                check_peer(out, reference.linear_act(x[rows], weight, bias, Activation.NONE, F32))
            return {}

        moved = x.numel() + weight.numel() + 2 * case.M * case.N
        return Implementation(run, check, bytes=moved, flops=2 * case.M * case.K * case.N, gemm="bfloat16")

    return {
        OURS: implementation(scaled, q_x, x_scale, q_weight, weight_scale, ours=True),
        f"{OURS}, quantized on the way": implementation(lambda: scaled(*quantize(x, E4M3, -1), *quantize(weight, E4M3, -1))),
        "torch._scaled_mm": implementation(torch_scaled),
        f"{OURS} bfloat16": implementation(in_bf16, x.to(BF16), weight.to(BF16)),
        "torch bfloat16": implementation(F.linear, x.to(BF16), weight.to(BF16), bias),
        "torch fp32": implementation(F.linear, x, weight, bias.float()),
    }


# ----- a layer ---------------------------------------------------------------


def layers(case: Float8, device: torch.device) -> dict[str, Implementation]:
    """Forward and backward of a linear with fp32 parameters, the casts and quantizations of its policy included."""
    (q_x, x_scale), (q_weight, weight_scale), bias = operands(case, device)
    x, weight = dequantize(q_x, x_scale), dequantize(q_weight, weight_scale)
    grad_out = torch.randn(case.M, case.N, device=device)
    rows = sample(case.M, case.K * case.N).to(device)

    def implementation(make, autocast=contextlib.nullcontext) -> Implementation:
        layer, leaf = make(case.K, case.N).to(device), x.clone().requires_grad_()
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

        def run():
            with autocast():
                out = layer(leaf)
            return out, *torch.autograd.grad(out, (leaf, *layer.parameters()), grad_out.to(out.dtype))

        def check() -> dict:
            out, grad_x, *_ = run()
            exact = reference.linear_act(x[rows], weight, bias, Activation.NONE, F32)
            check_peer(out[rows].detach(), exact)
            exact = grad_out[rows].double() @ weight.double()
            error = (grad_x[rows].double() - exact).norm() / exact.norm()
            assert error <= 2 * 2.0**-4, f"grad_x is off by {error:.3g}, more than two roundings to eight bits"
            return {"relative_error": error.item()}

        return Implementation(run, check, flops=6 * case.M * case.K * case.N, gemm="bfloat16")

    bf16 = functools.partial(torch.autocast, device.type, BF16)
    return {
        OURS: implementation(functools.partial(mpk.MPLinear, policy="mixed_float8")),
        IN_BF16: implementation(functools.partial(mpk.MPLinear, policy="mixed_bfloat16")),
        "torch autocast bf16": implementation(nn.Linear, bf16),
        "torch fp32": implementation(nn.Linear),
    }
