# SPDX-License-Identifier: Apache-2.0
"""Advice: what advise found, as a table, sentences, numbers, JSON and a picture."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mpkernels.policy import Policy, dtype_name
from mpkernels.precision import picture
from mpkernels.precision.layer import PolicyRow, cost_of
from mpkernels.precision.ranges import Range
from mpkernels.precision.tables import shown, table
from mpkernels.precision.verdict import addition, problem, tightest


@dataclass(frozen=True)
class AdviceRow:
    """One module with parameters. policy: the one chosen, None for what is not converted or was not called.

    policies: what each policy makes of it, by name; for modules that are not converted only the ranges. note: why it is not.
    """

    name: str
    policy: str | None
    policies: Mapping[str, PolicyRow]
    note: str = ""


@dataclass(frozen=True)
class Advice:
    """The rows in the model's order; prints as a table. loss: of the step. loss_budget: what all noise may add up to."""

    rows: tuple[AdviceRow, ...]
    loss: float
    loss_budget: float
    loss_scale: float

    @property
    def policy(self) -> dict[str, str]:
        """The policy of each linear that was called, as `mpk.convert` takes it."""
        return {row.name: row.policy for row in self.rows if row.policy is not None}

    def __getitem__(self, name: str) -> AdviceRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no module with parameters is called {name!r}: there are {', '.join(row.name for row in self.rows)}")

    def why(self, name: str, policy: str | Policy | None = None) -> str:
        """One sentence: why `name` has its policy and not another, or what `policy` would make of it."""
        row = self[name]
        if not row.policies or (row.policy is None and policy is None):
            return f"{shown(name)}: {row.note}"
        if policy is not None:
            key = str(Policy.parse(policy))
            if key not in row.policies:
                raise KeyError(f"{key} was not judged: {', '.join(row.policies)} were")
            return f"{shown(name)}: {key}: {self._verdict(row, key)}"
        rejected = [f"not {key}: {reason}" for key in row.policies if (reason := self._rejected(row, key)) is not None]
        chosen = row.policies[row.policy]
        wrong = problem(chosen, self.loss_scale)
        last = f"{row.policy}: {addition(chosen)}" if wrong is None else f"{row.policy}, the widest, does not mend it: {wrong}"
        return f"{shown(name)}: {'; '.join([*rejected, last])}"

    def _rejected(self, row: AdviceRow, key: str) -> str | None:
        """Why a policy was not taken, where that is not its cost."""
        found, chosen = row.policies[key], row.policies[row.policy]
        if key == row.policy:
            return None
        if (reason := problem(found, self.loss_scale)) is not None:
            return reason
        cost = cost_of(p for other in self.rows if other.policy is not None for p in other.policies.values())
        is_cheaper = getattr(found, cost) < getattr(chosen, cost)
        return f"{addition(found)}, of {self.loss_budget:.1e} for all layers" if is_cheaper else None

    def _verdict(self, row: AdviceRow, key: str) -> str:
        found = row.policies[key]
        if (reason := problem(found, self.loss_scale)) is not None:
            return reason
        return (
            f"stays in range ({tightest(found)}); {addition(found)}" if found.error else f"stays in range ({tightest(found)})"
        )

    def __str__(self) -> str:
        judged = list(dict.fromkeys(key for row in self.rows for key in row.policies))
        lines = [(shown(row.name), row.policy or "-", *(self._cell(row, key) for key in judged)) for row in self.rows]
        noise = sum(n for row in self.rows if row.policy and math.isfinite(n := row.policies[row.policy].noise or 0.0))
        text = table(("layer", "policy", *judged), lines, left=2 + len(judged))
        notes = [f"{shown(row.name)}: {row.note}" for row in self.rows if row.note and not row.policies]
        last = f"loss {self.loss:.4g}; what the policies add to it: {noise:.1e}, of a budget of {self.loss_budget:.1e}"
        if not math.isfinite(self.loss):
            last = f"loss {self.loss:.4g}: the data, or what the model makes of it in its own dtype, is not finite, so that no "
            last += "policy can be judged: mpk.find_nonfinite(model, step) says where it begins"
        return "\n".join([text, *notes, last])

    def _cell(self, row: AdviceRow, key: str) -> str:
        """What leaves its range, else the noise, else `-`."""
        found = row.policies.get(key)
        if found is None:
            return "-"
        if (reason := problem(found, self.loss_scale)) is not None:
            return reason.split(" at loss scale")[0].split(" in ")[0]
        return "in range" if found.noise is None else f"{found.noise:.1e}"

    def to_json(self) -> str:
        """All numbers; what is not finite as text."""
        return json.dumps(_plain(self), indent=1)

    def to_html(self, path: str | Path) -> None:
        """Write one file, with the ranges of every tensor drawn against those of the formats."""
        Path(path).write_text(picture.html(self), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Advice | AdviceRow | PolicyRow | Range):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Policy):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
