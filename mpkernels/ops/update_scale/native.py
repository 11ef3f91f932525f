# SPDX-License-Identifier: Apache-2.0
"""update_scale_ in C++: scale * backoff at an overflow, * growth after growth_interval good steps."""

from mpkernels.ops.update_scale import ScaleCall
from mpkernels.runtime import native


def update_scale_(call: ScaleCall) -> None:
    native.ops.update_scale_(*call)
