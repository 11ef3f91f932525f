# SPDX-License-Identifier: Apache-2.0
"""Adapt: a linear that overflows in its format moves to the next of a ladder, and back once it has room again.

Which layer an overflow counts against. In forward, the first in the order of execution whose out is inf or NaN: those after it
were given that. In backward gradients carry the loss scale, which the scaler halves until they fit: that is how a scale is
found, and no layer's fault. So an overflow counts only at a scale of 1 (of the scaler's `min_scale` where that is larger) or
less, where the gradient itself leaves the format; then against the first layer in the order of backward whose grad_x is inf or
NaN (or grad_weight, where x has no gradient). Data that is inf or NaN counts against none. A loss scale that fell because of a
layer that was moved goes back to what it was, once a step is finite again.
"""

import itertools
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from mpkernels.amp.skip_watch import callers_level
from mpkernels.nn.linear import is_converted
from mpkernels.policy import Policy, PolicyName
from mpkernels.precision.tables import shown
from mpkernels.precision.taps import NOTHING, OUT, SCALE, Fault, Tap, first_fault
from mpkernels.runtime import compute_copy

LAG = 4  # steps from what is seen to what follows from it, by which its copy is on the host
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapt:
    """When `mpk.watch(..., adapt=)` changes the policy of a layer.

    ladder: policies, each of a wider range than the one before, of the same parameters and gradients. A layer whose policy is
    one of them moves up to the next after overflows in `raise_after` of `window` steps, and down again, to where it was when
    the watch was made at most, after `lower_after` steps in which out, grad_x, x and weight were below the end of the lower
    format by `margin_bits` bits.
    Raises ValueError for an unknown policy, a ladder of less than two, one that does not go up or whose policies store
    parameters or gradients in other dtypes, and numbers that count nothing.
    """

    raise_after: int = 2
    window: int = 100
    lower_after: int = 2000
    margin_bits: float = 2
    ladder: tuple[PolicyName | Policy, ...] = ("mixed_float16", "mixed_bfloat16", "float32")

    def __post_init__(self) -> None:
        for name in ("raise_after", "window", "lower_after"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"Adapt: {name} must be an int of 1 or more, got {value!r}")
        if self.window < self.raise_after:
            raise ValueError(f"Adapt: window must be at least raise_after {self.raise_after}, got {self.window}")
        margin = self.margin_bits
        if isinstance(margin, bool) or not isinstance(margin, Real) or not 0 <= margin < math.inf:
            raise ValueError(f"Adapt: margin_bits must be a number of 0 or more, got {margin!r}")
        if not isinstance(self.ladder, Sequence) or isinstance(self.ladder, str) or len(self.ladder) < 2:
            raise ValueError(f"Adapt: ladder must have two policies or more, got {self.ladder!r}")
        policies = self.policies
        for lower, upper in itertools.pairwise(policies):
            if _end(lower) >= _end(upper):
                raise ValueError(f"Adapt: ladder must go up: {upper} has no wider range than {lower}")
            if lower.param_dtype != upper.param_dtype or _grad_dtype(lower) != _grad_dtype(upper):
                raise ValueError(f"Adapt: {lower} and {upper} store parameters or gradients in other dtypes")

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The ladder, parsed."""
        return tuple(map(Policy.parse, self.ladder))


class Change(NamedTuple):
    """A policy that was changed at the end of a step."""

    step: int
    layer: str
    before: str
    after: str
    why: str


@dataclass
class _Layer:
    """A layer on the ladder. overflows: the steps that count. clean: how many steps had room below. changed: at which step."""

    tap: Tap
    rung: int
    lowest: int
    overflows: list[int] = field(default_factory=list)
    clean: int = 0
    changed: int = 0


class Adaptation:
    """The decisions of one watch: the same steps give the same changes. least_scale: up to which backward counts."""

    def __init__(self, options: Adapt, taps: list[Tap], least_scale: float) -> None:
        self.options, self.ladder, self.least_scale = options, options.policies, least_scale
        self.layers = {
            tap.row: _Layer(tap, rung, rung)
            for tap in taps
            if is_converted(tap.module) and (rung := self._rung(tap.module.policy)) is not None
        }
        if not self.layers:
            names, theirs = ", ".join(map(str, self.ladder)), {str(p) for t in taps if (p := getattr(t.module, "policy", None))}
            remedy = f"they have {', '.join(sorted(theirs))}" if theirs else "mpk.convert(model, ...) first"
            raise ValueError(f"watch: adapt: no linear has a policy of the ladder ({names}): {remedy}")
        self.changes: list[Change] = []
        self._last_scale: float | None = None
        self._scale_before: float | None = None  # from which it has been falling
        self._owes_scale = False  # since it fell because of a layer that was raised
        self._warned: set[int] = set()

    def _rung(self, policy: Policy | None) -> int | None:
        return self.ladder.index(policy) if policy in self.ladder else None

    # ----- decisions ---------------------------------------------------------------

    def decide(self, now: int, step: int, rows: list[list[float]], order: list[int]) -> float | None:
        """At the end of step `now`, from the table of an earlier one; the loss scale to go back to, or None."""
        fault = first_fault(rows, order)
        if fault is not None:
            self._count(now, step, fault, rows[0][SCALE])
        else:
            for layer in self.layers.values():
                if layer.rung > layer.lowest and step > layer.changed:
                    self._look_for_room(now, layer, rows[layer.tap.row])
        return self._scale_to_restore(rows[0][SCALE], fault)

    def _count(self, now: int, step: int, fault: Fault, scale: float) -> None:
        layer = self.layers.get(fault.row)
        if layer is None or step <= layer.changed or (fault.direction == "backward" and scale > self.least_scale):
            return
        options, layer.clean = self.options, 0
        layer.overflows = [s for s in layer.overflows if s > step - options.window] + [step]
        if len(layer.overflows) < options.raise_after:
            return
        at = "" if fault.direction == "forward" or scale == NOTHING else f" at loss scale {scale:g}"
        why = f"{fault}{at}, in {len(layer.overflows)} of the last {options.window} steps"
        if layer.rung + 1 < len(self.ladder):
            self._owes_scale = True
            self._move(now, layer, layer.rung + 1, why)
        elif fault.row not in self._warned:
            self._warned.add(fault.row)
            warnings.warn(
                f"{shown(layer.tap.name)}: {why}, in {self.ladder[-1]}, the last of the ladder: mpk.find_nonfinite says why",
                stacklevel=callers_level(),
            )

    def _look_for_room(self, now: int, layer: _Layer, row: list[float]) -> None:
        if row[OUT] == NOTHING:
            return  # it was not called
        bits, lower = self.options.margin_bits, self.ladder[layer.rung - 1]
        layer.clean = layer.clean + 1 if max(row) <= _end(lower) / 2**bits else 0
        if layer.clean >= self.options.lower_after:
            self._move(now, layer, layer.rung - 1, f"{layer.clean} steps with {bits:g} bits to spare")

    def _scale_to_restore(self, scale: float, fault: Fault | None) -> float | None:
        if scale == NOTHING:
            return None
        if self._last_scale is not None and scale < self._last_scale and self._scale_before is None:
            self._scale_before = self._last_scale
        self._last_scale = scale
        if fault is not None:
            return None
        before, owes = self._scale_before, self._owes_scale
        self._scale_before, self._owes_scale = None, False
        return before if owes and before is not None and before > scale else None

    def _move(self, now: int, layer: _Layer, rung: int, why: str) -> None:
        change = Change(now, layer.tap.name, str(self.ladder[layer.rung]), str(self.ladder[rung]), why)
        layer.rung, layer.overflows, layer.clean, layer.changed = rung, [], 0, now
        self._apply(layer)
        self.changes.append(change)
        _logger.info("step %d: %s from %s to %s: %s", now, shown(change.layer), change.before, change.after, why)

    def _apply(self, layer: _Layer) -> None:
        """The policy alone: parameters, their gradients and an optimizer's state stay as they are; its copy is made anew."""
        module, policy = layer.tap.module, self.ladder[layer.rung]
        layer.tap.reads_operands = layer.rung > layer.lowest
        if module.policy != policy:
            module.adopt(module._activation, policy)
            module._cached = None
            compute_copy.forget(module)

    # ----- checkpoints ---------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        layers = {
            layer.tap.name: {
                "policy": str(self.ladder[layer.rung]), "lowest": str(self.ladder[layer.lowest]),
                "overflows": list(layer.overflows), "clean": layer.clean, "changed": layer.changed,
            }
            for layer in self.layers.values()
        }  # fmt: skip
        return {
            "layers": layers, "changes": [list(change) for change in self.changes], "last_scale": self._last_scale,
            "scale_before": self._scale_before, "owes_scale": self._owes_scale,
        }  # fmt: skip

    def check(self, state: Any) -> None:
        """Raise ValueError for what is not the state of such an adaptation."""
        if not isinstance(state, dict) or not {"layers", "changes", "last_scale", "scale_before", "owes_scale"} <= state.keys():
            raise ValueError("watch: adapt of the state_dict is not that of a watch made with adapt=")
        for name, layer in state["layers"].items():
            if missing := [which for which in ("policy", "lowest", "overflows", "clean", "changed") if which not in layer]:
                raise ValueError(f"watch: state_dict lacks {', '.join(missing)} of {shown(name)}")
            for which in ("policy", "lowest"):
                if self._rung(Policy.parse(layer[which])) is None:
                    raise ValueError(f"watch: state_dict has {shown(name)} in {layer[which]}, which the ladder has not")
        names = {layer.tap.name for layer in self.layers.values()}
        if others := sorted(names ^ state["layers"].keys()):
            raise ValueError(f"watch: state_dict adapts other layers than this watch: {', '.join(others)}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Checked before; the layers have their policies again."""
        for layer in self.layers.values():
            loaded = state["layers"][layer.tap.name]
            layer.rung, layer.lowest = (self._rung(Policy.parse(loaded[which])) for which in ("policy", "lowest"))
            layer.overflows, layer.clean, layer.changed = list(loaded["overflows"]), loaded["clean"], loaded["changed"]
            self._apply(layer)
        self.changes = [Change(*change) for change in state["changes"]]
        self._last_scale, self._scale_before = state["last_scale"], state["scale_before"]
        self._owes_scale = state["owes_scale"]


def _end(policy: Policy) -> float:
    return torch.finfo(policy.range_dtype).max


def _grad_dtype(policy: Policy) -> torch.dtype:
    return policy.grad_dtype or policy.param_dtype
