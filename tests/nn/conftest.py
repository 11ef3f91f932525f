# SPDX-License-Identifier: Apache-2.0
"""Layers whose backward is shared, as kernels for GPUs do it: the op on a CPU has the same two parts, mask and epilogue."""

import pytest

from mpkernels.ops.linear_act import forward_op
from tests.linear_act_cases import saving_masks


@pytest.fixture
def is_joined(monkeypatch):
    monkeypatch.setattr(forward_op, "_chosen", saving_masks())


@pytest.fixture(params=[False, True], ids=["one by one", "joined"])
def joined(request):
    if request.param:
        request.getfixturevalue("is_joined")
    return request.param
