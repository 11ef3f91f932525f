# SPDX-License-Identifier: Apache-2.0
"""The bounds themselves, where no wrong kernel puts them to the test: what they let through and what they do not."""

import math

import numpy as np
import pytest
import torch

from mpkernels.ops.linear_act import Activation
from mpkernels.testing.bounds import random_sign_excess, rounded
from tests import bounds

NONE = Activation.NONE


@pytest.mark.parametrize(
    "exact, right",
    [
        (65503.0, (65504.0,)),
        (65521.0, (math.inf,)),
        (65520.0, (65504.0, math.inf)),  # the factors are rounded before: either side of 65520
        (260000.0, (math.inf,)),
        (-260000.0, (-math.inf,)),
        (math.inf, (math.inf,)),
        (math.nan, (math.nan,)),
    ],
)
def test_bounds_slope_that_overflows(exact, right):
    """Bound 7 for grad_z in fp16: grad_out times the slope of ReLU squared at 0.5, which is 1."""
    grad_out, saved = torch.tensor([[exact]]), torch.tensor([[0.5]]).half()
    for value in (0.0, 65504.0, math.inf, -math.inf, math.nan):
        grad_z = torch.tensor([[value]]).half()
        check = lambda grad_z=grad_z: bounds.check_slope(grad_z, grad_out, saved, Activation.RELU2, torch.float16, 2.0**-24)
        if value in right or (math.isnan(value) and math.isnan(right[0])):
            check()
        else:
            with pytest.raises(AssertionError, match="grad_z"):
                check()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bounds_of_products_that_underflow(out_dtype):
    """A thousand products below the accumulator's least number: each may become 0, although their sum is far from it.

    What takes everything below 2^-126 for 0, as instructions for bf16 do, is still rejected.
    """
    check = lambda x, out: bounds.check_forward(torch.tensor([[out]], dtype=out_dtype), x, weight, None, NONE, torch.bfloat16)
    for exponent, factor in ((-133, 2.0**-18), (-120, 2.0**-31)):
        x, weight = torch.full((1, 1000), 2.0**exponent).bfloat16(), torch.full((1, 1000), factor).bfloat16()
        check(x, 0.0)
        check(x, 1000 * 2.0**exponent * factor)
        with pytest.raises(AssertionError, match="bound 1"):
            check(x, 2000 * 2.0**exponent * factor + 2.0**-131)
    x, weight = torch.full((1, 1000), 2.0**-70).bfloat16(), torch.full((1, 1000), 2.0**-60).bfloat16()
    check(x, 1000 * 2.0**-130)
    with pytest.raises(AssertionError, match="bound 1"):
        check(x, 0.0)


# ----- the formulas, in their own figures ---------------------------------------------------------------


def worst_case(K: int, v: float, r: float, dtype: torch.dtype) -> float:
    """Bound 1 of K products of 1 and a bias of 0, before the last rounding and after it."""
    u, n = 2.0 ** {torch.float64: -53, torch.float32: -24, torch.float16: -11}[dtype], K + 2
    return u * r + (1 + u) * (n * v / (1 - n * v) * K)


@pytest.mark.parametrize("K", [1, 7, 1000])
@pytest.mark.parametrize(
    "compute, given, v",
    [(torch.float16, 2.0**-23, 2.0**-23), (torch.float32, 2.0**-24, 2.0**-24), (torch.float64, 2.0**-24, 2.0**-53)],
)
def test_bound_1_in_figures(K, compute, given, v):
    """The accumulator of fp64 has its own roundoff whatever is given. Results of fp64 are exact enough to stand on the edge."""
    x, weight = torch.ones(1, K, dtype=compute), torch.ones(1, K, dtype=compute)
    allowed = worst_case(K, v, K, torch.float64)
    for sign in (1, -1):
        check = lambda out: bounds.check_forward(
            torch.tensor([[out]], dtype=torch.float64), x, weight, None, NONE, compute, given
        )
        unit = math.ulp(K)
        check(K + sign * math.floor(allowed / unit) * unit)
        with pytest.raises(AssertionError, match="bound 1"):
            check(K + sign * (math.floor(allowed / unit) + 1) * unit)


@pytest.mark.parametrize("activation", [Activation.GELU, Activation.GELU_TANH, Activation.SILU])
def test_bound_1_of_a_smooth_activation_in_figures(activation):
    """The accumulator's error times the steepest slope, 1.13, and 8 roundoffs of the value; at 1000 they are identities."""
    K, v = 1000, 2.0**-24
    x, weight = torch.ones(1, K), torch.ones(1, K)
    n, u = K + 2, 2.0**-53
    allowed = u * K + (1 + u) * (1.13 * (n * v / (1 - n * v) * K) + 8 * v * K)
    check = lambda out: bounds.check_forward(
        torch.tensor([[out]], dtype=torch.float64), x, weight, None, activation, torch.float32
    )
    check(K + allowed * (1 - 1e-9))
    with pytest.raises(AssertionError, match="bound 1"):
        check(K + allowed * (1 + 1e-9))


@pytest.mark.parametrize("shape", [(3, 16, 5), (16, 4, 5)])  # K with an exact root
def test_random_sign_excess_in_figures(shape):
    M, K, N = shape
    a, b = torch.ones(M, K), torch.ones(K, N)
    exact = (a @ b).double()
    allowed = 2.0**-24 * K + (1 + 2.0**-24) * (5 * math.sqrt(K) * 2.0**-23 * math.sqrt(K))
    got = (exact + 2.0**-10).float()
    excess = random_sign_excess(got, exact, a, b, 0, torch.float32, 2.0**-23)
    assert excess == 2.0**-10 / allowed


def test_accumulator_roundoff_by_device_and_dtype():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert [bounds.accumulator_roundoff(cpu, d) for d in (torch.float16, torch.float32, torch.float64)] == [
        2.0**-24,
        2.0**-24,
        2.0**-53,
    ]
    assert [bounds.accumulator_roundoff(cuda, d) for d in (torch.bfloat16, torch.float32, torch.float64)] == [
        2.0**-23,
        2.0**-24,
        2.0**-53,
    ]


def test_check_norm_in_figures():
    """Four squares and four roundings more, of 2^-53 each, relative."""
    bounds.check_norm(8 + 3 * math.ulp(8), 8.0, 4)
    with pytest.raises(AssertionError, match="grad_norm"):
        bounds.check_norm(8 + 5 * math.ulp(8), 8.0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_is_one_rounding_to_nearest_even(dtype):
    """All numbers of the format, the middles between two, and what lies next to a middle; subnormals, overflow and NaN."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double().numpy()
    finite = np.unique(every[np.isfinite(every)])
    assert np.array_equal(rounded(every, dtype), every, equal_nan=True)
    low, high = finite[:-1], finite[1:]
    middle = (low + high) / 2
    is_even = (torch.from_numpy(low).to(dtype).view(torch.int16).numpy() & 1) == 0
    assert np.array_equal(rounded(middle, dtype), np.where(is_even, low, high))
    assert np.array_equal(rounded(np.nextafter(middle, -np.inf), dtype), low)
    assert np.array_equal(rounded(np.nextafter(middle, np.inf), dtype), high)
    beyond = 2 * finite[-1] - finite[-2]
    assert rounded(np.array([(finite[-1] + beyond) / 2]), dtype) == np.inf
