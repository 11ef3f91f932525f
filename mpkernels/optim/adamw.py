# SPDX-License-Identifier: Apache-2.0
"""AdamW and Adam: one pass over memory per step."""

from typing import ClassVar

import torch

from mpkernels.ops.optimizer_update import adamw_
from mpkernels.optim import hyperparameters as hyper
from mpkernels.optim.optimizer import Optimizer, Params


class AdamW(Optimizer):
    """`torch.optim.AdamW` with masters, 16-bit copies, unscaling, the overflow check and clipping in the step.

    params: parameters, named parameters (their names then stand in errors and reports) or groups. lr: float, or a
    1-element tensor on any device. betas, eps, weight_decay, amsgrad, maximize: as torch.
    foreach, capturable, fused: kept in the groups for code that reads them there, without effect: the step always is fused and
    capturable. differentiable: False, the step has no gradient.
    master_dtype, state_dtype, max_norm, process_group, write_grads, skip_nonfinite: see Optimizer.
    `grad_norm`: 0-d fp64 on the device, unscaled, before clipping; None before the first step with `max_norm`.
    Raises ValueError for values torch refuses, and for inf and NaN too. Source: torch.optim.AdamW.
    """

    _op = adamw_
    _moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _optional: ClassVar = {"max_exp_avg_sq": "amsgrad"}
    _requirements: ClassVar = {
        **hyper.COMMON,
        "betas": hyper.BETAS,
        "eps": hyper.at_least_0("epsilon value"),
        "amsgrad": hyper.flag("amsgrad value"),
        "decoupled_weight_decay": hyper.ALWAYS_DECOUPLED,
    }

    def __init__(
        self, params: Params, lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
        amsgrad: bool = False, *, maximize: bool = False, foreach: bool | None = None, capturable: bool = False,
        differentiable: bool = False, fused: bool | None = None, decoupled_weight_decay: bool = True,
        master_dtype: torch.dtype | None = None, state_dtype: torch.dtype | None = None, max_norm: float | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None, write_grads: bool = False, skip_nonfinite: bool = False,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused, decoupled_weight_decay=decoupled_weight_decay,
        )  # fmt: skip
        super().__init__(
            params, defaults,
            master_dtype=master_dtype, state_dtype=state_dtype, max_norm=max_norm, process_group=process_group,
            write_grads=write_grads, skip_nonfinite=skip_nonfinite,
        )  # fmt: skip

    def _options(self, group):
        numbers = map(hyper.as_float, (*group["betas"], group["eps"], group["weight_decay"]))
        return *numbers, bool(group["decoupled_weight_decay"]), bool(group["maximize"])


class Adam(AdamW):
    """`torch.optim.Adam` in the same pass: weight_decay is added to the gradient and is 0 by default."""

    _requirements: ClassVar = {**AdamW._requirements, "decoupled_weight_decay": hyper.flag("decoupled_weight_decay value")}

    def __init__(
        self, params: Params, lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        amsgrad: bool = False, *, maximize: bool = False, foreach: bool | None = None, capturable: bool = False,
        differentiable: bool = False, fused: bool | None = None, decoupled_weight_decay: bool = False,
        master_dtype: torch.dtype | None = None, state_dtype: torch.dtype | None = None, max_norm: float | None = None,
        process_group: "torch.distributed.ProcessGroup | None" = None, write_grads: bool = False, skip_nonfinite: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=decoupled_weight_decay,
            master_dtype=master_dtype, state_dtype=state_dtype, max_norm=max_norm, process_group=process_group,
            write_grads=write_grads, skip_nonfinite=skip_nonfinite,
        )  # fmt: skip
