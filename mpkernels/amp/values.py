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


def _integer(name: str, value, what: str, least: int, most: int) -> int:
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


_NORMAL = "a normal positive float32", lambda x: _FLOAT32.tiny <= x <= _FLOAT32.max
_NUMBERS = {
    "min_scale": _NORMAL,
    "max_scale": _NORMAL,
    "growth_factor": ("greater than 1 and finite", lambda x: 1 < x < math.inf),
    "backoff_factor": ("between 0 and 1", lambda x: 0 < x < 1),
}
_INTEGERS = {
    "growth_interval": ("an int", 1, _INT64.max),  # one that the int32 of the tracker never reaches: growth never comes
    "hysteresis": ("an int", 1, _INT32.max),
    "_growth_tracker": ("a count", 0, _INT32.max),
    "hysteresis_tracker": ("a count", 0, _INT32.max),
    "skipped": ("a count", 0, _INT64.max),
}


def checked(name: str, value) -> float | int:
    """The value of this name in these tables."""
    return _number(name, value, *_NUMBERS[name]) if name in _NUMBERS else _integer(name, value, *_INTEGERS[name])


def scale(name: str, value, min_scale: float, max_scale: float) -> float:
    """A scale between the bounds of its scaler."""
    wanted = f"between min_scale {min_scale} and max_scale {max_scale}"
    return _number(name, value, wanted, lambda x: min_scale <= x <= max_scale)


def state(loaded: dict, default_hysteresis: int, min_scale: float, max_scale: float) -> dict:
    """The state_dict of a scaler, ours or torch's, with every value checked and complete."""
    if not isinstance(loaded, dict):
        raise TypeError(f"state_dict must be what a scaler's state_dict() returned, got {type(loaded).__name__}")
    if missing := [name for name in _TORCHS if name not in loaded]:
        raise ValueError(f"state_dict lacks {', '.join(missing)}: it is not that of a GradScaler")
    given = {"hysteresis_tracker": default_hysteresis, "skipped": [0, 0]} | loaded
    skipped = given["skipped"]
    if not isinstance(skipped, list | tuple) or len(skipped) != 2:
        raise ValueError(f"skipped must be two counts, of all steps and of those in a row, got {skipped!r}")
    names = ("growth_factor", "backoff_factor", "growth_interval", "_growth_tracker", "hysteresis_tracker")
    return {
        "scale": scale("scale", given["scale"], min_scale, max_scale),
        **{name: checked(name, given[name]) for name in names},
        "skipped": [checked("skipped", count) for count in skipped],
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
