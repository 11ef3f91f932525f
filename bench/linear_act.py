# SPDX-License-Identifier: Apache-2.0
"""linear_act on the CPU, forward and backward, against what torch can do with the same fp16 tensors.

python -m bench.linear_act [--rounds 9]     one thread, process time; prints one JSON row per case and contender
"""

import torch
import torch.nn.functional as F

from bench.rows import main
from bench.timing import interleave, ratio, summary
from mpkernels.ops.linear_act import Activation, linear_act, reference

SHAPES = ((64, 784, 512), (256, 1024, 1024), (512, 1024, 4096), (1, 4096, 4096))
HALF = torch.float16


def forward_contenders(M, K, N):
    """fp16 storage, fp32 arithmetic; the baseline is what oneDNN does with fp32 copies of the same tensors."""
    x, weight, bias = torch.randn(M, K).half(), torch.randn(N, K).half(), torch.randn(N).half()
    pointwise = torch.ops.mkldnn._linear_pointwise

    def ours():
        return linear_act(x, weight, bias, activation=Activation.RELU, compute_dtype=HALF, out_dtype=HALF)

    expected = reference.linear_act(x, weight, bias, Activation.RELU, HALF)
    error = (ours().double() - expected).norm() / (expected.half().double() - expected).norm()
    assert error < 1.001, f"forward is {error} times the best rounding away from fp64"
    contenders = {
        "mpkernels": ours,
        "oneDNN on fp32 copies": lambda: pointwise(x.float(), weight.float(), bias.float(), "relu", [], "").half(),
        "MKL on fp32 copies": lambda: F.linear(x.float(), weight.float(), bias.float()).relu_().half(),
    }
    if M <= 64:
        contenders["torch fp16"] = lambda: F.linear(x, weight, bias).relu_()
    return contenders, "oneDNN on fp32 copies"


def backward_contenders(M, K, N):
    """All three gradients; the baseline upcasts and multiplies with torch.mm (MKL)."""
    x, weight, out = torch.randn(M, K).half(), torch.randn(N, K).half(), torch.randn(M, N).half().relu_()
    grad_out = torch.randn(M, N).half()
    op = torch.ops.mpkernels.linear_act_backward

    def ours():
        return op(grad_out, x, weight, None, out, int(Activation.RELU), HALF, HALF, HALF, HALF, [True] * 3)

    def upcast_mkl():
        grad_z = torch.ops.aten.threshold_backward(grad_out, out, 0).float()
        return (grad_z @ weight.float()).half(), (grad_z.t() @ x.float()).half(), grad_z.sum(0).half()

    return {"mpkernels": ours, "MKL on fp32 copies": upcast_mkl}, "MKL on fp32 copies"


def rows(rounds: int):
    """One row per case and contender, ratios to the baseline taken within a round."""
    for direction, make in (("forward", forward_contenders), ("backward", backward_contenders)):
        for M, K, N in SHAPES:
            contenders, baseline = make(M, K, N)
            times = interleave(contenders, rounds)
            for name in contenders:
                yield {
                    "case": f"linear_act {direction} M={M} K={K} N={N} fp16", "contender": name, "baseline": baseline,
                    **summary(times[name]), "ratio": ratio(times, name, baseline),
                }  # fmt: skip


if __name__ == "__main__":
    main(__doc__.splitlines()[0], rows, rounds=9)
