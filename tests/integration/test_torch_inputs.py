# SPDX-License-Identifier: Apache-2.0
"""The inputs of torch's own suite for linear."""

import pytest
import torch
from torch.testing._internal import common_methods_invocations, common_modules

import mpkernels as mpk
from tests.bounds import check_forward

OPINFO = next(op for op in common_methods_invocations.op_db if op.name == "nn.functional.linear")
MODULE = next(module for module in common_modules.module_db if module.module_cls is torch.nn.Linear)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@by_dtype
def test_functional_on_torchs_inputs(dtype):
    samples = list(OPINFO.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        x, (weight, *bias) = sample.input, sample.args
        if weight.dim() != 2:
            continue  # F.linear takes a vector for a weight; a layer has none
        out, expected = mpk.functional.linear_act(x, weight, *bias), torch.nn.functional.linear(x, weight, *bias)
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        check_forward(out, x.detach(), weight.detach(), bias[0].detach() if bias else None, None, dtype)


@by_dtype
def test_module_on_torchs_inputs(dtype):
    for sample in MODULE.module_inputs_func(MODULE, "cpu", dtype, requires_grad=True, training=True):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        layer = mpk.MPLinear(*args, **kwargs, dtype=dtype)
        call = sample.forward_input
        x = call.args[0] if call.args else call.kwargs["input"]
        out, expected = layer(*call.args, **call.kwargs), torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        check_forward(out, x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, None, dtype)
