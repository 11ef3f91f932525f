# SPDX-License-Identifier: Apache-2.0
"""How long a linear takes in a step under a policy: what mpk.tune has measured on this machine, and nothing else."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mpkernels.ops.linear_act import Activation
from mpkernels.policy import Policy
from mpkernels.runtime import tuned_table


def seconds(
    entries: Mapping[str, Any], policy: Policy, rows: Iterable[int], weight: torch.Tensor, x_dtype: torch.dtype,
    activation: Activation,
) -> float | None:  # fmt: skip
    """Of forward and all gradients of calls with so many rows each, by the entries of a tuned table; None where one is missing.

    A table has rows rounded up to a power of 2. The weight is read from the copy in the compute dtype where it has that.
    """
    if policy.saved_dtype is not None:
        return None  # a table has the products, without what encodes x and decodes it
    compute, problem = policy.compute_dtype, (*weight.shape, int(activation))
    stored, x = (d if policy.param_dtype.itemsize > 2 else policy.param_dtype for d in (weight.dtype, x_dtype))
    written = {
        "fprop": (policy.output_dtype or (x if policy.mixed else stored),),
        "backward": (x, policy.grad_dtype or stored),
    }
    total = 0.0
    for M in rows:
        for role, dtypes in written.items():
            keys = (tuned_table.gemm_key(role, M, *problem, compute, read, *dtypes) for read in (compute, stored))
            found = [entries[name] for key in keys if (name := tuned_table.key_to_str(key)) in entries]
            if not found or "us" not in found[0]:
                return None
            total += found[0]["us"] / 1e6
    return total
