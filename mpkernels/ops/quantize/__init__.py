# SPDX-License-Identifier: Apache-2.0
"""quantize: a tensor in eight bits and the scale that it was divided by, a power of two.

    amax = max |x| over `axis`                  scale = 2^k, the least for which amax / scale <= the format's largest
    q = round(x / scale)                        x is about q * scale

Shapes and dtypes
    | tensor | shape                                   | dtype                                                   |
    | x      | any, strided                            | fp16, bf16, fp32                                        |
    | q      | x's, contiguous                         | float8_e4m3fn (largest 448) or float8_e5m2 (57344)      |
    | scale  | x's with size 1 at axis; (): axis=None  | fp32                                                    |
    Any size, 0 included. The scale is at least 2^-126, 1 where x is zero everywhere or has no elements, and NaN where any
    of x is not finite: q is NaN there too, so that an overflow stays visible. NaN is 0x7F in both formats.

Numerics
    x / scale is rounded once, to nearest even, from the exact value. With u = 2^-4 (e4m3fn) or 2^-3 (e5m2) and s = 2^-9 or
    2^-16, the least subnormal: |q * scale - x| <= u |x| + scale * s / 2. Zeros keep their sign. q has the same bits by every
    backend and in every version of torch, whose own casts differ in what they do beyond the largest, where none is asked for.
    A sum has no part in it: one order is as good as another, and a row has the same bits whatever the other rows are.
    `dequantize` multiplies in fp32, which is exact but for fp32's own limits: a subnormal product is rounded, and of the
    largest fp32 numbers one that rounds up to 2^128 is inf, as in bf16.
Derivatives
    None. `mpkernels.functional.quantize` gives results that do not require grad, as torch.quantize_per_tensor does; those of
    the op itself, which is what an exported layer has, refuse a backward. `dequantize` is torch's own arithmetic.
Raises
    RuntimeError for a tensor that is not strided, and for other dtypes than these, fp64 among them; IndexError for an axis
    out of range, as torch; TypeError for what is not a tensor, a dtype or an int.
Source: torchao.float8 (`ScalingGranularity`, `round_scales_to_power_of_2`); OCP 8-bit Floating Point Specification (OFP8).
"""

import math
from typing import NamedTuple

import torch

from mpkernels.runtime.op import Implementation, Op
from mpkernels.runtime.resolve import Key

INPUTS = (torch.float16, torch.bfloat16, torch.float32)


class Format(NamedTuple):
    """Of an 8-bit float: bits of the mantissa without the hidden one, bias of the exponent, exponent of the largest number.

    The largest number of both is 1.75 * 2**max_exponent.
    """

    mantissa: int
    bias: int
    max_exponent: int


FORMATS = {torch.float8_e4m3fn: Format(3, 7, 8), torch.float8_e5m2: Format(2, 15, 15)}
NAN = 0x7F  # in both


class QuantizeCall(NamedTuple):
    """A call of `quantize`."""

    x: torch.Tensor
    dtype: torch.dtype
    axis: int | None = None

    @property
    def key(self) -> Key:
        return Key(self.x.device, torch.float32)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        if self.axis is None or not self.x.dim():
            return ()
        shape = list(self.x.shape)
        shape[self.axis] = 1
        return tuple(shape)

    @property
    def matrix(self) -> tuple[int, int, int]:
        """(outer, n, inner): the shape that a contiguous x has as three dimensions, the middle one of which is reduced away."""
        x, shape = self.x, self.x.shape
        if self.axis is None or not x.dim():
            return 1, x.numel(), 1
        at = self.axis % x.dim()
        return math.prod(shape[:at]), shape[at], math.prod(shape[at + 1 :])


def check_axis(axis: int | None, dims: int) -> None:
    """Raise IndexError for what is no dimension; 0-d tensors have one, as in torch's reductions."""
    dims = max(dims, 1)
    if axis is not None and not -dims <= axis < dims:
        raise IndexError(f"quantize: axis is out of range (expected to be in range of [{-dims}, {dims - 1}], but got {axis})")


def check(call: QuantizeCall) -> None:
    """Raise for what does not fit."""
    x = call.x
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else f"layout {x.layout}"
        raise RuntimeError(f"quantize: x must be a dense strided tensor, got {kind}")
    if x.dtype not in INPUTS:
        raise RuntimeError(f"quantize: x must be float16, bfloat16 or float32, got {x.dtype}")
    check_format("quantize: dtype", call.dtype)
    check_axis(call.axis, x.dim())


def check_format(what: str, dtype: torch.dtype) -> None:
    """Raise RuntimeError for what is no 8-bit format here."""
    if dtype not in FORMATS:
        raise RuntimeError(f"{what} must be float8_e4m3fn or float8_e5m2, got {dtype}")


def empty(call: QuantizeCall):
    """The results, to be written."""
    return call.x.new_empty(call.x.shape, dtype=call.dtype), call.x.new_empty(call.scale_shape, dtype=torch.float32)


op = Op(
    "quantize(Tensor x, ScalarType dtype, int? axis=None) -> (Tensor, Tensor)",
    __name__,
    (
        Implementation("native", ("cpu",)),
        Implementation("eager", ("cpu", "cuda")),
        Implementation("triton", ("cuda", "cpu")),
    ),
    call=QuantizeCall,
    check=check,
    fake=empty,
)


# ----- autograd and vmap ---------------------------------------------------------------


def _refuse_backward(ctx, *grads):
    raise RuntimeError("quantize: the op is not differentiable, a layer whose Policy computes in eight bits is")


def _vmap(info, in_dims, x, dtype, axis=None):
    """The batch is one more dimension that is kept: all others are one where no axis is reduced alone."""
    x = x.movedim(in_dims[0], 0)
    dims = x.dim() - 1
    check_axis(axis, dims)
    if axis is not None and dims:
        return torch.ops.mpkernels.quantize(x, dtype, axis % dims + 1), (0, 0)
    q, scale = torch.ops.mpkernels.quantize(x.unsqueeze(-1).flatten(1), dtype, 1)
    return (q.view(x.shape), scale.squeeze(1)), (0, 0)


torch.library.register_autograd("mpkernels::quantize", _refuse_backward)
torch.library.register_vmap("mpkernels::quantize", _vmap)
