# SPDX-License-Identifier: Apache-2.0
"""The errors for a call of linear_act that does not fit, and the shapes of the results of one that does.

The slow path: on the fast one a call's `is_valid` has found nothing.
"""

import math

import torch

from mpkernels.ops.common.cast import DTYPES, FLOAT8_DTYPES
from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall, fits
from mpkernels.ops.linear_act.epilogues import Activation, empty_saved


def check_forward(call: ForwardCall) -> None:
    """Raise RuntimeError for what does not fit."""
    op, x, weight = "linear_act", call.x, call.weight
    if call.x_scale is None and call.weight_scale is None:
        tensors = {"bias": call.bias, "weight_copy": call.weight_copy, "prev_bias": call.prev_bias}
        check_tensors(op, x=x, weight=weight, **tensors)
        _check_devices(op, x=x, weight=weight, **tensors)
        _check_dtypes(op, compute_dtype=call.compute_dtype, out_dtype=call.out_dtype)
        if call.saved_dtype not in (None, *FLOAT8_DTYPES):
            raise RuntimeError(f"{op}: saved_dtype must be {_listed(FLOAT8_DTYPES)}, got {call.saved_dtype}")
    else:
        _check_scaled(op, call)
    _check_weight(op, call)
    N, K = weight.shape
    if not x.dim():
        raise RuntimeError(f"{op}: x must have shape (*, K), got a 0-d tensor")
    if x.shape[-1] != K:
        raise RuntimeError(f"{op}: x has last dimension {x.shape[-1]}, weight expects {K}")
    for name, scale, operand in (("x_scale", call.x_scale, x), ("weight_scale", call.weight_scale, weight)):
        by_row = (*operand.shape[:-1], 1)
        if scale is not None and scale.shape not in ((), by_row):
            raise RuntimeError(f"{op}: {name} must have shape {by_row} or (), got {tuple(scale.shape)}")
    if call.bias is not None and call.bias.shape != (N,):
        raise RuntimeError(f"{op}: bias must have shape ({N},), got {tuple(call.bias.shape)}")
    _check_activation(op, "activation", call.activation)
    if call.prev_activation != Activation.NONE:
        _check_activation(op, "prev_activation", call.prev_activation)
        _check_saved(op, "prev_saved", call.prev_saved, call.prev_activation, "x", x.shape, x.device)
    if call.prev_bias is not None and call.prev_bias.shape != (K,):
        raise RuntimeError(f"{op}: prev_bias must have shape ({K},), got {tuple(call.prev_bias.shape)}")
    if call.save not in (0, 1):
        raise RuntimeError(f"{op}: save must be 0 or 1, got {call.save}")


def check_backward(call: BackwardCall) -> None:
    """Raise RuntimeError for what does not fit."""
    op, grad_out, x, weight = "linear_act_backward", call.grad_out, call.x, call.weight
    check_tensors(op, grad_out=grad_out, x=x, weight=weight, weight_copy=call.weight_copy)
    _check_devices(op, grad_out=grad_out, x=x, weight=weight, weight_copy=call.weight_copy)
    names = ("compute_dtype", "grad_x_dtype", "grad_weight_dtype", "grad_bias_dtype")
    _check_dtypes(op, **{name: getattr(call, name) for name in names})
    if call.grad_prev_bias_dtype is not None:
        _check_dtypes(op, grad_prev_bias_dtype=call.grad_prev_bias_dtype)
    _check_activation(op, "activation", call.activation)
    _check_activation(op, "prev_activation", call.prev_activation)
    _check_weight(op, call)
    shape, (N, K) = grad_out.shape, weight.shape
    if not shape or shape[-1] != N:
        raise RuntimeError(f"{op}: grad_out must have shape (*, {N}), got {tuple(shape)}")
    if call.output_mask[1] and (x is None or x.dtype != call.compute_dtype or x.shape != (*shape[:-1], K)):
        got = "None" if x is None else f"{tuple(x.shape)} {x.dtype}"
        raise RuntimeError(f"{op}: x must be {(*shape[:-1], K)} {call.compute_dtype}, got {got}")
    if call.activation != Activation.NONE:
        _check_saved(op, "saved", call.saved, call.activation, "the output", shape, grad_out.device)
    if call.prev_activation != Activation.NONE:
        _check_saved(op, "prev_saved", call.prev_saved, call.prev_activation, "x", (*shape[:-1], K), grad_out.device)
    if call.is_fused and not call.output_mask[0]:
        raise RuntimeError(f"{op}: the gradients of the previous layer come out of grad_x: output_mask[0] must be True")


def _check_scaled(op: str, call: ForwardCall) -> None:
    """The tensors of a call with scales, and that nothing is there that it cannot have."""
    x, weight, x_scale, weight_scale = call.x, call.weight, call.x_scale, call.weight_scale
    if x_scale is None or weight_scale is None:
        given, missing = ("weight_scale", "x_scale") if x_scale is None else ("x_scale", "weight_scale")
        raise RuntimeError(f"{op}: {given} is given, {missing} is not: both operands have a scale, or neither")
    check_tensors(op, FLOAT8_DTYPES, x=x, weight=weight)
    check_tensors(op, (torch.float32,), x_scale=x_scale, weight_scale=weight_scale)
    check_tensors(op, bias=call.bias)
    _check_devices(op, x=x, weight=weight, x_scale=x_scale, weight_scale=weight_scale, bias=call.bias)
    _check_dtypes(op, out_dtype=call.out_dtype)
    if call.compute_dtype != x.dtype:
        raise RuntimeError(f"{op}: compute_dtype must be that of an x with a scale, {x.dtype}, got {call.compute_dtype}")
    if call.saved_dtype is not None:
        raise RuntimeError(f"{op}: a call with scales has no backward and no saved_dtype")
    if call.weight_copy is not None:
        raise RuntimeError(f"{op}: a weight with a scale has no weight_copy")
    if call.activation_grad_fused or call.prev_activation or call.prev_saved is not None or call.prev_bias is not None:
        raise RuntimeError(f"{op}: operands with scales have no fused backward")


def refuse_what_is_no_tensor(**values) -> None:
    """Raise TypeError for the first that is not a tensor; bias may be None."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) and not (value is None and name == "bias"):
            raise TypeError(f"linear_act: {name} must be a Tensor, got {type(value).__name__}")


def check_tensors(op: str, dtypes: tuple[torch.dtype, ...] = DTYPES, /, **tensors: torch.Tensor | None) -> None:
    """That they are dense, and of one of `dtypes`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else f"layout {tensor.layout}"
            advice = "; a nested x may have layout=torch.jagged" if tensor.is_nested else ""
            raise RuntimeError(f"{op}: {name} must be a dense strided tensor, got {kind}{advice}")
        if tensor.dtype not in dtypes:
            advice = ", which needs a scale" if tensor.dtype in FLOAT8_DTYPES and name in ("x", "weight") else ""
            raise RuntimeError(f"{op}: {name} must be {_listed(dtypes)}, got {tensor.dtype}{advice}")


def _check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    there = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    for name, device in there:
        if device != there[0][1]:
            raise RuntimeError(f"{op}: {there[0][0]} is on {there[0][1]} but {name} is on {device}")


def _check_weight(op: str, call: ForwardCall | BackwardCall) -> None:
    weight, copy, compute_dtype = call.weight, call.weight_copy, call.compute_dtype
    if weight.dim() != 2:
        raise RuntimeError(f"{op}: weight must have shape (N, K), got {tuple(weight.shape)}")
    if copy is not None and (copy.shape != weight.shape or copy.dtype != compute_dtype):
        expected = f"{tuple(weight.shape)} {compute_dtype}"
        raise RuntimeError(f"{op}: weight_copy must be {expected}, got {tuple(copy.shape)} {copy.dtype}")


def _check_dtypes(op: str, **dtypes: torch.dtype) -> None:
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise RuntimeError(f"{op}: {name} must be {_listed(DTYPES)}, got {dtype}")


def _listed(dtypes) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def _check_activation(op: str, name: str, activation: int) -> None:
    if activation not in list(Activation):
        known = ", ".join(f"{a:d} ({a.name})" for a in Activation)
        raise RuntimeError(f"{op}: {name} must be one of {known}, got {activation}")


def _check_saved(op: str, name: str, saved, activation: int, what: str, shape: tuple[int, ...], device) -> None:
    """What backward reads of an output of `shape`: a ReLU's mask or that output, called `what`; else the preactivation."""
    if fits(saved, activation, shape, device):
        return
    if saved is not None and fits(saved, activation, shape, saved.device):
        raise RuntimeError(f"{op}: {name} is on {saved.device}, expected {device}")
    rows, columns = math.prod(shape[:-1]), shape[-1]
    expected = f"the preactivation {(rows, columns)}"
    if activation == Activation.RELU:
        expected = f"the mask {(rows, (columns + 31) // 32)} int32 or {what}"
    got = "None" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
    raise RuntimeError(f"{op}: {name} must be {expected}, got {got}")


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
