# SPDX-License-Identifier: Apache-2.0
"""cast: one rounding, to nearest even, from and to every dtype."""

from itertools import product

import numpy as np
import pytest
import torch

from mpkernels.ops.common.cast import cast
from tests import bounds
from tests.linear_act_cases import bf16, f16, f32, f64, same_bits


def hard_values(narrow: torch.dtype, generator) -> torch.Tensor:
    """fp64: numbers of `narrow`, the middles between them and a hair to either side; subnormals, overflow, non-finite."""
    u, least = bounds.unit_roundoff(narrow), bounds.least_subnormal(narrow)
    edge = float(bounds.overflow_threshold(narrow))
    exponents = torch.randint(-40, 17, (4000,), generator=generator)
    grid = (1 + 2 * u * torch.randint(0, round(0.5 / u), (4000,), generator=generator)).double() * torch.exp2(
        exponents.double()
    )
    middles = grid * (1 + u)
    small = least * (torch.randint(0, 40, (200,), generator=generator).double() + 0.5)
    special = torch.tensor([0.0, torch.inf, torch.nan, edge, 2 * edge, least, least / 2, least / 4, 5e-324], dtype=f64)
    values = torch.cat([grid, middles, small, special])
    near = [torch.nextafter(values, torch.full_like(values, to)) for to in (-torch.inf, torch.inf)]
    hair = [values * (1 + sign * 2.0**-e) for sign, e in product((1, -1), (25, 30, 40, 50))]
    values = torch.cat([values, *near, *hair, torch.randn(4000, generator=generator, dtype=f64)])
    return torch.cat([values, -values])


@pytest.mark.parametrize("narrow", [f16, bf16, f32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("wide", [f64, f32, f16, bf16], ids=["fp64", "fp32", "fp16", "bf16"])
def test_cast_rounds_once(wide, narrow, generator, device):
    values = hard_values(narrow, generator).to(wide)
    result = cast(values.to(device), narrow).cpu()
    expected = bounds.rounded(values.double().numpy(), narrow)
    np.testing.assert_array_equal(result.double().numpy(), expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(result.signbit().numpy()[number], np.signbit(expected)[number])


def test_cast_to_fp16_is_numpys(generator):
    """numpy rounds fp64 to fp16 once: it vouches for the expectation of the other tests."""
    values = hard_values(f16, generator).numpy()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(bounds.rounded(values, f16), values.astype(np.float16).astype(np.float64))


@pytest.mark.parametrize("dtype", [f64, f32, f16, bf16], ids=["fp64", "fp32", "fp16", "bf16"])
def test_cast_keeps_shape_strides_and_values(dtype, generator, device):
    values = torch.randn(6, 10, generator=generator).to(device, dtype)
    for view in (values, values.t(), values[::2, 1::3], values[:1].expand(4, 10), values[:0]):
        assert same_bits(cast(view, f64), view.double())
        assert cast(view, f16).shape == view.shape
    assert cast(values, dtype) is values
