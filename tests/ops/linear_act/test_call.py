# SPDX-License-Identifier: Apache-2.0
"""What a call of linear_act says of itself, with any number of leading dimensions."""

import pytest
import torch

from mpkernels.ops.linear_act import Activation
from mpkernels.ops.linear_act.call import BackwardCall, ForwardCall

f16, f32 = torch.float16, torch.float32
LEADING = [(), (6,), (2, 3), (1, 3, 2)]


def forward_call(leading) -> ForwardCall:
    return ForwardCall(torch.ones(*leading, 4), torch.ones(5, 4), None, None, Activation.NONE, f32, f32, 0)


def backward_call(leading) -> BackwardCall:
    grad_out, x = torch.ones(*leading, 5), torch.ones(*leading, 4)
    return BackwardCall(grad_out, x, torch.ones(5, 4), None, None, Activation.NONE, f32, f32, f32, f32, [True, True, True])


@pytest.mark.parametrize("make", [forward_call, backward_call])
@pytest.mark.parametrize("leading", LEADING)
def test_a_good_call_takes_the_fast_path(make, leading):
    assert make(leading).is_valid()


@pytest.mark.parametrize("make", [forward_call, backward_call])
@pytest.mark.parametrize("leading", LEADING)
def test_the_tuned_table_is_asked_by_the_number_of_rows(make, leading):
    rows = 6 if leading else 1
    assert make(leading).gemm_key == make((rows,)).gemm_key
    assert make((4 * rows,)).gemm_key != make((rows,)).gemm_key
