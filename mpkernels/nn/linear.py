# SPDX-License-Identifier: Apache-2.0
"""MPLinear: nn.Linear with a policy and an activation, computed by one op."""

import contextlib
from collections.abc import Iterator
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import nn

from mpkernels import functional
from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act.call import FusedBackwardLink
from mpkernels.ops.linear_act.epilogues import Activation, ActivationName, activation_of, name_of
from mpkernels.policy import Policy, PolicyName, get_default_policy
from mpkernels.runtime import compute_copy

Model = TypeVar("Model", bound=nn.Module)


class MPLinear(nn.Linear):
    """`act(x @ weight.T + bias)` with parameters, arithmetic and output in the dtypes of a policy.

    in_features, out_features, bias, device, dtype: as `nn.Linear`; dtype None means the policy's param_dtype.
    activation: None, "relu", "relu2", "gelu", "gelu_tanh" or "silu"; the op's module says what each keeps for backward.
    policy: a Policy, its name, or None: `mpk.set_default_policy`'s, else as `nn.Linear`.
    The state_dict has the keys `weight` and `bias` and nothing else.
    Raises TypeError and ValueError for sizes that are not natural numbers, ValueError for an unknown activation or policy.
    """

    # What a module that was an nn.Linear becomes without running __init__ (mpk.convert).
    _activation: Activation = Activation.NONE
    _cached: compute_copy.ComputeCopy | None = None  # inside cached_weights
    _observer: Any = None  # of mpk.watch: no hook, which would keep a sequence from running its layers as one call
    policy: Policy | None = None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None, *, activation: ActivationName | None = None,
        policy: PolicyName | Policy | None = None,
    ) -> None:  # fmt: skip
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, Integral):  # numpy's integers, too, as nn.Linear takes them
                raise TypeError(f"MPLinear: {name} must be an int, got {size!r}")
            if size < 0:
                raise ValueError(f"MPLinear: {name} must not be negative, got {size}")
        policy = get_default_policy() if policy is None else Policy.parse(policy)
        activation = activation_of(activation)
        if dtype is None and policy is not None:
            dtype = policy.param_dtype
        super().__init__(in_features, out_features, bias, device, dtype)
        self.adopt(activation, policy)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, activation: ActivationName | None = None, policy: PolicyName | Policy | None = None
    ) -> "MPLinear":
        """An MPLinear that shares the Parameters of `linear`; None: the activation and the policy of an MPLinear stay.

        Raises TypeError for what is neither an nn.Linear nor an MPLinear itself, for hooks and for a forward of its own.
        """
        if isinstance(linear, nn.LazyLinear) and linear.has_uninitialized_params():
            raise TypeError("MPLinear: a LazyLinear has no weight yet: call it, or its model, once before")
        if type(linear) not in (nn.Linear, MPLinear) or "forward" in vars(linear) or has_hooks(linear):
            raise TypeError(f"MPLinear: expected an nn.Linear or MPLinear without hooks or a forward of its own, got {linear}")
        activation = getattr(linear, "activation", None) if activation is None else activation
        policy = getattr(linear, "policy", None) if policy is None else policy
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, activation=activation, policy=policy)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer.adopt(layer._activation, layer.policy)
        return layer

    def adopt(self, activation: Activation, policy: Policy | None) -> None:
        """Set activation and policy, and tell the Parameters which dtype their gradients have."""
        before = _grad_dtype(self.policy)
        self._activation, self.policy = activation, policy
        wanted = _grad_dtype(policy)
        if wanted is None and before is None:
            return  # Tensor.grad_dtype may be the user's
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.grad_dtype != (wanted or parameter.dtype):
                parameter.grad = None  # torch refuses a gradient that has another dtype already
                parameter.grad_dtype = wanted or parameter.dtype

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_cached", "_observer")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.adopt(self._activation, self.policy)  # copying and pickling drop Tensor.grad_dtype

    def _apply(self, fn, recurse=True):
        nn.Module._apply(self, fn, recurse)
        self._adopt_new_parameters()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)
        self._adopt_new_parameters()

    def _adopt_new_parameters(self) -> None:
        """torch makes new Parameters from and to meta, for `assign=True` and for its other ways to convert a module."""
        if all(type(p) is nn.Parameter for p in self._parameters.values() if p is not None) and len(self._parameters) == 2:
            self.adopt(self._activation, self.policy)

    @property
    def activation(self) -> ActivationName | None:
        """Its name, or None."""
        return name_of(self._activation)

    def forward(
        self, input: torch.Tensor, prev: FusedBackwardLink | None = None, next: FusedBackwardLink | None = None,
        activation: Activation | None = None, out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The layer's output; `input` as nn.Linear calls it. The others are MPSequential's: None means the layer's own."""
        if not isinstance(input, torch.Tensor):  # torch.fx traces all arguments, of which a graph of this layer alone has one
            return functional.forward(input, self.weight, self.bias, None, self._activation, self.policy)
        observer, parameters = self._observer, self._parameters
        if observer is not None:
            input = observer.enter(self, input)
        # Each once: a parametrization makes it anew at each look, and some count the looks. nn.Module.__getattr__ is in Python.
        weight, bias = parameters.get("weight"), parameters.get("bias")
        weight, bias = self.weight if weight is None else weight, self.bias if bias is None else bias
        copy, activation = self._weight_copy(weight), self._activation if activation is None else activation
        out = functional.forward(input, weight, bias, copy, activation, self.policy, prev, next, out_dtype)
        if observer is not None:
            observer.leave(self, out)
        return out

    def _weight_copy(self, weight: torch.Tensor) -> torch.Tensor | None:
        """`weight`, the layer's, in the compute dtype where one is kept. Only eager training reads the optimizer's.

        None is kept in eight bits: there are two of those, whose scales are known when all of the weight was read.
        """
        cached, policy = self._cached, self.policy
        if policy is None or (cached is None and not (self.training and torch.is_grad_enabled())):
            return None
        if policy.float8 or torch.compiler.is_compiling() or not isinstance(weight, torch.Tensor):
            return None  # no Tensor: what torch.fx traces by
        if torch._C._get_tracing_state() is not None or weight.dtype == policy.compute_dtype:
            return None  # torch.jit.trace would keep it as a constant
        if cached is not None:
            if cached.weight is not weight or not cached.is_fresh():
                self._cached = cached = _cast(weight, policy.compute_dtype)
            return cached.tensor
        copy = compute_copy.for_layer(self, weight, policy.compute_dtype)
        if copy is None:
            return None
        if not copy.is_fresh():
            copy.write(cast(weight.detach(), copy.tensor.dtype))
        return copy.tensor

    def __prepare_scriptable__(self):
        raise RuntimeError("torch.jit.script cannot read MPLinear: mpk.revert(model) first, or use torch.jit.trace")

    def extra_repr(self) -> str:
        if torch.compiler.is_compiling():
            return super().extra_repr()  # torch.func asks for it as a name, and dynamo cannot follow a Policy's
        return f"{super().extra_repr()}, activation={self.activation}, policy={self.policy}"


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook sees what goes into `module` or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_converted(module: nn.Module) -> bool:
    """Whether it is an MPLinear or an MPConv1D, which is imported only where a model has one."""
    return hasattr(module, "_weight_copy")


def is_watched(module: nn.Module) -> bool:
    """Whether an mpk.watch looks at it: as its observer, or by a hook where the class has a forward of its own."""
    hooks = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return any(getattr(tap, "is_watching", False) for tap in (module.__dict__.get("_observer"), *hooks))


def _grad_dtype(policy: Policy | None) -> torch.dtype | None:
    return None if policy is None else policy.grad_dtype


def _cast(weight: torch.Tensor, dtype: torch.dtype) -> compute_copy.ComputeCopy:
    return compute_copy.ComputeCopy(weight, cast(weight.detach(), dtype), compute_copy.stamp(weight))


@contextlib.contextmanager
def cached_weights(model: Model) -> Iterator[Model]:
    """Inside, every MPLinear (and Conv1D) of `model` casts its weight once, not at each call: for evaluation and sampling.

    A write that torch can see (load_state_dict, no_grad in-place) makes the cast anew; a write through `.data` does not.
    Of weights made under `torch.inference_mode()` it sees none: they are cast at each call. Under `mixed_float8` weights are
    quantized at each call here, too.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")
    layers = [m for m in model.modules() if is_converted(m) and m.policy is not None and not m.policy.float8]
    try:
        for layer in layers:
            weight = layer._parameters.get("weight")  # None: it is made anew at each look
            if weight is not None and weight.dtype != layer.policy.compute_dtype and not weight.is_inference():
                layer._cached = _cast(weight, layer.policy.compute_dtype)
        yield model
    finally:
        for layer in layers:
            layer._cached = None
