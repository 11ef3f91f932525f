# SPDX-License-Identifier: Apache-2.0
"""What an optimizer keeps of a parameter in its state: step count, moments, master; their names and dtypes, and making them."""

from dataclasses import dataclass

import torch

from mpkernels.ops.common.multi_tensor import MASTER_DTYPES, MOMENT_DTYPES
from mpkernels.optim.distributed import laid_out_as, placement


@dataclass(frozen=True)
class ParameterState:
    """The entries of `state[parameter]`: `step`, the moments, and `master` where the parameter has not the master's dtype.

    optional: of the moments those that only some groups have, each with the hyperparameter that asks for it.
    default_step: the step count of saved state that has none.
    """

    given_master_dtype: torch.dtype | None
    given_moment_dtype: torch.dtype | None
    moments: tuple[str, ...]
    optional: dict[str, str]
    default_step: int | None

    def __post_init__(self):
        if self.given_master_dtype not in (None, *MASTER_DTYPES):
            raise ValueError(f"master_dtype must be torch.float32 or torch.float64, got {self.given_master_dtype}")
        if self.given_moment_dtype not in (None, *MOMENT_DTYPES):
            raise ValueError(f"state_dtype must be None, the master's dtype or torch.bfloat16, got {self.given_moment_dtype}")

    def moments_of(self, group: dict) -> tuple[str, ...]:
        """The names of the moments of this group's parameters."""
        return tuple(name for name in self.moments if name not in self.optional or group[self.optional[name]])

    def master_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self.given_master_dtype or torch.promote_types(parameter.dtype, torch.float32)

    def moment_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return self.given_moment_dtype or self.master_dtype(parameter)

    def check_dtypes(self, parameter: torch.Tensor, name: str, error: type[Exception]) -> None:
        """Raise `error` where these dtypes do not go with that of the parameter."""
        if self.given_master_dtype is not None and self.given_master_dtype.itemsize < parameter.dtype.itemsize:
            raise error(f"master_dtype {self.given_master_dtype} is narrower than {parameter.dtype} of {name}")
        if self.given_moment_dtype not in (None, master := self.master_dtype(parameter), torch.bfloat16):
            wanted = f"None, {master} as the master of {name}, or torch.bfloat16"
            raise error(f"state_dtype must be {wanted}, got {self.given_moment_dtype}")

    def missing(self, state: dict, group: dict, parameter: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
        """What is to be put into `state`: all of it at first, later what a changed hyperparameter asks for; or nothing.

        What the user has put in counts; raises RuntimeError where it is not of this parameter's shape.
        """
        dtype, new = self.master_dtype(parameter), {}
        for key in self.moments_of(group):
            value = state.get(key)
            if value is None:
                new[key] = torch.zeros_like(parameter, dtype=self.moment_dtype(parameter), memory_format=torch.preserve_format)
            elif not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise RuntimeError(
                    f"{name} changed shape since its state was made: {key} has {got}, the parameter {tuple(parameter.shape)}: "
                    "resize the state with it, or take it away with optimizer.state.pop(parameter)"
                )
            elif placement(value) != placement(parameter):
                new[key] = laid_out_as(value, parameter)
        if not _is_tensor(step := state.get("step"), (), torch.float32, parameter.device):  # torch's may be on the CPU
            new["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            if step is not None:
                new["step"].copy_(step.reshape(())) if isinstance(step, torch.Tensor) else new["step"].fill_(step)
        if dtype == parameter.dtype:
            state.pop("master", None)
        elif not _is_tensor(master := state.get("master"), parameter.shape, dtype, parameter.device):
            new["master"] = parameter.detach().to(dtype, copy=True)
        elif placement(master) != placement(parameter):
            new["master"] = laid_out_as(master, parameter)
        return new


def _is_tensor(value, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    return isinstance(value, torch.Tensor) and (value.shape, value.dtype, value.device) == (shape, dtype, device)


class ParameterDtypes:
    """Of which dtype each parameter was when its state was made: a later `model.half()` leaves a state that does not fit."""

    def __init__(self):
        self._recorded: dict[int, tuple[dict, torch.dtype]] = {}  # by id of the parameter, its state and dtype

    def record(self, state: dict) -> None:
        """Take up what is new in the optimizer's state, and forget what is gone."""
        old, self._recorded = self._recorded, {}
        for parameter, entry in state.items():
            if isinstance(entry, dict) and isinstance(parameter, torch.Tensor):
                before = old.get(id(parameter))
                is_known = before is not None and before[0] is entry
                self._recorded[id(parameter)] = before if is_known else (entry, parameter.dtype)

    def check(self, parameter: torch.Tensor, entry: dict | None, name: str) -> None:
        """Raise RuntimeError for a parameter that has changed its dtype since."""
        recorded, dtype = self._recorded.get(id(parameter), (None, None))
        if recorded is not None and recorded is entry and dtype != parameter.dtype:
            raise RuntimeError(
                f"{name} changed dtype since its state was made: {dtype} then, {parameter.dtype} now: "
                "make the optimizer after convert"
            )
