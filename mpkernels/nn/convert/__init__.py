# SPDX-License-Identifier: Apache-2.0
"""convert and revert: nn.Linear becomes MPLinear, in place, and a Sequential runs the ReLU after one with it."""

import difflib
import fnmatch
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from mpkernels.nn.convert import cast_model, fast_path
from mpkernels.nn.convert.linears import linears, why_not
from mpkernels.nn.linear import Model, MPLinear, is_converted, is_watched
from mpkernels.nn.sequential import MPSequential
from mpkernels.ops.linear_act import Activation
from mpkernels.policy import Policy, PolicyName
from mpkernels.runtime import compute_copy
from mpkernels.runtime.op import agree_on_backends

# Weights from which on a linear is worth converting in a compiled model on a CPU. By bench/results, overhead/forward+backward,
# our op has 74 us more CPU launch overhead than torch's: 4 % of the arithmetic of 512 rows with so many weights, 15 % of 128's.
# training/digits, 64 rows and at most 128 x 128 weights, takes twice as long compiled as fp32 does. No row says so of a GPU.
MIN_SIZE_COMPILED = 256 * 256


def convert(
    model: Model, policy: PolicyName | Policy | Mapping[str, PolicyName | Policy] = "mixed_float16", *,
    include: str | Iterable[str] = "*", exclude: str | Iterable[str] = (),
    filter_fn: Callable[[nn.Module, str], bool] | None = None, keep: str | Iterable[str] = (), min_size: int | None = None,
) -> Model:  # fmt: skip
    """Make every nn.Linear of `model` an MPLinear. In place; returns it.

    policy: one for all, or an ordered mapping from globs of module names, where the last match wins.
    include, exclude: a glob, or several, of linears to convert, and of those to leave; filter_fn(module, name) is asked
    about the rest. What is left is cast with the model under `float16` and `bfloat16`; what `keep` names is not: a glob, or
    several, of modules that stay as they are, dtype too. A glob that names a module means what is in it as well.
    min_size: nn.Linears whose weight has fewer elements are left. None: those too small to pay in a model on a CPU that
    torch.compile has already wrapped, and none under `float16` and `bfloat16`.
    `transformers`' Conv1D, a linear whose weight is (in, out), is converted too. An nn.Sequential itself, no subclass, in
    which a ReLU or a linear comes after a linear, becomes an MPSequential: its forward runs linear and nn.ReLU as one call,
    and its children stay what they are. Other activations run where the model has them: `MPLinear(activation=)` fuses them.
    What cannot be converted is skipped; `convert_report` has the reason. An nn.TransformerEncoderLayer with a converted
    linear computes in evaluation as it does in training, not by torch's fast path, which would not call the linear.
    Parameters stay the same objects. Under `mixed_*` their dtype and the state_dict stay too. Under `float16` and
    `bfloat16` all floating-point parameters and buffers are cast as `model.half()` does, but for linears that a glob
    gives a wider policy. Masters start from the rounded parameters: for unrounded masters use `mixed_*`. Make the
    optimizer afterwards, and then put DDP, FSDP and hooks on the model: a cast would drop what they hold on to.
    Converting again changes the policy. Adapters may be put around a linear before or afterwards.
    A policy with a `grad_dtype` other than the parameters' is for the optimizers here: torch's own and DDP refuse such
    gradients; `grad_dtype=None` is for them.
    Raises ValueError for an unknown policy, a glob that matches nothing, policies that do not go together, and eight bits of
    float64 parameters; TypeError for what is no module; RuntimeError for a cast that would drop hooks, and for a converted
    linear that an `mpk.watch` watches. Nothing has changed then.
    """
    _check_module(model)
    policies = dict(policy) if isinstance(policy, Mapping) else {"*": policy}
    if not policies:
        raise ValueError('policy must not be empty: give a name, or globs with theirs, as {"*": "mixed_float16"}')
    policies = {glob: Policy.parse(p) for glob, p in policies.items()}
    include, exclude, keep = ((globs,) if isinstance(globs, str) else tuple(globs) for globs in (include, exclude, keep))
    narrow = _narrow_dtype(policies.values())
    _check_globs([name for name, _ in linears(model)], [g for g in (*policies, *include, *exclude) if g != "*"], "linear")
    _check_globs([name for name, _ in model.named_modules()], keep, "module")
    min_sizes = _min_sizes(model, min_size, narrow)
    kept = {module for name, module in model.named_modules() if any(_matches(name, glob) for glob in keep)}
    chosen, small = {}, {}
    for name, linear in linears(model):  # before anything is changed: filter_fn may raise
        found = [p for glob, p in policies.items() if _matches(name, glob)]
        included = any(_matches(name, glob) for glob in include) and not any(_matches(name, glob) for glob in exclude)
        wanted = found and included and linear not in kept and (filter_fn is None or filter_fn(linear, name))
        if not wanted or why_not(model, name, linear) is not None:
            continue
        size, least = linear.weight.numel(), min_sizes.get(linear, 0)
        if size < least and not issubclass(_class_before(linear), MPLinear):
            small[linear] = f"too small to pay: {size} weights (min_size={least})"
        else:
            chosen[linear] = found[-1]
            _check_can_compute(name, linear, found[-1])
    stays = kept | {linear for linear, p in chosen.items() if p.param_dtype != narrow}
    stay = {id(t) for m in stays for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    if narrow is not None:
        cast_model.check_can_cast(model, narrow, stay)
    revert(model)
    if narrow is not None:
        cast_model.cast_model(model, narrow, stay)
    for linear, note in small.items():
        linear._before = _Before(type(linear), (note,))
    for linear, linears_policy in chosen.items():
        _convert_linear(linear, linears_policy)
    for module in model.modules():
        if type(module) is nn.Sequential and _may_fuse(module):
            module.__class__ = MPSequential
    for module, cls, attributes in fast_path.turned_off(model):
        module._before = _Before(type(module), attributes={name: getattr(module, name) for name in attributes})
        module.__class__ = cls
        vars(module).update(attributes)
    agree_on_backends()
    return model


def revert(model: Model) -> Model:
    """Undo `convert`: modules are again what they were. Dtypes stay as they are.

    Raises TypeError for what is no module, RuntimeError for what `fully_shard` has made another class of, and for a linear
    that an `mpk.watch` watches.
    """
    _check_module(model)
    for name, module in model.named_modules():  # before anything is changed
        if is_converted(module) and is_watched(module):
            raise RuntimeError(f"{name or 'the model'} is watched: close() its mpk.watch first")
        before = vars(module).get("_before")
        if before is not None and type(module).__name__.startswith("FSDP") and type(module) is not before.cls:
            raise RuntimeError(f"{name or 'model'} was converted, then made a {type(module).__name__}: fully_shard comes last")
    for module in model.modules():
        if type(module) is MPSequential:
            module.__class__ = nn.Sequential
        before = vars(module).pop("_before", None)
        if isinstance(before, _Linear):
            module.adopt(before.activation, before.policy)
            compute_copy.forget(module)
            if not issubclass(before.cls, MPLinear):
                for name in ("_activation", "policy", "_cached"):
                    module.__dict__.pop(name, None)
        if before is not None:
            module.__class__ = before.cls
            vars(module).update(before.attributes)
    return model


def _check_module(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Module, got {type(model).__name__}")


@dataclass(frozen=True)
class _Before:
    """What a module was before convert changed it, and what the report says of it; kept on the module."""

    cls: type
    notes: tuple[str, ...] = ()
    attributes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class _Linear(_Before):
    """The same for a linear, with what else it had."""

    activation: Activation = Activation.NONE
    policy: Policy | None = None


def _matches(name: str, glob: str) -> bool:
    """Whether `glob` is the name, or that of a module around it, to the letter or as a glob.

    In a compiled model the name counts as advise and watch say it, too: without what torch.compile puts before it.
    """
    if name.startswith("_orig_mod.") and _matches(name.removeprefix("_orig_mod."), glob):
        return True
    is_literal = name == glob or name.startswith(f"{glob}.")
    return is_literal or fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"{glob}.*")


def _check_globs(names: list[str], globs: Iterable[str], what: str) -> None:
    for glob in globs:
        if not any(_matches(name, glob) for name in names):
            raise ValueError(f"no {what} of the model matches {glob!r}: {_what_there_is(names, glob, what)}")


def _what_there_is(names: list[str], glob: str, what: str) -> str:
    """What may have been meant by a glob that matches nothing: the end of a name, or one like it."""
    if any(_matches(name, f"*.{glob}") for name in names):
        return f"did you mean '*.{glob}'? A glob is held against the whole name"
    parents = [name.rpartition(".")[0] for name in names]
    if near := difflib.get_close_matches(glob, filter(None, dict.fromkeys([*names, *parents])), 2):
        return f"did you mean {' or '.join(map(repr, near))}?"
    few = ", ".join(map(repr, names[:4])) + ", ..." * (len(names) > 4)
    return f"there are {few}" if names else f"it has no {what}"


def _min_sizes(model: nn.Module, min_size: int | None, narrow: torch.dtype | None) -> dict[nn.Module, int]:
    """How many weights a linear must have to be converted, where that is not 0."""
    if min_size is not None:
        if isinstance(min_size, bool) or not isinstance(min_size, int):
            raise TypeError(f"min_size must be an int or None, got {min_size!r}")
        if min_size < 0:
            raise ValueError(f"min_size must be 0 or more, got {min_size}")
        return dict.fromkeys(model.modules(), min_size)
    if narrow is not None:  # what is left would compute in 16 bits all the same, by torch's numerics
        return {}
    compiled = [m for m in model.modules() if "_orig_mod" in m._modules or m._compiled_call_impl is not None]
    inner = (linear for module in compiled for _, linear in linears(module))
    return {linear: MIN_SIZE_COMPILED for linear in inner if all(p.is_cpu for p in linear.parameters())}


def _narrow_dtype(policies: Iterable[Policy]) -> torch.dtype | None:
    """float16 or bfloat16 if a policy stores parameters in it; ValueError for policies that do not go together."""
    narrow = {p.param_dtype for p in policies if p.param_dtype.itemsize == 2}
    if len(narrow) > 1 or (narrow and any(p.mixed for p in policies)):
        names = ", ".join(map(str, policies))
        raise ValueError(
            f"a model is stored in one dtype: {names} do not go together; give all of it mixed_* policies, or one 16-bit "
            "policy, beside which float32 and float64 may stand"
        )
    return narrow.pop() if narrow else None


def _check_can_compute(name: str, linear: nn.Module, policy: Policy) -> None:
    if policy.float8 and linear.weight.dtype == torch.float64:
        raise ValueError(
            f"{name or 'the model'} has float64 parameters, which policy {policy} cannot quantize: call model.float() before, "
            "exclude it, or use a policy of 16 bits"
        )


def _convert_linear(linear: nn.Module, policy: Policy) -> None:
    """Change the class: the module stays the same object, with its Parameters, hooks and name."""
    if is_converted(linear):
        linear._before = _Linear(type(linear), activation=linear._activation, policy=linear.policy)
    else:
        linear._before = _Linear(type(linear))
        linear.__class__ = MPLinear if isinstance(linear, nn.Linear) else _conv1d()
    linear.adopt(linear._activation, policy)


def _class_before(linear: nn.Module) -> type:
    before = vars(linear).get("_before")
    return type(linear) if before is None else before.cls


def _may_fuse(sequential: nn.Sequential) -> bool:
    """Whether what comes after a converted linear is of those that an MPSequential knows."""
    pairs = itertools.pairwise(sequential._modules.values())  # children() has a module that stands in two places once
    after = (nn.ReLU, nn.Identity, MPLinear)
    return any(isinstance(a, MPLinear) and "_before" in vars(a) and isinstance(b, after) for a, b in pairs)


def _conv1d() -> type:
    from mpkernels.nn.convert.transformers_conv1d import MPConv1D

    return MPConv1D
