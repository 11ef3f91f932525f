# SPDX-License-Identifier: Apache-2.0
"""MPConv1D: what convert makes of transformers' Conv1D, a linear whose weight is (in, out).

Imported only where a model has one. It is no nn.Linear: code that asks for one relies on a weight of (out, in).
"""

import torch
from transformers.pytorch_utils import Conv1D

from mpkernels import functional
from mpkernels.nn.linear import MPLinear


class MPConv1D(Conv1D):
    """`x @ weight + bias` by the op of MPLinear, which reads the weight transposed, in place. See MPLinear."""

    _activation = MPLinear._activation
    _cached = None
    policy = None

    adopt = MPLinear.adopt
    activation = MPLinear.activation
    _weight_copy = MPLinear._weight_copy
    _apply = MPLinear._apply
    _load_from_state_dict = MPLinear._load_from_state_dict
    _adopt_new_parameters = MPLinear._adopt_new_parameters
    __prepare_scriptable__ = MPLinear.__prepare_scriptable__

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight  # once, as MPLinear
        copy = self._weight_copy(weight)
        copy = None if copy is None else copy.t()
        return functional.forward(x, weight.t(), self.bias, copy, self._activation, self.policy)

    __getstate__ = MPLinear.__getstate__

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.adopt(self._activation, self.policy)  # copying and pickling drop Tensor.grad_dtype
