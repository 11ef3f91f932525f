# SPDX-License-Identifier: Apache-2.0
"""linear_act in ATen, for graphs that leave this package: out = round(act(x @ weight.T + bias))."""

import math

import torch
import torch.nn.functional as F

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act.call import ForwardCall
from mpkernels.ops.linear_act.epilogues import EPILOGUES, acc_dtype, pack_mask


def linear_act(*args):
    """The op's three results. Operands are rounded to compute_dtype, then multiplied and summed in the accumulator's dtype."""
    call = ForwardCall(*args)
    if call.is_scaled:
        raise NotImplementedError("linear_act: 8-bit operands have no decomposition in ATen")
    x, compute_dtype, acc, epilogue = call.x, call.compute_dtype, acc_dtype(call.compute_dtype), EPILOGUES[call.activation]
    x_compute, weight = cast(x, compute_dtype), cast(call.operand, compute_dtype)
    z = F.linear(x_compute.to(acc), weight.to(acc))
    if call.bias is not None:
        z = z + call.bias.to(acc)
    out = cast(epilogue.graph(z), call.out_dtype)
    saved = x.new_empty(0, dtype=torch.int32)
    if call.save and epilogue.saves != "nothing":
        rows = lambda t: t.reshape(math.prod(x.shape[:-1]), weight.shape[0])
        saved = pack_mask(rows(out)) if epilogue.saves == "mask" else cast(rows(z), compute_dtype)
    return out, saved, x_compute if x.dtype != compute_dtype else x.new_empty(0)
