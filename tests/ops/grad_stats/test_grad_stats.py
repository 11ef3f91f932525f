# SPDX-License-Identifier: Apache-2.0
"""grad_stats_ against fp64: found_inf, amax, count of non-finite and the norm."""

import functools
import math

import numpy as np
import pytest
import torch

from mpkernels.ops.common import multi_tensor
from mpkernels.ops.common.multi_tensor import count_nonfinite
from mpkernels.ops.grad_stats import eager, op, reference
from tests import bounds
from tests.steps import (
    BAD_SCALES,
    BAD_VALUES,
    DTYPES,
    SIZES,
    check_raises_unchanged,
    counts,
    force,
    layouts,
    norm_is_in_fp32,
    raw,
    scalar,
    split,
)
from tests.steps import targets as targets_of

grad_stats_ = torch.ops.mpkernels.grad_stats_


AS_ON_GPU = "eager as on a GPU"  # on the CPU, without looking at a value


@pytest.fixture(params=[*targets_of(op), AS_ON_GPU])
def device(request, monkeypatch):
    if request.param != AS_ON_GPU:
        return force(op, request.param, monkeypatch)
    for module in (multi_tensor, eager):
        monkeypatch.setattr(module, "values_are_here", lambda device: False)
    return force(op, ("eager", "cpu"), monkeypatch)


def outputs(n, device, norm=True):
    """What a call writes, filled with what it must not leave."""
    return dict(
        found_inf=scalar(7.0, device),
        amax=torch.full((n,), -7.0, dtype=torch.float64, device=device),
        nonfinite=torch.full((n,), -7, device=device),
        grad_norm=scalar(-7.0, device, torch.float64) if norm else None,
    )


def stats(grads, grad_scale, norm=True):
    """The outputs of one call; the gradients keep their bytes."""
    device, before = grads[0].device, raw(grads)
    out = outputs(len(grads), device, norm)
    grad_stats_(grads, None if grad_scale is None else scalar(grad_scale, device), *out.values())
    assert raw(grads) == before
    return out


VERDICT = ("found_inf", "amax", "nonfinite")


def count_what_was_not(grads, out) -> None:
    """As overflow_report does after `eager` on a GPU."""
    for i in (out["nonfinite"] < 0).nonzero().flatten().tolist():
        assert out["nonfinite"][i] == -1
        assert out["amax"][i].isnan()
        out["nonfinite"][i], out["amax"][i] = count_nonfinite(grads[i])
        assert out["nonfinite"][i] > 0


def check(grads, grad_scale):
    """A call with the norm against the reference, and one without. Returns the outputs of the first."""
    out, without_norm = stats(grads, grad_scale), stats(grads, grad_scale, norm=False)
    assert raw(map(without_norm.get, VERDICT)) == raw(map(out.get, VERDICT))
    found_inf, amax, nonfinite, norm = reference.grad_stats([g.cpu() for g in grads], 1.0 if grad_scale is None else grad_scale)
    assert out["found_inf"].item() == float(found_inf)
    count_what_was_not(grads, out)
    assert out["amax"].tolist() == amax
    assert out["nonfinite"].tolist() == nonfinite
    if math.isfinite(norm):
        bounds.check_norm(out["grad_norm"].item(), norm, sum(g.numel() for g in grads), norm_is_in_fp32(grads))
    else:
        assert not math.isfinite(out["grad_norm"].item())
    return out


def random_grads(device, sizes=SIZES, dtypes=DTYPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) * 10).to(device, dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [DTYPES], ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("grad_scale", [None, 1.0, 1024.0, 3.0, 2.0**-20])
def test_grad_stats_matches_reference(device, dtypes, grad_scale):
    check(random_grads(device, dtypes=dtypes), grad_scale)


def test_grad_stats_reference_matches_torch():
    grads = random_grads("cpu")
    found_inf, amax, nonfinite, norm = reference.grad_stats(grads, 4.0)
    assert not found_inf
    assert nonfinite == [0] * len(grads)
    assert amax == [g.double().abs().max().item() for g in grads]
    expected = torch.cat([g.double() for g in grads]).norm().item() / 4
    bounds.check_norm(norm, expected, sum(SIZES))


def test_grad_stats_exact_norm(device):
    grads = [torch.tensor([3.0]).to(device, d) for d in DTYPES] + [torch.tensor([0.0, 8.0], device=device)]
    assert stats(grads, 2.0)["grad_norm"].item() == 5.0


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.sweep) for dtype in DTYPES[1:])])
def test_grad_stats_finds_each_position(device, dtype):
    grads = random_grads(device, dtypes=(dtype,))
    grad_scale, out = scalar(8.0, device), outputs(len(grads), device)
    found, wrong = [], torch.zeros((), dtype=torch.int64, device=device)
    for i, grad in enumerate(grads):
        only_here = torch.nn.functional.one_hot(torch.tensor(i, device=device), len(grads))
        for position in range(grad.numel()):
            good = grad[position].clone()
            for bad in BAD_VALUES:
                grad[position] = bad
                grad_stats_(grads, grad_scale, *out.values())
                found.append(out["found_inf"].clone())
                wrong += (out["nonfinite"].abs() != only_here).sum()  # -1: not counted
            grad[position] = good
    assert torch.stack(found).tolist() == [1.0] * (len(BAD_VALUES) * sum(SIZES))
    assert wrong.item() == 0
    assert check(grads, 8.0)["found_inf"].item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_stats_counts_nonfinite(device, dtype):
    grads = random_grads(device, sizes=(5, 300, 1, 40), dtypes=(dtype,))
    grads[1][::3] = math.nan
    grads[1][1] = -math.inf
    grads[2][0] = math.inf
    grads[3][:] = math.nan
    out = check(grads, 2.0)
    assert out["nonfinite"].tolist() == [0, 101, 1, 40]
    assert out["amax"].tolist()[1:] == [grads[1][grads[1].isfinite()].abs().max().item(), 0.0, 0.0]


def test_grad_stats_norm_of_inf_and_nan(device):
    """As torch's: a clip by inf makes 0 of what is finite, one by NaN makes NaN of all."""
    inf, nan, one = (torch.tensor([x], device=device) for x in (math.inf, math.nan, 1.0))
    assert stats([one, -inf], 2.0)["grad_norm"].item() == math.inf
    assert stats([inf, one, nan], 2.0)["grad_norm"].isnan()


@pytest.mark.parametrize("grad_scale", BAD_SCALES)
def test_grad_stats_bad_scale_is_an_overflow(device, grad_scale):
    assert stats(random_grads(device), grad_scale)["found_inf"].item() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_stats_overflow_by_unscaling(device, dtype):
    top = torch.finfo(dtype).max
    grads = [torch.ones(3, device=device, dtype=dtype), torch.full((2,), -top, device=device, dtype=dtype)]
    assert check(grads, 1.0)["found_inf"].item() == 0
    for exponent in (-1, -100, -111, -112, -113, -126, -140):
        check(grads, 2.0**exponent)
    assert check(grads, 2.0**-149)["found_inf"].item() == 1


def test_grad_stats_empty(device):
    empty = torch.empty(0, device=device)
    assert stats([empty], 2.0)["found_inf"].item() == 0
    assert stats([empty], math.nan)["found_inf"].item() == 1
    grads = [empty, torch.ones((), device=device), empty.half(), torch.full((2, 0, 3), 1.0, device=device), empty.bfloat16()]
    out = check(grads, 0.5)
    assert out["amax"].tolist() == [0, 1, 0, 0, 0]
    assert out["grad_norm"].item() == 2
    check([torch.full((1,), math.inf, device=device), empty], 1.0)


def test_grad_stats_many_tensors(device):
    """More tensors than any by-value table of a kernel holds, and one that spans many chunks."""
    grads = random_grads(device, sizes=[i % 5 for i in range(1500)] + [200_003])
    check(grads, 16.0)
    grads[1403][1] = math.nan
    grads[-1][-1] = -math.inf
    out = check(grads, 16.0)
    assert out["nonfinite"].nonzero().flatten().tolist() == [1403, 1500]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_stats_strided(device, dtype):
    grads = list(layouts((9, 13), dtype, device, torch.Generator().manual_seed(0)).values())
    grads += [
        torch.ones(1, 1, dtype=dtype, device=device).expand(9, 13),
        torch.ones((), dtype=dtype, device=device).expand(300),
    ]
    check(grads, 4.0)
    grads[3][8, 12] = math.inf
    assert check(grads, 4.0)["nonfinite"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_grad_stats_reads_only_its_elements(device):
    storage = torch.full((10, 10), math.nan, device=device)
    grad = storage[1:9, 2:7]
    grad.fill_(1.0)
    assert check([grad], 1.0)["found_inf"].item() == 0


def test_grad_stats_norm_is_fp64(device):
    """Squares of these overflow or underflow fp32."""
    for exponent in (30, -30):
        fp64 = torch.full((9,), 10.0 ** (3 * exponent), device=device, dtype=torch.float64)
        check([torch.full((70,), 10.0**exponent, device=device), fp64], 2.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_grad_stats_norm_of_one_number_is_that_number(device, dtype):
    """In every place, from the smallest subnormal to the largest: in fp64 the square of 16 bits, and its root, are exact."""
    finfo = torch.finfo(dtype)
    for position, length in ((p, n) for n in (16, 35) for p in range(n)):
        grads = [torch.zeros(length, dtype=dtype) for _ in range(5)]
        for grad, x in zip(grads, (finfo.smallest_normal * finfo.eps, finfo.tiny, -1.5, finfo.max, 0.0), strict=True):
            grad[position] = x
            out = stats([grad.to(device)], None)
            assert out["grad_norm"].item() == out["amax"].item() == abs(grad[position].item())


def test_grad_stats_deterministic(device):
    grads = random_grads(device, sizes=(100_003, 7, 33_000))
    first, second = stats(grads, 3.0), stats(grads, 3.0)
    assert raw(first.values()) == raw(second.values())


def test_grad_stats_scaling_by_a_power_of_two_is_neutral(device):
    grads = random_grads(device, dtypes=(torch.float32,))
    one, scaled = stats(grads, 1.0), stats([g * 2.0**13 for g in grads], 2.0**13)
    assert raw([one["grad_norm"]]) == raw([scaled["grad_norm"]])
    assert torch.equal(one["amax"] * 2.0**13, scaled["amax"])


def test_grad_stats_norm_of_small_fp16_gradients_is_fp32s(device):
    """Negative control: unscaled in fp16, gradients of 1e-7 are subnormal and their norm is another."""
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-7
    grad = (exact * 65536).half().to(device)
    bounds.check_norm_follows_fp32(stats([grad], 65536.0)["grad_norm"].item(), exact.double().norm().item())
    unscaled_in_fp16 = (grad.float() / 65536).half()
    with pytest.raises(AssertionError, match="fp32 gradients"):
        bounds.check_norm_follows_fp32(stats([unscaled_in_fp16], None)["grad_norm"].item(), exact.double().norm().item())


def test_grad_stats_rejects_a_norm_in_fp32(device):
    grads = random_grads(device, dtypes=(torch.float32,))
    in_fp32 = float(np.sqrt(sum(np.float32((g.cpu() * g.cpu()).sum().item()) for g in grads)))
    exact = reference.grad_stats([g.cpu() for g in grads], 1.0)[3]
    with pytest.raises(AssertionError, match="grad_norm"):
        bounds.check_norm(in_fp32, exact, sum(SIZES))


@pytest.mark.parametrize("sizes", [(257,), (3, 40_000, 0, 5)], ids=str)
def test_grad_stats_norm_of_any_magnitude(device, sizes):
    """fp64 gradients whose squares over- or underflow, alone and beside others; a repeat has the same bits."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
    spread = 10 ** (-40 * torch.rand(len(whole), generator=generator, dtype=torch.float64))
    for size in (1e-300, 1e-154, 1e-150, 1e-144, 1e144, 1e150, 1e154, 1e200, 1e300):
        for values in (whole * size, whole * spread * size):
            grads = [t.to(device) for t in split(values, sizes)]
            for grad_scale in (1.0, 2.0**-9):
                first, again = (stats(grads, grad_scale)["grad_norm"] for _ in range(2))
                bounds.check_norm(first.item(), reference.grad_stats(split(values, sizes), grad_scale)[3], len(whole))
                assert raw([first]) == raw([again])


@pytest.mark.parametrize("device", [("eager", "cpu")], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grad_stats_squares_in_fp32(device, dtype):
    """Of the largest segments, of equal elements, whose roundings do not cancel, and of a bf16 magnitude beyond fp32's root."""
    for value in (0.1, 1 / 3, 1e-4, *((2.0**-80, 1e30, 3e38) if dtype == torch.bfloat16 else (2.0**-24, 65504.0))):
        for n in (eager.SEGMENT, 2 * eager.SEGMENT + 5):
            grad = torch.full((n,), value, dtype=dtype)
            norm, exact = stats([grad], None)["grad_norm"].item(), grad[0].item() * math.sqrt(n)
            bounds.check_norm(norm, exact, n, in_fp32=True)


def test_grad_stats_rejects_squares_in_a_row():
    """Negative control: fp32 additions one after another, in 32 lanes, are outside of the bound for a cascade."""
    values = np.full((2**13, 32), np.float32(np.float16(1 / 3)) ** 2)
    rows = functools.reduce(np.add, values)
    with pytest.raises(AssertionError, match="grad_norm"):
        bounds.check_norm(math.sqrt(rows.astype(np.float64).sum()), math.sqrt(values.astype(np.float64).sum()), 2**18, True)


def test_grad_stats_norm_of_mixed_magnitudes(device):
    """One tensor tiny, one usual, one huge, in every order; zeros and what is not finite among them."""
    at = lambda size, dtype=torch.float64: torch.full((300,), size, dtype=torch.float64).to(device, dtype)
    usual = at(3.0, torch.float16)
    for some in ([at(1e-200), at(1e-180)], [at(1e-160), usual], [at(1e200), usual, at(1e-200)], [usual, at(0.0), at(1e190)],
                 [at(1e-145), at(1e-144)], [at(2.0**480), at(2.0**479)], [at(0.0)], [at(5e-324), at(0.0)]):  # fmt: skip
        for grads in (some, some[::-1]):
            exact = reference.grad_stats([g.cpu() for g in grads], 1.0)[3]
            bounds.check_norm(stats(grads, None)["grad_norm"].item(), exact, 300 * len(grads), norm_is_in_fp32(grads))
    for bad in BAD_VALUES:
        for size in (1e-200, 1e200):
            grads = [at(size), at(size)]
            grads[1][7] = bad
            assert not stats(grads, None)["grad_norm"].isfinite()


def test_grad_stats_bumps_versions(device):
    out = outputs(1, device)
    before = [t._version for t in out.values()]
    grad = torch.ones(3, device=device)
    grad_stats_([grad], None, *out.values())
    assert all(t._version > v for t, v in zip(out.values(), before, strict=True))
    assert grad._version == 0


@pytest.mark.parametrize("norm", [False, True])
def test_grad_stats_opcheck(device, norm):
    args = (random_grads(device), scalar(2.0, device), *outputs(len(SIZES), device, norm).values())
    torch.library.opcheck(grad_stats_.default, args)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(grads=[]), "grads is empty"),
        (dict(grads=[torch.ones(3).to_sparse(), torch.ones(2)]), r"grads\[0\] must be a dense strided tensor, got layout"),
        (dict(grads=[torch.ones(3), torch.ones(2, dtype=torch.int64)]), r"grads\[1\] must be float16, .* got torch.int64"),
        (dict(grads=[torch.ones(3), torch.ones(2, dtype=torch.complex64)]), r"grads\[1\] must be"),
        (dict(grads=[torch.ones(3), torch.ones(2, device="meta")]), r"grads\[1\] is on meta, expected"),
        (dict(grad_scale=torch.ones(1)), r"grad_scale must be \(\) torch.float32"),
        (dict(grad_scale=scalar(1.0, dtype=torch.float64)), "grad_scale must be"),
        (dict(found_inf=torch.ones(1)), "found_inf must be"),
        (dict(found_inf=scalar(1.0, dtype=torch.int32)), "found_inf must be"),
        (dict(amax=torch.ones(2)), "amax must be"),
        (dict(amax=torch.ones(3, dtype=torch.float64)), "amax must be"),
        (dict(nonfinite=counts(1)), "nonfinite must be"),
        (dict(grad_norm=scalar(1.0)), "grad_norm must be"),
    ],
)
def test_grad_stats_raises(device, change, message):
    if device.type != "cpu":
        pytest.skip("the arguments are made on the CPU")
    args = dict(grads=[torch.ones(3), torch.ones(2)], grad_scale=scalar(1.0), **outputs(2, device))
    check_raises_unchanged(grad_stats_, args, change, message)
