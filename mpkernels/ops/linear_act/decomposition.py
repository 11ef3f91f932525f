# SPDX-License-Identifier: Apache-2.0
"""linear_act in ATen, for graphs that leave this package: out = round(act(x @ weight.T + bias))."""

import functools

import torch
import torch.nn.functional as F

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import Activation, acc_dtype
from mpkernels.ops.linear_act.passes import pack_mask

_ACTIVATE = {
    Activation.NONE: lambda z: z,
    Activation.RELU: torch.relu,
    Activation.RELU2: lambda z: torch.relu(z).square(),
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: functools.partial(F.gelu, approximate="tanh"),
    Activation.SILU: F.silu,
}


def linear_act(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, *_):
    """The op's three results. Operands are rounded to compute_dtype, then multiplied and summed in the accumulator's dtype."""
    acc, activation = acc_dtype(compute_dtype), Activation(activation)
    x_compute = cast(x, compute_dtype)
    weight = cast(weight if weight_copy is None else weight_copy, compute_dtype)
    z = F.linear(x_compute.to(acc), weight.to(acc))
    if bias is not None:
        z = z + bias.to(acc)
    out = cast(_ACTIVATE[activation](z), out_dtype)
    saved = x.new_empty(0, dtype=torch.int32)
    if save and activation != Activation.NONE:
        rows = lambda t: t.reshape(-1, weight.shape[0])
        saved = pack_mask(rows(out)) if activation == Activation.RELU else cast(rows(z), compute_dtype)
    return out, saved, x_compute if x.dtype != compute_dtype else x.new_empty(0)
