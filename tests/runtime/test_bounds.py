# SPDX-License-Identifier: Apache-2.0
"""The bounds themselves, where no wrong kernel puts them to the test: what they let through and what they do not."""

import math

import pytest
import torch

from mpkernels.ops.linear_act import Activation
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
