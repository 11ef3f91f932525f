# SPDX-License-Identifier: Apache-2.0
"""What linear_act answers to bad input: torch's class of error, the argument's name, what was got and what was wanted.

And to odd input: sizes and offsets beyond int32, views of other kinds, and the ways to ask for a second derivative.
"""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpkernels.functional import linear_act as functional
from mpkernels.ops.linear_act import Activation, activation_of, linear_act
from tests import bounds
from tests.linear_act_cases import far_apart, laid_out, same_bits

f16, f32, f64 = torch.float16, torch.float32, torch.float64


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
    given = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)} | {name: value}
    with pytest.raises(TypeError, match=f"linear_act: {name} must be a Tensor, got {type(value).__name__}"):
        functional(**given)


def test_linear_act_refuses_an_absent_weight():
    with pytest.raises(TypeError, match="weight must be a Tensor, got NoneType"):
        functional(torch.ones(2, 4), None)


@pytest.mark.parametrize("activation", [len(Activation), -1])
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
        ({"saved": torch.zeros(2, 1, dtype=torch.int32, device="meta")}, "saved is on meta, expected cpu"),
        ({"saved": torch.zeros(2, 3, device="meta")}, "saved is on meta, expected cpu"),
        ({"activation": 3, "saved": torch.ones(3, 2)}, "saved must be the preactivation (2, 3), got (3, 2)"),
        ({"activation": 3, "saved": torch.ones(2, 3).int()}, "saved must be the preactivation (2, 3), got (2, 3) torch.int32"),
        ({"activation": 6}, "activation must be one of 0 (NONE)"),
        ({"weight_copy": torch.ones(4, 3)}, "weight_copy must be (3, 4) torch.float32, got (4, 3)"),
        ({"grad_weight_dtype": torch.int8}, "grad_weight_dtype must be float16, bfloat16, float32 or float64"),
        ({"prev_saved": None}, "prev_saved must be the mask (2, 1) int32 or x, got None"),
        ({"prev_saved": torch.zeros(2, 2, dtype=torch.int32)}, "prev_saved must be the mask (2, 1) int32 or x, got (2, 2)"),
        ({"prev_saved": torch.zeros(2, 3)}, "prev_saved must be the mask (2, 1) int32 or x, got (2, 3) torch.float32"),
        ({"prev_saved": torch.zeros(2, 1, dtype=torch.int32, device="meta")}, "prev_saved is on meta, expected cpu"),
        ({"prev_activation": 9}, "prev_activation must be one of 0 (NONE), 1 (RELU)"),
        ({"grad_prev_bias_dtype": torch.int8}, "grad_prev_bias_dtype must be float16, bfloat16, float32 or float64"),
        ({"output_mask": [False, True, True]}, "the gradients of the previous layer come out of grad_x: output_mask[0] must"),
    ],
)
def test_linear_act_backward_refuses(changed, message):
    good = {
        "grad_out": torch.ones(2, 3), "x": torch.ones(2, 4), "weight": torch.ones(3, 4), "weight_copy": None,
        "saved": torch.zeros(2, 1, dtype=torch.int32), "activation": 1, "compute_dtype": f32, "grad_x_dtype": f32,
        "grad_weight_dtype": f32, "grad_bias_dtype": f32, "output_mask": [True] * 3,
        "prev_saved": torch.zeros(2, 1, dtype=torch.int32), "prev_activation": 1, "grad_prev_bias_dtype": f32,
    }  # fmt: skip
    torch.ops.mpkernels.linear_act_backward(**good)
    with pytest.raises(RuntimeError, match=re.escape(f"linear_act_backward: {message}")):
        torch.ops.mpkernels.linear_act_backward(**good | changed)


def test_linear_act_refuses_another_save():
    with pytest.raises(RuntimeError, match="save must be 0 or 1, got 2"):
        torch.ops.mpkernels.linear_act(torch.ones(2, 4), torch.ones(3, 4), None, None, 1, f32, f32, 2)


# ----- beyond int32 ---------------------------------------------------------------

LARGE = 1 << 31


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
@pytest.mark.parametrize(
    ("x", "weight", "out"),
    [
        ((LARGE, 0), (0, 0), (LARGE, 0)),
        ((0, 0), (LARGE, 0), (0, LARGE)),
        ((0, LARGE), (0, LARGE), (0, 0)),
        ((0, 3), (0, 3), (0, 0)),
        ((1 << 16, 0, 1 << 16, 0), (0, 0), (1 << 16, 0, 1 << 16, 0)),
    ],
)
def test_linear_act_large_sizes_without_elements(x, weight, out, policy):
    """A product of sizes that wraps around in 32 bits would allocate, or pass for, something else."""
    x, weight = torch.empty(x, requires_grad=True), torch.empty(weight, requires_grad=True)
    result = functional(x, weight, None, "relu", policy)
    assert result.shape == out
    result.sum().backward()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
@pytest.mark.parametrize("sizes", [(1 << 20, 1 << 13, 1 << 14), (LARGE, 3, 5), (5, LARGE, 3), (3, 5, LARGE)], ids=str)
def test_linear_act_large_shapes_on_meta(sizes, policy):
    """M, N, K with products beyond int32, forward and backward, in the shapes that a compiler plans memory by."""
    M, N, K = sizes
    x, weight, bias = (torch.empty(s, device="meta", requires_grad=True) for s in ((M, K), (N, K), (N,)))
    out = functional(x, weight, bias, "relu", policy)
    assert out.shape == (M, N)
    out.sum().backward()
    assert [t.grad.shape for t in (x, weight, bias)] == [(M, K), (N, K), (N,)]


@pytest.mark.parametrize("policy", [None, "mixed_float16", "mixed_bfloat16,output=bfloat16"])
def test_linear_act_rows_beyond_int32_bytes_apart(policy, generator):
    tensors = [torch.randn(shape, generator=generator) for shape in ((2, 5), (3, 5), (3,))]
    x, weight, bias = (far_apart(t).requires_grad_() for t in tensors)
    assert all(t.stride(0) * (t.shape[0] - 1) * t.element_size() >= LARGE for t in (x, weight, bias))
    out = functional(x, weight, bias, "relu", policy)
    near = [t.requires_grad_() for t in tensors]
    expected = functional(*near, "relu", policy)
    assert same_bits(out.detach(), expected.detach())
    grad_out = far_apart(torch.randn(2, 3, generator=generator)).to(out.dtype)
    grads = torch.autograd.grad(out, (x, weight, bias), grad_out)
    assert all(map(same_bits, grads, torch.autograd.grad(expected, near, grad_out.contiguous())))


# ----- views of other kinds ---------------------------------------------------------------


def test_linear_act_reversed_numpy_array():
    """torch itself refuses strides that are negative, and makes a copy of what is flipped."""
    array = np.arange(8, dtype=np.float32).reshape(2, 4)[::-1]
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(array)
    flipped = torch.arange(8.0).view(2, 4).flip(0)
    assert same_bits(call(flipped), call(torch.from_numpy(array.copy())))


@pytest.mark.parametrize("policy", [None, "mixed_float16", "mixed_bfloat16"])
def test_linear_act_minus_that_torch_has_put_off(policy, generator):
    """The imaginary part of a conjugate: a view whose values lie nowhere."""
    z = torch.complex(*(torch.randn(5, 4, generator=generator) for _ in range(2)))
    minus, weight = z.conj().imag, torch.randn(3, 4, generator=generator)
    assert minus.is_neg()
    assert same_bits(functional(minus, weight, None, "relu", policy), functional(-z.imag, weight, None, "relu", policy))
    assert same_bits(functional(weight, minus, None, "relu", policy), functional(weight, -z.imag, None, "relu", policy))


@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_linear_act_of_views_under_inference_mode(policy, generator):
    """A view, made there, of a tensor that was not; and tensors that were, which torch lets no backward keep."""
    base, weight = torch.randn(4, 5, generator=generator), torch.randn(3, 5, generator=generator)
    expected = functional(base[:2], weight, None, "relu", policy)
    with torch.inference_mode():
        view, inside = base[:2], base.clone()[:2]
        assert same_bits(functional(view, weight, None, "relu", policy), expected)
    assert inside.is_inference()
    assert same_bits(functional(inside, weight, None, "relu", policy), expected)
    weight.requires_grad_()
    wanted = torch.autograd.grad(functional(base[:2], weight, None, "relu", policy).sum(), weight)
    assert same_bits(torch.autograd.grad(functional(view, weight, None, "relu", policy).sum(), weight)[0], wanted[0])
    if policy is None:  # x itself would be kept: refused, as by F.linear
        for function in (functional, F.linear):
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                function(inside, weight)
    else:
        assert same_bits(torch.autograd.grad(functional(inside, weight, None, "relu", policy).sum(), weight)[0], wanted[0])
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        functional(base.requires_grad_(), inside, None, "relu", policy)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "weight_copy"])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "unaligned", "expanded", "far"])
def test_linear_act_every_tensor_in_every_layout(name, layout, generator):
    """One by one, the copy of the weight and the bias too."""
    shapes = {"x": (6, 9), "weight": (5, 9), "bias": (5,), "weight_copy": (5, 9)}
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    tensors["weight_copy"] = tensors["weight_copy"].half()
    good = tensors[name]
    tensors[name] = far_apart(good) if layout == "far" else laid_out(good, layout)
    if layout == "expanded":
        tensors[name] = good[:1].expand_as(good)
    out = call(**tensors, compute_dtype=f16, out_dtype=f32)
    bounds.check_forward(out, tensors["x"], tensors["weight_copy"], tensors["bias"], Activation.RELU, f16)


# ----- second derivatives ---------------------------------------------------------------

SECOND = {
    "backward of a gradient": lambda f, x: torch.autograd.grad(
        torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)[0].sum(), x
    ),
    "functional.hessian": torch.autograd.functional.hessian,
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(f, x, x),
    "functional.vhp": lambda f, x: torch.autograd.functional.vhp(f, x, x),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x),  # by two backwards
    "gradgradcheck": torch.autograd.gradgradcheck,
    "grad of grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),  # forward over reverse
    "per sample": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: torch.func.grad(f)(x).sum()))(x),
}


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("way", SECOND)
def test_linear_act_second_derivatives_raise(way, activation, generator):
    """Right or refused, never an unexpected zero; in fp64, of which some expect that it works."""
    x, weight = (torch.randn(s, generator=generator, dtype=f64) for s in ((2, 4), (3, 4)))
    function = lambda x: functional(x, weight, None, activation).square().sum()
    function(x)
    with pytest.raises(RuntimeError, match=r"double backward is not supported|forward mode \(jvp\) is not supported"):
        SECOND[way](function, x.requires_grad_() if way == "gradgradcheck" else x)
