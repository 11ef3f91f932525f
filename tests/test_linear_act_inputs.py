# SPDX-License-Identifier: Apache-2.0
"""What linear_act answers to bad input: torch's class of error, the argument's name, what was got and what was wanted."""

import re

import pytest
import torch

from mpkernels.ops.linear_act import Activation, activation_of, linear_act

f16, f32 = torch.float16, torch.float32


def call(x=None, weight=None, bias=None, weight_copy=None, **kwargs):
    """linear_act on good tensors, M=2 K=4 N=3, where nothing else is given."""
    x = torch.ones(2, 4) if x is None else x
    weight = torch.ones(3, 4) if weight is None else weight
    kwargs = {"activation": Activation.RELU, "compute_dtype": f32, "out_dtype": f32} | kwargs
    return linear_act(x, weight, bias, weight_copy, **kwargs)


def check_refused(error, message, **kwargs):
    with pytest.raises(error, match=re.escape(message)):
        call(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.ones(2, 5)}, "x has last dimension 5, weight expects 4"),
        ({"x": torch.ones(5)}, "x has last dimension 5, weight expects 4"),
        ({"x": torch.ones(2, 0)}, "x has last dimension 0, weight expects 4"),
        ({"x": torch.tensor(1.0)}, "x must have shape (*, K), got a 0-d tensor"),
        ({"weight": torch.ones(4)}, "weight must have shape (N, K), got (4,)"),
        ({"weight": torch.ones(1, 3, 4)}, "weight must have shape (N, K), got (1, 3, 4)"),
        ({"weight": torch.tensor(1.0)}, "weight must have shape (N, K), got ()"),
        ({"bias": torch.ones(4)}, "bias must have shape (3,), got (4,)"),
        ({"bias": torch.ones(1)}, "bias must have shape (3,), got (1,)"),
        ({"bias": torch.ones(1, 3)}, "bias must have shape (3,), got (1, 3)"),
        ({"bias": torch.tensor(1.0)}, "bias must have shape (3,), got ()"),
        ({"weight_copy": torch.ones(4, 3)}, "weight_copy must be (3, 4) torch.float32, got (4, 3) torch.float32"),
        ({"weight_copy": torch.ones(3, 4, dtype=f16)}, "weight_copy must be (3, 4) torch.float32, got (3, 4) torch.float16"),
    ],
)
def test_linear_act_refuses_shapes(kwargs, message):
    check_refused(RuntimeError, message, **kwargs)


BAD_DTYPES = (
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@pytest.mark.parametrize("dtype", BAD_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "weight_copy"])
def test_linear_act_refuses_dtypes(name, dtype):
    shape = {"x": (2, 4), "weight": (3, 4), "bias": (3,), "weight_copy": (3, 4)}[name]
    message = f"{name} must be float16, bfloat16, float32 or float64, got {dtype}"
    check_refused(RuntimeError, message, **{name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize("name", ["compute_dtype", "out_dtype"])
def test_linear_act_refuses_dtypes_of_results(name):
    for dtype in BAD_DTYPES:
        check_refused(RuntimeError, f"{name} must be float16, bfloat16, float32 or float64, got {dtype}", **{name: dtype})


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.filterwarnings("ignore")  # torch calls its sparse, quantized and nested tensors prototypes
def test_linear_act_refuses_layouts(name):
    dense = torch.ones(2, 4) if name == "x" else torch.ones(3, 4)
    for tensor in (
        dense.to_sparse(), dense.to_sparse_csr(), dense.to_mkldnn(), torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([dense, dense]),
    ):  # fmt: skip
        check_refused(RuntimeError, f"{name} must be a dense strided tensor", **{name: tensor})
    check_refused(RuntimeError, "torch.sparse_coo", **{name: dense.to_sparse()})
    with pytest.raises(RuntimeError):
        call(**{name: torch.nested.nested_tensor([dense, dense], layout=torch.jagged)})


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_linear_act_refuses_two_devices(name):
    shape = {"x": (2, 4), "weight": (3, 4), "bias": (3,)}[name]
    with pytest.raises(RuntimeError) as refused:
        call(**{"bias": torch.ones(3), name: torch.ones(shape, device="meta")})
    assert "is on meta" in str(refused.value)
    assert "is on cpu" in str(refused.value)


def test_linear_act_on_meta_has_the_shapes():
    out = call(torch.ones(5, 2, 4, device="meta"), torch.ones(3, 4, device="meta"), out_dtype=f16)
    assert (out.shape, out.dtype, out.device.type) == ((5, 2, 3), f16, "meta")


@pytest.mark.parametrize("value", [[[1.0] * 4], 1.0, "x", (1, 2)], ids=["list", "float", "str", "tuple"])
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_linear_act_refuses_what_is_no_tensor(name, value):
    check_refused(TypeError, f"{name} must be a Tensor, got {type(value).__name__}", **{name: value})


def test_linear_act_refuses_an_absent_weight():
    with pytest.raises(TypeError, match="weight must be a Tensor, got NoneType"):
        linear_act(torch.ones(2, 4), None, activation=0, compute_dtype=f32, out_dtype=f32)


@pytest.mark.parametrize("activation", [6, -1])
def test_linear_act_refuses_activations(activation):
    check_refused(RuntimeError, "activation must be one of 0 (NONE), 1 (RELU)", activation=activation)


@pytest.mark.parametrize("name", ["tanh", "ReLU", "", "none", 1])
def test_linear_act_refuses_names_of_activations(name):
    known = '"relu", "relu2", "gelu", "gelu_tanh", "silu"'
    with pytest.raises(ValueError, match=re.escape(f"activation must be None or one of {known}, got {name!r}")):
        activation_of(name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad_out": torch.ones(2, 5)}, "grad_out must have shape (*, 3), got (2, 5)"),
        ({"grad_out": torch.tensor(1.0)}, "grad_out must have shape (*, 3), got ()"),
        ({"grad_out": torch.ones(2, 3, dtype=torch.int64)}, "grad_out must be float16, bfloat16, float32 or float64"),
        ({"x": None}, "x must be (2, 4) torch.float32, got None"),
        ({"x": torch.ones(3, 4)}, "x must be (2, 4) torch.float32, got (3, 4) torch.float32"),
        ({"x": torch.ones(2, 4, dtype=f16)}, "x must be (2, 4) torch.float32, got (2, 4) torch.float16"),
        ({"weight": torch.ones(3)}, "weight must have shape (N, K), got (3,)"),
        ({"saved": None}, "saved must be the mask (2, 1) int32 or the output, got None"),
        ({"saved": torch.zeros(2, 2, dtype=torch.int32)}, "saved must be the mask (2, 1) int32 or the output, got (2, 2)"),
        ({"saved": torch.zeros(0, dtype=torch.int32)}, "saved must be the mask (2, 1) int32 or the output, got (0,)"),
        ({"saved": torch.zeros(2, 3, dtype=torch.int64)}, "saved must be the mask (2, 1) int32 or the output, got (2, 3)"),
        ({"weight": torch.ones(3, 4, device="meta")}, "grad_out is on cpu but weight is on meta"),
        ({"grad_weight_dtype": torch.int8}, "grad_weight_dtype must be float16, bfloat16, float32 or float64"),
    ],
)
def test_linear_act_backward_refuses(changed, message):
    good = {
        "grad_out": torch.ones(2, 3), "x": torch.ones(2, 4), "weight": torch.ones(3, 4), "weight_copy": None,
        "saved": torch.zeros(2, 1, dtype=torch.int32), "activation": 1, "compute_dtype": f32, "grad_x_dtype": f32,
        "grad_weight_dtype": f32, "grad_bias_dtype": f32, "output_mask": [True] * 3,
    }  # fmt: skip
    torch.ops.mpkernels.linear_act_backward(**good)
    with pytest.raises(RuntimeError, match=re.escape(f"linear_act_backward: {message}")):
        torch.ops.mpkernels.linear_act_backward(**good | changed)
