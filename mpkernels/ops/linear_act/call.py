# SPDX-License-Identifier: Apache-2.0
"""The calls of linear_act and its backward: the arguments of the schemas by name, and what follows from them.

`is_valid` is the fast-path predicate: all that every call pays for. It says yes of plain tensors that fit; where it says no,
mpkernels/ops/linear_act/checks.py builds the message, or the dispatcher has to see the call.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from mpkernels.ops.common.cast import DTYPES, FLOAT8_DTYPES
from mpkernels.ops.linear_act.epilogues import Activation
from mpkernels.runtime.op import PLAIN
from mpkernels.runtime.tuned_table import GemmKey, gemm_key

_DTYPES, _ACTIVATIONS, _STRIDED = frozenset(DTYPES), frozenset(map(int, Activation)), torch.strided


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

    def is_valid(self) -> bool:
        if self.x_scale is not None or self.weight_scale is not None:
            return self._is_valid_scaled()
        x, weight, bias, copy, prev_bias = self.x, self.weight, self.bias, self.weight_copy, self.prev_bias
        device = x.device
        if not _fit(device, x, weight, bias, copy, prev_bias) or weight.dim() != 2 or not x.dim():
            return False  # NOTE: a nested tensor has no shape
        shape, (N, K) = x.shape, weight.shape
        return (
            shape[-1] == K
            and (bias is None or bias.shape == (N,))
            and (copy is None or (copy.dtype is self.compute_dtype and copy.shape == (N, K)))
            and self.compute_dtype in _DTYPES
            and self.out_dtype in _DTYPES
            and self.activation in _ACTIVATIONS
            and self.save in (0, 1)
            and (self.saved_dtype is None or self.saved_dtype in FLOAT8_DTYPES)
            and (not self.prev_activation or _is_plain_and_fits(self.prev_saved, self.prev_activation, shape, device))
            and (prev_bias is None or prev_bias.shape == (K,))
        )

    def _is_valid_scaled(self) -> bool:
        x, weight, bias, x_scale, weight_scale = self.x, self.weight, self.bias, self.x_scale, self.weight_scale
        if x_scale is None or weight_scale is None:
            return False
        if not (_fit(x.device, x, weight, dtypes=FLOAT8_DTYPES) and _fit(x.device, x_scale, weight_scale, bias)):
            return False
        shape, weight_shape = x.shape, weight.shape
        return (
            x.dtype == self.compute_dtype
            and x_scale.dtype == weight_scale.dtype == torch.float32
            and self.out_dtype in _DTYPES
            and len(weight_shape) == 2
            and len(shape) > 0
            and shape[-1] == weight_shape[1]
            and x_scale.shape in ((), (*shape[:-1], 1))
            and weight_scale.shape in ((), (weight_shape[0], 1))
            and (bias is None or bias.shape == weight_shape[:1])
            and self.activation in _ACTIVATIONS
            and self.save in (0, 1)
            and self.weight_copy is self.prev_saved is self.prev_bias is self.saved_dtype is None
            and not (self.activation_grad_fused or self.prev_activation)
        )


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

    def is_valid(self) -> bool:
        grad_out, x, weight, copy = self.grad_out, self.x, self.weight, self.weight_copy
        device = grad_out.device
        if not _fit(device, grad_out, x, weight, copy) or weight.dim() != 2 or not grad_out.dim():
            return False  # NOTE: a nested tensor has no shape
        shape, (N, K) = grad_out.shape, weight.shape
        return (
            shape[-1] == N
            and (copy is None or (copy.dtype is self.compute_dtype and copy.shape == (N, K)))
            and (not self.output_mask[1] or (x is not None and x.dtype is self.compute_dtype and x.shape == (*shape[:-1], K)))
            and _DTYPES.issuperset((self.compute_dtype, self.grad_x_dtype, self.grad_weight_dtype, self.grad_bias_dtype))
            and (not self.activation or _is_plain_and_fits(self.saved, self.activation, shape, device))
            and (not self.is_fused or self._may_be_fused())
        )

    def _may_be_fused(self) -> bool:
        shape, device = (*self.grad_out.shape[:-1], self.weight.shape[1]), self.grad_out.device
        return (
            bool(self.output_mask[0])
            and self.grad_prev_bias_dtype in (*DTYPES, None)
            and (not self.prev_activation or _is_plain_and_fits(self.prev_saved, self.prev_activation, shape, device))
        )


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
        self.activation, self.bias = Activation(call.activation), call.bias


def fits(saved: torch.Tensor | None, activation: int, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether `saved` is what backward reads of an output of `shape`: a ReLU's mask or that output, else the preactivation."""
    if activation not in _ACTIVATIONS or saved is None or saved.device != device:
        return False
    if activation == Activation.RELU and saved.dtype != torch.int32:
        return saved.shape == shape and saved.dtype in DTYPES
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if activation == Activation.RELU:
        return saved.shape == (rows, (columns + 31) // 32)
    return saved.shape == (rows, columns) and saved.dtype in DTYPES


def _is_plain_and_fits(saved: torch.Tensor | None, activation: int, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether it `fits` and is plain, which what a hook on saved tensors returns may not be."""
    return type(saved) in PLAIN and not saved.is_neg() and fits(saved, activation, shape, device)


def _fit(device: torch.device, *tensors: Any, dtypes: Collection[torch.dtype] = _DTYPES) -> bool:
    """Whether they are plain and dense, of one of `dtypes`, and on `device`."""
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
