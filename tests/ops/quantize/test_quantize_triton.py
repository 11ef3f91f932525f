# SPDX-License-Identifier: Apache-2.0
"""quantize in Triton: on a GPU, or through Triton's interpreter (test_triton_interpreter.py starts it)."""

import itertools
import math

import pytest
import torch

from mpkernels.ops.quantize import FORMATS, op
from mpkernels.testing import checks
from tests import triton_target
from tests.ops.quantize import test_quantize as cases

device, _force_triton = triton_target.device, triton_target.forcing("quantize")
test_interpreter_computes_bf16_by_value = triton_target.test_interpreter_computes_bf16_by_value

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
SHAPES = ((), (1,), (3, 1), (1, 3), (33, 65), (4, 5, 7), (1, 4500), (4500, 1), (70, 3), (2, 20, 70))


@pytest.fixture(params=FORMATS, ids=["e4m3", "e5m2"])
def dtype(request):
    return request.param


def test_quantize_passes_the_proof(device):
    assert checks.wrong(op, "triton", device) is None


@pytest.mark.parametrize("source", [f16, bf16])
def test_quantize_every_16_bit_number(source, dtype, device):
    cases.test_quantize_every_16_bit_number_below(source, -14, dtype, device)
    cases.test_quantize_every_16_bit_number_below(source, 15, dtype, device)


@pytest.mark.parametrize("source, shape", list(zip(itertools.cycle((f16, bf16, f32)), SHAPES)), ids=str)
def test_quantize_shapes(shape, source, dtype, device, generator):
    cases.test_quantize_shapes(shape, source, dtype, device, generator)


@pytest.mark.parametrize("bad", [math.inf, -math.nan])
def test_quantize_keeps_an_overflow_visible(bad, dtype, device):
    cases.test_quantize_keeps_an_overflow_visible(bad, bf16 if math.isinf(bad) else f32, dtype, device)


def test_quantize_of_other_modules(dtype, device, generator):
    cases.test_quantize_midpoints(dtype, device)
    cases.test_quantize_random_bits(dtype, device, generator)
    cases.test_quantize_scales_reach_the_largest(dtype, device)
    cases.test_quantize_zeros_keep_their_sign(dtype, device)
    cases.test_quantize_any_layout(dtype, device, generator)
    for x in (2.0**-149, torch.finfo(f32).max):
        cases.test_quantize_at_the_ends_of_fp32(x, dtype, device)
    for shape in ((0,), (3, 0)):
        cases.test_quantize_empty(shape, dtype, device)
