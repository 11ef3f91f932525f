# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured in the run: bytes per second and multiply-adds per second."""

import statistics

import torch
import torch.nn.functional as F

from bench.contender import Contender
from bench.timing import Clock, interleave

CPU_STREAM, CPU_GEMM, GPU_STREAM, GPU_GEMM = 1 << 25, (1024,), 1 << 29, (4096, 8192)  # elements; widths


def measure(device: torch.device, clock: Clock) -> dict:
    """{"gb_s": ..., "tflop_s": {dtype: ...}}: the better of a copy and of an update in place; the best torch GEMM.

    On a CPU fp16 operands are multiplied in fp32: its limit is that of fp32.
    """
    on_gpu = device.type == "cuda"
    count = GPU_STREAM if on_gpu else CPU_STREAM
    a, b = torch.ones(count, device=device), torch.ones(count, device=device)
    streams = {"copy": Contender(lambda: b.copy_(a)), "in place": Contender(lambda: torch._foreach_mul_([a, b], 1.0))}
    times = interleave([streams], clock, 1.0, (9, 9))
    rates = {
        "copy": 8 * count / statistics.median(times["copy"]),
        "in place": 16 * count / statistics.median(times["in place"]),
    }
    tflop_s = {}
    for dtype in (torch.float32, torch.bfloat16, *((torch.float16,) if on_gpu else ())):
        tflop_s[str(dtype).removeprefix("torch.")] = max(
            _gemm(n, dtype, device, clock) for n in (GPU_GEMM if on_gpu else CPU_GEMM)
        )
    if not on_gpu:
        tflop_s["float16"] = tflop_s["float32"]
    return {"gb_s": max(rates.values()) / 1e3, "copy_gb_s": rates["copy"] / 1e3, "tflop_s": tflop_s}


def _gemm(width: int, dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    contenders = {"torch": Contender(lambda: F.linear(a, b))}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        contenders["oneDNN"] = Contender(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    times = interleave([contenders], clock, 1.0, (5, 15))
    return max(2 * width**3 / statistics.median(each) for each in times.values()) / 1e6


def roof_us(contender: Contender, limits: dict) -> float:
    """The least time that the machine could take for what the contender moves and computes; 0 where nothing is counted."""
    return max(contender.bytes / limits["gb_s"] / 1e3, contender.flops / limits["tflop_s"][contender.gemm] / 1e6)
