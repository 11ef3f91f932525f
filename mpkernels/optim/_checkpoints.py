# SPDX-License-Identifier: Apache-2.0
"""A state_dict, ours or torch's, checked against an optimizer and converted to what it keeps, before anything is loaded."""

import math

import torch

from mpkernels.ops._cast import DTYPES, cast
from mpkernels.optim import _ranks
from mpkernels.optim._parameters import name_of


def checked_state(optimizer, state_dict: dict) -> dict[torch.Tensor, dict]:
    """The state by parameter, converted, or ValueError."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("state_dict must have the keys state and param_groups")
    saved, ours = state_dict["param_groups"], optimizer.param_groups
    if not isinstance(saved, list) or not all(isinstance(g, dict) and "params" in g for g in saved):
        raise ValueError("state_dict: param_groups must be a list of groups with params")
    states = state_dict["state"]
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise ValueError("state_dict: state must be a dict of dicts")
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in ours]
    if sizes[0] != sizes[1]:
        raise ValueError(f"state_dict has groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
    by_id = {
        key: ({**group, **new, **identity(group)}, i, parameter)
        for new, group in zip(saved, ours, strict=True)
        for i, (key, parameter) in enumerate(zip(new["params"], group["params"], strict=True))
    }
    if unknown := state_dict["state"].keys() - by_id.keys():
        raise ValueError(f"state_dict has state for {sorted(unknown)}, which no group names")
    for new, group in zip(saved, ours, strict=True):
        optimizer._check_hyperparameters({**group, **new})
        decoupled = group.get("decoupled_weight_decay")
        if new.get("decoupled_weight_decay", decoupled) != decoupled:
            raise ValueError(
                f"state_dict: decoupled_weight_decay is {not decoupled}, {type(optimizer).__name__} was made with {decoupled}: "
                "load Adam into Adam, AdamW into AdamW"
            )
    result = {}
    for key, state in state_dict["state"].items():
        group, i, parameter = by_id[key]
        result[parameter] = _converted(optimizer, state, parameter, group, name_of(group, i))
    return result


def _converted(optimizer, state: dict, parameter: torch.Tensor, group: dict, name: str) -> dict:
    dtype, optional = optimizer._master_dtype(parameter), optimizer._optional_states
    wanted = tuple(dict.fromkeys((*optimizer._group_state_names(group), *optional)))
    if extra := {key for key, value in state.items() if value is not None} - {"step", "master", *wanted}:
        raise ValueError(f"state_dict: {name} has {', '.join(sorted(extra))}, expected {', '.join(wanted)}")
    result = {"step": _converted_step(state, name, optimizer._default_step, parameter.device)}
    for key in wanted:
        if key in optional and state.get(key) is None:
            continue
        result[key] = _converted_tensor(state.get(key), parameter, optimizer._moment_dtype(parameter), f"{key} of {name}")
    if dtype != parameter.dtype:
        master = state.get("master", parameter)
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
    return torch.empty_like(parameter, dtype=dtype).copy_(cast(_ranks.laid_out_as(value, parameter), dtype))


def _converted_step(state: dict, name: str, default: int | None, device) -> torch.Tensor:
    step = state.get("step", default)
    value = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    if not isinstance(value, int | float) or not 0 <= value < math.inf or value != int(value):
        raise ValueError(f"state_dict: step of {name} must be a count, got {step}")
    return torch.full((), value, dtype=torch.float32, device=device)


def identity(group: dict) -> dict:
    """What a loaded group does not change: which parameters it has, and their names."""
    return {key: group[key] for key in ("params", "param_names") if key in group}
