# SPDX-License-Identifier: Apache-2.0
"""Which modules read the output of a linear, proved by torch.fx."""

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from mpkernels._rng import fork_rng
from mpkernels.nn.linear import MPLinear, has_hooks
from mpkernels.nn.sources import has_branches, read_elsewhere

# Elementwise: what they return has the dtype they are given, and no arithmetic that 16 bits would spoil.
_ELEMENTWISE_MODULES = (nn.Identity, nn.ReLU, nn.Dropout, nn.Flatten)
_RELUS = (torch.relu, torch.relu_, nn.functional.relu)
_ELEMENTWISE_FUNCTIONS = (*_RELUS, nn.functional.dropout, torch.flatten)
_SUMS = (operator.add, operator.iadd, torch.add)  # the widest operand's dtype goes on

RELU = "relu"  # torch.relu, F.relu or x.relu() right after a linear
Reader = nn.Module | str | None


class _Tracer(fx.Tracer):
    """Looks into what has one path and no observer: fx sees one path, and a hook would be run."""

    proxy_buffer_attributes = True  # else what forward does to them in place would be done

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = isinstance(module, MPLinear) or super().is_leaf_module(module, name)
        return known or has_hooks(module) or _may_do_otherwise(module)


def _may_do_otherwise(module: nn.Module) -> bool:
    return "forward" in vars(module) or (type(module).forward is not nn.Sequential.forward and has_branches(module))


@dataclass
class Edges:
    """What reads the outputs of linears.

    readers: MPLinear -> the modules that read its output at every call, through elementwise ones and sums; among them RELU
    where a function is next, None for a reader that nobody knows. before_relu: those whose every output goes into such a
    function alone, called by the module that called the linear.
    """

    readers: dict[MPLinear, set[Reader]] = field(default_factory=dict)
    before_relu: set[MPLinear] = field(default_factory=set)


def edges_of_linears(model: nn.Module) -> Edges:
    """Empty where fx cannot trace `model` or might not see all that it does.

    The forward runs on proxies: what that leaves in attributes is put back, and buffers are proxies as well.
    """
    edges = Edges()
    if _may_do_otherwise(model):
        return edges
    attributes = {module: dict(vars(module)) for module in model.modules()}
    try:
        with fork_rng(model):
            graph = _Tracer().trace(model)
    except Exception:  # NOTE: fx raises whatever the model's own code raises on a Proxy; then nothing is proved
        return edges
    finally:
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module" and isinstance(modules[node.target], MPLinear)]
    for node in calls:
        linear = modules[node.target]
        found = edges.readers.setdefault(linear, set())
        found |= _readers(node, modules) | ({None} if has_hooks(linear) else set())
        found |= {RELU for user in node.users if _is_relu(user)}
    seen = {modules[node.target] for node in calls if not _is_before_relu(node, modules)}
    edges.before_relu = edges.readers.keys() - seen
    return edges


def _is_before_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a ReLU function, called by the module that calls this linear of its own, is all that reads the output."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    *callers, _ = node.meta["nn_module_stack"].items()
    owner, parts = callers[-1][1][0] if callers else "", node.target.split(".")
    while isinstance(modules[".".join(parts[:-1])], nn.ModuleList | nn.ModuleDict):
        parts.pop()
    *parent, attribute = parts
    same_call = callers == list(user.meta.get("nn_module_stack", {}).items()) and ".".join(parent) == owner
    path = [type(modules[".".join(parent[:i])]) for i in range(len(parent) + 1)]
    return _is_relu(user) and same_call and not read_elsewhere(path, attribute)


def _is_relu(node: fx.Node) -> bool:
    return node.target in _RELUS or (node.op == "call_method" and node.target in ("relu", "relu_"))


def _readers(node: fx.Node, modules: dict[str, nn.Module]) -> set[Reader]:
    found: set[Reader] = set()
    for user in node.users:
        module = modules.get(user.target) if user.op == "call_module" else None
        if module is not None and has_hooks(module):
            found |= {None, module}
        elif isinstance(module, _ELEMENTWISE_MODULES) or user.target in _ELEMENTWISE_FUNCTIONS or _is_relu(user):
            found |= _readers(user, modules)
        elif user.target in _SUMS:
            found |= {None} | _readers(user, modules)
        else:
            found.add(module)
    return found or {None}
