# SPDX-License-Identifier: Apache-2.0
"""What the values of a loss scaler must be, each for the tensor that holds it; ValueError with the name and the value."""

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch

_FLOAT32, _INT32, _INT64 = torch.finfo(torch.float32), torch.iinfo(torch.int32), torch.iinfo(torch.int64)
_TORCHS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def number(name: str, value) -> float:
    """A Python or NumPy number as a float; the integer that no float holds as inf."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}{_hint(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _integer(name: str, what: str, value, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value <= most:
        raise ValueError(f"{name} must be {what} from {least} to {most}, got {value!r}{_hint(value)}")
    return int(value)


def _hint(value) -> str:
    return ": take its .item()" if isinstance(value, torch.Tensor) else ""


def _number(name: str, value, wanted: str, holds: Callable[[float], bool]) -> float:
    result = number(name, value)
    if not holds(result):
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return result


def bound(name: str, value) -> float:
    """min_scale or max_scale."""
    return _number(name, value, "a normal positive float32", lambda x: _FLOAT32.tiny <= x <= _FLOAT32.max)


def scale(name: str, value, min_scale: float, max_scale: float) -> float:
    """A scale between the bounds of its scaler."""
    wanted = f"between min_scale {min_scale} and max_scale {max_scale}"
    return _number(name, value, wanted, lambda x: min_scale <= x <= max_scale)


def growth_factor(value) -> float:
    """What a scale grows by."""
    return _number("growth_factor", value, "greater than 1 and finite", lambda x: 1 < x < math.inf)


def backoff_factor(value) -> float:
    """What a scale backs off by."""
    return _number("backoff_factor", value, "between 0 and 1", lambda x: 0 < x < 1)


def growth_interval(value) -> int:
    """An argument of the op, an int64: one that the int32 of the tracker never reaches is growth that never comes."""
    return _integer("growth_interval", "an int", value, 1, _INT64.max)


def hysteresis(value) -> int:
    """What the int32 of the hysteresis tracker starts from."""
    return _integer("hysteresis", "an int", value, 1, _INT32.max)


def state(loaded: dict, default_hysteresis: int, min_scale: float, max_scale: float) -> dict:
    """The state_dict of a scaler, ours or torch's, with every value checked and complete."""
    if not isinstance(loaded, dict):
        raise TypeError(f"state_dict must be what a scaler's state_dict() returned, got {type(loaded).__name__}")
    if missing := [name for name in _TORCHS if name not in loaded]:
        raise ValueError(f"state_dict lacks {', '.join(missing)}: it is not that of a GradScaler")
    skipped = loaded.get("skipped", [0, 0])
    if not isinstance(skipped, list | tuple) or len(skipped) != 2:
        raise ValueError(f"skipped must be two counts, of all steps and of those in a row, got {skipped!r}")
    return {
        "scale": scale("scale", loaded["scale"], min_scale, max_scale),
        "growth_factor": growth_factor(loaded["growth_factor"]),
        "backoff_factor": backoff_factor(loaded["backoff_factor"]),
        "growth_interval": growth_interval(loaded["growth_interval"]),
        "_growth_tracker": _integer("_growth_tracker", "a count", loaded["_growth_tracker"], 0, _INT32.max),
        "hysteresis_tracker": _integer(
            "hysteresis_tracker", "a count", loaded.get("hysteresis_tracker", default_hysteresis), 0, _INT32.max
        ),
        "skipped": [_integer("skipped", "a count", count, 0, _INT64.max) for count in skipped],
    }


def check_device(device) -> None:
    """Raise RuntimeError for a device that is not there."""
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch was built without it
        raise RuntimeError(f"GradScaler: device {device} is not there: {error}") from error


def refuse_float16(outputs, scale: float) -> None:
    """Deciding by the value would wait for the device: a float16 loss is refused whatever the scale is by then."""
    if isinstance(outputs, list | tuple):
        for output in outputs:
            refuse_float16(output, scale)
    elif isinstance(outputs, torch.Tensor) and outputs.dtype == torch.float16:
        raise ValueError(
            f"loss is float16: scaled, it and its gradient, which is the scale itself ({scale:.9g} at first), are rounded to "
            "11 bits and inf from 65520 on; compute the loss in float32, as loss_fn(output.float(), target)"
        )
