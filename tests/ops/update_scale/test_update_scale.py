# SPDX-License-Identifier: Apache-2.0
"""update_scale_ against torch.amp.GradScaler and its own state machine, value for value."""

import math

import pytest
import torch

from mpkernels.ops.update_scale import op, reference
from tests.steps import check_raises_unchanged, counts, force, raw, scalar, targets

update_scale_ = torch.ops.mpkernels.update_scale_
TORCHS = dict(
    growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, hysteresis=1, min_scale=2.0**-126, max_scale=2.0**127
)


@pytest.fixture(params=targets(op))
def device(request, monkeypatch):
    return force(op, request.param, monkeypatch)


class Scaler:
    """The tensors of a scaler and their update."""

    def __init__(self, device, scale=2.0**16, **options):
        self.options = TORCHS | options
        self.scale = scalar(scale, device)
        self.growth_tracker = scalar(0, device, torch.int32)
        self.hysteresis_tracker = scalar(self.options["hysteresis"], device, torch.int32)
        self.skipped = counts(2, device)

    def tensors(self):
        return [self.scale, self.growth_tracker, self.hysteresis_tracker, self.skipped]

    def update(self, found_inf: float) -> None:
        update_scale_(*self.tensors(), scalar(found_inf, self.scale.device), **self.options)

    def values(self) -> list:
        return [t.tolist() for t in self.tensors()]


def overflows(n: int, share: float, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, generator=generator) < share).float().tolist()


def test_update_scale_counts_in_a_strided_view(device):
    ours = Scaler(device)
    every_other = counts(4, device)
    every_other[1::2] = 7
    ours.skipped = every_other[::2]
    for found in (1.0, 1.0, 0.0):
        ours.update(found)
    assert every_other.tolist() == [2, 7, 0, 7]


@pytest.mark.parametrize("interval, share, n", [(2000, 0.0003, 5000), (3, 0.2, 200), (1, 0.4, 100), (7, 0.05, 500)])
@pytest.mark.parametrize("factors", [(2.0, 0.5), (1.1, 0.7), (3.0, 0.1)])
def test_update_scale_matches_torch(device, interval, share, n, factors):
    ours = Scaler(device, growth_interval=interval, growth_factor=factors[0], backoff_factor=factors[1])
    scale, tracker = ours.scale.clone(), ours.growth_tracker.clone()
    low, high = ours.options["min_scale"], ours.options["max_scale"]
    for i, found in enumerate(overflows(n, share, interval)):
        ours.update(found)
        torch._amp_update_scale_(scale, tracker, scalar(found, device), *factors, interval)
        assert low < scale.item() < high, "torch has no bounds: nothing to compare with"
        assert (ours.scale.item(), ours.growth_tracker.item()) == (scale.item(), tracker.item()), f"update {i}"


@pytest.mark.parametrize("hysteresis", [1, 2, 5])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("interval", [1, 4])
def test_update_scale_matches_reference(device, hysteresis, share, interval):
    options = TORCHS | dict(growth_interval=interval, hysteresis=hysteresis, min_scale=2.0**-3, max_scale=2.0**20)
    ours = Scaler(device, **options)
    expected = reference.Scale(2.0**16, 0, hysteresis)
    for i, found in enumerate(overflows(300, share, 10 * hysteresis + interval)):
        ours.update(found)
        expected.update(found != 0, **options)
        state = [expected.scale, expected.growth_tracker, expected.hysteresis_left, [expected.skipped, expected.in_a_row]]
        assert ours.values() == state, f"update {i}"


def test_update_scale_hysteresis(device):
    """Backoff on the k-th overflow since the last refill; growth refills, a good step alone does not."""
    ours, scales = Scaler(device, hysteresis=3, growth_interval=3), []
    for found in (1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1):
        ours.update(float(found))
        scales.append(math.log2(ours.scale.item()))
    assert scales == [16, 16, 15, 14, 14, 13, 13, 13, 14, 14, 14, 14, 13]
    assert ours.skipped.tolist() == [8, 1]


def test_update_scale_survives_a_storm(device):
    """Overflow after overflow: the scale stops at min_scale, never 0, and comes back."""
    ours, scales = Scaler(device, growth_interval=2), []
    for _ in range(400):
        ours.update(1.0)
        scales.append(ours.scale.item())
    assert min(scales) == scales[-1] == 2.0**-126
    assert ours.skipped.tolist() == [400, 400]
    for _ in range(2 * 142):
        ours.update(0.0)
    assert ours.scale.item() == 2.0**16
    assert ours.skipped.tolist() == [400, 0]


@pytest.mark.parametrize("factor", [2.0, 1.5, 1e30])
def test_update_scale_stops_at_max_scale(device, factor):
    ours, scales = Scaler(device, growth_interval=1, growth_factor=factor), []
    for _ in range(400):
        ours.update(0.0)
        scales.append(ours.scale.item())
    assert max(scales) == scales[-1] == 2.0**127
    ours.update(1.0)
    assert ours.scale.item() == 2.0**126


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("bounds_of_scale", [(2.0**-126, 2.0**127), (1.0, 2.0**24), (0.3, 1e5)])
def test_update_scale_stays_within_bounds(device, share, bounds_of_scale):
    low, high = bounds_of_scale
    ours = Scaler(
        device, scale=1024.0, min_scale=low, max_scale=high, growth_interval=1, growth_factor=1e3, backoff_factor=1e-3
    )
    fp32 = torch.tensor([low, high])
    for found in overflows(200, share, 1):
        ours.update(found)
        assert fp32[0] <= ours.scale <= fp32[1]
        assert ours.scale.isfinite()


@pytest.mark.parametrize("found_inf", [math.nan, math.inf, -1.0, 2.0, 1e-45])
def test_update_scale_any_nonzero_found_inf_is_an_overflow(device, found_inf):
    ours, one = Scaler(device), Scaler(device)
    ours.update(found_inf)
    one.update(1.0)
    assert ours.values() == one.values()
    ours.update(-0.0)
    one.update(0.0)
    assert ours.values() == one.values()


def test_update_scale_deterministic(device):
    runs = [Scaler(device, growth_interval=3, growth_factor=1.3) for _ in range(2)]
    for ours in runs:
        for found in overflows(100, 0.2, 3):
            ours.update(found)
    assert raw(runs[0].tensors()) == raw(runs[1].tensors())


def test_update_scale_bumps_versions(device):
    ours = Scaler(device)
    before = [t._version for t in ours.tensors()]
    ours.update(0.0)
    assert all(t._version > v for t, v in zip(ours.tensors(), before, strict=True))


@pytest.mark.parametrize("interval", [2**31 - 1, 2**31, 2**40])
def test_update_scale_counts_saturate(device, interval):
    """A count that has no room left stays; nothing wraps to what is below 0."""
    ours = Scaler(device, growth_interval=interval)
    ours.growth_tracker.fill_(2**31 - 2)
    for _ in range(3):
        ours.update(0.0)
    grown = interval == 2**31 - 1
    assert (ours.growth_tracker.item(), ours.scale.item()) == ((2, 2.0**17) if grown else (2**31 - 1, 2.0**16))
    ours.skipped.fill_(2**63 - 2)
    ours.hysteresis_tracker.fill_(-(2**31))
    for _ in range(3):
        ours.update(1.0)
    assert (ours.skipped.tolist(), ours.hysteresis_tracker.item()) == ([2**63 - 1] * 2, 0)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_update_scale_opcheck(device, found_inf):
    ours = Scaler(device)
    torch.library.opcheck(update_scale_.default, (*ours.tensors(), scalar(found_inf, device), *TORCHS.values()))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(grad_scale=torch.ones(1)), "grad_scale must be"),
        (dict(grad_scale=scalar(1.0, dtype=torch.float64)), "grad_scale must be"),
        (dict(growth_tracker=scalar(0.0)), "growth_tracker must be"),
        (dict(growth_tracker=scalar(0, dtype=torch.int64)), "growth_tracker must be"),
        (dict(hysteresis_tracker=scalar(0, "meta", torch.int32)), "hysteresis_tracker must be"),
        (dict(skipped=counts(1)), "skipped must be"),
        (dict(skipped=torch.zeros(2)), "skipped must be"),
        (dict(found_inf=torch.zeros(1)), "found_inf must be"),
        (dict(found_inf=scalar(0, dtype=torch.int32)), "found_inf must be"),
        (dict(hysteresis=2**31), "hysteresis must fit"),
        (dict(hysteresis=-(2**31)), "hysteresis must fit"),
    ],
)
def test_update_scale_raises(device, change, message):
    if device.type != "cpu":
        pytest.skip("the arguments are made on the CPU")
    names = ("grad_scale", "growth_tracker", "hysteresis_tracker", "skipped")
    args = dict(zip(names, Scaler("cpu").tensors(), strict=True)) | dict(found_inf=scalar(0.0)) | TORCHS
    check_raises_unchanged(update_scale_, args, change, message)
