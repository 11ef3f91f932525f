# SPDX-License-Identifier: Apache-2.0
"""A matrix in eight bits with a scale per row: ours, which is a power of two, against a scale and a cast in torch."""

import torch

from bench.cases import Quantize
from bench.implementation import OURS, Implementation, check_peer, with_forced
from mpkernels.functional import dequantize, quantize
from tests import bounds

E4M3 = torch.float8_e4m3fn


def by_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As torchao's row-wise recipes: the largest magnitude of a row becomes the format's."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(E4M3).max
    return (x / scale).to(E4M3), scale


def implementations(case: Quantize, device: torch.device) -> dict[str, Implementation]:
    x = torch.randn(case.rows, case.columns, device=device)
    moved = x.numel() * (x.itemsize + 1) + 4 * case.rows
    compiled = torch.compile(by_torch)

    def ours() -> Implementation:
        run = lambda: quantize(x, E4M3, -1)

        def check() -> dict:
            q, scale = run()
            bounds.check_quantized(dequantize(q, scale), x, scale, E4M3)
            return {}

        return Implementation(run, check, bytes=moved)

    def peer(function) -> Implementation:
        run = lambda: function(x)

        def check() -> dict:
            check_peer(dequantize(*run()), x.double())
            return {}

        return Implementation(run, check, bytes=moved)

    found = {OURS: ours(), "torch amax and cast": peer(by_torch), "torch amax and cast, compiled": peer(compiled)}
    return with_forced(found, ours, "quantize", device)
