# SPDX-License-Identifier: Apache-2.0
"""convert, revert, convert_report: nn.Linear and the ReLU after it become MPLinear, in place."""

import dataclasses
import fnmatch
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mpkernels import _copies
from mpkernels.nn.edges import feeds_only_linears, has_hooks
from mpkernels.nn.linear import MPLinear
from mpkernels.ops._cast import DTYPES, cast
from mpkernels.ops.linear_act import Activation
from mpkernels.policy import Policy


class FusedReLU(nn.Identity):
    """Stands where a ReLU was that the linear before it now applies, so that indices and keys stay."""

    def __init__(self, relu: nn.ReLU):
        super().__init__()
        self.replaced = (relu,)  # a tuple: not a submodule
        self.training = relu.training


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


class Report(tuple):
    """The rows, one for each linear of the model; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self)


def convert(model: nn.Module, policy: "str | Policy | Mapping[str, str | Policy]" = "mixed_float16", *, keep=()) -> nn.Module:
    """Make every nn.Linear of `model`, with the nn.ReLU after it in an nn.Sequential, an MPLinear. In place; returns it.

    policy: one for all, or an ordered mapping from globs of module names, where the last match wins.
    keep: a glob, or several, of module names that stay as they are. A glob that names a module means what is in it, too.
    Parameters stay the same objects. Under `mixed_*` their dtype and the state_dict stay too. Under `float16` and
    `bfloat16` all floating-point parameters and buffers are cast as `model.half()` does, but for linears that a glob
    gives a wider policy, and the optimizer made afterwards starts its masters from the unrounded values.
    Converting again changes the policy. A policy with a `grad_dtype` other than the parameters' is for the optimizers
    here: torch's own and DDP refuse such gradients; `grad_dtype=None` is for them.
    Raises ValueError for an unknown policy, a glob that matches nothing, and policies that do not go together.
    """
    policies = dict(policy) if isinstance(policy, Mapping) else {"*": policy}
    policies = {glob: Policy.parse(p) for glob, p in policies.items()}
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    narrow = _narrow_dtype(policies.values())
    _check_globs([name for name, _ in _linears(model)], [glob for glob in policies if glob != "*"], "linear")
    _check_globs([name for name, _ in model.named_modules()], keep, "module")
    revert(model)
    kept = {module for name, module in model.named_modules() if any(_matches(name, glob) for glob in keep)}
    chosen = {}
    for name, linear in _linears(model):
        found = [p for glob, p in policies.items() if _matches(name, glob)]
        if found and linear not in kept and _why_not(model, name, linear) is None:
            chosen[linear] = found[-1]
    if narrow is not None:
        _cast_model(model, narrow, kept | {linear for linear, p in chosen.items() if p.param_dtype != narrow})
    for linear, chosen_policy in chosen.items():
        _convert_linear(linear, chosen_policy)
    _fuse_relus(model)
    _narrow_inner_outputs(model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: the linears are again what they were, every fused ReLU is back. Dtypes stay as they are."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, FusedReLU):
                setattr(module, name, child.replaced[0].train(child.training))
        if type(module) is MPLinear and "_before" in vars(module):
            cls, activation, policy = vars(module).pop("_before")
            module.adopt(activation, policy)
            _copies.forget(module.weight)
            if cls is nn.Linear:
                for name in ("_activation", "policy", "_cached"):
                    module.__dict__.pop(name, None)
                module.__class__ = nn.Linear
    return model


def convert_report(model: nn.Module) -> Report:
    """What became of each linear of `model`, and why one was left alone."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, MPLinear):
            rows.append(Row(name, True, module.policy, module.activation, _note(module)))
        elif isinstance(module, nn.Linear):
            rows.append(Row(name, False, None, None, _why_not(model, name, module) or "left as it was"))
    return Report(rows)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, m) for name, m in list(model.named_modules()) if isinstance(m, nn.Linear))


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"{glob}.*")


def _check_globs(names: list[str], globs: Iterable[str], what: str) -> None:
    for glob in globs:
        if not any(_matches(name, glob) for name in names):
            raise ValueError(f"no {what} of the model matches {glob!r}")


def _narrow_dtype(policies: Iterable[Policy]) -> torch.dtype | None:
    """float16 or bfloat16 if a policy stores parameters in it; ValueError for policies that do not go together."""
    narrow = {p.param_dtype for p in policies if p.param_dtype.itemsize == 2}
    if len(narrow) > 1 or (narrow and any(p.mixed for p in policies)):
        raise ValueError(f"a model is stored in one dtype: {', '.join(map(str, policies))} do not go together")
    return narrow.pop() if narrow else None


def _why_not(model: nn.Module, name: str, linear: nn.Linear) -> str | None:
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return "its weight is used by nn.MultiheadAttention without calling it"
    if hasattr(linear, "parametrizations"):
        return "is parametrized"
    if type(linear) not in (nn.Linear, MPLinear):
        return f"is a {type(linear).__name__}, which has its own forward"
    if linear.weight.dtype not in DTYPES:
        return f"has a weight of {linear.weight.dtype}"
    return None


def _convert_linear(linear: nn.Linear, policy: Policy) -> None:
    """Change the class: the module stays the same object, with its Parameters, hooks and name."""
    if type(linear) is nn.Linear:
        linear.__class__ = MPLinear
        linear._before = (nn.Linear, Activation.NONE, None)
    else:
        linear._before = (MPLinear, linear._activation, linear.policy)
    linear.adopt(linear._activation, policy)


def _fuse_relus(model: nn.Module) -> None:
    """Where an MPLinear and an nn.ReLU are neighbours in an nn.Sequential and nobody can see what is between them."""
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for sequential in [m for m in model.modules() if type(m) is nn.Sequential]:
        children = list(sequential.named_children())
        for (_, linear), (name, relu) in itertools.pairwise(children):
            if type(linear) is not MPLinear or type(relu) is not nn.ReLU or linear._activation != Activation.NONE:
                continue
            seen = "_before" not in vars(linear) or has_hooks(linear) or has_hooks(relu)
            if max(uses[id(linear)], uses[id(relu)]) == 1 and not seen:
                linear._activation = Activation.RELU
                setattr(sequential, name, FusedReLU(relu))


def _cast_model(model: nn.Module, dtype: torch.dtype, kept: set[nn.Module]) -> None:
    """What `model.half()` does, but for the modules in `kept`; Parameters stay, and so do their unrounded values."""
    stay = {id(t) for module in kept for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in stay and parameter.is_floating_point() and parameter.dtype != dtype:
                unrounded, parameter.grad = parameter.data, None
                parameter.data = cast(unrounded, dtype)
                _copies.keep_unrounded(parameter, unrounded)
        for key, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in stay and buffer.is_floating_point():
                module._buffers[key] = cast(buffer, dtype)


def _narrow_inner_outputs(model: nn.Module) -> None:
    """Between MPLinears of one compute dtype nobody needs the wide output; what leaves the chain stays wide."""
    chained: set[MPLinear] = set()
    narrowed = {}
    for linear, readers in feeds_only_linears(model).items():
        dtypes = {None if m.policy is None else m.policy.compute_dtype for m in (linear, *readers)}
        if len(dtypes) == 1 and linear.policy is not None and linear.policy.mixed:
            narrowed[linear] = linear.policy.compute_dtype
            chained |= readers
    for linear in chained - narrowed.keys():
        narrowed[linear] = linear.weight.dtype
    for linear, output_dtype in narrowed.items():
        if linear.policy.output_dtype is None:
            linear.adopt(linear._activation, dataclasses.replace(linear.policy, output_dtype=output_dtype))


def _note(linear: MPLinear) -> str:
    """What a reader of the report would not expect."""
    policy, notes = linear.policy, []
    if policy is not None and policy.output_dtype == policy.compute_dtype:
        notes.append(f"output {_short(policy.output_dtype)}: only linears read it")
    if policy is not None and policy.param_dtype != linear.weight.dtype:
        notes.append(f"its weight is {_short(linear.weight.dtype)}, the policy's parameters are {_short(policy.param_dtype)}")
    return "; ".join(notes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
