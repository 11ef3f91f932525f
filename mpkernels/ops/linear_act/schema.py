# SPDX-License-Identifier: Apache-2.0
"""The two ops, linear_act and its backward: their schemas, and what implements them."""

import functools

import torch

from mpkernels.ops.linear_act import checks, flops
from mpkernels.ops.linear_act.call import BackwardCall, CallKey, ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.runtime.op import Implementation, Op
from mpkernels.runtime.tuned_table import GemmKey

_PACKAGE = __package__
_IMPLEMENTATIONS = (
    Implementation("native", ("cpu",), module="cpu"),
    Implementation("native", ("cuda",), module="sm90", sm=90, saves_mask=True),
    Implementation("eager", ("cpu", "cuda")),
    Implementation("triton", ("cuda", "cpu"), saves_mask=True),
)
_PARTS = {"linear_act": torch.float16, "linear_act 8-bit": torch.float8_e4m3fn}
_PARTS_BACKWARD = {"linear_act_backward": torch.float16}


def _part_of(parts: dict[str, torch.dtype], key: CallKey) -> str | None:
    """Cases of a proof have no activation or a ReLU: see mpkernels/testing/linear_act_cases.py and scaled_cases.py."""
    alike = (part for part, dtype in parts.items() if dtype.itemsize == key.dtype.itemsize)
    return next(alike, None) if key.activation <= Activation.RELU else None


forward_op = Op(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, Tensor? weight_copy, int activation, ScalarType compute_dtype, "
    "ScalarType out_dtype, int save, bool batch_invariant=False, ScalarType? grad_dtype=None, "
    "bool activation_grad_fused=False, Tensor? prev_saved=None, int prev_activation=0, Tensor? prev_bias=None, "
    "Tensor? x_scale=None, Tensor? weight_scale=None, ScalarType? saved_dtype=None) "
    "-> (Tensor out, Tensor saved, Tensor x_compute)",
    _PACKAGE,
    _IMPLEMENTATIONS,
    call=ForwardCall,
    key=CallKey,
    check=checks.check_forward,
    fake=checks.fake_forward,
    fill=checks.fill_forward,
    parts=_PARTS,
    part_of=functools.partial(_part_of, _PARTS),
)
backward_op = Op(
    "linear_act_backward(Tensor grad_out, Tensor? x, Tensor weight, Tensor? weight_copy, Tensor? saved, int activation, "
    "ScalarType compute_dtype, ScalarType grad_x_dtype, ScalarType grad_weight_dtype, ScalarType grad_bias_dtype, "
    "bool[3] output_mask, Tensor? prev_saved=None, int prev_activation=0, ScalarType? grad_prev_bias_dtype=None) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_prev_bias)",
    _PACKAGE,
    _IMPLEMENTATIONS,
    call=BackwardCall,
    key=CallKey,
    check=checks.check_backward,
    fake=checks.fake_backward,
    fill=checks.fill_backward,
    parts=_PARTS_BACKWARD,
    part_of=functools.partial(_part_of, _PARTS_BACKWARD),
)
flops.register()


def op_of(key: GemmKey) -> Op:
    """The op that a key of a tuned table is about."""
    return forward_op if key[0] == "fprop" else backward_op
