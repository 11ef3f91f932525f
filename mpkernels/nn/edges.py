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


def feeds_only_linears(model: nn.Module) -> dict[MPLinear, torch.dtype]:
    """MPLinear -> the compute dtype of the MPLinears that alone read its output; empty where fx cannot trace `model`."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # NOTE: fx raises whatever the model's own code raises on a Proxy; then nothing is proved
        return {}
    modules = dict(model.named_modules())
    proved, disproved = {}, set()
    for node in graph.nodes:
        linear = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(linear, MPLinear):
            continue
        dtypes = _consumer_dtypes(node, modules)
        if len(dtypes) == 1 and None not in dtypes:
            proved[linear] = dtypes.pop()
        else:
            disproved.add(linear)
    return {linear: dtype for linear, dtype in proved.items() if linear not in disproved}


def _consumer_dtypes(node: fx.Node, modules: dict[str, nn.Module]) -> set[torch.dtype | None]:
    """Compute dtypes of the MPLinears that read `node`, through elementwise modules; None for any other reader."""
    dtypes = set()
    for user in node.users:
        module = modules.get(user.target) if user.op == "call_module" else None
        if isinstance(module, MPLinear):
            dtypes.add(None if module.policy is None else module.policy.compute_dtype)
        elif isinstance(module, _ELEMENTWISE_MODULES) or (user.op == "call_function" and user.target in _ELEMENTWISE_FUNCTIONS):
            dtypes |= _consumer_dtypes(user, modules)
        else:
            dtypes.add(None)
    return dtypes or {None}
