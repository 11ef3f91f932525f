# SPDX-License-Identifier: Apache-2.0
"""convert_report: what became of each linear of a model, and why one was left alone."""

from dataclasses import dataclass

import torch
from torch import nn

from mpkernels.nn.convert.linears import linears, uncompiled, why_not
from mpkernels.nn.linear import MPLinear, is_converted
from mpkernels.nn.sequential import MPSequential, is_plain, narrows, step
from mpkernels.ops.linear_act import Activation, name_of
from mpkernels.policy import Policy, dtype_name

HINT = (
    'hint: activations that a forward() calls itself run apart: MPLinear(activation="relu") fuses one, '
    'or "gelu", "gelu_tanh", "silu", "relu2"'
)


EMULATED = "8-bit operands: {} decodes them and multiplies in more bits, which saves memory and takes no less time"


@dataclass(frozen=True)
class Row:
    """What became of one linear."""

    name: str
    converted: bool
    policy: Policy | None
    activation: str | None
    note: str

    def __str__(self) -> str:
        state = f"{self.policy}" if self.converted else "not converted"
        return f"{self.name or '(model)':40} {state:24} {self.activation or '-':6} {self.note}".rstrip()


class Report(tuple[Row, ...]):
    """The rows, one for each linear of the model; prints as a table, with hints below where they may help."""

    hint = ""

    def __str__(self) -> str:
        return "\n".join(str(line) for line in (*self, self.hint) if line)


def convert_report(model: nn.Module) -> Report:
    """What became of each linear of `model`, and why one was left alone.

    An activation: the linear's own, or that of the nn.ReLU which its nn.Sequential runs with it as things stand.
    The names of a compiled model are those of what torch.compile was given, as advise and watch say them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")
    model = uncompiled(model)
    rows, hint, emulating = [], "", {}
    for name, linear in linears(model):
        notes = list(getattr(vars(linear).get("_before"), "notes", ()))
        if not is_converted(linear):
            note = why_not(model, name, linear) or "; ".join(notes) or "left as it was"
            rows.append(Row(name, False, None, None, note))
            continue
        parent, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if name and isinstance(parent, nn.Sequential):
            activation, beside = _in_sequential(parent, list(parent._modules).index(key), name)
            notes += beside
        else:
            activation = linear.activation
            hint = hint or (HINT if activation is None else "")
        if linear.policy is not None and linear.policy.param_dtype != linear.weight.dtype:
            stored, policys = dtype_name(linear.weight.dtype), dtype_name(linear.policy.param_dtype)
            notes.append(f"its weight is {stored}, the policy's parameters are {policys}")
        if linear.policy is not None and linear.policy.float8:
            if multiplies_in_8_bits(linear.weight.device):
                notes += _too_small_for_8_bits(linear)
            else:
                emulating[linear.weight.device.type] = None
        rows.append(Row(name, True, linear.policy, activation, "; ".join(notes)))
    report = Report(rows)
    report.hint = "\n".join(filter(None, (hint, *map(EMULATED.format, emulating))))
    return report


def multiplies_in_8_bits(device: torch.device) -> bool:
    """Whether its tensor cores take two 8-bit floats: NVIDIA GPUs from sm_89 on."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _too_small_for_8_bits(linear: nn.Module) -> list[str]:
    """Scales by row cost more than the product saves on an H100 below these sizes.

    Source: torchao.float8, `_auto_filter_for_recipe`, 2026-11.
    """
    N, K = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.shape[::-1]
    if linear.policy.scaling == "row" and (N <= 2048 or K <= 1024 or (N <= 4096 and K <= 2048)):
        return [f"{K} x {N}: below the sizes at which 8 bits pay on an H100"]
    return []


def _in_sequential(sequential: nn.Sequential, i: int, name: str) -> tuple[str | None, list[str]]:
    """The activation that runs with its child i, and what else is to say of that child."""
    modules, keys = list(sequential), list(sequential._modules)
    linear, prefix = modules[i], name.removesuffix(keys[i])
    activation, notes = linear._activation, []
    if isinstance(sequential, MPSequential) and is_plain(linear, MPLinear):
        _, activation, reader = step(modules, i)
        if narrows(linear, reader, linear.weight.dtype):
            other = prefix + keys[modules.index(reader, i + 1)]
            notes.append(f"output {dtype_name(linear.policy.compute_dtype)}: only {other} reads it")
    following = modules[i + 1] if i + 1 < len(modules) else None
    if activation == Activation.NONE and (fusable := _fusable(following)) is not None:
        notes.append(f'its {type(following).__name__} runs apart: MPLinear(activation="{fusable}") would fuse it')
    return name_of(activation), notes


def _fusable(module: nn.Module | None) -> str | None:
    """The activation of MPLinear that computes what `module` does."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "relu" if isinstance(module, nn.ReLU) else "silu" if isinstance(module, nn.SiLU) else None
