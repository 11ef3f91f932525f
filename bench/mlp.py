# SPDX-License-Identifier: Apache-2.0
"""A chain of linears with ReLU between, forward and backward: MPMLP against the layers one by one and against torch."""

import contextlib
import functools

import torch
from torch import nn

import mpkernels as mpk
from bench import limits
from bench.cases import Mlp
from bench.implementation import OURS, Implementation, Missing, check_peer, with_forced
from bench.linear_act import onednn_fp32
from tests import bounds

LAYERS = "MPLinear, layer by layer"


def network(case: Mlp) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(case.layers) for layer in (nn.Linear(case.width, case.width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def implementations(case: Mlp, device: torch.device) -> dict[str, Implementation]:
    dtype = getattr(torch, case.dtype)
    policy = f"mixed_{case.dtype}"
    x, grad_out = (torch.randn(case.M, case.width, device=device).to(dtype).float() for _ in range(2))
    exact = network(case).double().to(device)(x.double()).detach()
    flops, errors = 3 * 2 * case.M * case.width**2 * case.layers, {}

    def one_by_one():
        layers = mpk.nn.MPMLP.from_sequential(network(case), policy)
        layers.__class__ = nn.Sequential
        for layer in [layer for layer in layers if isinstance(layer, mpk.MPLinear)][:-1]:  # as wide as MPMLP has them
            layer.adopt(layer._activation, mpk.Policy.parse(f"{policy},output={case.dtype}"))
        return layers

    def implementation(
        name: str, model: nn.Module, narrow: torch.dtype | None = None, switch=contextlib.nullcontext
    ) -> Implementation:
        """narrow: what autocast computes in."""
        autocast = contextlib.nullcontext if narrow is None else functools.partial(torch.autocast, device.type, narrow)
        run = _run(model.to(device), x, grad_out, autocast, switch)

        def check() -> dict:
            if slow := limits.too_slow(device, narrow or torch.float32, "both", flops):
                raise Missing(slow)
            # The output's alone: gradients also differ where a ReLU's input changes sign, by rounding anywhere.
            error = ((run()[0].double() - exact).norm() / exact.norm()).item()
            errors.setdefault(name, error)
            if name == LAYERS:
                bounds.check_no_farther(errors[OURS], error)
            check_peer(torch.tensor(1 + error), torch.tensor(1.0))
            return {"relative_error": error}

        gemm = "bfloat16" if "bf16" in name else "float32" if "fp32" in name else case.dtype
        return Implementation(run, check, flops=flops, gemm=gemm)

    f16, bf16 = torch.float16, torch.bfloat16
    fused = lambda: mpk.MPMLP.from_sequential(network(case), policy)
    found = {OURS: implementation(OURS, fused()), LAYERS: implementation(LAYERS, one_by_one())}
    found["torch fp32"] = implementation("torch fp32", network(case))
    if device.type == "cpu":
        found["torch fp32, oneDNN"] = implementation("torch fp32, oneDNN", network(case), switch=onednn_fp32)
    for label, narrow in (("fp16", f16), ("bf16", bf16)):
        name = f"torch autocast {label}"
        found[name] = implementation(name, network(case), narrow)
        if case.compiled:
            found[f"{name}, compiled"] = implementation(f"{name}, compiled", torch.compile(network(case)), narrow)
    return with_forced(found, lambda: implementation(OURS, fused()), "linear_act", device)


def _run(model, x, grad_out, autocast, switch):
    def run():
        """The output and the gradients of the weights."""
        with autocast(), switch():
            out = model(x)
            out.backward(grad_out.to(out.dtype))
        parameters = list(model.parameters())
        result = [out.detach(), *(p.grad for p in parameters)]
        for p in parameters:
            p.grad = None
        return result

    return run
