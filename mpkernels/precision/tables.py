# SPDX-License-Identifier: Apache-2.0
"""Tables, numbers and names as text, for a terminal."""

from collections.abc import Sequence

from torch import nn


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns under their heads; the first `left` of them aligned to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    aligned = ((c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in (head, *rows))
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def size_text(size: float) -> str:
    """`size` bytes in the largest unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def flops_text(flops: float) -> str:
    """So many operations in the largest unit that leaves a number of 1 or more."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if flops < 1000:
            return f"{flops:.3g} {unit}"
        flops /= 1000
    return f"{flops:.1f} TFLOP"


def shown(name: str) -> str:
    """The name of a module; that of the model itself is empty."""
    return name or "the model"


def described(name: str, module: nn.Module) -> str:
    return f"{shown(name)} ({type(module).__name__})"
