# SPDX-License-Identifier: Apache-2.0
"""What the value of each hyperparameter must be: at construction, in a group that is added or loaded, and at a step."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_

import torch

_IMMUTABLE = (float, int, bool, type(None))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Requirement:
    """`words`: what torch's message calls it. `wanted`: what ours says that it must be."""

    words: str
    wanted: str
    holds: Callable[[object], bool]


def as_float(value) -> float:
    """A number, or a 1-element tensor on the CPU, as a float; NaN for anything else: then no requirement holds."""
    if type(value) is float:
        return value
    if isinstance(value, torch.Tensor):
        return float(value.item()) if _is_readable(value) and value.numel() == 1 and not value.is_complex() else math.nan
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy's
        value = value.item()
    if not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an int that no float holds
        return math.inf


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether its value is there to be read without waiting for a device: a FakeTensor, for one, has none."""
    return tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _is_flag(value) -> bool:
    """bool, numpy's, or 0 and 1, as a configuration file may say."""
    return type(value).__name__ in ("bool", "bool_") or (isinstance(value, numbers.Integral) and value in (0, 1))


def _is_learning_rate(value) -> bool:
    return _is_finite_lr(value) and not as_float(value) < 0


def _is_finite_lr(value) -> bool:
    if not isinstance(value, torch.Tensor):
        return math.isfinite(as_float(value))
    if value.numel() != 1 or value.dtype not in _FLOATS or value.is_meta:
        return False
    return not _is_readable(value) or math.isfinite(value.item())  # a device would be waited for


def _are_betas(value) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(0 <= as_float(beta) < 1 for beta in value)


def at_least_0(words: str) -> Requirement:
    return Requirement(words, "a finite number, 0 or more", lambda value: 0 <= as_float(value) < math.inf)


def finite(words: str) -> Requirement:
    return Requirement(words, "a finite number", lambda value: math.isfinite(as_float(value)))


def flag(words: str) -> Requirement:
    return Requirement(words, "True or False", _is_flag)


LEARNING_RATE = Requirement(
    "learning rate", "a finite number, 0 or more, or a 1-element floating-point tensor with data", _is_learning_rate
)
# NOTE: at a step below 0 as well, as for torch's, which checks nothing there: some ascend, and a schedule may round below 0.
LEARNING_RATE_AT_A_STEP = Requirement(
    "learning rate", "a finite number or a 1-element floating-point tensor with data", _is_finite_lr
)
BETAS = Requirement("betas", "two numbers of 0 or more and below 1", _are_betas)
ALWAYS_DECOUPLED = Requirement(
    "decoupled_weight_decay value", "True: Adam has the other", lambda value: _is_flag(value) and bool(value)
)
COMMON = {
    "lr": LEARNING_RATE,
    "weight_decay": at_least_0("weight_decay value"),
    "maximize": flag("maximize value"),
    "differentiable": Requirement("differentiable value", "False: the step has no gradient", lambda value: not value),
}


def check(requirements: dict[str, Requirement], group: dict) -> None:
    """Raise ValueError for the first value of `group` that is not what is required."""
    for name, requirement in requirements.items():
        if name not in group:
            raise ValueError(f"a param group lacks {name}, which must be {requirement.wanted}")
        if not requirement.holds(value := group[name]):
            raise ValueError(_message(name, requirement, value))


def comparable(values: tuple | list) -> tuple:
    """What values are compared by: themselves where they are immutable, tensors by being the same one, which are not read."""
    return tuple([value if type(value) in _IMMUTABLE else _comparable(value) for value in values])


def _comparable(value):
    if isinstance(value, torch.Tensor):
        return torch.Tensor, id(value)
    if getattr(value, "ndim", None) == 0:  # an array of numpy's has no hash
        return value.item(), id(value)
    if isinstance(value, tuple | list):
        key = comparable(value)
        return value if type(value) is tuple and all(map(is_, key, value)) else key
    return value


def check_as_torch(defaults: dict) -> None:
    """Raise what torch's constructors raise for arguments that do not go together."""
    foreach, differentiable = defaults["foreach"], defaults["differentiable"]
    if defaults["fused"] and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if differentiable:
        raise RuntimeError("differentiable=True: the step is one pass without a gradient; use torch's optimizer for it")
    if defaults["fused"] and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    betas = defaults.get("betas")
    betas = betas if isinstance(betas, tuple | list) else ()
    tensors = [isinstance(beta, torch.Tensor) for beta in betas]
    if betas and not (all(tensors) or all(isinstance(beta, float) for beta in betas)):
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas}")
    if foreach and not defaults.get("capturable", True):
        for name, is_tensor in (("lr", isinstance(defaults["lr"], torch.Tensor)), ("betas[0]", any(tensors))):
            if is_tensor:
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")


def _message(name: str, requirement: Requirement, value) -> str:
    if name == "lr" and isinstance(value, torch.Tensor) and value.numel() != 1:
        return f"Tensor lr must be 1-element, got {tuple(value.shape)}"
    words = requirement.words
    if name == "betas" and isinstance(value, tuple | list) and len(value) == 2:
        index = int(0 <= as_float(value[0]) < 1)
        words, value = f"beta parameter at index {index}", value[index]
    remedy = "; convert it with float()" if isinstance(value, str) and "finite number" in requirement.wanted else ""
    return f"Invalid {words}: {_shown(value)}: {name} must be {requirement.wanted}{remedy}"


def _shown(value) -> str:
    if isinstance(value, torch.Tensor):
        kind = f"{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
        return f"{value.item()} ({kind})" if _is_readable(value) and value.numel() == 1 else kind
    if isinstance(value, int) and value.bit_length() > 1024:  # of which Python writes no more than 4,300 digits
        return f"an int of {value.bit_length()} bits"
    return f"{value}" if isinstance(value, int | float) else f"{value!r} (a {type(value).__name__})"
