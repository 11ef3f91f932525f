# SPDX-License-Identifier: Apache-2.0
"""One linear under several policies: ranges, errors and bounds of what it computes, against fp64 on what it was given."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mpkernels import functional
from mpkernels.ops.linear_act import Activation
from mpkernels.policy import Policy
from mpkernels.precision.capture import Call
from mpkernels.precision.exact import Exact, scale_of
from mpkernels.precision.ranges import BLOCK, Range, RangeCounter, Scaling
from mpkernels.precision.seconds import seconds

SAMPLE = 256  # rows of a call that a GPU computes in fp64
FORWARD, BACKWARD = ("x", "weight", "out"), ("grad_out", "grad_x", "grad_weight")


@dataclass(frozen=True)
class PolicyRow:
    """What one policy makes of one linear; of another module, the ranges alone. Gradients are those times `loss_scale`.

    range: by tensor, against the format that the policy gives it; `out` against the compute dtype where the policy has no
    output_dtype, since it is that under autocast and between linears; where operands have 8 bits and scales, `out` and
    `grad_x` against bfloat16. error: relative, in norm, of out, and of grad_x and grad_weight where backward computes
    them, against fp64 on what was not rounded. loss_change: `<grad_out, out - exact>`, the first order of what the loss
    changes by. noise: what it would be with random signs, `sqrt(sum((grad_out * (out - exact))**2))`. bound_ratio: the
    largest error of an element of out, in units of the bound that follows from the roundings; None where something
    overflows. max_loss_scale: the largest power of two that no gradient overflows with. bytes: parameters and, of a weight that
    is trained, its copy and what is saved for backward, scales included. traffic: bytes that the products of a step read and
    write, and with saved_dtype what encodes x and decodes it. seconds: of its forward and gradients, where this machine's tuned
    table has them, else None.
    """

    policy: Policy
    range: MappingProxyType[str, Range]
    error: MappingProxyType[str, float] = field(default_factory=lambda: MappingProxyType({}))
    loss_change: float | None = None
    noise: float | None = None
    bound_ratio: float | None = None
    max_loss_scale: float | None = None
    bytes: int = 0
    traffic: int = 0
    seconds: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "range": dict(self.range), "error": dict(self.error)}  # a MappingProxyType is not pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, range=MappingProxyType(state["range"]), error=MappingProxyType(state["error"]))


def cost_of(rows: Iterable[PolicyRow]) -> str:
    """The field that says what is cheaper: seconds where all are known."""
    return "traffic" if any(row.seconds is None for row in rows) else "seconds"


def formats(policy: Policy) -> dict[str, torch.dtype]:
    """The format of each tensor under `policy`."""
    found = dict.fromkeys((*FORWARD, *BACKWARD), policy.compute_dtype)
    found["out"] = policy.output_dtype or policy.range_dtype
    found["grad_x"], found["grad_out"] = policy.range_dtype, policy.dgrad_dtype or policy.compute_dtype
    found["grad_weight"] = policy.grad_dtype or policy.param_dtype
    return found


SCALED = ("x", "weight", "grad_out")  # the operands


class Ranges:
    """The ranges of the tensors of a module over its calls."""

    def __init__(self, policies: list[Policy], loss_scale: float):
        self.by_tensor = {
            name: RangeCounter((_format(p, name) for p in policies), loss_scale if name in BACKWARD else 1.0)
            for name in (*FORWARD, *BACKWARD)
        }

    def add(self, name: str, values: torch.Tensor | None) -> None:
        if values is not None and values.numel():
            for block in values.reshape(-1).split(BLOCK):
                self.by_tensor[name].add(block.double())

    def add_scaled(self, name: str, values: torch.Tensor | None) -> None:
        """An operand as a whole, for the policies that scale it; a row is what the last dimension holds."""
        if values is not None and values.numel():
            self.by_tensor[name].add_scaled(values.reshape(-1, values.shape[-1] if values.dim() else 1))

    def of(self, policy: Policy) -> MappingProxyType[str, Range]:
        counted = {name: counter for name, counter in self.by_tensor.items() if counter.elements}
        return MappingProxyType({name: counter.range(*_format(policy, name)) for name, counter in counted.items()})


def _format(policy: Policy, name: str) -> tuple[torch.dtype, Scaling | None]:
    return formats(policy)[name], policy.scaling if name in SCALED else None


@dataclass
class _Sums:
    """What one policy adds up over blocks and calls."""

    wrong: dict[str, float]
    loss_change: float = 0.0
    noise: float = 0.0  # squared
    bound_ratio: float | None = 0.0


class Layer:
    """A linear, and what its calls have shown so far."""

    def __init__(self, module: nn.Module, policies: list[Policy], loss_scale: float):
        self.module, self.loss_scale = module, loss_scale
        self.ranges = Ranges(policies, loss_scale)
        self.sums = {policy: _Sums({"out": 0.0, "grad_x": 0.0, "grad_weight": 0.0}) for policy in policies}
        self.norms = {"out": 0.0, "grad_x": 0.0, "grad_weight": 0.0}
        self.activation = getattr(module, "_activation", Activation.NONE)
        self.rows: list[int] = []  # of each call
        self.x_dtype = module.weight.dtype
        self.has_gradient = False
        self.computed: set[str] = set()  # of the gradients

    @property
    def weight(self) -> torch.Tensor:
        """(N, K); transformers' Conv1D has it transposed."""
        weight = self.module.weight.detach()
        return weight if isinstance(self.module, nn.Linear) else weight.t()

    def add(self, call: Call) -> None:
        """Analyse one call, in blocks of rows."""
        weight, bias = self.weight, None if self.module.bias is None else self.module.bias.detach()
        N, K = weight.shape
        M = math.prod(call.x.shape[:-1])
        x, grad = call.x.reshape(M, K), None if call.grad_out is None else call.grad_out.reshape(M, N)
        if not self.rows:
            self.ranges.add("weight", weight)
            self.ranges.add_scaled("weight", weight)
        self.ranges.add_scaled("x", x)
        self.ranges.add_scaled("grad_out", grad)
        self.rows.append(M)
        self.x_dtype, self.has_gradient = x.dtype, self.has_gradient or grad is not None
        wanted = {"grad_x": call.wants_grad_x, "grad_weight": self.module.weight.requires_grad}
        wanted = {name for name, is_wanted in wanted.items() if is_wanted and grad is not None}
        self.computed |= wanted
        size = max(BLOCK // max(N, K, 1), min(N, K) // 4, 1)  # next to the weight a quarter of it is little
        blocks, is_sampled = [(slice(at, at + size), 1.0) for at in range(0, M, size)], M > SAMPLE and is_sampled_on(x.device)
        exact = Exact(weight, bias, self.activation, wanted)
        if is_sampled:
            self._add_ranges(Exact(weight, bias, self.activation, wanted, weight.dtype), x, grad, blocks)
            chosen, largest = _sample(x, grad)
            x, grad = x[chosen], None if grad is None else grad[chosen]
            blocks = [(slice(0, largest), 1.0), (slice(largest, None), (M - largest) / (len(chosen) - largest))]
        of_tensor = [p for p in self.sums if p.scaling == "tensor"]
        split = of_tensor if len(blocks) > 1 else ()  # one block is the whole: nothing of it has to wait
        wholes = {p: self._run(p, exact, x, _times(grad, self.loss_scale)) for p in split}
        exact.tensor_scales = {p: (scale_of(x, p, None), scale_of(weight, p, None)) for p in of_tensor}
        totals: dict[Policy, torch.Tensor] = {}
        for at, share in blocks:
            is_last = at is blocks[-1][0]
            parts = {p: _part(whole, at, is_last) for p, whole in wholes.items()}
            exact.run(x[at], None if grad is None else grad[at])
            if not is_sampled:
                self._add_range(exact)
            self._add_block(exact, parts, totals, is_last, share)
        if "grad_weight" in wanted:
            self.norms["grad_weight"] += _square(exact.grad_weight)
            if not is_sampled:
                self.ranges.add("grad_weight", exact.grad_weight)

    def _add_ranges(self, exact: Exact, x, grad, blocks) -> None:
        """Of all rows, in the dtype of the parameters."""
        for at, _ in blocks:
            exact.run(x[at], None if grad is None else grad[at])
            self._add_range(exact)
        self.ranges.add("grad_weight", exact.grad_weight)

    def _add_range(self, exact: Exact) -> None:
        for name in ("x", "out", "grad_out", "grad_x"):
            self.ranges.add(name, getattr(exact, name))

    def _add_block(
        self, exact: Exact, parts: dict[Policy, tuple], totals: dict[Policy, torch.Tensor], is_last: bool, share: float
    ) -> None:
        """parts: of policies with one scale for a tensor. totals: gradients of the weight, of the blocks before this one.

        share: how many rows each of these stands for.
        """
        for name in ("out", "grad_x"):
            values = getattr(exact, name)
            self.norms[name] += 0.0 if values is None else share * _square(values)
        scaled = _times(exact.stored_grad, self.loss_scale)
        for policy, found in self.sums.items():
            out, grads = parts[policy] if policy in parts else self._run(policy, exact, exact.stored_x, scaled)
            wrong, stored = out.double().sub_(exact.out), out.dtype
            del out
            square = _square(wrong)
            found.wrong["out"] += share * square
            is_finite = math.isfinite(square)
            if found.bound_ratio is not None:
                ratio = exact.bound_ratio(policy, stored, wrong)
                found.bound_ratio = max(found.bound_ratio, ratio) if is_finite else None
            if exact.grad_out is None:
                continue
            terms = wrong.mul_(exact.grad_out)
            found.loss_change += share * float(terms.sum())
            found.noise += share * _square(terms) if is_finite else math.inf
            if "grad_x" in grads:
                found.wrong["grad_x"] += share * _distance(grads["grad_x"], self.loss_scale, exact.grad_x)
            if "grad_weight" in grads:
                total = grads["grad_weight"].to(torch.promote_types(torch.float32, policy.grad_dtype or policy.param_dtype))
                totals[policy] = totals[policy].add_(total) if policy in totals else total
                if is_last:
                    found.wrong["grad_weight"] += _distance(totals.pop(policy), self.loss_scale, exact.grad_weight)

    def _run(self, policy: Policy, exact: Exact, x, scaled) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """out, and the gradients that are wanted, of the op under `policy`; with parameters of 16 bits, of them rounded.

        scaled: the gradient of the output times the loss scale; so are those that come of it.
        """
        narrow = policy.param_dtype.itemsize == 2 or policy.float8  # which has no operands in fp64
        x, weight, bias = (
            t if t is None or not narrow else t.to(policy.param_dtype) for t in (x, exact.weight, exact.bias)
        )  # fmt: skip
        leaves = {"grad_x": x.detach(), "grad_weight": weight.detach()}
        if policy.grad_dtype is not None:
            leaves["grad_weight"].grad_dtype = policy.grad_dtype
        with torch.enable_grad():
            wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name in exact.wanted}
            out = functional.forward(*leaves.values(), bias, None, self.activation, policy)
            grads = torch.autograd.grad(out, list(wanted.values()), scaled.to(out.dtype)) if wanted else ()
        return out.detach(), dict(zip(wanted, grads))

    def by_policy(self, tuned: Mapping[str, Any] = MappingProxyType({})) -> dict[str, PolicyRow]:
        """tuned: the entries of this machine's table."""
        return {str(policy): self._row(policy, sums, tuned) for policy, sums in self.sums.items()}

    def _row(self, policy: Policy, sums: _Sums, tuned: Mapping[str, Any]) -> PolicyRow:
        weight, rows = self.weight, sum(self.rows)
        N, K = weight.shape
        parameters = N * K + (0 if self.module.bias is None else N)
        compute = policy.compute_dtype.itemsize
        ranges = self.ranges.of(policy)
        saved = policy.saved_dtype or policy.compute_dtype
        held = parameters * policy.param_dtype.itemsize
        if self.module.weight.requires_grad:  # else no optimizer keeps a copy, and backward reads no x
            copy = N * K * compute if policy.mixed and not policy.float8 else 0  # of 8 bits none is kept
            scales = 0 if saved.itemsize > 1 else 4 * (len(self.rows) if policy.scaling == "tensor" else rows)
            held += copy + rows * K * saved.itemsize + scales
        of, in_wgrad = formats(policy), (policy.wgrad_dtype or policy.compute_dtype).itemsize
        products = {
            "out": compute * (rows * K + N * K) + rows * N * of["out"].itemsize,
            "grad_x": compute * (rows * N + N * K) + rows * K * of["grad_x"].itemsize,
            "grad_weight": in_wgrad * (rows * N + rows * K) + N * K * of["grad_weight"].itemsize,
        }
        if policy.saved_dtype is not None:  # x is read to be encoded and written, and the same again to be decoded
            products["grad_weight"] += 2 * rows * K * (compute + saved.itemsize)
        names = ("out", *(name for name in ("grad_x", "grad_weight") if name in self.computed))
        return PolicyRow(
            policy=policy,
            range=ranges,
            error=MappingProxyType({n: _relative(sums.wrong[n], self.norms[n]) for n in names}),
            loss_change=sums.loss_change if self.has_gradient else None,
            noise=math.sqrt(sums.noise) if self.has_gradient else None,
            bound_ratio=sums.bound_ratio,
            max_loss_scale=_max_lossscale_of(ranges, self.loss_scale),
            bytes=held,
            traffic=sum(products[name] for name in names),
            seconds=seconds(tuned, policy, self.rows, weight, self.x_dtype, self.activation) if self.has_gradient else None,
        )


def is_sampled_on(device: torch.device) -> bool:
    """Whether fp64 is too slow there for all rows."""
    return device.type != "cpu"


def _sample(x: torch.Tensor, grad: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """At most SAMPLE rows: first those that have the largest magnitudes, how many they are, and one at random of each stretch.

    The largest stand for themselves alone; and one scale for a tensor is the same of the sample as of all.
    """
    largest = torch.stack([t.abs().amax(1).argmax() for t in (x, grad) if t is not None]).unique()
    M, n = len(x), SAMPLE - len(largest)
    on_cpu = {"dtype": torch.float64, "device": "cpu"}
    at = (torch.arange(n, **on_cpu) + torch.rand(n, generator=torch.Generator("cpu").manual_seed(0), **on_cpu)) * (M / n)
    others = at.to(x.device).long().clamp_(max=M - 1)
    return torch.cat([largest, others[~torch.isin(others, largest)]]), len(largest)


def _times(grad: torch.Tensor | None, loss_scale: float) -> torch.Tensor | None:
    return None if grad is None else grad * loss_scale


def _part(whole: tuple[torch.Tensor, dict[str, torch.Tensor]], rows: slice, is_last: bool) -> tuple:
    """Of what a whole call has given, that of some rows; the gradient of the weight comes with the last."""
    out, grads = whole
    found = {"grad_x": grads["grad_x"][rows]} if "grad_x" in grads else {}
    if is_last and "grad_weight" in grads:
        found["grad_weight"] = grads["grad_weight"]
    return out[rows], found


def _square(values: torch.Tensor) -> float:
    """Of the norm of values in fp64."""
    flat = values.reshape(-1)
    return float(flat.dot(flat))


def _distance(got: torch.Tensor, scale: float, exact: torch.Tensor) -> float:
    """The square of the norm of `got / scale - exact`, a part at a time."""
    rows = max(BLOCK // max(exact.shape[1], 1), 1)
    parts = zip(got.split(rows), exact.split(rows), strict=True)
    return sum(_square(a.double().div_(scale).sub_(b)) for a, b in parts)


def _relative(wrong: float, norm: float) -> float:
    if math.isnan(wrong):
        return math.inf
    return math.sqrt(wrong / norm) if norm else (0.0 if not wrong else math.inf)


def _max_lossscale_of(ranges, loss_scale: float) -> float | None:
    """None without gradients, and where they are all 0 or not finite."""
    room = [ranges[n].margin_bits for n in BACKWARD if n in ranges]
    if not room or not math.isfinite(min(room)):
        return None
    return 2.0 ** min(math.floor(math.log2(loss_scale) + min(room)), 1023)  # of fp64
