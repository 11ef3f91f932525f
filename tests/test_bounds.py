# SPDX-License-Identifier: Apache-2.0
"""The bounds themselves, where no wrong kernel puts them to the test: what they let through and what they do not."""

import math

import bounds
import pytest
import torch

from mpkernels.ops.linear_act import Activation


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
