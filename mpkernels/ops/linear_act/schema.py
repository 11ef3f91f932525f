# SPDX-License-Identifier: Apache-2.0
"""The two ops, linear_act and its backward: their schemas, the shapes of their results, and what implements them."""

import functools

import torch

from mpkernels.ops.linear_act import flops
from mpkernels.ops.linear_act.call import BackwardCall, CallKey, ForwardCall, check_backward, check_forward
from mpkernels.ops.linear_act.epilogues import Activation, empty_saved
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


# ----- results ---------------------------------------------------------------


def fake_forward(call: ForwardCall):
    x, columns = call.x, call.weight.shape[0]
    saved = empty_saved(x, columns, call.activation if call.save else Activation.NONE, call.preactivation_dtype)
    if x.dtype == call.compute_dtype:
        x_compute = x.new_empty(0)
    else:
        x_compute = torch.empty_like(x, dtype=call.compute_dtype)  # a cast keeps the order of memory: transposed stays so
    return x.new_empty((*x.shape[:-1], columns), dtype=call.out_dtype), saved, x_compute


def fake_backward(call: BackwardCall):
    grad_out, (N, K) = call.grad_out, call.weight.shape
    shapes = ((*grad_out.shape[:-1], K), (N, K), (N,), (K,))
    wanted = (*call.output_mask, call.grad_prev_bias_dtype is not None)
    return fill_backward(
        call,
        tuple(
            grad_out.new_empty(shape, dtype=dtype) if want else None
            for shape, dtype, want in zip(shapes, _grad_dtypes(call), wanted, strict=True)
        ),
    )


def fill_forward(call: ForwardCall, results):
    """With what the schema says where nothing was saved, and x was not cast."""
    out, saved, x_compute = results
    if saved is None:
        saved = call.x.new_empty(0, dtype=torch.int32)
    return out, saved, call.x.new_empty(0) if x_compute is None else x_compute


def fill_backward(call: BackwardCall, results):
    """With tensors of size 0 for the gradients that are not wanted."""
    return tuple(
        call.grad_out.new_empty(0, dtype=dtype) if grad is None else grad
        for grad, dtype in zip(results, _grad_dtypes(call), strict=True)
    )


def _grad_dtypes(call: BackwardCall) -> tuple[torch.dtype | None, ...]:
    return call.grad_x_dtype, call.grad_weight_dtype, call.grad_bias_dtype, call.grad_prev_bias_dtype


# ----- the ops ---------------------------------------------------------------

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
    check=check_forward,
    fake=fake_forward,
    fill=fill_forward,
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
    check=check_backward,
    fake=fake_backward,
    fill=fill_backward,
    parts=_PARTS_BACKWARD,
    part_of=functools.partial(_part_of, _PARTS_BACKWARD),
)
flops.register()


def op_of(key: GemmKey) -> Op:
    """The op that a key of a tuned table is about."""
    return forward_op if key[0] == "fprop" else backward_op
