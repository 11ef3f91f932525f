# SPDX-License-Identifier: Apache-2.0
"""How linear_act lies on a DTensor's mesh: by rows of x, by columns of out, or by K where nothing follows the sum.

Imported, and thereby registered, at the first DTensor. Source: torch.distributed.tensor.experimental.register_sharding.
"""

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation


def check(weight, bias, activation, out_dtype) -> None:
    """Raise RuntimeError for row-parallel layers of which the parts cannot be summed afterwards."""
    if not any(placement.is_shard(1) for placement in weight.placements):
        return
    if bias is not None:
        reason = "a bias, which every rank would add"
    elif activation != Activation.NONE:
        reason = "an activation, which is not that of the parts' sum"
    elif out_dtype.itemsize == 2:
        reason = f"an output in {out_dtype}, to which every part would be rounded"
    else:
        return
    raise RuntimeError(f"linear_act: weight is sharded by in_features (row-parallel), which cannot have {reason}")


def _listed(generate):
    return lambda *args: list(generate(*args))


@register_sharding(torch.ops.mpkernels.linear_act.default)
@_listed
def _forward(*args):
    call = ForwardCall(*args)
    if call.is_scaled:
        raise NotImplementedError("linear_act: 8-bit operands cannot be DTensors")
    last = len(call.x.shape) - 1
    masked = call.save and call.activation != Activation.NONE
    cast = call.x.tensor_meta.dtype != call.compute_dtype

    def placed(out, saved, x_at, weight_at, bias_at):
        outputs = [out, saved if masked else Replicate(), x_at if cast else Replicate()]
        return outputs, [x_at, weight_at, call.bias and bias_at, call.weight_copy and weight_at]

    yield placed(Replicate(), Replicate(), Replicate(), Replicate(), Replicate())
    for dim in range(min(last, 1) if masked else last):  # rows of a mask are those of the flattened x
        yield placed(Shard(dim), Shard(0), Shard(dim), Replicate(), Replicate())
    yield placed(Shard(last), Shard(1), Replicate(), Shard(0), Shard(0))
    if call.bias is None and call.activation == Activation.NONE and call.out_dtype.itemsize > 2:
        yield placed(Partial(), Replicate(), Shard(last), Shard(1), None)


@register_sharding(torch.ops.mpkernels.linear_act_backward.default)
@_listed
def _backward(*args):
    call = BackwardCall(*args)
    last, saved = len(call.grad_out.shape) - 1, call.saved
    by_mask = saved is not None and saved.tensor_meta.dtype == torch.int32

    def placed(grads, grad_out_at, saved_at, x_at, weight_at):
        outputs = [at if wanted else Replicate() for at, wanted in zip(grads, call.output_mask, strict=True)]
        inputs = [grad_out_at, call.x and x_at, weight_at, call.weight_copy and weight_at, saved and saved_at]
        return [*outputs, Replicate()], inputs

    yield placed([Replicate()] * 3, *[Replicate()] * 4)
    for dim in range(min(last, 1) if by_mask else last):
        yield placed([Shard(dim), Partial(), Partial()], Shard(dim), Shard(dim), Shard(dim), Replicate())
    yield placed([Partial(), Shard(0), Shard(0)], Shard(last), Shard(1 if by_mask else last), Replicate(), Shard(0))
    if call.activation == Activation.NONE:
        yield placed([Shard(last), Shard(1), Replicate()], Replicate(), Replicate(), Shard(last), Shard(1))
