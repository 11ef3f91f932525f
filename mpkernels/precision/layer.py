# SPDX-License-Identifier: Apache-2.0
"""One linear under several policies: ranges, errors and bounds of what it computes, against fp64 on what it was given."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mpkernels import functional
from mpkernels.ops.linear_act.epilogues import activation_of
from mpkernels.policy import Policy
from mpkernels.precision.capture import Call
from mpkernels.precision.ranges import Range, RangeCounter
from mpkernels.precision.seconds import seconds

FORWARD, BACKWARD = ("x", "weight", "out"), ("grad_out", "grad_x", "grad_weight")
BLOCK = 1 << 18  # elements of the widest tensor of a block of rows, of which some ten in fp64 live at a time
_ACTIVATIONS = {
    None: lambda z: z, "relu": torch.relu, "relu2": lambda z: torch.relu(z).square(), "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu,
}  # fmt: skip


@dataclass(frozen=True)
class PolicyRow:
    """What one policy makes of one linear. Gradients are those times `loss_scale`.

    range: by tensor, against the format that the policy gives it; `out` against the compute dtype where the policy has no
    output_dtype, since it is that under autocast and between linears. error: relative, in norm, of out, and of grad_x and
    grad_weight where backward computes them, against fp64 on what was not rounded. loss_change: `<grad_out, out - exact>`,
    the first order of what the loss changes by. noise: what it would be with random signs,
    `sqrt(sum((grad_out * (out - exact))**2))`. bound_ratio: the largest error of an element of out, in units of the bound
    that follows from the roundings; None where something overflows. max_loss_scale: the largest power of two that no
    gradient overflows with. bytes: parameters, their copy and what is saved for backward. traffic: bytes that the products
    of a step read and write. seconds: of its forward and gradients, where this machine's tuned table has them, else None.
    """

    policy: Policy
    range: MappingProxyType[str, Range]
    error: MappingProxyType[str, float]
    loss_change: float | None
    noise: float | None
    bound_ratio: float | None
    max_loss_scale: float | None
    bytes: int
    traffic: int
    seconds: float | None


def cost_of(rows: Iterable[PolicyRow]) -> str:
    """The field that says what is cheaper: seconds where all are known."""
    return "traffic" if any(row.seconds is None for row in rows) else "seconds"


def formats(policy: Policy) -> dict[str, torch.dtype]:
    """The format of each tensor under `policy`."""
    found = dict.fromkeys((*FORWARD, *BACKWARD), policy.range_dtype)
    found["out"] = policy.output_dtype or policy.range_dtype
    found["grad_weight"] = policy.grad_dtype or policy.param_dtype
    return found


class Ranges:
    """The ranges of the tensors of a module over its calls."""

    def __init__(self, policies: list[Policy], loss_scale: float):
        self.by_tensor = {
            name: RangeCounter([formats(p)[name] for p in policies], loss_scale if name in BACKWARD else 1.0)
            for name in (*FORWARD, *BACKWARD)
        }

    def add(self, name: str, values: torch.Tensor | None) -> None:
        if values is not None and values.numel():
            for block in values.reshape(-1).split(BLOCK):
                self.by_tensor[name].add(block.double())

    def of(self, policy: Policy) -> MappingProxyType[str, Range]:
        found = {n: c.range(formats(policy)[n]) for n, c in self.by_tensor.items() if c.elements}
        return MappingProxyType(found)


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
        self.module, self.policies, self.loss_scale = module, policies, loss_scale
        self.ranges = Ranges(policies, loss_scale)
        self.sums = [_Sums({"out": 0.0, "grad_x": 0.0, "grad_weight": 0.0}) for _ in policies]
        self.norms = {"out": 0.0, "grad_x": 0.0, "grad_weight": 0.0}
        self.activation = getattr(module, "activation", None)
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
        self.rows.append(M)
        self.x_dtype, self.has_gradient = x.dtype, self.has_gradient or grad is not None
        wanted = {"grad_x": call.wants_grad_x, "grad_weight": self.module.weight.requires_grad}
        wanted = {name for name, is_wanted in wanted.items() if is_wanted and grad is not None}
        self.computed |= wanted
        exact = _Exact(weight, bias, self.activation, wanted)
        totals: list[torch.Tensor | None] = [None] * len(self.policies)
        size = max(BLOCK // max(N, K, 1), min(N, K) // 4, 1)  # next to the weight a quarter of it is little
        for rows in range(0, M, size):
            is_last = rows + size >= M
            self._add_block(exact, x[rows : rows + size], None if grad is None else grad[rows : rows + size], totals, is_last)
        if "grad_weight" in wanted:
            self.ranges.add("grad_weight", exact.grad_weight)
            self.norms["grad_weight"] += _square(exact.grad_weight)

    def _add_block(self, exact: "_Exact", x, grad, totals: list[torch.Tensor | None], is_last: bool) -> None:
        """totals: the gradients of the weight under each policy, of the blocks before this one."""
        exact.run(x, grad)
        for name in ("x", "out", "grad_out", "grad_x"):
            self.ranges.add(name, getattr(exact, name))
        for name in ("out", "grad_x"):
            values = getattr(exact, name)
            self.norms[name] += 0.0 if values is None else _square(values)
        scaled = None if grad is None else grad * self.loss_scale
        for i, (policy, found) in enumerate(zip(self.policies, self.sums, strict=True)):
            out, grads = self._run(policy, exact, x, scaled)
            wrong = out.double().sub_(exact.out)
            square = _square(wrong)
            found.wrong["out"] += square
            is_finite = math.isfinite(square)
            if found.bound_ratio is not None:
                ratio = exact.bound_ratio(policy, x.dtype, out.dtype, wrong)
                found.bound_ratio = max(found.bound_ratio, ratio) if is_finite else None
            if grad is None:
                continue
            terms = wrong.mul_(exact.grad_out)
            found.loss_change += float(terms.sum())
            found.noise += _square(terms) if is_finite else math.inf
            if "grad_x" in grads:
                found.wrong["grad_x"] += _distance(grads["grad_x"], self.loss_scale, exact.grad_x)
            if "grad_weight" in grads:
                total = grads["grad_weight"].to(_wide(policy))
                total = total if totals[i] is None else totals[i].add_(total)
                if is_last:
                    found.wrong["grad_weight"] += _distance(total, self.loss_scale, exact.grad_weight)
                totals[i] = None if is_last else total

    def _run(self, policy: Policy, exact: "_Exact", x, scaled) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """out, and the gradients that are wanted, of the op under `policy`; with parameters of 16 bits, of them rounded.

        scaled: the gradient of the output times the loss scale; so are those that come of it.
        """
        narrow = policy.param_dtype.itemsize == 2
        x, weight, bias = (
            t if t is None or not narrow else t.to(policy.param_dtype) for t in (x, exact.weight, exact.bias)
        )  # fmt: skip
        leaves = {"grad_x": x.detach(), "grad_weight": weight.detach()}
        if policy.grad_dtype is not None:
            leaves["grad_weight"].grad_dtype = policy.grad_dtype
        with torch.enable_grad():
            wanted = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name in exact.wanted}
            out = functional.linear_act(*leaves.values(), bias, self.activation, policy)
            grads = torch.autograd.grad(out, list(wanted.values()), scaled.to(out.dtype)) if wanted else ()
        return out.detach(), dict(zip(wanted, grads))

    def row(self, index: int, tuned: Mapping[str, Any] = MappingProxyType({})) -> PolicyRow:
        """tuned: the entries of this machine's table."""
        policy, sums = self.policies[index], self.sums[index]
        weight, rows = self.weight, sum(self.rows)
        N, K = weight.shape
        parameters = N * K + (0 if self.module.bias is None else N)
        compute, result = policy.compute_dtype.itemsize, policy.range_dtype.itemsize
        ranges = self.ranges.of(policy)
        held = parameters * policy.param_dtype.itemsize + (N * K * compute if policy.mixed and not policy.float8 else 0)
        held += rows * K * (policy.saved_dtype or policy.compute_dtype).itemsize
        of = formats(policy)
        products = {
            "out": compute * (rows * K + N * K) + rows * N * of["out"].itemsize,
            "grad_x": compute * (rows * N + N * K) + result * rows * K,
            "grad_weight": (policy.wgrad_dtype or policy.compute_dtype).itemsize * (rows * N + rows * K)
            + N * K * of["grad_weight"].itemsize,
        }
        names = ("out", *(name for name in ("grad_x", "grad_weight") if name in self.computed))
        return PolicyRow(
            policy=policy,
            range=ranges,
            error=MappingProxyType({n: _relative(sums.wrong[n], self.norms[n]) for n in names}),
            loss_change=sums.loss_change if self.has_gradient else None,
            noise=math.sqrt(sums.noise) if self.has_gradient else None,
            bound_ratio=sums.bound_ratio,
            max_loss_scale=_max_loss_scale(ranges, self.loss_scale),
            bytes=held,
            traffic=sum(products[name] for name in names),
            seconds=seconds(tuned, policy, self.rows, weight, self.x_dtype, self.activation) if self.has_gradient else None,
        )


class _Exact:
    """The layer in fp64, on a block of rows at a time."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, wanted: set[str]):
        self.weight, self.bias, self.activation, self.wanted = weight, bias, activation, wanted
        self.wide = weight.double()
        self.wide_bias = weight.new_zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
        self.grad_weight = torch.zeros_like(self.wide) if "grad_weight" in wanted else None
        self.x = self.z = self.out = self.grad_out = self.grad_x = None

    def run(self, x: torch.Tensor, grad: torch.Tensor | None) -> None:
        self.x, self.grad_out = x.double(), None if grad is None else grad.double()
        self.out = self.z = torch.addmm(self.wide_bias, self.x, self.wide.t())
        grad_z = self.grad_out
        if self.activation is not None:
            with torch.enable_grad():
                z = self.z.detach().requires_grad_()
                out = _ACTIVATIONS[self.activation](z)
            self.out = out.detach()
            if grad is not None:
                grad_z = torch.autograd.grad(out, z, grad_z)[0]
        self.grad_x = grad_z @ self.wide if "grad_x" in self.wanted else None
        if "grad_weight" in self.wanted:
            self.grad_weight.addmm_(grad_z.t(), self.x)
        self._magnitudes = None
        self._stored_x = x

    def bound_ratio(self, policy: Policy, x_dtype: torch.dtype, out_dtype: torch.dtype, wrong: torch.Tensor) -> float:
        """The largest `|out - exact| / bound`. bound: the roundings of operands, of the sum of K products, and of the store.

        Each operand is off by u of it and half a least subnormal s where it is narrowed, and a sum of n terms by gamma_n of
        their magnitudes; an activation passes that on and adds its own. For the preactivation, P = |x| @ |weight.T|:
        (1 + gamma) ((1 + ux) (1 + uw) P + (1 + ux) sw |x| 1 + (1 + uw) sx |weight| 1 + K sx sw) - P, and so for the bias.
        """
        from mpkernels.testing.bounds import after_activation

        K, stored = self.x.shape[1], self.weight.dtype
        if self._magnitudes is None:
            products = (self._stored_x.abs() @ self.weight.abs().t()).double()
            self._magnitudes = products, self.x.abs().sum(1, keepdim=True), self.wide.abs().sum(1), self.wide_bias.abs()
        products, row, column, bias = self._magnitudes
        (ux, sx), (uw, sw) = (_rounding(t.dtype, policy.compute_dtype, t) for t in (self._stored_x, self.weight))
        ub, sb = _rounding(stored, policy.param_dtype)
        v = 2.0**-53 if policy.compute_dtype == torch.float64 else _accumulator(self.x.device, policy.compute_dtype)
        acc_least = 2.0**-1074 if policy.compute_dtype == torch.float64 else 2.0**-149
        gamma = (K + 2) * v / (1 - (K + 2) * v)
        exact = 1 / (1 - (K + 1) * _unit(stored))  # what the sums of `products` may have been rounded down by
        off = products * ((gamma + (1 + gamma) * (ux + uw + ux * uw)) * exact)
        off += (1 + gamma) * (1 + ux) * sw * row
        off += (1 + gamma) * (1 + uw) * sx * column + (ub + gamma * (1 + ub)) * bias
        off += (1 + gamma) * (K * sx * sw + sb) + K * acc_least
        off = after_activation(off, self.z, activation_of(self.activation), v)
        uo, so = _unit(out_dtype), _least(out_dtype)
        bound = off.mul_(1 + uo).add_(self.out.abs(), alpha=uo).add_(so)
        return float(torch.div(wrong, bound, out=bound).abs_().max()) if wrong.numel() else 0.0


def _accumulator(device: torch.device, compute: torch.dtype) -> float:
    """Tensor cores truncate inside a block, of 8-bit operands to 14 bits."""
    if device.type != "cuda" or compute.itemsize > 2:
        return 2.0**-24
    return 2.0**-23 if compute.itemsize == 2 else 2.0**-13


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _least(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def _rounding(stored: torch.dtype, dtype: torch.dtype, values: torch.Tensor | None = None) -> tuple[float, float]:
    """(relative, absolute) error of a rounding to `dtype` of what is stored: none to what holds it.

    values: to 8 bits what is rounded, whose scale is at most that of its largest.
    """
    if dtype.itemsize == 1:
        amax = float(values.abs().max()) if values.numel() else 0.0
        scale = 2.0 ** max(math.ceil(math.log2(amax / torch.finfo(dtype).max)), -126) if 0 < amax < math.inf else 1.0
        return _unit(dtype), scale * _least(dtype) / 2
    return (0.0, 0.0) if torch.promote_types(stored, dtype) == dtype else (_unit(dtype), _least(dtype) / 2)


def _wide(policy: Policy) -> torch.dtype:
    return torch.promote_types(torch.float32, policy.grad_dtype or policy.param_dtype)


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


def _max_loss_scale(ranges, loss_scale: float) -> float | None:
    """None without gradients, and where they are all 0 or not finite."""
    room = [ranges[n].margin_bits for n in BACKWARD if n in ranges]
    if not room or not math.isfinite(min(room)):
        return None
    return 2.0 ** math.floor(math.log2(loss_scale) + min(room))
