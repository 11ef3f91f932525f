# SPDX-License-Identifier: Apache-2.0
"""Every op of a backend at a few small sizes, for compute-sanitizer: `python -m bench.sanitize triton [cpu]`.

linear_act and its backward at partial tiles, the previous layer's pass in the epilogue included, then each op's cases.
"""

import sys

import torch

from mpkernels.ops.linear_act import Activation, backward_op, forward_op
from mpkernels.ops.linear_act.epilogues import empty_mask
from mpkernels.runtime import resolve
from mpkernels.testing import checks

SHAPES = ((136, 264, 72), (40, 520, 200))  # M, N, K: partial tiles, several of them


def main(backend: str, device: str = "cuda") -> None:
    device = torch.device(device)
    for M, N, K in SHAPES:
        linear_acts(backend, device, M, N, K)
    for op in resolve.ops.values():
        reason = op.why_not(backend, device, torch.float32)
        reason = reason and op.why_not(backend, device, torch.float16)
        wrong = None if reason else checks.wrong(op, backend, device)
        if wrong is not None:
            raise SystemExit(f"{op.name}: {wrong}")
        print(f"{backend}: {op.name}: {reason or 'done'}")


def linear_acts(backend: str, device: torch.device, M: int, N: int, K: int) -> None:
    """Forward and backward in float16, and backward once more with what the layer below has its epilogue do."""
    f16, f32, relu = torch.float16, torch.float32, int(Activation.RELU)
    x, weight, grad_out = (torch.randn(shape, device=device).to(f16) for shape in ((M, K), (N, K), (M, N)))
    bias, below = torch.randn(N, device=device), empty_mask(x, M, K).fill_(-1)
    _, saved, _ = forward_op.function(backend)(x, weight, bias, None, relu, f16, f16, 1)
    arguments = (grad_out, x, weight, None, saved, relu, f16, f16, f16, f32, [True] * 3)
    for more in ((), (below, relu, f32)):
        backward_op.function(backend)(*arguments, *more)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
