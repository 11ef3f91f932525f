# SPDX-License-Identifier: Apache-2.0
"""quantize in C++ on the CPU: scale = the least 2^k with max |x| / 2^k <= the format's largest, q = round(x / scale)."""

import torch

from mpkernels.ops.quantize import FORMATS, QuantizeCall, empty
from mpkernels.runtime import native


def quantize(call: QuantizeCall):
    q, scale = empty(call)
    if not q.numel():
        return q, scale.fill_(1)
    native.ops.quantize(call.x.contiguous(), *call.matrix, FORMATS[call.dtype].mantissa, q.view(torch.uint8), scale)
    return q, scale
