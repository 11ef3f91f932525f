# SPDX-License-Identifier: Apache-2.0
"""Weight gradients that linear_act adds in Triton: on a GPU, or through Triton's interpreter (test_triton_interpreter.py)."""

import pytest
import torch

from mpkernels.ops.linear_act import triton
from tests import triton_target
from tests.linear_act_cases import check_adds_grad_weight, same_bits

INTERPRETED, device = triton_target.INTERPRETED, triton_target.device
test_interpreter_computes_bf16_by_value = triton_target.test_interpreter_computes_bf16_by_value

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
ALIGNED, ODD = (40, 72, 96), (7, 33, 41)  # M, N, K
CASES = [
    *((dtype, ALIGNED, shift, shift % 4 == 0) for dtype in (f16, bf16) for shift in (0, 1, 4)),
    (f16, ODD, 0, False), (f16, ODD, 3, False), (f16, (0, 16, 24), 0, False), (f32, ALIGNED, 0, False), (f32, ODD, 1, False),
]  # fmt: skip


@pytest.mark.parametrize("dtype, sizes, shift, by_tma", CASES, ids=str)
def test_linear_act_adds_grad_weight(dtype, sizes, shift, by_tma, generator, device, monkeypatch):
    """By the kernel that reads such a sum."""
    launches, launch = [], triton._gemm_launch
    monkeypatch.setattr(triton, "_gemm_launch", lambda *args: launches.append(launch(*args)) or launches[-1])
    check_adds_grad_weight(triton.linear_act_backward, sizes, dtype, shift, generator, device)
    if INTERPRETED:
        assert launches[-1].by_tma == by_tma


def test_linear_act_adds_in_tiles_of_two_parts(generator, device):
    """The largest tile of the descriptor kernel is stored in two parts."""
    rows, columns = (64, 128) if INTERPRETED else (4096, 4096)
    grad_z, x = (torch.randn(32, n, generator=generator).to(device, f16) for n in (rows, columns))
    before = torch.randn(rows, columns, generator=generator).to(device, f16)
    product, _ = triton._gemm(grad_z.t(), x, f16)
    total, _ = triton._gemm(grad_z.t(), x, f16, add_to=before.clone())
    assert same_bits(total, before + product)
