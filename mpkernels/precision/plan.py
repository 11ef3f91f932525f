# SPDX-License-Identifier: Apache-2.0
"""plan: what a training step needs of memory under each policy and optimizer, found without allocating any."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpkernels import optim
from mpkernels.amp import GradScaler
from mpkernels.nn import convert
from mpkernels.nn.convert.linears import linears, uncompiled
from mpkernels.optim.optimizer import Optimizer
from mpkernels.policy import Policy, PolicyName, dtype_name
from mpkernels.precision import memory as step_memory
from mpkernels.precision.capture import is_positive, mapped, several, tensors_of
from mpkernels.precision.memory import Trace, Usage
from mpkernels.precision.tables import flops_text, shown, size_text, table
from mpkernels.runtime.fake import is_fake
from mpkernels.runtime.untouched import call

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": optim.AdamW,
    "Adam": optim.Adam,
    "Lion": optim.Lion,
    "SGD": lambda params: optim.SGD(params, momentum=0.9),
}
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
NOT_COUNTED = {  # by the op of backward that reads what a fake forward says is empty
    "aten.mkldnn_rnn_layer_backward.default": (
        "not counted: what an nn.LSTM on a CPU keeps for backward inside oneDNN, which may be several times its activations: "
        "activations and peak are too small by it"
    ),
}


@dataclass(frozen=True)
class PlanRow:
    """The memory of one combination, in bytes. Categories have their maxima at different times: `peak` is not their sum.

    parameters: with buffers. states: moments and masters. copies: weights in the compute dtype, which optimizers here keep.
    activations: what forward makes, and the batch. temporaries: what backward and the optimizer make and free again.
    fits: whether `peak` is within `memory`; None where no `memory` was given. flops: the operations of a step, as
    `torch.utils.flop_counter` counts them; on a CPU it leaves out what fused attention does inside.
    """

    policy: str
    optimizer: str
    batch_size: int
    parameters: int
    gradients: int
    states: int
    copies: int
    activations: int
    temporaries: int
    peak: int
    fits: bool | None
    flops: int


@dataclass(frozen=True)
class Plan:
    """The combinations, by policy, optimizer and batch size in the order in which they were given; prints as a table.

    memory: the budget in bytes, or None. largest_batch: the largest batch that fits it, by (policy, optimizer), or None where
    no `memory` was given or one batch size was. notes: sentences on memory of this model that no row counts.
    """

    rows: tuple[PlanRow, ...]
    memory: int | None
    largest_batch: Mapping[tuple[str, str], int | None]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> PlanRow:
        """Of the rows that fit, and of these of the largest batch, the first. Raises ValueError where none fits."""
        fitting = [row for row in self.rows if row.fits is not False]
        if not fitting:
            raise ValueError(f"plan: {self._nearest()}")
        return max(fitting, key=lambda row: row.batch_size)  # the first of them

    @property
    def policy(self) -> str:
        """The policy of the best row, as `mpk.convert` takes it. Raises ValueError where no row fits."""
        return self.best.policy

    def _nearest(self) -> str:
        row = min(self.rows, key=lambda row: row.peak)
        what = f"{row.policy} with {row.optimizer} and batch {row.batch_size} comes nearest, with {size_text(row.peak)}"
        return f"nothing fits {size_text(self.memory or 0)}: {what}"

    def __str__(self) -> str:
        sizes = ("parameters", "gradients", "states", "copies", "activations", "temporaries", "peak")
        head, lines = ["policy", "optimizer", "batch", *sizes, "operations", *(["fits"] if self.memory is not None else [])], []
        for row in self.rows:
            fits = [] if row.fits is None else ["yes" if row.fits else "no"]
            figures = [size_text(getattr(row, size)) for size in sizes]
            lines.append([row.policy, row.optimizer, str(row.batch_size), *figures, flops_text(row.flops), *fits])
        text = "\n".join([table(head, lines, left=2), *self.notes])
        if self.memory is None:
            return text
        if all(row.fits is False for row in self.rows):
            return f"{text}\n{self._nearest()}"
        largest = [f"{n} {p} {o}" for (p, o), n in self.largest_batch.items() if n]
        found = f"\nlargest batch in {size_text(self.memory)}: {', '.join(largest)}" if largest else ""
        return f"{text}{found}\npolicy: {self.policy}"


def plan(
    make_model: Callable[[], nn.Module], make_batch: Callable[[int], Any], *, memory: float | None = None,
    policies: Iterable[PolicyName | Policy] = POLICIES,
    optimizers: Iterable[str] | Mapping[str, Callable[..., torch.optim.Optimizer]] = ("AdamW",),
    batch_sizes: Iterable[int] = BATCH_SIZES,
) -> Plan:  # fmt: skip
    """What a training step needs of memory under each policy, optimizer and batch size, without allocating any.

    Two steps (forward, backward, optimizer, and a GradScaler where the arithmetic is fp16) run on FakeTensors.
    make_model(): the model as it is made, in its own dtype; under the 16-bit policies it is cast. make_batch(n): what it is
    called with, a tensor, a tuple of arguments or a mapping of keyword arguments. A scalar that the model returns, or its
    `.loss`, is the loss; else the mean of squares of what it returns, in fp32, stands for one. Both are called anew for each
    combination, and must make tensors, not take those that are there. memory: the budget in bytes of the model's device.
    optimizers: names of `mpk.optim`, "SGD" with momentum, or names of one's own with functions of the parameters.
    batch_sizes: the smallest and the largest run; between them each op's memory is interpolated where both ran the same ops.
    A model on a GPU needs a torch that was built for GPUs, but no GPU. What is not seen: memory that an op frees before it
    returns, gaps between blocks, what torch does not allocate, and the addresses given to a step's op: 160 bytes a parameter;
    and what an nn.LSTM on a CPU keeps for backward inside oneDNN, most of what it needs: `notes` says so where there is one.
    Raises TypeError and ValueError for arguments that are not as above, ValueError for a policy whose parameters have
    another dtype than the model's, RuntimeError for a model on meta, and for one that needs values.
    """
    chosen = [Policy.parse(p) for p in several("plan", "policies", policies)]
    makers = _optimizers(optimizers)
    sizes = sorted(set(several("plan", "batch_sizes", batch_sizes)))
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise ValueError(f"plan: batch_sizes must be natural numbers, got {sizes!r}")
    if memory is not None and not is_positive(memory):
        raise ValueError(f"plan: memory must be a positive number of bytes or None, got {memory!r}")
    for name, function in (("make_model", make_model), ("make_batch", make_batch)):
        if not callable(function) or isinstance(function, nn.Module):
            raise TypeError(f"plan: {name} must be a function, got {type(function).__name__}")
    budget = None if memory is None else int(memory)
    rows, largest, notes = [], {}, []
    for policy in chosen:
        for name, maker in makers.items():
            runs = _Runs(make_model, make_batch, policy, maker, sizes)
            largest[str(policy), name] = runs.largest(budget)
            notes += [NOT_COUNTED[op] for trace in runs.traces.values() for op in trace.ops if op in NOT_COUNTED]
            for n in sizes:
                trace = runs.trace(n)
                figures = _figures(trace)
                fits = None if budget is None else figures["peak"] <= budget
                rows.append(PlanRow(str(policy), name, n, **figures, fits=fits, flops=trace.flops))
    return Plan(tuple(rows), budget, largest, tuple(dict.fromkeys(notes)))


def _optimizers(given: Iterable[str] | Mapping[str, Callable]) -> dict[str, Callable]:
    if isinstance(given, Mapping):
        found = dict(given)
    else:
        names = several("plan", "optimizers", given)
        if unknown := [name for name in names if name not in OPTIMIZERS]:
            raise ValueError(
                f"plan: unknown optimizer {unknown[0]!r}: one of {', '.join(OPTIMIZERS)}, or a mapping to functions"
            )
        found = {name: OPTIMIZERS[name] for name in names}
    if not found or not all(map(callable, found.values())):
        raise ValueError("plan: optimizers must be names, or a mapping from names to functions of the parameters")
    return found


class _Runs:
    """The traces of one policy and optimizer, of the smallest and the largest batch, and of others where it must be."""

    def __init__(self, make_model, make_batch, policy: Policy, maker: Callable, sizes: Sequence[int]):
        self.run = lambda n: _run(make_model, make_batch, n, policy, maker)
        self.first, self.last = sizes[0], sizes[-1]
        self.traces = {n: self.run(n) for n in {self.first, self.last}}
        ops = [trace.ops for trace in self.traces.values()]
        self.affine = len(ops) == 2 and ops[0] == ops[1]

    def trace(self, n: int) -> Trace:
        if n not in self.traces:
            self.traces[n] = self._between(n) if self.affine else self.run(n)
        return self.traces[n]

    def _between(self, n: int) -> Trace:
        """Tensors grow with the batch or do not, so that between two sizes each op's memory lies on a line."""
        low, high = self.traces[self.first], self.traces[self.last]
        share = (n - self.first) / (self.last - self.first)
        at = lambda a, b: round(a + share * (b - a))
        usages = [Usage(*map(at, x, y)) for x, y in zip(low.usages, high.usages)]
        return low._replace(usages=usages, flops=at(low.flops, high.flops))

    def largest(self, budget: int | None) -> int | None:
        """The largest batch whose every op stays within `budget`."""
        if budget is None or not self.affine:
            return None
        low, high = self.traces[self.first], self.traces[self.last]
        found = []
        for a, b in zip(low.usages, high.usages):
            per_row = (b.total - a.total) / (self.last - self.first)
            fixed = a.total - per_row * self.first
            if fixed > budget:
                return 0
            found += [int((budget - fixed) / per_row)] if per_row > 0 else []
        return min(found, default=None)


def _figures(trace: Trace) -> dict[str, int]:
    usages, copies = trace.usages, trace.copies
    kept = usages[-1].optimizer  # after the last step nothing but states and copies is left of what the steps made
    return {
        "parameters": max(u.parameters for u in usages),
        "gradients": max(u.gradients for u in usages),
        "states": kept - copies,
        "copies": copies,
        "activations": max(u.activations for u in usages),
        "temporaries": max(u.temporaries + max(u.optimizer - kept, 0) for u in usages),
        "peak": max(u.total for u in usages),
    }


def _run(make_model, make_batch, n: int, policy: Policy, make_optimizer: Callable) -> Trace:
    """Of two steps, of which the second has states and copies."""
    with _fake_mode() as mode:
        model = _made(make_model)
        _check_model(model, policy)
        if policy.param_dtype.itemsize == 2:
            _cast(model, policy.param_dtype)
        convert(model, policy)
        optimizer = make_optimizer(list(model.parameters()))
        is_ours = isinstance(optimizer, Optimizer)  # torch's ask the scaler for a value, and need no more memory under a scale
        scaler = GradScaler(enabled=policy.compute_dtype == torch.float16 and is_ours)
        batch = mapped(lambda t: _as_input(mode, t, policy), make_batch(n))
        device = next(model.parameters()).device

        def step() -> None:
            scaler.scale(_loss(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return step_memory.trace(model, list(tensors_of(batch)), [step, step], device)


@contextlib.contextmanager
def _fake_mode() -> Iterator[Any]:
    """FakeTensors inside; random numbers are afterwards what they were, though a model's maker may seed."""
    from torch._subclasses import FakeTensorMode
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        try:
            yield mode
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise RuntimeError(
                f"plan: the model or the batch needs the values of a tensor, for {error}, and FakeTensors have none: nothing "
                "may depend on data, as .item() and x[mask] do"
            ) from error


def _made(make_model: Callable[[], nn.Module]) -> nn.Module:
    try:
        return uncompiled(make_model())
    except RuntimeError as error:
        if "UninitializedParameter" in str(error):
            raise ValueError(
                "plan: make_model makes a lazy layer, which no FakeTensor can be: give it its in_features"
            ) from error
        if "Couldn't swap" in str(error):
            raise ValueError(
                "plan: make_model casts or moves the model, which torch cannot do to FakeTensors: make it in its dtype and on "
                "its device, inside of torch.device(...) say, or by torch.set_default_dtype"
            ) from error
        raise


def _check_model(model: Any, policy: Policy) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"plan: make_model must return a torch.nn.Module, got {type(model).__name__}")
    parameters = list(model.named_parameters())
    if not parameters:
        raise ValueError("plan: the model has no parameters")
    for name, parameter in parameters:
        if parameter.is_meta:
            raise RuntimeError(
                f"plan: {name} is on meta: make the model on the device that it is to train on, nothing is allocated"
            )
        if not is_fake(parameter):
            raise ValueError(f"plan: {name} was there before: make_model must make the model, not return one that is there")
    if policy.param_dtype.itemsize > 2:
        for name, linear in linears(model):
            weight = linear._parameters.get("weight")
            if weight is not None and weight.dtype != policy.param_dtype:
                stored, wanted = map(dtype_name, (weight.dtype, policy.param_dtype))
                raise ValueError(f"plan: {policy} stores {wanted}, and {shown(name)} is made in {stored}: make it in {wanted}")


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """What convert does to a model of tensors with data; torch cannot swap a Parameter that is fake."""
    made: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and p.is_floating_point():
                    module._parameters[name] = made.setdefault(id(p), nn.Parameter(p.to(dtype), p.requires_grad))
            for name, b in module._buffers.items():
                if b is not None and b.is_floating_point():
                    module._buffers[name] = b.to(dtype)


def _as_input(mode: Any, t: torch.Tensor, policy: Policy) -> torch.Tensor:
    """`t` as the user would give it: in 16 bits to a model that is stored in 16 bits."""
    t = t if is_fake(t) else mode.from_tensor(t)
    return t.to(policy.param_dtype) if t.is_floating_point() and policy.param_dtype.itemsize == 2 else t


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    out = call(model, batch)
    loss = getattr(out, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss.float()
    tensors = [t for t in tensors_of(out) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise ValueError("plan: the model returns no tensor that has a gradient")
    if len(tensors) == 1 and tensors[0].numel() == 1:
        return tensors[0].float().reshape(())
    return torch.stack([t.float().square().mean() for t in tensors]).sum()
