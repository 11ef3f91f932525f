# SPDX-License-Identifier: Apache-2.0
"""Tests of mpkernels.functional.linear_act: dtypes from a policy, from autocast or from the tensors, and bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mpkernels as mpk
from mpkernels.functional import linear_act
from mpkernels.ops.linear_act import Activation, activation_of
from tests import bounds

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALL_DTYPES = (*DTYPES, torch.int64, torch.bool, torch.complex64)
AUTOCAST = (None, torch.float16, torch.bfloat16)


def outcome(function, *args):
    """dtype of the result, or the class of the error."""
    try:
        return function(*args).dtype
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_without_a_policy_dtypes_are_those_of_torch(autocast):
    for x_dtype, weight_dtype, bias_dtype in itertools.product(ALL_DTYPES, ALL_DTYPES, (None, *DTYPES)):
        x, weight = torch.ones(3, 5).to(x_dtype), torch.ones(4, 5).to(weight_dtype)
        bias = None if bias_dtype is None else torch.ones(4, dtype=bias_dtype)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            got, expected = outcome(linear_act, x, weight, bias), outcome(F.linear, x, weight, bias)
        if expected not in DTYPES:  # CPU torch multiplies integers, bool and complex; the op refuses them
            expected = RuntimeError
        assert got == expected, (x_dtype, weight_dtype, bias_dtype)


class Arguments(TorchDispatchMode):
    """By name, of each call of the op."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mpkernels.linear_act.default:
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append(dict(zip(names, args, strict=False)))  # what is the default is left out
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [None, "mixed_float16", "mixed_float16,batch_invariant"])
def test_batch_invariant_is_the_policys(policy):
    """Without one a layer is an nn.Linear, which is not."""
    with torch.no_grad(), Arguments() as seen:
        linear_act(torch.ones(3, 5), torch.ones(4, 5), policy=policy)
    assert [call.get("batch_invariant", False) for call in seen.calls] == [policy is not None and "invariant" in policy]


@pytest.mark.parametrize("inner", AUTOCAST, ids=str)
@pytest.mark.parametrize("outer", AUTOCAST, ids=str)
def test_without_a_policy_dtypes_are_those_of_torch_in_nested_autocast(outer, inner):
    """Inside both, and in the outer one again; None is off, inside of one that is on, too."""
    regions = [torch.autocast("cpu", dtype, enabled=dtype is not None) for dtype in (outer, inner)]
    for x_dtype, weight_dtype, bias_dtype in itertools.product(DTYPES, DTYPES, (None, *DTYPES)):
        x, weight = torch.ones(3, 5, dtype=x_dtype), torch.ones(4, 5, dtype=weight_dtype)
        args = (x, weight, None if bias_dtype is None else torch.ones(4, dtype=bias_dtype))
        with regions[0]:
            with regions[1]:
                inside = [outcome(function, *args) for function in (linear_act, F.linear)]
            outside = [outcome(function, *args) for function in (linear_act, F.linear)]
        assert inside[0] == inside[1], (x_dtype, weight_dtype, bias_dtype)
        assert outside[0] == outside[1], (x_dtype, weight_dtype, bias_dtype)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_policy_gradients_have_the_dtypes_of_torch(dtype, autocast, generator):
    x = torch.randn(6, 5, generator=generator).to(dtype).requires_grad_()
    weight, bias = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in ((4, 5), (4,)))
    grads = []
    for function in (linear_act, F.linear):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            out = function(x, weight, bias)
        grads.append(torch.autograd.grad(out.sum(), (x, weight, bias)))
    assert [g.dtype for g in grads[0]] == [g.dtype for g in grads[1]] == [dtype] * 3


def test_dtype_mismatch_names_both_dtypes_and_the_policy():
    with pytest.raises(RuntimeError, match=r"x torch.float32, weight torch.float16.* no Policy"):
        linear_act(torch.ones(2, 3), torch.ones(4, 3).half())


@pytest.mark.parametrize("activation", [None, *(a.name.lower() for a in Activation if a)])
@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_policy_matches_reference(policy, activation, generator):
    policy = mpk.Policy.parse(policy)
    shapes = ((2, 7, 33), (19, 33), (19,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(policy.param_dtype) for s in shapes)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # an explicit policy decides what is computed in
        out = linear_act(x, weight, bias, activation, policy)
    assert out.shape == (2, 7, 19)
    bounds.check_forward(out, x, weight, bias, activation_of(activation), policy.compute_dtype)


@pytest.mark.parametrize(
    "policy, x_dtype, autocast, expected",
    [
        ("mixed_float16", torch.float32, None, torch.float32),
        ("mixed_float16", torch.float16, None, torch.float16),
        ("mixed_float16", torch.float64, None, torch.float64),
        ("mixed_float16", torch.float32, torch.bfloat16, torch.bfloat16),
        ("mixed_float16,output=float32", torch.float16, torch.bfloat16, torch.float32),
        ("mixed_float32", torch.float64, None, torch.float64),
        ("float16", torch.float32, None, torch.float16),
        ("float16,output=float32", torch.float16, None, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float16, torch.bfloat16),
        ("float32", torch.float16, torch.float16, torch.float32),
    ],
)
def test_policy_output_dtype(policy, x_dtype, autocast, expected):
    parsed = mpk.Policy.parse(policy)
    x, weight = torch.ones(2, 3, dtype=x_dtype), torch.ones(4, 3, dtype=parsed.param_dtype)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        assert linear_act(x, weight, policy=policy).dtype == expected


def test_policy_wide_output_is_not_rounded_on_the_way():
    x, weight = torch.tensor([[1.0, 2.0**-14]]), torch.ones(1, 2)
    assert linear_act(x, weight, policy="mixed_float16").item() == 1 + 2.0**-14
    assert linear_act(x, weight, torch.tensor([2.0**-20]), policy="mixed_float16").item() == 1 + 2.0**-14 + 2.0**-20


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(2, 5)}, RuntimeError, "x has last dimension 5, weight expects 4"),
        ({"bias": torch.ones(2)}, RuntimeError, r"bias must have shape \(3,\), got \(2,\)"),
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"x": torch.ones(2, 4).to_sparse()}, RuntimeError, "sparse"),
        ({"x": torch.ones(2, 4, device="meta")}, RuntimeError, "x is on meta but weight is on cpu"),
        ({"activation": "tanh"}, ValueError, 'activation must be None or one of "relu", .*"silu", got \'tanh\''),
        ({"policy": "mixed_float4"}, ValueError, "mixed_float4.*expected one of"),
        ({"policy": 16}, TypeError, "policy must be a Policy or a string, got int"),
    ],
)
@pytest.mark.parametrize("policy", [None, "mixed_float16"])
def test_bad_inputs(change, error, message, policy):
    good = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3), "policy": policy}
    with pytest.raises(error, match=message):
        linear_act(**good | change)
