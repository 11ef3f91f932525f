# SPDX-License-Identifier: Apache-2.0
"""MPMLP: an MPSequential of MPLinears that have their activations."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from mpkernels.nn.linear import MPLinear, has_hooks
from mpkernels.nn.sequential import MPSequential
from mpkernels.ops.linear_act.epilogues import Activation, ActivationName, activation_of
from mpkernels.policy import Policy, PolicyName


class MPMLP(MPSequential):
    """MPLinears one after another, an Identity where an activation module would be: the keys are nn.Sequential's.

    sizes: features from the input's to the output's, at least two. activation: as MPLinear's, after every layer but the
    last, which has output_activation. bias, device, dtype, policy: as MPLinear.
    x: `(*, sizes[0])`; returns `(*, sizes[-1])`. Values and gradients are those of the layers one by one. Under `mixed_*` the
    activations between layers are in the compute dtype, the result as the policy says: by default in the dtype of x.
    One autograd node per layer; where kernels run it, its grad_x is already selected by the mask of the layer before, whose
    bias gradient it returns. Not where a hook could see the activation between the two: see MPSequential.
    Raises TypeError and ValueError for sizes and options as MPLinear does, ValueError for fewer than two sizes.
    """

    def __init__(
        self, sizes: Sequence[int], bias: bool = True, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None, *, activation: ActivationName | None = "relu",
        output_activation: ActivationName | None = None, policy: PolicyName | Policy | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(sizes, Sequence):
            raise TypeError(f"MPMLP: sizes must be a sequence of int, got {sizes!r}")
        if len(sizes) < 2:
            raise ValueError(f"MPMLP: sizes must be two or more, the input's first, got {sizes}")
        activation_of(activation)  # where there is a single layer, nothing else looks at it
        super().__init__()
        for i, (in_features, out_features) in enumerate(itertools.pairwise(sizes), start=2):
            name = output_activation if i == len(sizes) else activation
            self.append(MPLinear(in_features, out_features, bias, device, dtype, activation=name, policy=policy))
            if name is not None:
                self.append(nn.Identity())

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential, policy: PolicyName | Policy | None = None) -> "MPMLP":
        """An MPMLP that shares the Parameters of an nn.Sequential of nn.Linear, MPLinear, nn.ReLU and nn.Identity; same keys.

        policy: None, and MPLinears keep theirs. Raises TypeError for other modules and subclasses, for a ReLU without a linear
        before or after another activation, and for hooks.
        """
        if type(sequential) not in (nn.Sequential, MPSequential, cls) or has_hooks(sequential):
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
                raise TypeError(
                    f"MPMLP: {name} is a {type(module).__name__}, expected a linear, an Identity, or a ReLU without hooks "
                    "after a linear; MPLinear(activation=) has other activations, and mpk.convert takes any nn.Sequential"
                )
        return cls.adopt(nn.Sequential(modules).train(sequential.training))

    @classmethod
    def adopt(cls, sequential: nn.Sequential) -> "MPMLP":
        """Make an nn.Sequential of MPLinear and Identity an MPMLP, in place; returns it.

        Its hooks, name and children stay. Assign `nn.Sequential` to `__class__` to undo it.
        Raises TypeError for other modules and for a subclass of nn.Sequential.
        """
        if type(sequential) not in (nn.Sequential, MPSequential, cls):
            raise TypeError(f"MPMLP: {type(sequential).__name__} is not nn.Sequential itself, its forward may be another")
        for name, module in sequential.named_children():
            if not isinstance(module, MPLinear | nn.Identity):
                raise TypeError(
                    f"MPMLP: {name} is a {type(module).__name__}, expected MPLinear or Identity: from_sequential takes others"
                )
        sequential.__class__ = cls
        return sequential

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        part.__class__ = type(self)  # whose __init__ takes sizes
        return part
