# SPDX-License-Identifier: Apache-2.0
"""The update of every rule in C++, one pass over all tensors: csrc/optimizer_update."""

from mpkernels.ops.common.layout import SameLayout, described
from mpkernels.runtime import native


def update(call) -> None:
    layout = SameLayout(*call[: call.num_lists])
    op = getattr(native.ops, call.rule.name)
    if op(*layout.tables, described(call.steps).table, call.masters[0], *call[call.num_lists + 1 :]):
        layout.write_back()  # always on a GPU, which does not tell; a skipped step has left the copies as they were
