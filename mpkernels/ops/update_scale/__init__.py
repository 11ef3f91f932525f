# SPDX-License-Identifier: Apache-2.0
"""update_scale_: the loss scale grows, backs off and counts what was skipped, all on the device.

    overflow (found_inf not 0): growth_tracker = 0; hysteresis_tracker -= 1; at 0 or below:
                                grad_scale = max(grad_scale * backoff_factor, min_scale)
    else:                       growth_tracker += 1; at growth_interval: growth_tracker = 0,
                                hysteresis_tracker = hysteresis, grad_scale = min(grad_scale * growth_factor, max_scale)
    skipped = [steps skipped, skipped in a row]
    A count that has no room left in its dtype stays.

Shapes and dtypes
    | tensor             | shape | dtype |
    | grad_scale         | ()    | fp32  |
    | growth_tracker     | ()    | int32 |
    | hysteresis_tracker | ()    | int32 |
    | skipped            | (2,)  | int64 |
    | found_inf          | ()    | fp32: 0 or anything else, NaN included |

Numerics
    Multiplied in fp64 and rounded once to fp32, as torch.amp.GradScaler: with hysteresis=1 the same sequence of scales.
    NOTE: torch leaves a scale as it is where growth would make it inf, and lets it fall to 0; here max_scale and min_scale
    bound it.
Raises
    RuntimeError for shapes, dtypes and devices other than these, for tensors that share memory or overlap themselves.
    Nothing is written then.
Source: torch.amp.GradScaler (`_amp_update_scale_`); hysteresis as in Megatron-LM's DynamicGradScaler.
"""

from typing import NamedTuple

import torch

from mpkernels.ops.common.memory import check_memory
from mpkernels.ops.common.multi_tensor import IMPLEMENTATIONS, check_tensor
from mpkernels.runtime.op import Op
from mpkernels.runtime.resolve import Key


class ScaleCall(NamedTuple):
    """A call of `update_scale_`."""

    grad_scale: torch.Tensor
    growth_tracker: torch.Tensor
    hysteresis_tracker: torch.Tensor
    skipped: torch.Tensor
    found_inf: torch.Tensor
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    hysteresis: int
    min_scale: float
    max_scale: float

    @property
    def key(self) -> Key:
        return Key(self.grad_scale.device, self.grad_scale.dtype)

    @property
    def written(self) -> tuple[torch.Tensor, ...]:
        return self[:4]


def check(call: ScaleCall) -> None:
    """Raise RuntimeError for what does not fit."""
    op, device = "update_scale_", call.grad_scale.device
    check_tensor(op, "grad_scale", call.grad_scale, (), torch.float32, device)
    check_tensor(op, "growth_tracker", call.growth_tracker, (), torch.int32, device)
    check_tensor(op, "hysteresis_tracker", call.hysteresis_tracker, (), torch.int32, device)
    check_tensor(op, "skipped", call.skipped, (2,), torch.int64, device)
    check_tensor(op, "found_inf", call.found_inf, (), torch.float32, device)
    if not abs(call.hysteresis) < 2**31:
        raise RuntimeError(f"{op}: hysteresis must fit the tracker's int32, got {call.hysteresis}")
    check_memory(op, written=dict(zip(call._fields, call.written)), read={"found_inf": call.found_inf})


op = Op(
    "update_scale_(Tensor(a!) grad_scale, Tensor(b!) growth_tracker, Tensor(c!) hysteresis_tracker, Tensor(d!) skipped, "
    "Tensor found_inf, float growth_factor, float backoff_factor, int growth_interval, int hysteresis, float min_scale, "
    "float max_scale) -> ()",
    __name__,
    IMPLEMENTATIONS,
    call=ScaleCall,
    check=check,
)
