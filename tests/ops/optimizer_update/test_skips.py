# SPDX-License-Identifier: Apache-2.0
"""Steps that are skipped, which leave every byte, and what is not finite where nothing asked for a check."""

import math

import pytest
import torch

from tests import steps
from tests.ops.optimizer_update.rules import RULES
from tests.steps import BAD_SCALES, BAD_VALUES, SIZES, counts, raw, scalar

grad_stats_ = torch.ops.mpkernels.grad_stats_


@pytest.mark.parametrize("rule, busy", [
    pytest.param(rule, busy, id=f"{name}-{busy}", marks=pytest.mark.sweep if busy != (name == "sgd") else ())
    for name, rule in RULES.items() for busy in (False, True)
])  # fmt: skip
def test_update_inf_leaves_state_bitwise(rule, busy, device):
    """inf, -inf and NaN at each of 1,000 positions: grad_stats_ finds it, nothing is written, the first step stays first."""
    args = rule.mixed(device, **rule.busy if busy else {})
    grad_scale, found_inf = scalar(8.0, device), scalar(0.0, device)
    before = raw(rule.state(args))
    amax, nonfinite = torch.empty(len(SIZES), dtype=torch.float64, device=device), counts(len(SIZES), device)
    for i, grad in enumerate(args["grads"]):
        for position in range(grad.numel()):
            good = grad[position].clone()
            for bad in BAD_VALUES:
                grad[position] = bad
                grad_stats_(args["grads"], grad_scale, found_inf, amax, nonfinite)
                rule.call(**args, grad_scale=grad_scale, found_inf=found_inf)
            grad[position] = good
            if position % 50 == 0:
                assert raw(rule.state(args)) == before
                assert nonfinite.nonzero().tolist() == [[i]]
    assert raw(rule.state(args)) == before
    grad_stats_(args["grads"], grad_scale, found_inf, amax, nonfinite)
    rule.call(**args, grad_scale=grad_scale, found_inf=found_inf)
    assert steps.taken(args["steps"]) == [1] * len(SIZES)
    assert all(m.isfinite().all() for m in args["masters"])


def check_skipped(rule, device, **options):
    """After a step that was taken, and as the first."""
    args = rule.mixed(device, **rule.busy)
    for _ in range(2):
        before = raw(rule.state(args))
        rule.call(**args, **options)
        assert raw(rule.state(args)) == before
        rule.call(**args)


@pytest.mark.parametrize("grad_scale", BAD_SCALES)
@pytest.mark.parametrize("found_inf", [None, 0.0])
def test_update_bad_scale_is_skipped(rule, device, grad_scale, found_inf):
    options = dict(grad_scale=scalar(grad_scale, device), found_inf=None if found_inf is None else scalar(found_inf, device))
    check_skipped(rule, device, **options)
    check_skipped(rule, device, **options, grad_norm=scalar(math.nan, device, torch.float64), max_norm=1.0)


@pytest.mark.parametrize("found_inf", [1.0, 2.0, -1.0, 1e-45, math.nan, math.inf])
@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_update_found_inf_is_skipped(rule, device, found_inf, grad_scale):
    scale = None if grad_scale is None else scalar(grad_scale, device)
    check_skipped(rule, device, found_inf=scalar(found_inf, device), grad_scale=scale)


def test_update_found_inf_of_minus_zero_is_taken(rule, device):
    args = rule.mixed(device)
    rule.call(**args, found_inf=scalar(-0.0, device))
    assert steps.taken(args["steps"]) == [1] * len(SIZES)


def test_update_nonfinite_without_a_check_is_applied(rule, device):
    """As in torch, NaN goes into the weight where it stands and nowhere else."""
    args = rule.mixed(device)
    args["grads"][4][3] = math.nan
    rule.call(**args)
    assert [int(m.isnan().sum()) for m in args["masters"]] == [0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.nan])
def test_update_norm_that_is_not_finite(rule, device, norm):
    """Clipped by NaN all becomes NaN, by inf every gradient 0: as torch.nn.utils.clip_grad_norm_."""
    args = rule.mixed(device, **rule.busy)
    rule.call(**args, grad_norm=scalar(norm, device, torch.float64), max_norm=1.0)
    expected = torch.full((1,), 1.0 / (norm + 1e-6)).clamp(max=1.0).item()
    for state in args[rule.states[0]]:
        assert (state.isnan() if math.isnan(expected) else state == 0).all()
    assert all(m.isnan().all() == math.isnan(expected) for m in args["masters"])
