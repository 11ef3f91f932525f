# SPDX-License-Identifier: Apache-2.0
"""Choose one option of each of several items: the cheapest whose noise and bytes stay within what all have together."""

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    cost: float
    noise: float
    bytes: float


def choose(items: Sequence[Sequence[Option]], noise: float, memory: float) -> list[int] | None:
    """The index of an option of each item, of least cost, and of least noise among these; None where nothing meets both.

    Of options that are as good, the first.

    By mixed-integer programming where scipy is there, else greedily, which may miss the cheapest by little, and a choice that
    meets both limits where they leave next to none.
    """
    cheapest = [min(range(len(options)), key=lambda i: (options[i].cost, options[i].noise)) for options in items]
    if _within(items, cheapest, noise, memory):
        return cheapest
    try:
        from scipy import optimize
    except ImportError:
        picks = _greedy(items, cheapest, noise, memory)
    else:
        picks = _milp(optimize, items, noise, memory)
    return None if picks is None else [_first_as_good(options, i) for options, i in zip(items, picks, strict=True)]


def total(items: Sequence[Sequence[Option]], chosen: Sequence[int], field: str) -> float:
    return sum(getattr(options[i], field) for options, i in zip(items, chosen, strict=True))


def _first_as_good(options: Sequence[Option], pick: int) -> int:
    return next(i for i, option in enumerate(options) if all(a <= b for a, b in zip(option, options[pick], strict=True)))


def _within(items, chosen, noise: float, memory: float) -> bool:
    return total(items, chosen, "noise") <= noise and total(items, chosen, "bytes") <= memory


def _milp(optimize, items, noise: float, memory: float) -> list[int] | None:
    """One variable, 0 or 1, for each option of each item."""
    options = [(item, option) for item, row in enumerate(items) for option in row]
    one_each = [[float(owner == item) for owner, _ in options] for item in range(len(items))]
    values = {name: [getattr(option, name) for _, option in options] for name in Option._fields}
    scale = {name: max(map(abs, found)) or 1.0 for name, found in values.items()}
    limits = {"noise": noise, "bytes": memory}
    constraints = [optimize.LinearConstraint(one_each, 1, 1)]
    for name, limit in limits.items():
        if limit != float("inf"):
            constraints.append(optimize.LinearConstraint([[v / scale[name] for v in values[name]]], ub=limit / scale[name]))
    small = 1e-6 / len(options)  # of the noise: where the cost is the same
    objective = [c / scale["cost"] + small * n / scale["noise"] for c, n in zip(values["cost"], values["noise"], strict=True)]
    found = optimize.milp(objective, integrality=[1] * len(options), bounds=(0, 1), constraints=constraints)
    if found.x is None:
        return None
    picks, first = [], 0
    for row in items:
        part = found.x[first : first + len(row)]
        picks.append(int(part.argmax()))
        first += len(row)
    return picks if _within(items, picks, noise * (1 + 1e-6), memory * (1 + 1e-6)) else None


def _greedy(items, chosen: list[int], noise: float, memory: float) -> list[int] | None:
    """From the cheapest on, the change that wins most of what is too much for what it costs."""
    chosen = list(chosen)
    for name, limit, other, other_limit in (("noise", noise, "bytes", None), ("bytes", memory, "noise", noise)):
        while (excess := total(items, chosen, name) - limit) > 0:
            changes = []
            for item, options in enumerate(items):
                now = options[chosen[item]]
                for i, option in enumerate(options):
                    won = min(getattr(now, name) - getattr(option, name), excess)
                    grown = total(items, chosen, other) + getattr(option, other) - getattr(now, other)
                    if won > 0 and (other_limit is None or grown <= other_limit):
                        changes.append(((option.cost - now.cost) / won, -won, item, i))
            if not changes:
                return None
            *_, item, i = min(changes)
            chosen[item] = i
    return chosen if _within(items, chosen, noise, memory) else None
