# SPDX-License-Identifier: Apache-2.0
"""The report of which gradients of a skipped step were not finite."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch

from mpkernels.ops.common.multi_tensor import count_nonfinite
from mpkernels.optim.distributed import local
from mpkernels.optim.grad_reading import LastRead
from mpkernels.optim.optimizer import Optimizer

MOST = 0.75  # of all gradients: that many are not finite where the forward made inf or NaN

HOW_TO_SEARCH = (
    "check that the inputs and the loss are finite; mpkernels.find_nonfinite(model, step) names the first module that is not"
)


def report(optimizer: torch.optim.Optimizer, first_layer: Callable[[], str | None] | None = None) -> str:
    """See `GradScaler.overflow_report`. first_layer: where a watch says that it began, None where all it saw is finite."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"overflow_report needs an optimizer of mpkernels.optim, which counts what it reads, got {_full_name(optimizer)}: "
            + _instead(optimizer)
        )
    read = optimizer._last_read()
    if not any(stats.found_inf.item() for stats in read.stats):
        return ""
    grad_scale = read.stats[0].grad_scale
    scale = "none" if grad_scale is None else f"{grad_scale.item():.9g}"
    head = f"step {read.steps_called} skipped at scale {scale}: "
    named = None if first_layer is None else first_layer()
    lines = _lines(read, is_found=named is not None)
    if first_layer is not None:
        lines = [named or "out and grad_x of every linear are finite", *lines]
    return "\n".join(head + line for line in lines)


def _full_name(optimizer) -> str:
    kind = type(optimizer)
    public = getattr(torch.optim, kind.__name__, None) is kind
    return f"{'torch.optim' if public else kind.__module__}.{kind.__qualname__}"


def _instead(optimizer) -> str:
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        return "pass the one inside it, its .optimizer"
    name = type(optimizer).__name__
    return f"train with mpkernels.optim.{name if name in ('AdamW', 'Adam', 'Lion', 'SGD') else 'AdamW'}"


@dataclass(frozen=True)
class _Gradient:
    """What was read of one: how many of its elements are inf or NaN, and amax of the others. -1: not counted, and gone."""

    name: str
    place: int  # among the optimizer's parameters; -1 of one that was replaced
    is_weight: bool
    size: int
    nonfinite: int
    amax: float

    @property
    def is_whole(self) -> bool:
        return self.nonfinite == self.size

    def __str__(self) -> str:
        if self.nonfinite < 0:
            return f"{self.name} has non-finite of {self.size}, not counted: the gradient was replaced before this report"
        others = "no finite element" if self.is_whole else f"amax {self.amax:g} of the finite ones"
        return f"{self.name} has {self.nonfinite} non-finite of {self.size}, {others}"


def _lines(read: LastRead, is_found: bool) -> list[str]:
    """One line where it began in the forward, else a line for each gradient that is not finite, in order of backward.

    What forward makes inf or NaN reaches the last layer's gradient, and from there most others: a ReLU may stop it. Under a
    loss that is linear in the output it reaches the weights alone, through the inputs of their layers. is_found: it is known
    where it began.
    """
    gradients = _gradients(read)
    bad = [gradient for gradient in gradients if gradient.nonfinite]
    if not bad and read.on_many_ranks:
        return ["every gradient of this rank is finite: another rank's is not, or it is not once it is unscaled"]
    if not bad:
        return ["every gradient is finite, but not once it is unscaled"]
    from_the_end = bad[0] is gradients[0] and len(bad) >= MOST * len(gradients) and any(g.is_whole for g in bad)
    weights = [gradient.is_whole for gradient in gradients if gradient.is_weight]
    if not (from_the_end or (len(weights) > 1 and all(weights))):
        return list(map(str, bad))
    many, others = "all" if len(bad) == len(gradients) else f"{len(bad) - 1} of", len(gradients) - 1
    too = f", and {many} {others} other gradients have inf or NaN too" if others else ""
    where = f": this began in the forward, the loss or the data, unless the scale is far too large: {HOW_TO_SEARCH}"
    return [f"{bad[0]}{too}{'' if is_found else where}"]


def _gradients(read: LastRead) -> list[_Gradient]:
    """Those that have elements, in order of backward: it reaches the last registered first."""
    places, found = {key: place for place, key in enumerate(read.names)}, []
    for p, count, amax in chain.from_iterable(map(_counted, read.stats)):
        if size := local(p).numel():
            name = read.names.get(id(p), f"a replaced parameter {tuple(p.shape)}")
            found.append(_Gradient(name, places.get(id(p), -1), p.dim() > 1, size, count, amax))
    return sorted(found, key=lambda gradient: -gradient.place)


def _counted(stats) -> Iterator[tuple[torch.Tensor, int, float]]:
    """(parameter, non-finite elements, amax) of each; counted now where the op did not, -1 where the gradient is gone."""
    for p, count, amax in zip(stats.params, stats.nonfinite.tolist(), stats.amax.tolist(), strict=True):
        if count < 0 and p.grad is not None:
            with torch.no_grad():
                now, amax_now = (t.item() for t in count_nonfinite(local(p.grad)))
            count, amax = (now, amax_now) if now else (count, amax)  # none: it is another gradient
        yield p, count, amax
