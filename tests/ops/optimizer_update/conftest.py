# SPDX-License-Identifier: Apache-2.0
"""Fixtures: every rule, on every implementation and device that is here."""

import pytest

from mpkernels.ops.optimizer_update import adamw_
from tests import steps
from tests.ops.optimizer_update.rules import RULES, Rule


@pytest.fixture(params=RULES)
def rule(request) -> Rule:
    return RULES[request.param]


@pytest.fixture(params=steps.targets(adamw_))  # they are the same for all
def device(request, monkeypatch):
    backend, device = request.param
    return steps.force_all([rule.op for rule in RULES.values()], backend, device, monkeypatch)
