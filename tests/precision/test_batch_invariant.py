# SPDX-License-Identifier: Apache-2.0
"""check_batch_invariant: finds the module and the number of rows, passes what is invariant, leaves the model alone."""

from collections import OrderedDict, UserDict
from types import MappingProxyType

import pytest
import torch
from torch import nn

import mpkernels as mpk


class Returns(nn.Module):
    """What `function` makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def mean_of_rows(x):
    """A row's result depends on the others."""
    return x + x.mean(0)


def model_with(*modules):
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), *modules, nn.LayerNorm(8))


@pytest.fixture
def x():
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def test_batch_invariant_passes_what_is(x):
    report = mpk.check_batch_invariant(model_with(nn.ReLU()), x)
    assert report
    assert report.ok
    assert (report.module, report.rows) == (None, None)
    assert str(report).startswith("batch invariant: the first 1, 2, 3, 7, 17, 33 of 40 rows")


@pytest.mark.parametrize("m", [1, 3, 17])
def test_batch_invariant_names_module_and_rows(x, m):
    """All 40 rows are moved by the least there is; the first size at which they are not is the first that differs from them."""
    planted = Returns(lambda x: x if len(x) <= m else torch.nextafter(x, torch.full_like(x, torch.inf)))
    report = mpk.check_batch_invariant(model_with(planted, Returns(mean_of_rows)), x, sizes=(33, 2, 1, 17))
    assert not report
    assert (report.module, report.direction, report.rows) == ("1", "forward", 1)
    assert "1 (Returns) gives the first 1 of 40 rows other bits" in str(report)


def test_batch_invariant_finds_the_smallest_size(x):
    report = mpk.check_batch_invariant(model_with(Returns(lambda x: x + (len(x) == 17))), x)
    assert (report.module, report.rows) == ("1", 17)


@pytest.mark.parametrize("name", ["float32", "mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_batch_invariant_holds_for_the_policy(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 130), nn.ReLU(), nn.Linear(130, 64), nn.GELU(), nn.Linear(64, 10))
    mpk.convert(model, f"{name},batch_invariant")
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(1))
    assert mpk.check_batch_invariant(model, x.to(next(model.parameters()).dtype))


def test_batch_invariant_finds_a_plain_linear():
    """torch's GEMM sums one row in another order than many; the remedy is said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(1024), nn.Linear(1024, 512))
    report = mpk.check_batch_invariant(model, torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)))
    if report.ok:
        pytest.skip("this CPU's GEMM happens to be invariant at this size")
    assert report.module == "1"
    assert 'mpk.convert(model, "<policy>,batch_invariant")' in str(report)


def test_batch_invariant_rows_anywhere(x):
    """Of a sequence (T, B, E), of (B * T, E), of a dict, of a named output; a mean has no rows and is not compared."""

    class Turned(nn.Module):
        def forward(self, tokens, mask, *, extra=None):
            flat = torch.cat([tokens, tokens], 1).reshape(-1, 4)
            return {"turned": tokens.t()[:, None], "flat": flat, "mean": tokens.mean(), "mask": mask}

    inputs = {"tokens": x, "mask": torch.ones(5)}
    assert mpk.check_batch_invariant(Turned(), inputs)
    assert mpk.check_batch_invariant(Turned(), (x, torch.ones(5)))


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, MappingProxyType])
def test_batch_invariant_cuts_every_mapping(x, kind):
    """A tokenizer gives a UserDict: what is not cut would agree with itself."""

    assert mpk.check_batch_invariant(Returns(mean_of_rows), kind({"x": x})).rows == 1


@pytest.mark.parametrize("function", [lambda x: x.new_zeros(40, 8), torch.mean], ids=["as many as ever", "mean"])
def test_batch_invariant_wants_something_to_compare(function, x):
    with pytest.raises(RuntimeError, match="no tensor that the model returns has a dimension of rows"):
        mpk.check_batch_invariant(Returns(function), x)


def test_batch_invariant_compares_bits(x):
    """0 and -0 are equal and not the same bits; a NaN is the same as itself."""

    for dtype in (torch.float64, torch.float32):
        assert mpk.check_batch_invariant(Returns(lambda x: x * (0.0 if len(x) > 7 else -0.0)), x.abs().to(dtype)).rows == 1
        assert mpk.check_batch_invariant(Returns(lambda x: x * torch.nan), x.to(dtype))


def test_batch_invariant_runs_the_model_in_its_own_mode(x):
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(8))
    report = mpk.check_batch_invariant(model, x, sizes=(2, 7))
    assert (report.module, report.rows) == ("1", 2), "batch statistics in training"
    assert mpk.check_batch_invariant(model.eval(), x, sizes=(2, 7))


def test_batch_invariant_refuses(x):
    model = nn.Sequential(nn.Linear(8, 8))
    for sizes in ((0,), (1.5,), (True,), (-3, 2), 3, "3"):
        with pytest.raises(ValueError, match="sizes must be several natural numbers, got"):
            mpk.check_batch_invariant(model, x, sizes=sizes)
    with pytest.raises(ValueError, match="x has 1 rows, and none of the sizes"):
        mpk.check_batch_invariant(model, x[:1])
    jagged = torch.nested.nested_tensor_from_jagged(torch.ones(5, 8), torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="x is a nested tensor, which cannot be cut to fewer rows"):
        mpk.check_batch_invariant(model, jagged)
    with pytest.raises(ValueError, match="no tensor with a dimension"):
        mpk.check_batch_invariant(model, torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"1 is a dropout that is on: call model\.eval\(\) first"):
        mpk.check_batch_invariant(nn.Sequential(nn.Linear(8, 8), nn.Dropout()), x)
