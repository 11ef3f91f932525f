# SPDX-License-Identifier: Apache-2.0
"""MPMLP: an nn.Sequential of MPLinears in which the backward of each layer does the streaming pass of the one below."""

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules import module as _module

from mpkernels.nn.linear import MPLinear, has_hooks
from mpkernels.ops.linear_act import Activation, Seam, activation_of


class MPMLP(nn.Sequential):
    """MPLinears one after another, an Identity where an activation module would be: the keys are nn.Sequential's.

    sizes: features from the input's to the output's, at least two. activation: as MPLinear's, after every layer but the
    last, which has output_activation. bias, device, dtype, policy: as MPLinear.
    x: (*, sizes[0]); returns (*, sizes[-1]). Values and gradients are those of the layers one by one. Under `mixed_*` the
    activations between layers are in the compute dtype, the result in the policy's output_dtype, else the parameters'.
    One autograd node per layer; where kernels run it, its grad_x is already selected by the mask of the layer below, whose
    bias gradient it returns. Not where somebody could see the activation between the two: hooks (but FSDP2's) on either
    layer, on what is between them, or on all modules. Those two layers then run as they do alone.
    Raises TypeError and ValueError for sizes and options as MPLinear does, ValueError for fewer than two sizes.
    """

    def __init__(
        self, sizes: Sequence[int], bias: bool = True, device=None, dtype=None, *, activation="relu", output_activation=None,
        policy=None,
    ):  # fmt: skip
        if not isinstance(sizes, Sequence):
            raise TypeError(f"MPMLP: sizes must be a sequence of int, got {sizes!r}")
        if len(sizes) < 2:
            raise ValueError(f"MPMLP: sizes must be two or more, the input's first, got {sizes}")
        activation_of(activation)  # where there is a single layer, nobody else looks at it
        super().__init__()
        for i, (in_features, out_features) in enumerate(itertools.pairwise(sizes), start=2):
            name = output_activation if i == len(sizes) else activation
            self.append(MPLinear(in_features, out_features, bias, device, dtype, activation=name, policy=policy))
            if name is not None:
                self.append(nn.Identity())
        self._narrow_inner_outputs()

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential, policy=None) -> "MPMLP":
        """An MPMLP that shares the Parameters of an nn.Sequential of nn.Linear, MPLinear, nn.ReLU and nn.Identity; same keys.

        policy: None, and MPLinears keep theirs. Raises TypeError for other modules and subclasses, for a ReLU without a linear
        before or after another activation, and for hooks.
        """
        if type(sequential) not in (nn.Sequential, cls) or has_hooks(sequential):
            raise TypeError(f"MPMLP: expected an nn.Sequential itself, without hooks, got {type(sequential).__name__}")
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        last = None
        for name, module in sequential._modules.items():  # named_children has a module that stands in two places once
            if type(module) is nn.ReLU and last is not None and last.activation in (None, "relu") and not has_hooks(module):
                last.adopt(Activation.RELU, last.policy)
                modules[name] = nn.Identity()
            elif isinstance(module, nn.Identity):
                modules[name] = module
            elif isinstance(module, nn.Linear):
                last = modules[name] = MPLinear.from_linear(module, policy=policy)
            else:
                raise TypeError(f"MPMLP: {name} is a {type(module).__name__}")
        return cls.adopt(nn.Sequential(modules).train(sequential.training))

    @classmethod
    def adopt(cls, sequential: nn.Sequential) -> "MPMLP":
        """Make an nn.Sequential of MPLinear and Identity an MPMLP, in place; returns it.

        Its hooks, name and children stay. Assign `nn.Sequential` to `__class__` to undo it.
        Raises TypeError for other modules and for a subclass of nn.Sequential.
        """
        if type(sequential) not in (nn.Sequential, cls):
            raise TypeError(f"MPMLP: {type(sequential).__name__} is not nn.Sequential itself, its forward may be another")
        for name, module in sequential.named_children():
            if not isinstance(module, MPLinear | nn.Identity):
                raise TypeError(f"MPMLP: {name} is a {type(module).__name__}, expected MPLinear or Identity")
        sequential.__class__ = cls
        sequential._narrow_inner_outputs()
        return sequential

    def __getitem__(self, index):
        if isinstance(index, slice):
            return type(self).adopt(nn.Sequential(OrderedDict(list(self._modules.items())[index])))
        return super().__getitem__(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules, below = list(self), None
        for i, module in enumerate(modules):
            if not isinstance(module, MPLinear):
                x = module(x)
                continue
            above = Seam() if torch.is_grad_enabled() and _read_by_the_next_alone(modules, i) else None
            x = module(x) if below is above is None else module(x, below, above)
            below = above
        return x

    def _narrow_inner_outputs(self) -> None:
        """Between layers of one compute dtype nobody needs the wide output; what leaves the last stays wide."""
        layers = [module for module in self if isinstance(module, MPLinear)]
        for layer, above in itertools.zip_longest(layers, layers[1:]):
            policy = layer.policy
            if policy is None or not policy.mixed or policy.output_dtype is not None:
                continue
            inner = above is not None and above.policy is not None and above.policy.compute_dtype == policy.compute_dtype
            output_dtype = policy.compute_dtype if inner else policy.param_dtype
            layer.adopt(layer._activation, dataclasses.replace(policy, output_dtype=output_dtype))


def _read_by_the_next_alone(modules: list[nn.Module], i: int) -> bool:
    """Whether nothing but the next layer sees what the layer modules[i] returns, and its backward can do this one's part."""
    for j in range(i + 1, len(modules)):
        if isinstance(modules[j], MPLinear):
            ours, theirs = ((p.compute_dtype, p.grad_dtype) if (p := m.policy) else None for m in (modules[i], modules[j]))
            return ours == theirs and not hooks_on_all_modules() and not any(map(_seen, modules[i : j + 1]))
        if type(modules[j]).forward is not nn.Identity.forward:
            break
    return False


def _seen(module: nn.Module) -> bool:
    """Whether somebody sees, or may change, what goes into `module` or comes out of it. FSDP2's hooks only gather."""
    forward = nn.Identity.forward if isinstance(module, nn.Identity) else MPLinear.forward
    hooks = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    )  # fmt: skip
    return (
        any(not hook.__module__.startswith("torch.distributed.fsdp.") for found in hooks for hook in found.values())
        or type(module).forward is not forward
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
    )


def hooks_on_all_modules() -> bool:
    return bool(
        _module._global_forward_pre_hooks or _module._global_forward_hooks
        or _module._global_backward_pre_hooks or _module._global_backward_hooks
    )  # fmt: skip
