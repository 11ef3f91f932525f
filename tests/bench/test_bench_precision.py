# SPDX-License-Identifier: Apache-2.0
"""bench/precision.py: its goals are met where no other test measures the same, and its table says what was missed."""

import pytest

from bench import precision
from bench.tables import goals, is_met


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["advise_memory", "plan_resident", "plan_7b"])
def test_bench_precision_goals_are_met(name):
    for row in precision.MEASURES[name]():
        assert is_met(row), row


def test_bench_precision_table():
    rows = [precision.figure("a", 1.0, 0.95, 1000, at_least=True), precision.figure("b", 3.0, 2, 1)]
    assert [is_met(row) for row in rows] == [True, False]
    assert goals(rows).splitlines()[2:] == ["| a | >= 0.95 | 1 | 1,000 |", "| b | <= 2 | 3, missed | 1 |"]
