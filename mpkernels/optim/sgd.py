# SPDX-License-Identifier: Apache-2.0
"""SGD: one pass over memory per step."""

from typing import ClassVar

import torch

from mpkernels.ops.optimizer_update import sgd_
from mpkernels.optim import hyperparameters as hyper
from mpkernels.optim.optimizer import Optimizer, Params


class SGD(Optimizer):
    """`torch.optim.SGD` with masters, 16-bit copies, unscaling, the overflow check and clipping in the step.

    params, lr: as AdamW here. momentum, dampening, weight_decay, nesterov, maximize: as torch.
    foreach, differentiable, fused: as AdamW here.
    master_dtype, state_dtype, max_norm, process_group, write_grads, skip_nonfinite: see Optimizer.
    Raises ValueError for values torch refuses, and for inf and NaN too. Source: torch.optim.SGD.
    """

    # NOTE: torch's SGD saves no step count; a buffer that it saved is past its first step.
    _default_step = 1
    _op = sgd_
    _moments = ("momentum_buffer",)
    _optional: ClassVar = {"momentum_buffer": "momentum"}
    _requirements: ClassVar = {
        **hyper.COMMON,
        "momentum": hyper.at_least_0("momentum value"),
        "dampening": hyper.finite("dampening value"),
        "nesterov": hyper.flag("nesterov value"),
    }

    def __init__(
        self, params: Params, lr: float | torch.Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False, foreach: bool | None = None,
        differentiable: bool = False, fused: bool | None = None,
        master_dtype: torch.dtype | None = None, state_dtype: torch.dtype | None = None, max_norm: float | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None, write_grads: bool = False, skip_nonfinite: bool = False,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
            foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(
            params, defaults,
            master_dtype=master_dtype, state_dtype=state_dtype, max_norm=max_norm, process_group=process_group,
            write_grads=write_grads, skip_nonfinite=skip_nonfinite,
        )  # fmt: skip

    def _check_hyperparameters(self, group):
        super()._check_hyperparameters(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _init_state(self, group, parameter, name):
        state = self.state.get(parameter, {})
        is_late = group["momentum"] and "step" in state and "momentum_buffer" not in state
        super()._init_state(group, parameter, name)
        if is_late:
            state["step"].zero_()  # a buffer that comes late begins with the gradient too

    def _options(self, group):
        numbers = map(hyper.as_float, (group["momentum"], group["dampening"], group["weight_decay"]))
        return *numbers, bool(group["nesterov"]), bool(group["maximize"])
