# SPDX-License-Identifier: Apache-2.0
"""The calls of linear_act and its backward: the arguments of the schemas by name, what follows from them, and what fits.

Every call pays for the conditions, only one that fails for a message.
"""

import math
from collections.abc import Collection
from typing import NamedTuple, NoReturn

import torch

from mpkernels.ops.common.cast import DTYPES, FLOAT8_DTYPES
from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.runtime.op import PLAIN
from mpkernels.runtime.tuned_table import GemmKey, gemm_key

_DTYPES, _ACTIVATIONS, _RELU, _STRIDED = frozenset(DTYPES), frozenset(map(int, Activation)), int(Activation.RELU), torch.strided
_OF_SCALED = {"x": FLOAT8_DTYPES, "weight": FLOAT8_DTYPES, "x_scale": (torch.float32,), "weight_scale": (torch.float32,)}


class CallKey(NamedTuple):
    """All that the choice of an implementation may depend on. activation: of two the one that fewer implementations have.

    N, K: of the weight; 0 on a CPU, where they decide nothing.
    """

    device: torch.device
    dtype: torch.dtype  # compute_dtype
    out_dtype: torch.dtype | None = None  # None: compute_dtype, in the plainest call there is
    activation: int = Activation.NONE
    N: int = 0
    K: int = 0


class ForwardCall(NamedTuple):
    """A call of `linear_act`. activation_grad_fused and the three after it are of the fused backward: see FusedBackwardLink.

    saved_dtype: what its derivative keeps x and the preactivation in, with scales by row; None: as they are.
    keeps_x: whether x_compute is wanted. Of eager execution alone: it is no argument of the op.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_copy: torch.Tensor | None
    activation: int
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    save: int
    batch_invariant: bool = False
    grad_dtype: torch.dtype | None = None
    activation_grad_fused: bool = False
    prev_saved: torch.Tensor | None = None
    prev_activation: int = 0
    prev_bias: torch.Tensor | None = None
    x_scale: torch.Tensor | None = None
    weight_scale: torch.Tensor | None = None
    saved_dtype: torch.dtype | None = None
    keeps_x: bool = True

    @property
    def is_scaled(self) -> bool:
        """Whether the operands are 8-bit floats that have scales."""
        return self.x_scale is not None

    @property
    def preactivation_dtype(self) -> torch.dtype:
        """What an activation other than ReLU is saved in."""
        return torch.bfloat16 if self.is_scaled else self.compute_dtype

    @property
    def key(self) -> CallKey:
        x = self.x
        if x.is_cuda:
            return CallKey(x.device, self.compute_dtype, self.out_dtype, self.activation, *self.weight.shape)
        return CallKey(x.device, self.compute_dtype, self.out_dtype, self.activation)

    @property
    def gemm_key(self) -> GemmKey | None:
        """None where a table may not decide: with batch_invariant a row's bits would depend on the number of rows."""
        if self.batch_invariant:
            return None
        dtypes = (self.compute_dtype, self.operand.dtype, self.out_dtype)
        return gemm_key("fprop", math.prod(self.x.shape[:-1]), *self.weight.shape, int(self.activation), *dtypes)

    @property
    def operand(self) -> torch.Tensor:
        """The weight as it is multiplied with."""
        return self.weight if self.weight_copy is None else self.weight_copy


class BackwardCall(NamedTuple):
    """A call of `linear_act_backward`; `prev_saved` to `grad_prev_bias_dtype` are of the fused backward: see FusedBackwardLink.

    grad_weight_sum: fp32, contiguous, or None: grad_weight is added to it in place, and None returned in its stead. Of eager
    execution alone: it is no argument of the op, whose results are new tensors.
    """

    grad_out: torch.Tensor
    x: torch.Tensor | None
    weight: torch.Tensor
    weight_copy: torch.Tensor | None
    saved: torch.Tensor | None
    activation: int
    compute_dtype: torch.dtype
    grad_x_dtype: torch.dtype
    grad_weight_dtype: torch.dtype
    grad_bias_dtype: torch.dtype
    output_mask: list[bool]
    prev_saved: torch.Tensor | None = None
    prev_activation: int = 0
    grad_prev_bias_dtype: torch.dtype | None = None
    grad_weight_sum: torch.Tensor | None = None

    @property
    def key(self) -> CallKey:
        grad_out, activation = self.grad_out, max(self.activation, self.prev_activation)
        if grad_out.is_cuda:
            return CallKey(grad_out.device, self.compute_dtype, grad_out.dtype, activation, *self.weight.shape)
        return CallKey(grad_out.device, self.compute_dtype, grad_out.dtype, activation)

    @property
    def gemm_key(self) -> GemmKey:
        dtypes = (self.compute_dtype, self.operand.dtype, self.grad_x_dtype, self.grad_weight_dtype)
        return gemm_key("backward", math.prod(self.grad_out.shape[:-1]), *self.weight.shape, int(self.activation), *dtypes)

    @property
    def operand(self) -> torch.Tensor:
        """The weight as it is multiplied with."""
        return self.weight if self.weight_copy is None else self.weight_copy

    @property
    def is_fused(self) -> bool:
        """Whether it does the activation's backward of the previous layer too, or sums its bias gradient."""
        return bool(self.prev_activation) or self.grad_prev_bias_dtype is not None


class FusedBackwardLink:
    """Between two layers, the next of which alone reads what the previous returns: what its backward does for both.

    The previous layer's forward gets it as `next`, and fills it where a kernel does the next one's dgrad; the next layer's
    gets it as `prev`. Then dgrad's epilogue applies the activation's gradient of the previous layer and sums its bias
    gradient, and the previous layer takes what arrives as its grad_z.
    """

    __slots__ = ("activation", "activation_grad_fused", "bias", "saved")

    def __init__(self):
        self.activation_grad_fused, self.saved, self.activation, self.bias = False, None, Activation.NONE, None

    def fill(self, call: ForwardCall, saved: torch.Tensor) -> None:
        """With a forward that left its activation's gradient to the next layer."""
        self.activation_grad_fused, self.saved = True, saved if call.save else None
        self.activation, self.bias = call.activation, call.bias


# ----- what fits ---------------------------------------------------------------


def check_forward(call: ForwardCall) -> bool:
    """Raise RuntimeError for what does not fit. Whether what is read is plain, so that the dispatcher need not see the call."""
    op, x, weight, bias, copy, prev_bias = "linear_act", call.x, call.weight, call.bias, call.weight_copy, call.prev_bias
    if call.x_scale is not None or call.weight_scale is not None:
        plain = _check_scaled(op, call)
    else:
        plain = _fit(x.device, x, weight, bias, copy, prev_bias)
        if not plain:
            check_tensors(op, x=x, weight=weight, bias=bias, weight_copy=copy, prev_bias=prev_bias)
        if call.compute_dtype not in _DTYPES or call.out_dtype not in _DTYPES:
            _refuse_dtypes(op, compute_dtype=call.compute_dtype, out_dtype=call.out_dtype)
        if call.saved_dtype is not None and call.saved_dtype not in FLOAT8_DTYPES:
            raise RuntimeError(f"{op}: saved_dtype must be {_listed(FLOAT8_DTYPES)}, got {call.saved_dtype}")
    shape, (N, K) = x.shape, _weight_shape(op, call)
    if not shape:
        raise RuntimeError(f"{op}: x must have shape (*, K), got a 0-d tensor")
    if shape[-1] != K:
        raise RuntimeError(f"{op}: x has last dimension {shape[-1]}, weight expects {K}")
    if bias is not None and bias.shape != (N,):
        raise RuntimeError(f"{op}: bias must have shape ({N},), got {tuple(bias.shape)}")
    if call.activation not in _ACTIVATIONS:
        _refuse_activation(op, "activation", call.activation)
    if call.prev_activation:
        _check_saved(op, "prev_saved", call.prev_saved, call.prev_activation, "x", shape, x.device)
    if prev_bias is not None and prev_bias.shape != (K,):
        raise RuntimeError(f"{op}: prev_bias must have shape ({K},), got {tuple(prev_bias.shape)}")
    if call.save not in (0, 1):
        raise RuntimeError(f"{op}: save must be 0 or 1, got {call.save}")
    return plain


def check_backward(call: BackwardCall) -> bool:
    """Raise RuntimeError for what does not fit. Whether what is read is plain, so that the dispatcher need not see the call."""
    op, grad_out, x, weight, copy = "linear_act_backward", call.grad_out, call.x, call.weight, call.weight_copy
    plain = _fit(grad_out.device, grad_out, x, weight, copy)
    if not plain:
        check_tensors(op, grad_out=grad_out, x=x, weight=weight, weight_copy=copy)
    if not _DTYPES.issuperset((call.compute_dtype, call.grad_x_dtype, call.grad_weight_dtype, call.grad_bias_dtype)):
        names = ("compute_dtype", "grad_x_dtype", "grad_weight_dtype", "grad_bias_dtype")
        _refuse_dtypes(op, **{name: getattr(call, name) for name in names})
    shape, (N, K) = grad_out.shape, _weight_shape(op, call)
    if not shape or shape[-1] != N:
        raise RuntimeError(f"{op}: grad_out must have shape (*, {N}), got {tuple(shape)}")
    if call.output_mask[1] and (x is None or x.dtype != call.compute_dtype or x.shape != (*shape[:-1], K)):
        got = "None" if x is None else f"{tuple(x.shape)} {x.dtype}"
        raise RuntimeError(f"{op}: x must be {(*shape[:-1], K)} {call.compute_dtype}, got {got}")
    if call.activation:
        plain &= _check_saved(op, "saved", call.saved, call.activation, "the output", shape, grad_out.device)
    if call.prev_activation:
        shape = (*shape[:-1], K)
        plain &= _check_saved(op, "prev_saved", call.prev_saved, call.prev_activation, "x", shape, grad_out.device)
    if call.grad_prev_bias_dtype is not None and call.grad_prev_bias_dtype not in _DTYPES:
        _refuse_dtypes(op, grad_prev_bias_dtype=call.grad_prev_bias_dtype)
    if not call.output_mask[0] and call.is_fused:
        raise RuntimeError(f"{op}: the gradients of the previous layer come out of grad_x: output_mask[0] must be True")
    return plain


def _check_scaled(op: str, call: ForwardCall) -> bool:
    """The tensors of a call with scales, and that nothing is there that it cannot have."""
    x, weight, x_scale, weight_scale = call.x, call.weight, call.x_scale, call.weight_scale
    if x_scale is None or weight_scale is None:
        given, missing = ("weight_scale", "x_scale") if x_scale is None else ("x_scale", "weight_scale")
        raise RuntimeError(f"{op}: {given} is given, {missing} is not: both operands have a scale, or neither")
    plain = _fit(x.device, x, weight, dtypes=FLOAT8_DTYPES) and _fit(x.device, x_scale, weight_scale, call.bias)
    if not plain or x_scale.dtype != torch.float32 or weight_scale.dtype != torch.float32:
        tensors = {"x": x, "weight": weight, "x_scale": x_scale, "weight_scale": weight_scale, "bias": call.bias}
        check_tensors(op, _OF_SCALED, **tensors)
    if call.out_dtype not in _DTYPES:
        _refuse_dtypes(op, out_dtype=call.out_dtype)
    if call.compute_dtype != x.dtype:
        raise RuntimeError(f"{op}: compute_dtype must be that of an x with a scale, {x.dtype}, got {call.compute_dtype}")
    if call.saved_dtype is not None:
        raise RuntimeError(f"{op}: a call with scales has no backward and no saved_dtype")
    if call.weight_copy is not None:
        raise RuntimeError(f"{op}: a weight with a scale has no weight_copy")
    if call.activation_grad_fused or call.prev_activation or call.prev_saved is not None or call.prev_bias is not None:
        raise RuntimeError(f"{op}: operands with scales have no fused backward")
    _weight_shape(op, call)  # before a scale's, which follows from it
    for name, scale, operand in (("x_scale", x_scale, x), ("weight_scale", weight_scale, weight)):
        by_row = (*operand.shape[:-1], 1)
        if scale.shape not in ((), by_row):
            raise RuntimeError(f"{op}: {name} must have shape {by_row} or (), got {tuple(scale.shape)}")
    return plain


def _fit(device: torch.device, *tensors: torch.Tensor | None, dtypes: Collection[torch.dtype] = _DTYPES) -> bool:
    """Whether they are plain and dense, of one of `dtypes`, and on `device`; what is not plain may fit all the same."""
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in PLAIN
            and tensor.dtype in dtypes
            and tensor.layout is _STRIDED
            and tensor.device == device
            and not tensor.is_nested
            and not tensor.is_neg()
        ):
            return False
    return True


def check_tensors(op: str, dtypes: dict[str, tuple[torch.dtype, ...]] | None = None, /, **tensors: torch.Tensor | None) -> None:
    """That they are dense, of `DTYPES` or of what `dtypes` has for their names, and on one device."""
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in there.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else f"layout {tensor.layout}"
            advice = "; a nested x may have layout=torch.jagged" if tensor.is_nested else ""
            raise RuntimeError(f"{op}: {name} must be a dense strided tensor, got {kind}{advice}")
        wanted = (dtypes or {}).get(name, DTYPES)
        if tensor.dtype not in wanted:
            advice = ", which needs a scale" if tensor.dtype in FLOAT8_DTYPES and name in ("x", "weight") else ""
            raise RuntimeError(f"{op}: {name} must be {_listed(wanted)}, got {tensor.dtype}{advice}")
    first = next(iter(there))
    for name, tensor in there.items():
        if tensor.device != there[first].device:
            raise RuntimeError(f"{op}: {first} is on {there[first].device} but {name} is on {tensor.device}")


def _weight_shape(op: str, call: ForwardCall | BackwardCall) -> torch.Size:
    """(N, K), which a copy has too."""
    shape, copy, compute_dtype = call.weight.shape, call.weight_copy, call.compute_dtype
    if len(shape) != 2:
        raise RuntimeError(f"{op}: weight must have shape (N, K), got {tuple(shape)}")
    if copy is not None and (copy.dtype != compute_dtype or copy.shape != shape):
        expected = f"{tuple(shape)} {compute_dtype}"
        raise RuntimeError(f"{op}: weight_copy must be {expected}, got {tuple(copy.shape)} {copy.dtype}")
    return shape


def _refuse_dtypes(op: str, **dtypes: torch.dtype) -> NoReturn:
    name, dtype = next((name, dtype) for name, dtype in dtypes.items() if dtype not in DTYPES)
    raise RuntimeError(f"{op}: {name} must be {_listed(DTYPES)}, got {dtype}")


def _listed(dtypes) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def _refuse_activation(op: str, name: str, activation: int) -> NoReturn:
    known = ", ".join(f"{a:d} ({a.name})" for a in Activation)
    raise RuntimeError(f"{op}: {name} must be one of {known}, got {activation}")


def _check_saved(op: str, name: str, saved, activation: int, what: str, shape: tuple[int, ...], device) -> bool:
    """What backward reads of an output of `shape`: a ReLU's mask or that output, called `what`; else the preactivation."""
    if activation not in _ACTIVATIONS:
        _refuse_activation(op, name.replace("saved", "activation"), activation)
    if saved is None:
        fits = False
    elif activation != _RELU:
        fits = saved.shape == (math.prod(shape[:-1]), shape[-1]) and saved.dtype in _DTYPES
    elif saved.dtype is torch.int32:
        fits = saved.shape == (math.prod(shape[:-1]), (shape[-1] + 31) // 32)
    else:
        fits = saved.shape == shape and saved.dtype in _DTYPES
    if not fits:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        expected = f"the preactivation {(rows, columns)}"
        if activation == _RELU:
            expected = f"the mask {(rows, (columns + 31) // 32)} int32 or {what}"
        got = "None" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
        raise RuntimeError(f"{op}: {name} must be {expected}, got {got}")
    if saved.device != device:
        raise RuntimeError(f"{op}: {name} is on {saved.device}, expected {device}")
    return type(saved) in PLAIN and not saved.is_neg()
