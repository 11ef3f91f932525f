# SPDX-License-Identifier: Apache-2.0
"""A state_dict, ours or torch's, checked against an optimizer and converted to what it keeps, before anything is loaded.

What the optimizer does not know is kept as torch keeps it: keys of `state` that name no parameter, and further entries of
a parameter, whose tensors take its dtype and device.
"""

import numbers
from collections.abc import Callable

import torch
from torch.nn.parameter import is_lazy

from mpkernels.ops.common.cast import DTYPES, cast
from mpkernels.optim.distributed import laid_out_as
from mpkernels.optim.format_checks import name_of
from mpkernels.optim.state import ParameterState
from mpkernels.runtime.fake import copy_, is_fake

_MOST_STEPS = torch.finfo(torch.float32).max  # what the tensor of the count holds


def checked_state(
    state_dict: dict, ours: list[dict], kept: ParameterState, check_hyperparameters: Callable[[dict], None], optimizer_name: str
) -> dict[torch.Tensor, dict]:
    """The state by parameter, converted for `ours`, the groups of the optimizer, or ValueError."""
    saved = _saved_groups(state_dict, ours)
    by_key = {
        key: ({**group, **new, **identity(group)}, i, parameter)
        for new, group in zip(saved, ours, strict=True)
        for i, (key, parameter) in enumerate(zip(new["params"], group["params"], strict=True))
    }
    known, states = {"step", "master", *kept.moments}, state_dict["state"]
    others = {key: state for key, state in states.items() if key not in by_key}
    has_moments = lambda state: isinstance(state, dict) and not state.keys().isdisjoint(kept.moments)
    if unknown := [key for key, state in others.items() if isinstance(key, int) or has_moments(state)]:
        raise ValueError(f"state_dict has state for {unknown}, which no group names")
    for new, group in zip(saved, ours, strict=True):
        check_hyperparameters({**group, **new})
        decoupled = group.get("decoupled_weight_decay")
        if new.get("decoupled_weight_decay", decoupled) != decoupled:
            raise ValueError(
                f"state_dict: decoupled_weight_decay is {not decoupled}, {optimizer_name} was made with {decoupled}: "
                "load Adam into Adam, AdamW into AdamW"
            )
    result = {}
    for key, state in states.items():
        if key in others:
            result[key] = state
            continue
        group, i, parameter = by_key[key]
        if not isinstance(state, dict):
            raise ValueError(f"state_dict: the state of {name_of(group, i)} must be a dict, got {type(state).__name__}")
        result[parameter] = {key: _like(value, parameter) for key, value in state.items() if key not in known}
        if known & state.keys():
            result[parameter].update(_converted(kept, state, parameter, name_of(group, i)))
    return result


def _saved_groups(state_dict: dict, ours: list[dict]) -> list[dict]:
    """The groups of a state_dict of the right form, and as large as `ours`."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict must have the keys state and param_groups")
    saved = state_dict["param_groups"]
    if not isinstance(saved, list) or not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in saved):
        raise ValueError("state_dict: param_groups must be a list of groups with params")
    keys = [key for group in saved for key in group["params"]]
    if not all(isinstance(key, int | str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("state_dict: params of param_groups must be different numbers or names, one for each parameter")
    if not isinstance(state_dict["state"], dict):
        raise ValueError(f"state_dict: state must be a dict, got {type(state_dict['state']).__name__}")
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in ours]
    if sizes[0] != sizes[1]:
        raise ValueError(f"state_dict has groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
    return saved


def _like(value, parameter: torch.Tensor):
    """As torch's load_state_dict converts what it finds in the state of a parameter."""
    if isinstance(value, torch.Tensor):
        return value.to(device=parameter.device, dtype=parameter.dtype if parameter.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _like(member, parameter) for key, member in value.items()}
    if isinstance(value, list | tuple | set) and type(value) in (list, tuple, set):
        return type(value)(_like(member, parameter) for member in value)
    return value


def _converted(kept: ParameterState, state: dict, parameter: torch.Tensor, name: str) -> dict:
    if is_lazy(parameter):
        raise ValueError(f"state_dict: {name} has state, but no shape yet: load it after a first forward of the model")
    # torch's reader of flattened distributed checkpoints puts {} where one lacks an entry
    state = {key: value for key, value in state.items() if not (isinstance(value, dict) and not value)}
    dtype = kept.master_dtype(parameter)
    result = {"step": _converted_step(state, name, kept.default_step, parameter.device)}
    for key in kept.moments:
        if state.get(key) is not None or key not in kept.optional:
            result[key] = _converted_tensor(state.get(key), parameter, kept.moment_dtype(parameter), f"{key} of {name}")
    if dtype != parameter.dtype:
        master = parameter if state.get("master") is None else state["master"]
        result["master"] = _converted_tensor(master, parameter, dtype, f"master of {name}")
        if master.dtype.itemsize < dtype.itemsize and master is not parameter:
            raise ValueError(f"state_dict: master of {name} is {master.dtype}, the optimizer keeps {dtype}")
    return result


def _converted_tensor(value, parameter: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"state_dict: {name} must have shape {tuple(parameter.shape)}, got {got}")
    if value.layout != torch.strided or value.dtype not in DTYPES or value.is_meta:
        raise ValueError(
            f"state_dict: {name} must be a dense floating-point tensor with data, "
            f"got {value.dtype}, {value.layout} on {value.device}"
        )
    return copy_(torch.empty_like(parameter, dtype=dtype), cast(laid_out_as(value, parameter), dtype))


def _converted_step(state: dict, name: str, default: int | None, device) -> torch.Tensor:
    step = state.get("step", default)
    if isinstance(step, torch.Tensor) and is_fake(step):  # which has no value to look at
        return step.to(device, torch.float32)
    value = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 and not step.is_meta else step
    if not isinstance(value, numbers.Real) or not 0 <= value <= _MOST_STEPS or value != int(value):
        raise ValueError(f"state_dict: step of {name} must be a count, got {step}")
    return torch.full((), float(value), dtype=torch.float32, device=device)


def identity(group: dict) -> dict:
    """What a loaded group does not change: which parameters it has, and their names."""
    return {key: group[key] for key in ("params", "param_names") if key in group}
