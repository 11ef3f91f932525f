# SPDX-License-Identifier: Apache-2.0
"""How quantize lies on a DTensor's mesh: by every dimension but the one that is reduced away.

Imported, and thereby registered, at the first DTensor. Source: torch.distributed.tensor.experimental.register_sharding.
"""

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from mpkernels.ops.quantize import QuantizeCall


@register_sharding(torch.ops.mpkernels.quantize.default)
def _quantize(*args):
    call = QuantizeCall(*args)
    dims, others = len(call.x.shape), [None] * (len(args) - 1)
    kept = [dim for dim in range(dims) if call.axis is not None and dim != call.axis % dims]
    return [([placement] * 2, [placement, *others]) for placement in (Replicate(), *map(Shard, kept))]
