# SPDX-License-Identifier: Apache-2.0
"""What torch.utils.flop_counter counts for linear_act: the products, as for nn.Linear.

That module imports Triton, slowly, and a counter copies the registry when it is made: so the formulas are registered when
that module is imported, by what wants to count.
"""

import importlib.util
import math
import sys

import torch

from mpkernels.ops.linear_act.call import BackwardCall

_COUNTER = "torch.utils.flop_counter"


def forward(x, weight, *_, **__) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def backward(*shapes, out_shape=None, **named) -> int:
    call = BackwardCall(*shapes, **named)  # of shapes instead of tensors
    wants_x, wants_weight, _ = call.output_mask
    return 2 * math.prod(call.grad_out[:-1]) * math.prod(call.weight) * (wants_x + wants_weight)


class _AtImport:
    """The finder of that one module: has it registered once it was loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


def _register(counter) -> None:
    counter.register_flop_formula(torch.ops.mpkernels.linear_act)(forward)
    counter.register_flop_formula(torch.ops.mpkernels.linear_act_backward)(backward)


def register() -> None:
    """Now, where the counter is imported already, else when it is."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AtImport())
