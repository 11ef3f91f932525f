# SPDX-License-Identifier: Apache-2.0
"""grad_stats_: read all gradients once and say whether the step can be taken, which tensor is bad, how long they are.

    amax[i] = max |grads[i]| over what is finite, else 0       nonfinite[i] = count of inf, -inf and NaN in grads[i]
    found_inf = 1 if any nonfinite[i], or amax[i] / grad_scale is not finite, or grad_scale is not positive and finite
    grad_norm = sqrt(sum of squares of all gradients) / grad_scale

    By `eager` on a GPU a gradient that is not finite has amax[i] = NaN and nonfinite[i] = -1: it is not counted, which would
    be a second pass; `multi_tensor.count_nonfinite` does it where it is asked for.

Shapes and dtypes
    | tensor     | shape        | dtype                                                     |
    | grads      | any, a list  | fp16, bf16, fp32, fp64; any layout; read, never written   |
    | grad_scale | ()           | fp32, on the device; the gradients are divided by it      |
    | found_inf  | ()           | fp32: 0. or 1., overwritten                               |
    | amax       | (len(grads),)| fp64, of the scaled gradients                             |
    | nonfinite  | (len(grads),)| int64                                                     |
    | grad_norm  | () or None   | fp64, unscaled, before clipping                           |

Numerics
    1 / grad_scale is taken in fp64; a gradient is unscaled in fp32 (fp64 for fp64), and must be finite there too. The norm
    is an fp64 sum in a fixed order: the same bits every time; of fp64 gradients whose squares over- or underflow, of these
    times a power of 2.
Raises
    RuntimeError for an empty list, a tensor that is not dense, and shapes, dtypes or devices other than these, an
    output that shares memory with another tensor or overlaps itself. Nothing is written then.
Source: torch.amp.GradScaler (`_amp_foreach_non_finite_check_and_unscale_`), which rewrites the gradients.
"""

from typing import NamedTuple

import torch

from mpkernels.ops.common.memory import check_memory
from mpkernels.ops.common.multi_tensor import IMPLEMENTATIONS, check_list, check_tensor
from mpkernels.runtime.op import Op
from mpkernels.runtime.resolve import Key


class StatsCall(NamedTuple):
    """A call of `grad_stats_`."""

    grads: list[torch.Tensor]
    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor
    amax: torch.Tensor
    nonfinite: torch.Tensor
    grad_norm: torch.Tensor | None = None

    @property
    def key(self) -> Key:
        return Key(self.grads[0].device, self.grads[0].dtype)

    @property
    def written(self) -> list[torch.Tensor]:
        return [self.found_inf, self.amax, self.nonfinite, *(() if self.grad_norm is None else (self.grad_norm,))]


def check(call: StatsCall) -> None:
    """Raise RuntimeError for what does not fit."""
    op, grads = "grad_stats_", call.grads
    if not grads:
        raise RuntimeError(f"{op}: grads is empty")
    device = grads[0].device
    check_list(op, "grads", grads)
    check_tensor(op, "grad_scale", call.grad_scale, (), torch.float32, device)
    check_tensor(op, "found_inf", call.found_inf, (), torch.float32, device)
    check_tensor(op, "amax", call.amax, (len(grads),), torch.float64, device)
    check_tensor(op, "nonfinite", call.nonfinite, (len(grads),), torch.int64, device)
    check_tensor(op, "grad_norm", call.grad_norm, (), torch.float64, device)
    written = {name: getattr(call, name) for name in ("found_inf", "amax", "nonfinite", "grad_norm")}
    check_memory(op, written=written, read={"grads": grads, "grad_scale": call.grad_scale})


op = Op(
    "grad_stats_(Tensor[] grads, Tensor? grad_scale, Tensor(a!) found_inf, Tensor(b!) amax, Tensor(c!) nonfinite, "
    "Tensor(d!)? grad_norm=None) -> ()",
    __name__,
    IMPLEMENTATIONS,
    call=StatsCall,
    check=check,
)
