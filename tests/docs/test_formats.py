# SPDX-License-Identifier: Apache-2.0
"""docs/formats.md is what its script writes, and says of the formats what bounds.py, which does not ask torch, says."""

import importlib.util

import pytest
import torch

from tests import bounds
from tests.paths import ROOT

SCRIPT = ROOT / "docs" / "make_formats.py"


@pytest.fixture(scope="module")
def make_formats():
    spec = importlib.util.spec_from_file_location("make_formats", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formats_page_is_what_the_script_writes(make_formats):
    assert make_formats.PAGE.read_text() == make_formats.page(), "run python docs/make_formats.py"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_formats_numbers(make_formats, dtype):
    assert 2.0 ** -make_formats.significand_bits(dtype) == bounds.unit_roundoff(dtype)
    assert make_formats.least_subnormal(dtype) == bounds.least_subnormal(dtype)
    assert torch.tensor(make_formats.least_subnormal(dtype), dtype=torch.float64).to(dtype) > 0
    assert torch.tensor(make_formats.least_subnormal(dtype) / 2, dtype=torch.float64).to(dtype) == 0


def test_formats_misstatements_are_wrong_in_torch(make_formats):
    page = make_formats.page()
    assert "16,777,217" in page
    assert torch.tensor(16777217.0) == torch.tensor(16777216.0)
    assert "65520 and above become infinite" in page
    assert torch.tensor([65519.0, 65520.0]).half().tolist() == [65504.0, float("inf")]
    value = torch.tensor(1 + 2**-11 + 2**-40, dtype=torch.float64)
    assert "becomes 1 that way" in page
    assert value.half().item() == 1.0
    wide, narrow = torch.nn.Linear(2, 2, dtype=torch.float64), torch.nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64
        assert narrow(torch.zeros(1, 2)).dtype == torch.bfloat16


def test_formats_eight_bits_are_numbers_of_fp16():
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        numbers = every.view(dtype).double()
        assert torch.equal(numbers.half().double().nan_to_num(7), numbers.nan_to_num(7))
    upper = (every.short() << 8).view(torch.float16)
    assert torch.equal(upper.double().nan_to_num(7), every.view(torch.float8_e5m2).double().nan_to_num(7))


def test_formats_eight_bits_have_exact_products():
    every = torch.cat([torch.arange(256, dtype=torch.uint8).view(d).double() for d in (torch.float8_e4m3fn, torch.float8_e5m2)])
    every = every[every.isfinite()]
    products = every[:, None] * every
    assert torch.equal(products.float().double(), products)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="casts of earlier versions differ")
def test_formats_casts_of_torch_hide_an_overflow():
    x = torch.tensor([1e6, float("inf"), float("nan")])
    assert x.to(torch.float8_e4m3fn).float().nan_to_num(7).tolist() == [448.0, 448.0, 7.0]
    assert x.to(torch.float8_e5m2).float().isinf().tolist() == [True, True, False]
