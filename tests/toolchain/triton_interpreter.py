# SPDX-License-Identifier: Apache-2.0
"""Make Triton's interpreter compute bf16 by value: it computes on the bit patterns, and truncates (triton-lang/triton#11584).

`install()` makes a bf16 block an fp32 array whose values all fit bf16: widened when loaded, rounded to nearest even after
every operation, packed to 16 bits when stored. `check()` raises where that does not hold. A dot adds up in fp64 and rounds
once: in fp32 numpy's order, and with it the bits, depend on the CPU and on a row's place in its tile.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from mpkernels.ops.common.cast import cast

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def install() -> None:
    """Patch the interpreter of this process; raises where TRITON_INTERPRET was not set before triton was imported."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    if getattr(_Builder, "computes_bf16_by_value", False):
        return
    _Builder.computes_bf16_by_value = True
    _patch_storage()
    _patch_memory()
    _patch_casts()
    _Builder.create_dot = _dot_in_fp64
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma", "create_dot"):
        setattr(_Builder, name, _rounding(getattr(_Builder, name)))


def _is_bf16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _round(values: np.ndarray) -> np.ndarray:
    """Numbers of any dtype rounded once to bf16, to nearest even, as fp32."""
    wide = values if values.dtype.kind == "f" else values.astype(np.float64)
    return cast(torch.from_numpy(np.array(wide)), torch.bfloat16).float().numpy()


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _pack(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16).reshape(values.shape)


def _patch_storage() -> None:
    """A bf16 block is held in fp32."""
    np_dtype, fits = interpreter._get_np_dtype, interpreter._validate_np_data_size

    def get_np_dtype(dtype):
        scalar = dtype.scalar if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.float32) if scalar == tl.bfloat16 else np_dtype(dtype)

    def validate_np_data_size(array, dtype):
        return (not isinstance(dtype, tl.pointer_type) and _is_bf16(dtype) and array.itemsize <= 4) or fits(array, dtype)

    interpreter._get_np_dtype, interpreter._validate_np_data_size = get_np_dtype, validate_np_data_size
    _Builder.get_bf16 = lambda self, value: _Handle(_round(np.array([value], dtype=np.float64)), tl.bfloat16)


def _patch_memory() -> None:
    load, store = _Builder.create_masked_load, _Builder.create_masked_store

    def create_masked_load(self, ptrs, mask, other, *hints, **more_hints):
        if not _is_bf16(ptrs.get_element_ty()):
            return load(self, ptrs, mask, other, *hints, **more_hints)
        outside = np.zeros(ptrs.data.shape, np.uint16) if other is None else _pack(np.broadcast_to(other.data, ptrs.data.shape))
        bits = interpreter._interpreter.load(ptrs.data, mask.data, outside, np.dtype(np.uint16))
        return _Handle(_widen(bits), tl.bfloat16)

    def create_masked_store(self, ptrs, value, mask, *hints):
        if _is_bf16(value.dtype):
            value = _Handle(_pack(value.data), tl.uint16)
        return store(self, ptrs, value, mask, *hints)

    _Builder.create_masked_load, _Builder.create_masked_store = create_masked_load, create_masked_store


def _patch_casts() -> None:
    cast_impl, fp_to_fp, bitcast, fabs = (
        getattr(_Builder, name) for name in ("cast_impl", "create_fp_to_fp", "create_bitcast", "create_fabs")
    )

    def cast_by_value(self, src, dst_type):
        if _is_bf16(dst_type):
            return _Handle(_round(src.data), tl.bfloat16)
        if _is_bf16(src.dtype):
            return _Handle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
        return cast_impl(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if not (_is_bf16(dst_type) or _is_bf16(src.dtype)):
            return fp_to_fp(self, src, dst_type, rounding_mode)
        if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError("bf16 is rounded to nearest even only")
        return cast_by_value(self, src, dst_type)

    def create_bitcast(self, src, dst_type):
        if isinstance(src.dtype.scalar, tl.pointer_type) or isinstance(dst_type.scalar, tl.pointer_type):
            return bitcast(self, src, dst_type)
        bits = _Handle(_pack(src.data), tl.uint16) if _is_bf16(src.dtype) else src
        if _is_bf16(dst_type):
            return _Handle(_widen(bits.data.view(np.uint16)), tl.bfloat16)
        return bitcast(self, bits, dst_type)

    def create_fabs(self, arg):
        return _Handle(np.abs(arg.data), tl.bfloat16) if _is_bf16(arg.dtype) else fabs(self, arg)

    _Builder.cast_impl, _Builder.create_fp_to_fp = cast_by_value, create_fp_to_fp
    _Builder.create_bitcast, _Builder.create_fabs = create_bitcast, create_fabs


def _dot_in_fp64(self, a, b, d, *options):
    total = np.matmul(_in_fp64(a), _in_fp64(b)).astype(d.data.dtype)
    return _Handle(total + d.data, d.dtype.scalar)


def _in_fp64(operand) -> np.ndarray:
    """Of 8-bit floats the interpreter holds bits."""
    dtype = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}.get(operand.dtype.scalar)
    if dtype is None:
        return operand.data.astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(operand.data)).view(dtype).double().numpy()


def _rounding(operation):
    """`operation` of the builder, its floating-point result rounded where it is bf16 by type."""

    def rounded(self, *args):
        result = operation(self, *args)
        if _is_bf16(result.dtype) and result.data.dtype.kind == "f":  # a comparison carries its operands' type
            result.data = _round(result.data)
        return result

    return rounded


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index).to(out_ptr.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, add_ptr, multiply_ptr, greater_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + index), tl.load(y_ptr + index)
    tl.store(add_ptr + index, x + y)
    tl.store(multiply_ptr + index, x * y)
    tl.store(greater_ptr + index, tl.where(x > y, x, 0.0))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    block = index[:, None] * BLOCK + index[None, :]
    tl.store(out_ptr + block, tl.dot(tl.load(a_ptr + block), tl.load(b_ptr + block)))


def check() -> None:
    """Casts, arithmetic and `tl.dot` on bf16 against torch, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    _check_casts(generator)
    x, y = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    results = [torch.empty(256, dtype=torch.bfloat16) for _ in range(3)]
    _arithmetic_kernel[(1,)](x, y, *results, BLOCK=256)
    for name, result, expected in zip(("+", "*", ">"), results, (x + y, x * y, torch.where(x > y, x, 0)), strict=True):
        _require(torch.equal(result, expected), f"bf16 {name}")
    a, b = (torch.randint(-3, 4, (16, 16), generator=generator).bfloat16() / 2 for _ in range(2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, BLOCK=16)
    _require(torch.equal(out, a.float() @ b.float()), "tl.dot on bf16")


def _check_casts(generator) -> None:
    """Every bf16 to fp32 and back, ties, subnormals, overflow, and fp64 in one rounding."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = torch.empty(1 << 16)
    _cast_kernel[(1,)](every, wide, BLOCK=1 << 16)
    _require(torch.equal(wide.nan_to_num(7.0), every.float().nan_to_num(7.0)), "bf16 -> fp32")
    ties = every.float().view(torch.int32) + (torch.randint(0, 3, (1 << 16,), generator=generator).int() << 14)
    for values in (ties.view(torch.float32), 1 + 2.0**-8 + torch.arange(-32, 32).double() * 2.0**-40):
        rounded = torch.empty(values.shape, dtype=torch.bfloat16)
        _cast_kernel[(1,)](values, rounded, BLOCK=values.numel())
        expected = cast(values, torch.bfloat16)
        _require(torch.equal(rounded.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{values.dtype} -> bf16")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"Triton's interpreter is wrong for {what}: no bf16 test through it means anything")
