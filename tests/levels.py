# SPDX-License-Identifier: Apache-2.0
"""Which of a test's many combinations run every time, which in the sweep, and which before a release."""

import itertools
from collections.abc import Iterable

import pytest


def each_once(*lists: Iterable, few=(), others=pytest.mark.sweep) -> list:
    """Every combination as a parameter: marked `few` a few that have each value at least once, the rest marked `others`."""
    lists = [list(values) for values in lists]
    chosen = {tuple(values[i % len(values)] for values in lists) for i in range(max(map(len, lists)))}
    return [pytest.param(*c, marks=few if c in chosen else others) for c in itertools.product(*lists)]
