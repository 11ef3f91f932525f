# SPDX-License-Identifier: Apache-2.0
"""convert, revert, convert_report: nn.Linear and the ReLU after it become MPLinear, in place."""

import dataclasses
import fnmatch
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import nn

from mpkernels import _copies
from mpkernels.nn.before_relu import MPLinearBeforeReLU
from mpkernels.nn.edges import RELU, Edges, edges_of_linears
from mpkernels.nn.linear import MPLinear, has_hooks
from mpkernels.nn.mlp import MPMLP
from mpkernels.ops._cast import DTYPES, cast
from mpkernels.ops.linear_act import Activation
from mpkernels.policy import Policy

# Weights from which on a linear is worth converting in a compiled model on a CPU. By bench/results, overhead/forward+backward,
# our op costs the host 74 us more than torch's: 4 % of the arithmetic of 512 rows with so many weights, 15 % of that of 128.
# training/digits, 64 rows and at most 128 x 128 weights, takes twice as long compiled as fp32 does. No row says so of a GPU.
MIN_SIZE_COMPILED = 256 * 256


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


def convert(
    model: nn.Module, policy: "str | Policy | Mapping[str, str | Policy]" = "mixed_float16", *, include="*", exclude=(),
    filter_fn: Callable[[nn.Module, str], bool] | None = None, keep=(), min_size: int | None = None,
) -> nn.Module:  # fmt: skip
    """Make every nn.Linear of `model`, with the ReLU after it, an MPLinear. In place; returns it.

    The ReLU is an nn.ReLU in an nn.Sequential, or a function called in a forward that torch.fx can follow.

    policy: one for all, or an ordered mapping from globs of module names, where the last match wins.
    include, exclude: a glob, or several, of linears to convert, and of those to leave; filter_fn(module, name) is asked
    about the rest. What is left is cast with the model under `float16` and `bfloat16`; what `keep` names is not: a glob, or
    several, of modules that stay as they are, dtype too. A glob that names a module means what is in it as well.
    min_size: nn.Linears whose weight has fewer elements are left. None: those too small to pay in a model on a CPU that
    torch.compile has already wrapped, and none under `float16` and `bfloat16`.
    `transformers`' Conv1D, a linear whose weight is (in, out), is converted too, and an nn.Sequential of linears and ReLUs
    becomes an MPMLP. What cannot be converted is skipped; `convert_report` has the reason.
    Parameters stay the same objects. Under `mixed_*` their dtype and the state_dict stay too. Under `float16` and
    `bfloat16` all floating-point parameters and buffers are cast as `model.half()` does, but for linears that a glob
    gives a wider policy, and the masters of the optimizer made afterwards start from the rounded parameters.
    Converting again changes the policy. Adapters that wrap a linear are put around it before: afterwards its ReLU is inside.
    A policy with a `grad_dtype` other than the parameters' is for the optimizers here: torch's own and DDP refuse such
    gradients; `grad_dtype=None` is for them.
    Raises ValueError for an unknown policy, a glob that matches nothing, and policies that do not go together; TypeError
    for what is no module.
    """
    _check_module(model)
    policies = dict(policy) if isinstance(policy, Mapping) else {"*": policy}
    if not policies:
        raise ValueError("policy must not be empty")
    policies = {glob: Policy.parse(p) for glob, p in policies.items()}
    include, exclude, keep = ((globs,) if isinstance(globs, str) else tuple(globs) for globs in (include, exclude, keep))
    narrow = _narrow_dtype(policies.values())
    _check_globs([name for name, _ in _linears(model)], [g for g in (*policies, *include, *exclude) if g != "*"], "linear")
    _check_globs([name for name, _ in model.named_modules()], keep, "module")
    min_sizes = _min_sizes(model, min_size, narrow)
    kept = {module for name, module in model.named_modules() if any(_matches(name, glob) for glob in keep)}
    wanted = {}
    for name, linear in _linears(model):  # before anything is changed: filter_fn may raise
        found = [p for glob, p in policies.items() if _matches(name, glob)]
        included = any(_matches(name, glob) for glob in include) and not any(_matches(name, glob) for glob in exclude)
        if found and included and linear not in kept and (filter_fn is None or filter_fn(linear, name)):
            wanted[name] = found[-1]
    revert(model)
    chosen = {}
    for name, linear in _linears(model):
        if name not in wanted or _why_not(model, name, linear) is not None:
            continue
        size, least = linear.weight.numel(), min_sizes.get(linear, 0)
        if size < least and not hasattr(linear, "adopt"):
            linear._before = _Before(type(linear), (f"too small to pay: {size} weights (min_size={least})",))
            continue
        chosen[linear] = wanted[name]
    if narrow is not None:
        _cast_model(model, narrow, kept | {linear for linear, p in chosen.items() if p.param_dtype != narrow})
    for linear, chosen_policy in chosen.items():
        _convert_linear(linear, chosen_policy)
    _fuse_relus(model)
    edges = edges_of_linears(model)
    _fuse_functional_relus(model, edges)
    _set_output_dtypes(model, edges, chosen.keys())
    _adopt_mlps(model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`: the linears are again what they were, every fused ReLU is back. Dtypes stay as they are."""
    _check_module(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, FusedReLU):
                setattr(module, name, child.replaced[0].train(child.training))
        before = vars(module).pop("_before", None)
        if isinstance(before, _Linear):
            module.adopt(before.activation, before.policy)
            _copies.forget(module)
            if not issubclass(before.cls, MPLinear):
                for name in ("_activation", "policy", "_cached"):
                    module.__dict__.pop(name, None)
        if before is not None:
            module.__class__ = before.cls
    return model


def convert_report(model: nn.Module) -> Report:
    """What became of each linear of `model`, and why one was left alone."""
    _check_module(model)
    rows = []
    for name, module in _linears(model):
        if hasattr(module, "adopt"):
            rows.append(Row(name, True, module.policy, module.activation, _note(module)))
        else:
            note = _why_not(model, name, module) or _note(module) or "left as it was"
            rows.append(Row(name, False, None, None, note))
    return Report(rows)


def _check_module(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")


@dataclass(frozen=True)
class _Before:
    """The class of a module before convert changed it, and what the report says of it; kept on the module."""

    cls: type
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Linear(_Before):
    """The same for a linear, with what else it had."""

    activation: Activation = Activation.NONE
    policy: Policy | None = None


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in list(model.named_modules()) if isinstance(m, nn.Linear) or _kind(m) is not None)


def _kind(module: nn.Module) -> str | None:
    """What kind of linear a module is that is no nn.Linear; by name, so that nobody's package is imported."""
    for cls in type(module).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return "Conv1D"
        if cls.__name__ in ("Linear", "LinearReLU") and cls.__module__.startswith("torch.ao.nn."):
            return "quantized"
    return None


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"{glob}.*")


def _check_globs(names: list[str], globs: Iterable[str], what: str) -> None:
    for glob in globs:
        if not any(_matches(name, glob) for name in names):
            raise ValueError(f"no {what} of the model matches {glob!r}")


def _min_sizes(model: nn.Module, min_size: int | None, narrow: torch.dtype | None) -> dict[nn.Module, int]:
    """How many weights a linear must have to be converted, where that is not 0."""
    if min_size is not None:
        if isinstance(min_size, bool) or not isinstance(min_size, int):
            raise TypeError(f"min_size must be an int or None, got {min_size!r}")
        return dict.fromkeys(model.modules(), min_size)
    if narrow is not None:  # what is left would compute in 16 bits all the same, by torch's numerics
        return {}
    compiled = [m for m in model.modules() if "_orig_mod" in m._modules or m._compiled_call_impl is not None]
    inner = (linear for module in compiled for _, linear in _linears(module))
    return {linear: MIN_SIZE_COMPILED for linear in inner if all(p.is_cpu for p in linear.parameters())}


def _narrow_dtype(policies: Iterable[Policy]) -> torch.dtype | None:
    """float16 or bfloat16 if a policy stores parameters in it; ValueError for policies that do not go together."""
    narrow = {p.param_dtype for p in policies if p.param_dtype.itemsize == 2}
    if len(narrow) > 1 or (narrow and any(p.mixed for p in policies)):
        raise ValueError(f"a model is stored in one dtype: {', '.join(map(str, policies))} do not go together")
    return narrow.pop() if narrow else None


def _why_not(model: nn.Module, name: str, linear: nn.Module) -> str | None:
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


def _convert_linear(linear: nn.Module, policy: Policy) -> None:
    """Change the class: the module stays the same object, with its Parameters, hooks and name."""
    if hasattr(linear, "adopt"):
        linear._before = _Linear(type(linear), (), linear._activation, linear.policy)
    else:
        linear._before = _Linear(type(linear))
        linear.__class__ = MPLinear if isinstance(linear, nn.Linear) else _conv1d()
    linear.adopt(linear._activation, policy)


def _conv1d() -> type:
    from mpkernels.nn.transformers_conv1d import MPConv1D

    return MPConv1D


def _fuse_relus(model: nn.Module) -> None:
    """Where an MPLinear and an nn.ReLU are neighbours in an nn.Sequential and nobody can see what is between them."""
    uses = _uses(model)
    for sequential in [m for m in model.modules() if type(m) is nn.Sequential]:
        children = list(sequential._modules.items())  # named_children has a module that stands in two places once
        for (_, linear), (name, relu) in itertools.pairwise(children):
            if type(linear) is not MPLinear or type(relu) is not nn.ReLU or linear._activation != Activation.NONE:
                continue
            seen = "_before" not in vars(linear) or has_hooks(linear) or has_hooks(relu)
            if max(uses[linear], uses[relu]) == 1 and not seen:
                linear._activation = Activation.RELU
                setattr(sequential, name, FusedReLU(relu))


def _fuse_functional_relus(model: nn.Module, edges: Edges) -> None:
    """Where the model's own forward calls a ReLU function on the output of an MPLinear, and nobody else has that."""
    uses = _uses(model)
    for linear in edges.before_relu:
        ours = type(linear) is MPLinear and "_before" in vars(linear)
        if ours and linear._activation == Activation.NONE and uses[linear] == 1 and not has_hooks(linear):
            linear.__class__ = MPLinearBeforeReLU


def _uses(model: nn.Module) -> Counter:
    """How often each module is somebody's child."""
    return Counter(child for module in model.modules() for child in module._modules.values())


def _adopt_mlps(model: nn.Module) -> None:
    """An nn.Sequential of two or more converted linears, each seen by its neighbours alone, is an MPMLP."""
    uses = _uses(model)
    for sequential in [m for m in model.modules() if type(m) is nn.Sequential]:
        children = list(sequential)
        linears = [child for child in children if type(child) is MPLinear and "_before" in vars(child)]
        ours = len(linears) > 1 and all(isinstance(child, FusedReLU) or child in linears for child in children)
        if ours and all(uses[child] == 1 and not has_hooks(child) for child in children):
            sequential._before = _Before(nn.Sequential)
            MPMLP.adopt(sequential)


@torch.inference_mode(False)  # Parameters made under it could not be trained
@torch.no_grad()
def _cast_model(model: nn.Module, dtype: torch.dtype, kept: set[nn.Module]) -> None:
    """What `model.half()` does, but for the modules in `kept`; Parameters stay."""
    stay = {id(t) for module in kept for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    casts: dict[torch.Tensor, torch.Tensor] = {}  # a buffer may have several names
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in stay and parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.grad = None
                parameter.data = cast(parameter.data, dtype)
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in stay and buffer.is_floating_point():
                casts[buffer] = casts[buffer] if buffer in casts else cast(buffer, dtype)
                module._buffers[key] = casts[buffer]


def _set_output_dtypes(model: nn.Module, edges: Edges, chosen: Set[nn.Module]) -> None:
    """Between MPLinears of one compute dtype nobody needs the wide output; what leaves the chain stays wide.

    A module whose parameters have another dtype than the output it would be given is given theirs. MPLinears of the user's
    own that are not `chosen` stay as they are, and so does what they are given: without an output_dtype they return its.
    """
    readers_of = {linear: readers for linear, readers in edges.readers.items() if linear in chosen}
    chained: set[MPLinear] = set()
    narrowed = {}
    for linear, readers in readers_of.items():
        if RELU in readers and not isinstance(linear, MPLinearBeforeReLU):
            _remember(linear, 'relu in forward() not fused: use MPLinear(activation="relu")')
        above = readers - {RELU}
        dtypes = {m.policy.compute_dtype for m in (linear, *above) if m in chosen}
        if above <= chosen and len(dtypes) == 1 and linear.policy.mixed:
            narrowed[linear] = linear.policy.compute_dtype
            chained |= above
    for linear in chained - narrowed.keys():
        narrowed[linear] = linear.weight.dtype
    for linear, output_dtype in narrowed.items():
        if linear.policy.output_dtype is None:
            linear.adopt(linear._activation, dataclasses.replace(linear.policy, output_dtype=output_dtype))
            if output_dtype == linear.policy.compute_dtype:
                _remember(linear, f"output {_short(output_dtype)}: only linears read it")
    names = {module: name for name, module in model.named_modules()}
    for linear, readers in readers_of.items():
        for module in readers - {RELU, None}:
            taken = {p.dtype for p in module.parameters() if p.is_floating_point()}
            output_dtype = _known_output_dtype(linear)
            if not isinstance(module, MPLinear) and output_dtype is not None and len(taken) == 1 and taken != {output_dtype}:
                (dtype,) = taken
                linear.adopt(linear._activation, dataclasses.replace(linear.policy, output_dtype=dtype))
                _remember(linear, f"output {_short(dtype)}: {names[module]} takes it")


def _known_output_dtype(linear: MPLinear) -> torch.dtype | None:
    """None where it is that of the input."""
    policy = linear.policy
    if policy.mixed and policy.output_dtype is None:
        return None
    return policy.output_dtype or linear.weight.dtype


def _remember(linear: MPLinear, note: str) -> None:
    """For the report."""
    linear._before = dataclasses.replace(linear._before, notes=(*linear._before.notes, note))


def _note(linear: nn.Module) -> str:
    """What a reader of the report would not expect."""
    policy, notes = getattr(linear, "policy", None), list(getattr(vars(linear).get("_before"), "notes", ()))
    if policy is not None and policy.param_dtype != linear.weight.dtype:
        notes.append(f"its weight is {_short(linear.weight.dtype)}, the policy's parameters are {_short(policy.param_dtype)}")
    return "; ".join(notes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
