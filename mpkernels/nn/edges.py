# SPDX-License-Identifier: Apache-2.0
"""Which linears feed nothing but linears, proved by torch.fx."""

import torch
from torch import fx, nn

from mpkernels.nn.linear import MPLinear

# Elementwise: what they return has the dtype they are given, and no arithmetic that 16 bits would spoil.
_ELEMENTWISE_MODULES = (nn.Identity, nn.ReLU, nn.Dropout, nn.Flatten)
_ELEMENTWISE_FUNCTIONS = (torch.relu, nn.functional.relu, nn.functional.dropout, torch.flatten)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, MPLinear) or super().is_leaf_module(module, name)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody sees what goes into `module` or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def feeds_only_linears(model: nn.Module) -> dict[MPLinear, set[MPLinear]]:
    """MPLinear -> the MPLinears that alone read its output, at every call; empty where fx cannot trace `model`."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # NOTE: fx raises whatever the model's own code raises on a Proxy; then nothing is proved
        return {}
    modules = dict(model.named_modules())
    readers: dict[MPLinear, set[nn.Module | None]] = {}
    for node in graph.nodes:
        linear = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(linear, MPLinear):
            readers.setdefault(linear, set()).update({None} if has_hooks(linear) else _readers(node, modules))
    return {linear: found for linear, found in readers.items() if None not in found}


def _readers(node: fx.Node, modules: dict[str, nn.Module]) -> set[MPLinear | None]:
    """The MPLinears that read `node`, through elementwise modules; None for any other reader, and for no reader."""
    found: set[MPLinear | None] = set()
    for user in node.users:
        module = modules.get(user.target) if user.op == "call_module" else None
        if module is not None and has_hooks(module):
            found.add(None)
        elif isinstance(module, MPLinear):
            found.add(module)
        elif isinstance(module, _ELEMENTWISE_MODULES) or (user.op == "call_function" and user.target in _ELEMENTWISE_FUNCTIONS):
            found |= _readers(user, modules)
        else:
            found.add(None)
    return found or {None}
