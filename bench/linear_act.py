# SPDX-License-Identifier: Apache-2.0
"""linear_act with ReLU against what torch makes of the same 16-bit tensors, forward, backward and both.

All get the same random x, weight, bias and grad_out, in tensors of their own. Backward runs on a graph that is kept,
so that a peer who casts has its casts from forward. A row with a large weight is a read of that weight, whose time follows
the place of the weight in memory: all read the same few copies, at random.
"""

import contextlib
import functools
import random

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config

from bench import limits
from bench.cases import LinearAct
from bench.implementation import OURS, Implementation, Missing, check_peer, numerics, package, sample, with_forced
from mpkernels.ops.linear_act import Activation, linear_act, reference
from tests import bounds


@contextlib.contextmanager
def onednn_fp32():
    """Send torch's fp32 GEMMs to oneDNN. NOTE: on a CPU with AMX this means bf16; the error column shows it."""
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


# ----- what computes out from x, weight, bias ---------------------------------------------------------------


def ours(x, weight, bias):
    return linear_act(x, weight, bias, activation=Activation.RELU, compute_dtype=weight.dtype, out_dtype=weight.dtype)


def torch_linear(x, weight, bias):
    return F.linear(x, weight, bias).relu()


def upcast_mkl(x, weight, bias):
    return F.linear(x.float(), weight.float(), bias.float()).relu().to(x.dtype)


def upcast_onednn(x, weight, bias):
    with onednn_fp32():
        return upcast_mkl(x, weight, bias)


def upcast_onednn_fused(x, weight, bias):
    out = torch.ops.mkldnn._linear_pointwise(x.float(), weight.float(), bias.float(), "relu", [], "")
    return out.to(x.dtype)


def fp32_onednn(x, weight, bias):
    with onednn_fp32():
        return torch_linear(x, weight, bias)


def addmm_activation(x, weight, bias):
    return torch._addmm_activation(bias, x, weight.t())


def autocast(x, weight, bias):
    with torch.autocast(x.device.type, x.dtype):
        return torch_linear(x, weight, bias)


@functools.cache
def compiled(mode: str):
    functorch_config.donated_buffer = False  # the graph is kept from round to round
    return torch.compile(torch_linear, mode=mode, dynamic=False)


@package
def quack(x, weight, bias):
    """Dao-AILab's CuTe kernels."""
    from quack.gemm_interface import gemm_act

    return gemm_act(x, weight.t(), bias=bias, activation="relu", store_preact=False)[1]


@package
def apex(x, weight, bias):
    """NVIDIA's MLP of one layer, by cuBLASLt's epilogues."""
    from apex.mlp.mlp import mlp_function

    return mlp_function(True, 1, x, weight, bias)  # bias, ReLU


@package
def transformer_engine(x, weight, bias):
    """NVIDIA's linear, which has no ReLU of its own."""
    from transformer_engine.pytorch import Linear

    N, K = weight.shape
    module = _once(Linear, K, N, params_dtype=weight.dtype, device=str(weight.device))
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,)).relu()


@functools.cache
def _once(module, *args, **kwargs):
    return module(*args, **kwargs)


PACKAGES = {"quack": (quack, ("forward",)), "Apex": (apex, ()), "Transformer Engine": (transformer_engine, ())}


def functions(case: LinearAct, device: torch.device) -> dict[str, tuple]:
    """name: (function, dtype of x, dtype of weight and bias, what torch's own GEMM is asked to multiply in)."""
    D, f32, bf16 = getattr(torch, case.dtype), torch.float32, torch.bfloat16
    forward = case.direction == "forward"
    found = {OURS: (ours, D, D, f32)}
    if device.type == "cpu":
        found["oneDNN on fp32 copies"] = (upcast_onednn, D, D, f32)
        if forward:
            found["oneDNN on fp32 copies, ReLU fused"] = (upcast_onednn_fused, D, D, f32)
        found["MKL on fp32 copies"] = (upcast_mkl, D, D, f32)
        found["fp32, oneDNN"] = (fp32_onednn, f32, f32, f32)
    found[f"torch {case.dtype}"] = (torch_linear, D, D, D)
    if forward:
        found["torch _addmm_activation"] = (addmm_activation, D, D, D)
    found["torch autocast"] = (autocast, D, f32, D)
    if bf16 != D:
        found["torch bfloat16"] = (torch_linear, bf16, bf16, bf16)
    for mode in case.compiled:
        found[f"torch.compile {mode}"] = (compiled(mode), D, D, D)
    for name, (function, directions) in PACKAGES.items():
        if not directions or case.direction in directions:
            found[name] = (function, D, D, f32)
    return found


# ----- implementations ---------------------------------------------------------------


def tensors(case: LinearAct, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, grad_out in the dtype of the case."""
    shapes = ((case.M, case.K), (case.N, case.K), (case.N,), (case.M, case.N))
    return tuple(torch.randn(shape, device=device).to(getattr(torch, case.dtype)) for shape in shapes)


PLACES, LARGE = 4, 1 << 22  # copies of the operands, from so many elements of a weight that one row is multiplied with


def implementations(case: LinearAct, device: torch.device) -> dict[str, Implementation]:
    given, copies = tensors(case, device), {}

    def of(name: str) -> Implementation:
        function, x_dtype, weight_dtype, multiplied = functions(case, device)[name]
        dtypes = x_dtype, weight_dtype, weight_dtype
        make = lambda: tuple(t.to(dtype, copy=True) for t, dtype in zip(given, dtypes, strict=False))
        if case.direction == "forward" and case.M == 1 and case.K * case.N >= LARGE:
            operands = copies.setdefault(dtypes, [])
            operands += [make() for _ in range(PLACES - len(operands))]
        else:
            operands = [make()]
        return implementation(case, given, operands, function, x_dtype, multiplied, ours=name == OURS)

    return with_forced({name: of(name) for name in functions(case, device)}, lambda: of(OURS), "linear_act", device)


def implementation(case, given, operands, function, x_dtype, multiplied, ours) -> Implementation:
    """operands: one x, weight and bias, or of a forward several copies of them."""
    inputs, x = operands[0], operands[0][0]
    needs_grad = case.direction != "forward"
    products = {"forward": 1, "backward": 2, "both": 3}[case.direction]
    flops = products * 2 * case.M * case.K * case.N
    for tensor in inputs:
        tensor.requires_grad_(needs_grad)
    kept = None

    def run():
        """out, or the gradients."""
        nonlocal kept
        if not needs_grad:
            return function(*inputs)
        out = function(*inputs) if kept is None or case.direction == "both" else kept
        kept = out if case.direction == "backward" else None
        grad_out = given[3].to(out.dtype) if given[3].dtype != out.dtype else given[3]
        return torch.autograd.grad(out, inputs, grad_out, retain_graph=case.direction == "backward")

    def check() -> dict:
        if slow := limits.too_slow(x.device, multiplied, case.direction, flops):
            raise Missing(slow)
        out = function(*inputs).detach()
        return _check(given, out, run() if needs_grad else None, ours)

    run_any = run if len(operands) == 1 else lambda: function(*random.choice(operands))
    gemm = "bfloat16" if x_dtype == torch.bfloat16 else "float32" if x_dtype == torch.float32 else case.dtype
    return Implementation(run_any, check, _bytes(case), flops, gemm)


def _bytes(case: LinearAct) -> int:
    """Inputs once and outputs once, 16 bits each: the least for all."""
    x, weight, out = case.M * case.K, case.N * case.K, case.M * case.N
    forward, backward = x + weight + out, 2 * out + 2 * x + 2 * weight
    return 2 * {"forward": forward, "backward": backward, "both": forward + backward}[case.direction]


def _check(given, out, grads, ours: bool) -> dict:
    """Error against fp64 of what was given, in sampled rows of out and grad_x and sampled columns of grad_weight."""
    x, weight, bias, grad_out = given
    dtype, (M, K), N = x.dtype, x.shape, weight.shape[0]
    acc_roundoff = bounds.accumulator_roundoff(out.device, dtype)
    rows, columns = sample(M, K * N).to(x.device), sample(N, K * M).to(x.device)
    positive = ~(out <= 0)
    if grads is None:
        exact = [reference.linear_act(x[rows], weight, bias, Activation.RELU, dtype)]
        got = [out[rows]]
        if ours:
            bounds.check_forward(got[0], x[rows], weight, bias, Activation.RELU, dtype, acc_roundoff, random_sign=True)
    else:
        grad_x, grad_weight, grad_bias = grads
        of_rows = (grad_out[rows], x[rows], weight, positive[rows], dtype)
        of_columns = (grad_out[:, columns], x, weight[columns], positive[:, columns], dtype)
        exact = [reference.linear_act_backward(*of_rows)[0], *reference.linear_act_backward(*of_columns)[1:]]
        got = [grad_x[rows], grad_weight[columns], grad_bias[columns]]
        if ours:
            bounds.check_backward((got[0], None, None), *of_rows, acc_roundoff, random_sign=True)
            bounds.check_backward((None, *got[1:]), *of_columns, acc_roundoff, random_sign=True)
    for g, e in zip(got, exact, strict=True):
        if not ours:
            check_peer(g, e)
    found = [numerics(g, e, dtype) for g, e in zip(got[:2], exact[:2], strict=True)]
    return {
        "error_to_best": max(f["error_to_best"] for f in found),
        "correctly_rounded": min(f["correctly_rounded"] for f in found),
    }
