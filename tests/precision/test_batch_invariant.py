# SPDX-License-Identifier: Apache-2.0
"""check_batch_invariant: finds the module and the number of rows, passes what is invariant, leaves the model alone."""

from collections import OrderedDict, UserDict
from types import MappingProxyType

import pytest
import torch
from torch import nn

import mpkernels as mpk


class MeanOfRows(nn.Module):
    """A row's result depends on the others."""

    def forward(self, x):
        return x + x.mean(0)


class From(nn.Module):
    """Adds the least there is to rows of results of more than `m` rows: the fault is planted."""

    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, x):
        return x if x.shape[0] <= self.m else torch.nextafter(x, torch.full_like(x, torch.inf))


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
    """All 40 rows are moved; the first size at which they are not is the first that differs from them."""
    report = mpk.check_batch_invariant(model_with(From(m), MeanOfRows()), x, sizes=(33, 2, 1, 17))
    assert not report
    assert (report.module, report.direction, report.rows) == ("1", "forward", 1)
    assert "1 (From) gives the first 1 of 40 rows other bits" in str(report)


def test_batch_invariant_finds_the_smallest_size(x):
    class Odd(nn.Module):
        def forward(self, x):
            return x + (x.shape[0] == 17)

    report = mpk.check_batch_invariant(model_with(Odd()), x)
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

    class Named(nn.Module):
        def forward(self, tokens):
            return tokens + tokens.mean(0)

    assert mpk.check_batch_invariant(Named(), kind({"tokens": x})).rows == 1


def test_batch_invariant_wants_something_to_compare(x):
    """A result of as many rows as ever, though x has fewer."""

    class Fixed(nn.Module):
        def forward(self, x):
            return x.new_zeros(40, 8)

    with pytest.raises(RuntimeError, match="no tensor that the model returns has a dimension of rows"):
        mpk.check_batch_invariant(Fixed(), x)


def test_batch_invariant_compares_bits(x):
    """0 and -0 are equal and not the same bits; a NaN is the same as itself."""

    class Signed(nn.Module):
        def forward(self, x):
            return x * (0.0 if x.shape[0] > 7 else -0.0)

    class Nan(nn.Module):
        def forward(self, x):
            return x * torch.nan

    assert mpk.check_batch_invariant(Signed(), x.abs()).rows == 1
    assert mpk.check_batch_invariant(Nan(), x)


def test_batch_invariant_leaves_the_model_alone(x):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model(x).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads, seed = [p.grad for p in model.parameters()], torch.get_rng_state()
    report = mpk.check_batch_invariant(model, x, sizes=(2, 7))
    assert (report.module, report.rows) in (("0", 2), ("1", 2)), "batch statistics in training"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), seed)
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_batch_invariant_refuses(x):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        mpk.check_batch_invariant(lambda x: x, x)
    for sizes in ((0,), (1.5,), (True,), (-3, 2), 3, "3"):
        with pytest.raises(ValueError, match="sizes must be several natural numbers, got"):
            mpk.check_batch_invariant(model, x, sizes=sizes)
    with pytest.raises(ValueError, match="x has 1 rows, and none of the sizes"):
        mpk.check_batch_invariant(model, x[:1])
    with pytest.raises(ValueError, match="no tensor with a dimension"):
        mpk.check_batch_invariant(model, torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"1 is a dropout that is on: call model\.eval\(\) first"):
        mpk.check_batch_invariant(nn.Sequential(nn.Linear(8, 8), nn.Dropout()), x)
    with pytest.raises(RuntimeError, match="no tensor that the model returns has a dimension of rows"):
        mpk.check_batch_invariant(Mean(), x)
    with pytest.raises(RuntimeError, match=r"0\.weight is on meta"):
        mpk.check_batch_invariant(nn.Sequential(nn.Linear(8, 8, device="meta")), x)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()
