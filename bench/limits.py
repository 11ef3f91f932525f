# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured in the run: bytes per second and multiply-adds per second."""

import functools
import time

import torch
import torch.nn.functional as F

from bench.implementation import Implementation
from bench.timing import Clock, interleave

CPU_STREAM, CPU_GEMM, GPU_STREAM, GPU_GEMM = 1 << 25, (1024,), 1 << 29, (4096, 8192)  # elements; widths
PROBE = (256, 1024, 1024)  # M, K, N
ENDURED = 3.5  # seconds that a call of a peer may take
NOTHING = 10**9  # operations that even the slowest CPU does sooner


def measure(device: torch.device, clock: Clock) -> dict:
    """{"gb_s": ..., "tflop_s": {dtype: ...}}: the better of a copy and of an update in place; the best torch GEMM.

    On a CPU 16-bit operands can be multiplied in fp32: that is their limit, too, where it is the higher one.
    """
    on_gpu = device.type == "cuda"
    count = GPU_STREAM if on_gpu else CPU_STREAM
    a, b = torch.ones(count, device=device), torch.ones(count, device=device)
    streams = {"copy": Implementation(lambda: b.copy_(a)), "in place": Implementation(lambda: torch._foreach_mul_([a, b], 1.0))}
    times = interleave([streams], clock, 1.0)
    rates = {"copy": 8 * count / times["copy"].median, "in place": 16 * count / times["in place"].median}
    tflop_s = {
        str(dtype).removeprefix("torch."): max(_gemm(n, dtype, device, clock) for n in (GPU_GEMM if on_gpu else CPU_GEMM))
        for dtype in (torch.float32, torch.bfloat16, *((torch.float16,) if on_gpu else ()))
    }
    if not on_gpu:
        tflop_s["bfloat16"] = max(tflop_s["bfloat16"], tflop_s["float32"])
        tflop_s["float16"] = tflop_s["float32"]
    return {"gb_s": max(rates.values()) / 1e3, "copy_gb_s": rates["copy"] / 1e3, "tflop_s": tflop_s}


def _gemm(width: int, dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    implementations = {"torch": Implementation(lambda: F.linear(a, b))}
    onednn = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    if device.type == "cpu":
        try:
            onednn()
            implementations["oneDNN"] = Implementation(onednn)
        except RuntimeError:  # it has no bf16 for a CPU without instructions for it
            pass
    times = interleave([implementations], clock, 1.0)
    return max(2 * width**3 / each.median for each in times.values()) / 1e6


def roof_us(implementation: Implementation, limits: dict) -> float:
    """The least time that the machine could take for what the implementation moves and computes; 0 where nothing is counted."""
    return max(implementation.bytes / limits["gb_s"] / 1e3, implementation.flops / limits["tflop_s"][implementation.gemm] / 1e6)


@functools.cache
def _seconds_per_flop(dtype: torch.dtype, direction: str) -> float:
    """Of torch's own linear on this CPU, where one without instructions for a dtype is up to a hundred times slower."""
    M, K, N = PROBE
    x, weight = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((M, K), (N, K)))
    grad_out = torch.ones(M, N, dtype=dtype)

    def seconds() -> float:
        out = F.linear(x, weight)
        start = time.process_time()
        if direction == "forward":
            F.linear(x, weight)
        else:
            torch.autograd.grad(out, (x, weight), grad_out)
        return time.process_time() - start

    products = 1 if direction == "forward" else 2
    return min(seconds() for _ in range(2)) / (products * 2 * M * K * N)


def too_slow(device: torch.device, dtype: torch.dtype, direction: str, flops: int) -> str | None:
    """Why torch's own arithmetic in `dtype` is not waited for, or None. direction: forward, or what has a backward in it."""
    if device.type != "cpu" or flops < NOTHING:
        return None
    seconds = flops * _seconds_per_flop(dtype, "forward" if direction == "forward" else "backward")
    return f"would take {seconds:.0f} s a call on this CPU" if seconds > ENDURED else None
