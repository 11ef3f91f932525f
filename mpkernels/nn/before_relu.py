# SPDX-License-Identifier: Apache-2.0
"""What convert makes of a linear whose output goes into torch.relu alone: it applies the ReLU, the call costs nothing.

The user's forward stays as it is, and calls torch.relu on what the linear returns. That is a plain tensor but for its class,
by which the call is recognised: the tensor gets its own class back and is returned.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mpkernels import functional
from mpkernels.nn.linear import MPLinear, has_hooks
from mpkernels.nn.mlp import hooks_on_all_modules
from mpkernels.ops.linear_act import Activation

_RELUS = {torch.relu, torch.relu_, nn.functional.relu, torch.Tensor.relu, torch.Tensor.relu_}


class Activated(torch.Tensor):
    """An output that has its ReLU, until a function is called on it: that one, and all after it, see a plain tensor."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _RELUS and args:
            args[0].__class__ = torch.Tensor
            return args[0]
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, cls):
                tensor.__class__ = torch.Tensor
        return func(*args, **(kwargs or {}))


class MPLinearBeforeReLU(MPLinear):
    """An MPLinear that applies the ReLU called next, in eager mode and where nobody looks at what is between.

    NOTE: not under torch.compile: where a graph breaks between the two, AOTAutograd refuses the class.
    """

    activation = "relu"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        plain = type(input) is torch.Tensor and type(self.weight) in (nn.Parameter, torch.Tensor)
        if not plain or torch.compiler.is_compiling() or has_hooks(self) or hooks_on_all_modules():
            return super().forward(input)
        out = functional.forward(input, self.weight, self.bias, self._weight_copy(), Activation.RELU, self.policy)
        out.__class__ = Activated
        return out
