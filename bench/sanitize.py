# SPDX-License-Identifier: Apache-2.0
"""A forward and backward of linear_act at a few small shapes, for compute-sanitizer: `python -m bench.sanitize triton`."""

import sys

import torch

from mpkernels.ops.linear_act import Activation, backward_op, forward_op
from mpkernels.ops.linear_act.reference import self_check

SHAPES = ((136, 264, 72), (40, 520, 200))  # M, N, K: ragged tiles, several of them


def main(backend: str) -> None:
    device, f16, relu = torch.device("cuda"), torch.float16, int(Activation.RELU)
    for M, N, K in SHAPES:
        x, weight, grad_out = (torch.randn(shape, device=device).to(f16) for shape in ((M, K), (N, K), (M, N)))
        bias = torch.randn(N, device=device)
        _, saved, _ = forward_op.function(backend)(x, weight, bias, None, relu, f16, f16, 1)
        backward_op.function(backend)(grad_out, x, weight, None, saved, relu, f16, f16, f16, torch.float32, [True] * 3)
    torch.cuda.synchronize()
    wrong = self_check(backend, device)
    if wrong is not None:
        raise SystemExit(wrong)
    print(f"{backend}: done")


if __name__ == "__main__":
    main(*sys.argv[1:])
