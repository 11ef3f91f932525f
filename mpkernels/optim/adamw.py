# SPDX-License-Identifier: Apache-2.0
"""AdamW and Adam: one pass over memory per step."""

import math

from mpkernels.ops._layout import NO_TENSORS
from mpkernels.ops.adamw import adamw_
from mpkernels.optim._base import Optimizer


class AdamW(Optimizer):
    """`torch.optim.AdamW` with masters, 16-bit copies, unscaling, the overflow check and clipping in the step.

    params: parameters, named parameters (their names then stand in errors and reports) or groups. lr: float, or a
    1-element tensor on any device. betas, eps, weight_decay, amsgrad, maximize: as torch.
    master_dtype, state_dtype, max_norm, process_group, write_grads, skip_nonfinite: see Optimizer.
    `grad_norm`: 0-d fp64 on the device, unscaled, before clipping; None before the first step with `max_norm`.
    Raises ValueError for values torch refuses, and for inf and NaN too. Source: torch.optim.AdamW.
    """

    _decoupled = True
    _optional_states = ("max_exp_avg_sq",)
    _op = adamw_

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False,
        master_dtype=None, state_dtype=None, max_norm=None, process_group=None, write_grads=False,
        skip_nonfinite=False,
    ):  # fmt: skip
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        super().__init__(
            params, defaults,
            master_dtype=master_dtype, state_dtype=state_dtype, max_norm=max_norm, process_group=process_group,
            write_grads=write_grads, skip_nonfinite=skip_nonfinite,
        )  # fmt: skip

    def _check_hyperparameters(self, group):
        super()._check_hyperparameters(group)
        if not 0 <= group["eps"] < math.inf:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']}")
        for index, beta in enumerate(group["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if group.get("decoupled_weight_decay", self._decoupled) != self._decoupled:  # in a state_dict of torch's
            raise ValueError(f"decoupled_weight_decay is {not self._decoupled}: {type(self).__name__} has the other")

    def _group_state_names(self, group):
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def _arguments(self, group, rows, grads):
        states = rows.states
        return (
            rows.masters, grads, states["exp_avg"], states["exp_avg_sq"], states.get("max_exp_avg_sq", NO_TENSORS), rows.copies,
            rows.steps, rows.lr(group["lr"]), *group["betas"], group["eps"], group["weight_decay"],
            self._decoupled, group["maximize"],
        )  # fmt: skip


class Adam(AdamW):
    """`torch.optim.Adam` in the same pass: weight_decay is added to the gradient and is 0 by default."""

    _decoupled = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, **options):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
