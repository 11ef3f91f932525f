# SPDX-License-Identifier: Apache-2.0
"""Which of a test's many combinations run every time, and which in the sweep."""

import itertools
from collections.abc import Iterable

import pytest


def each_once(*lists: Iterable) -> list:
    """Every combination as a parameter: a few that have each value at least once, the others marked sweep."""
    lists = [list(values) for values in lists]
    few = {tuple(values[i % len(values)] for values in lists) for i in range(max(map(len, lists)))}
    return [pytest.param(*c, marks=() if c in few else pytest.mark.sweep) for c in itertools.product(*lists)]
