# SPDX-License-Identifier: Apache-2.0
"""A chain of linears with ReLU between, forward and backward: MPMLP against the layers one by one and against torch."""

import torch
from torch import nn

import mpkernels as mpk
from bench.cases import Mlp
from bench.contender import OURS, Contender, check_peer
from bench.linear_act import onednn_fp32
from tests import bounds


def network(case: Mlp) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(case.layers) for layer in (nn.Linear(case.width, case.width), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def contenders(case: Mlp, device: torch.device) -> dict[str, Contender]:
    dtype = getattr(torch, case.dtype)
    policy = f"mixed_{case.dtype}"
    x, grad_out = (torch.randn(case.M, case.width, device=device).to(dtype).float() for _ in range(2))
    exact = _run(network(case).double(), x.cpu().double(), grad_out.cpu().double())()

    def one_by_one():
        layers = mpk.nn.MPMLP.from_sequential(network(case), policy)
        layers.__class__ = nn.Sequential
        return layers

    models = {OURS: mpk.MPMLP.from_sequential(network(case), policy), "MPLinear, layer by layer": one_by_one()}
    models |= {"torch fp32": network(case), "torch autocast bf16": network(case)}
    runs = {name: _run(model.to(device), x, grad_out) for name, model in models.items()}
    runs["torch autocast bf16"] = _autocast(runs["torch autocast bf16"], device, torch.bfloat16)
    if device.type == "cpu":
        runs["torch fp32, oneDNN"] = _switched(_run(network(case), x, grad_out))
    else:
        runs["torch autocast fp16"] = _autocast(_run(network(case).to(device), x, grad_out), device, torch.float16)
        compiled = torch.compile(network(case).to(device))
        runs["torch autocast fp16, compiled"] = _autocast(_run(compiled, x, grad_out), device, torch.float16)
    errors = {name: _error(run(), exact) for name, run in runs.items()}

    def check(name):
        if name == OURS:
            bounds.check_no_farther(errors[OURS], errors["MPLinear, layer by layer"])
        check_peer(torch.tensor(1 + errors[name]), torch.tensor(1.0))
        return {"relative_error": errors[name]}

    flops = 3 * 2 * case.M * case.width**2 * case.layers
    return {
        name: Contender(run, lambda name=name: check(name), flops=flops, gemm=_gemm(name, case)) for name, run in runs.items()
    }


def _gemm(name: str, case: Mlp) -> str:
    return "bfloat16" if "bf16" in name else "float32" if "fp32" in name else case.dtype


def _run(model, x, grad_out):
    def run():
        """The output and the gradients of the weights."""
        out = model(x)
        out.backward(grad_out.to(out.dtype))
        parameters = list(model.parameters())
        result = [out.detach(), *(p.grad for p in parameters)]
        for p in parameters:
            p.grad = None
        return result

    return run


def _autocast(run, device, dtype):
    def inside():
        with torch.autocast(device.type, dtype):
            return run()

    return inside


def _switched(run):
    def inside():
        with onednn_fp32():
            return run()

    return inside


def _error(got, exact) -> float:
    """The output's error norm, relative: gradients also differ where a ReLU's input changes sign, by rounding anywhere."""
    return ((got[0].cpu().double() - exact[0]).norm() / exact[0].norm()).item()
