# SPDX-License-Identifier: Apache-2.0
"""Lion: one pass over memory per step, and one moment."""

from typing import ClassVar

import torch

from mpkernels.ops.optimizer_update import lion_
from mpkernels.optim import hyperparameters as hyper
from mpkernels.optim.optimizer import Optimizer, Params


class Lion(Optimizer):
    """Lion with masters, 16-bit copies, unscaling, the overflow check and clipping in the step.

    params, lr: as AdamW here. betas, weight_decay: as in lion-pytorch; the decay is decoupled. maximize: as torch.
    foreach, capturable, differentiable, fused: as AdamW here.
    master_dtype, state_dtype, max_norm, process_group, write_grads, skip_nonfinite: see Optimizer.
    Raises ValueError for betas outside of [0, 1), and for negative, inf and NaN values of the others. Source: Chen et al.,
    "Symbolic Discovery of Optimization Algorithms".
    """

    _op = lion_
    _moments = ("exp_avg",)
    _requirements: ClassVar = {**hyper.COMMON, "betas": hyper.BETAS}

    def __init__(
        self, params: Params, lr: float | torch.Tensor = 1e-4,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.99), weight_decay: float = 0.0, *,
        maximize: bool = False, foreach: bool | None = None, capturable: bool = False, differentiable: bool = False,
        fused: bool | None = None, master_dtype: torch.dtype | None = None, state_dtype: torch.dtype | None = None,
        max_norm: float | None = None, process_group: "torch.distributed.ProcessGroup | None" = None,
        write_grads: bool = False, skip_nonfinite: bool = False,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(
            params, defaults,
            master_dtype=master_dtype, state_dtype=state_dtype, max_norm=max_norm, process_group=process_group,
            write_grads=write_grads, skip_nonfinite=skip_nonfinite,
        )  # fmt: skip

    def _options(self, group):
        return *map(hyper.as_float, (*group["betas"], group["weight_decay"])), bool(group["maximize"])
