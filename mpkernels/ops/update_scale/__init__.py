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

import torch

from mpkernels.ops.common.memory import check_memory
from mpkernels.ops.common.multi_tensor import check_tensor
from mpkernels.runtime.op import Implementation, Op


def _check(
    grad_scale, growth_tracker, hysteresis_tracker, skipped, found_inf, growth_factor, backoff_factor, growth_interval,
    hysteresis, min_scale, max_scale,
) -> None:  # fmt: skip
    op, device = "update_scale_", grad_scale.device
    check_tensor(op, "grad_scale", grad_scale, (), torch.float32, device)
    check_tensor(op, "growth_tracker", growth_tracker, (), torch.int32, device)
    check_tensor(op, "hysteresis_tracker", hysteresis_tracker, (), torch.int32, device)
    check_tensor(op, "skipped", skipped, (2,), torch.int64, device)
    check_tensor(op, "found_inf", found_inf, (), torch.float32, device)
    if not abs(hysteresis) < 2**31:
        raise RuntimeError(f"{op}: hysteresis must fit the tracker's int32, got {hysteresis}")
    written = {
        "grad_scale": grad_scale, "growth_tracker": growth_tracker, "hysteresis_tracker": hysteresis_tracker,
        "skipped": skipped,
    }  # fmt: skip
    check_memory(op, written=written, read={"found_inf": found_inf})


op = Op(
    "update_scale_(Tensor(a!) grad_scale, Tensor(b!) growth_tracker, Tensor(c!) hysteresis_tracker, Tensor(d!) skipped, "
    "Tensor found_inf, float growth_factor, float backoff_factor, int growth_interval, int hysteresis, float min_scale, "
    "float max_scale) -> ()",
    __name__,
    (
        Implementation("native", ("cpu", "cuda"), module="impl_native"),
        Implementation("eager", ("cpu", "cuda"), module="impl_eager"),
        Implementation("triton", ("cuda", "cpu"), module="impl_triton"),
    ),
    check=_check,
    fake=lambda *_, **__: None,
    key=lambda grad_scale, *_, **__: (grad_scale.device, grad_scale.dtype),
    mutated=lambda grad_scale, growth_tracker, hysteresis_tracker, skipped, *_, **__: (
        [grad_scale, growth_tracker, hysteresis_tracker, skipped]
    ),
)

update_scale_ = op
