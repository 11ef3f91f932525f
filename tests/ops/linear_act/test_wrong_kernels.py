# SPDX-License-Identifier: Apache-2.0
"""The bounds of linear_act reject wrong kernels, and no sound one."""

import pytest
import torch
import torch.nn.functional as F

from mpkernels.ops.linear_act import Activation
from tests import bounds, wrong_kernels
from tests.levels import each_once
from tests.linear_act_cases import DTYPES, Case, Dtypes, bf16, f16, f32, forward

NONE, RELU = Activation.NONE, Activation.RELU
sixteen_bits = pytest.mark.parametrize("dtype", [f16, bf16], ids=["fp16", "bf16"])
LENGTHS = (8, 64, 1024, 4096)  # K


def wrong_case(dtypes, K, generator):
    x, weight, bias, _ = Case(48, 64, K, dtypes).tensors(generator)
    return x.to(dtypes.compute), weight.to(dtypes.compute), bias


HALVES = ("mixed_float16 inside", "mixed_bfloat16 inside")
WRONG = {  # and the dtypes with which it must be found
    "accumulator_16_bit": (*HALVES, "mixed_float16"),
    "split_k_partials_16_bit": (*HALVES, "mixed_bfloat16"),
    "rounded_before_bias": HALVES,
    "last_row_missing": HALVES,
    "rounded_through_bfloat16": ("float16",),
    "rounded_through_float16": ("bfloat16", "mixed_float16"),
    "truncated_at_the_store": ("bfloat16",),
    "operands_truncated": ("float32",),
    "float32_inside": ("float64",),
}


PAIRS = [f"{kernel} of {dtypes}" for kernel, found in WRONG.items() for dtypes in found]


@pytest.mark.parametrize("pair, activation, K", each_once(PAIRS, (NONE, RELU), LENGTHS))
def test_linear_act_bounds_reject(pair, activation, K, generator):
    kernel, dtypes = pair.split(" of ")
    dtypes = DTYPES[dtypes]
    operands = wrong_case(dtypes, K, generator)
    args = (*operands, activation, dtypes.compute)
    bounds.check_forward(wrong_kernels.sound(*args, dtypes.out), *args, random_sign=True)
    wrong = getattr(wrong_kernels, kernel)(*args, dtypes.out)
    with pytest.raises(AssertionError, match="out, bound"):
        bounds.check_forward(wrong, *args, random_sign=True)


@pytest.mark.parametrize("K", [0, 8, 64, 1024])
def test_linear_act_bounds_reject_a_rounded_bias(K, generator):
    """Up to where the sum's own error exceeds half an ulp of an fp16 bias."""
    x, weight, bias = wrong_case(DTYPES["mixed_float16"], K, generator)
    args = (x, weight, bias, NONE, f16)
    bounds.check_forward(wrong_kernels.sound(*args, f32), *args, random_sign=True)
    with pytest.raises(AssertionError, match="out, bound"):
        bounds.check_forward(wrong_kernels.bias_in_compute_dtype(*args, f32), *args, random_sign=True)


@pytest.mark.parametrize("kernel", ["nan_dropped", "saturated"])
def test_linear_act_bounds_reject_nonfinite(kernel, generator):
    x, weight, bias = wrong_case(DTYPES["float16"], 64, generator)
    x[3, 5], x[7], weight[9] = torch.nan, 600, 600
    args = (x, weight, bias, RELU, f16)
    bounds.check_forward(wrong_kernels.sound(*args, f16), *args)
    with pytest.raises(AssertionError, match="bound 7"):
        bounds.check_forward(getattr(wrong_kernels, kernel)(*args, f16), *args)


@pytest.mark.parametrize("rows", [8, 64, 1024])
@pytest.mark.parametrize("kernel", ["gradient_through_16_bit", "bias_gradient_in_16_bit", "split_rows_16_bit"])
@sixteen_bits
def test_linear_act_bounds_reject_backward(kernel, dtype, rows, generator):
    x, weight, _, grad_z = Case(rows, 48, 40, Dtypes(dtype, dtype, dtype, dtype, f32)).tensors(generator)
    check = lambda grads: bounds.check_backward(grads, grad_z, x, weight, None, dtype, random_sign=True)
    check(wrong_kernels.sound_backward(grad_z, x, weight, f32))
    with pytest.raises(AssertionError, match="bound"):
        check(getattr(wrong_kernels, kernel)(grad_z, x, weight, f32))


def test_linear_act_bounds_reject_a_multiplied_mask(generator):
    x, weight, bias, grad_out = Case(9, 33, 17, DTYPES["float32"]).tensors(generator)
    positive = forward(x, weight, bias, DTYPES["float32"])[0] > 0
    grad_out[~positive] = torch.inf
    sound = torch.where(positive, grad_out, 0).sum(0)
    bounds.check_backward((None, None, sound), grad_out, x, weight, positive, f32)
    wrong = wrong_kernels.mask_multiplied(grad_out, positive).sum(0)
    with pytest.raises(AssertionError, match="bound 7"):
        bounds.check_backward((None, None, wrong), grad_out, x, weight, positive, f32)


def test_linear_act_bounds_reject_a_wrong_mask(generator):
    x, weight, bias, _ = Case(9, 33, 17, DTYPES["float32"]).tensors(generator)
    z = F.linear(x, weight, bias)
    bounds.check_mask(z > 0, x, weight, bias, f32, f32)
    for wrong in (z >= -0.1, z > 0.1, z < 0):
        with pytest.raises(AssertionError, match="mask"):
            bounds.check_mask(wrong, x, weight, bias, f32, f32)


@sixteen_bits
def test_linear_act_bounds_reject_a_worse_kernel_than_torch(dtype, generator):
    dtypes = Dtypes(dtype, dtype, dtype, dtype, dtype)
    args = (*wrong_case(dtypes, 256, generator), NONE, dtype)
    wrong, torchs = wrong_kernels.accumulator_16_bit(*args, dtype), F.linear(*args[:3])
    with pytest.raises(AssertionError, match="torch"):
        bounds.check_not_worse_than(wrong, torchs, *args)
    with pytest.raises(AssertionError, match="correctly rounded"):
        bounds.check_correctly_rounded(wrong, *args)
