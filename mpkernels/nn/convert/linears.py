# SPDX-License-Identifier: Apache-2.0
"""Which modules are linears, and which of them can be converted."""

from collections.abc import Iterator

import torch
from torch import nn

from mpkernels.nn.linear import MPLinear
from mpkernels.ops.common.cast import DTYPES


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in list(model.named_modules()) if isinstance(m, nn.Linear) or _kind(m) is not None)


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile was given, if it was: hooks in a compiled model break its graph, and names would be other ones."""
    return getattr(model, "_orig_mod", model)


def is_linear(module: nn.Module) -> bool:
    """Whether its output is `act(x @ weight.T + bias)`; transformers' Conv1D has its weight transposed."""
    return isinstance(module, nn.Linear) or _kind(module) == "Conv1D"


def _kind(module: nn.Module) -> str | None:
    """What kind of linear a module is that is no nn.Linear; by name, so that no package is imported."""
    for cls in type(module).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return "Conv1D"
        if cls.__name__ in ("Linear", "LinearReLU") and cls.__module__.startswith("torch.ao.nn."):
            return "quantized"
    return None


def why_not(model: nn.Module, name: str, linear: nn.Module) -> str | None:
    """Why this linear of `model` is not converted, or None."""
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return "its weight is used by nn.MultiheadAttention without calling it"
    if isinstance(linear, nn.modules.lazy.LazyModuleMixin):
        return "is lazy and has no weight yet: call the model once before"
    if _kind(linear) == "quantized":
        return "is quantized"
    if not {"weight", "bias"} <= linear._parameters.keys():  # by torch's parametrizations, its older hooks, or pruning
        return "is parametrized"
    known = type(linear) in (nn.Linear, MPLinear) or type(linear).__name__ in ("Conv1D", "MPConv1D")
    if "forward" in vars(linear) or not (known or type(linear).forward is nn.Linear.forward):
        return f"is a {type(linear).__name__}, which has its own forward"
    if not known:
        return f"is a {type(linear).__name__}, which an MPLinear is not"
    if linear.weight.dtype not in DTYPES:
        return f"has a weight of {linear.weight.dtype}"
    if linear.weight.layout != torch.strided:
        return f"has a weight of {linear.weight.layout}"
    return None
