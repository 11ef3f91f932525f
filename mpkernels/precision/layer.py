# SPDX-License-Identifier: Apache-2.0
"""One linear under several policies: ranges, errors and bounds of what it computes, against fp64 on what it was given."""

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from mpkernels import functional
from mpkernels.policy import Policy
from mpkernels.precision.capture import Call
from mpkernels.precision.ranges import Range, RangeCounter

FORWARD, BACKWARD = ("x", "weight", "out"), ("grad_out", "grad_x", "grad_weight")
BLOCK = 1 << 20  # elements of the widest tensor of a block of rows, of which some ten in fp64 live at a time
_ACTIVATIONS = {
    None: lambda z: z, "relu": torch.relu, "relu2": lambda z: torch.relu(z).square(), "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu,
}  # fmt: skip


@dataclass(frozen=True)
class PolicyRow:
    """What one policy makes of one linear. Gradients are those times `loss_scale`.

    range: by tensor, against the format that the policy gives it; `out` against the compute dtype where the policy has no
    output_dtype, since it is that under autocast and between linears. error: relative, in norm, of out, grad_x and
    grad_weight, against fp64 on what was not rounded. loss_change: `<grad_out, out - exact>`, the first order of what the
    loss changes by. noise: what it would be with random signs, `sqrt(sum((grad_out * (out - exact))**2))`. bound_ratio: the
    largest error of an element of out, in units of the bound that follows from the roundings; None for a curved activation
    and where something overflows. max_loss_scale: the largest power of two that no gradient overflows with. bytes:
    parameters, their copy and what is saved for backward. traffic: bytes that the products of a step read and write.
    seconds: None where no row of this machine says it.
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


def formats(policy: Policy) -> dict[str, torch.dtype]:
    """The format of each tensor under `policy`."""
    found = dict.fromkeys((*FORWARD, *BACKWARD), policy.compute_dtype)
    found["out"] = policy.output_dtype or policy.compute_dtype
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
        self.rows = self.calls = 0
        self.has_gradient = False

    @property
    def weight(self) -> torch.Tensor:
        """(N, K); transformers' Conv1D has it transposed."""
        weight = self.module.weight.detach()
        return weight if isinstance(self.module, nn.Linear) else weight.t()

    def add(self, call: Call) -> None:
        """Analyse one call, in blocks of rows."""
        weight, bias = self.weight, None if self.module.bias is None else self.module.bias.detach()
        N, K = weight.shape
        x = call.x.reshape(-1, K)
        grad = None if call.grad_out is None else call.grad_out.reshape(-1, N)
        if not self.calls:
            self.ranges.add("weight", weight)
        self.calls, self.rows, self.has_gradient = self.calls + 1, self.rows + len(x), self.has_gradient or grad is not None
        exact = _Exact(weight, bias, self.activation)
        sums = [torch.zeros(N, K, dtype=_wide(p), device=weight.device) if grad is not None else None for p in self.policies]
        for rows in range(0, len(x), size := max(BLOCK // max(N, K, 1), 1)):
            self._add_block(exact, x[rows : rows + size], None if grad is None else grad[rows : rows + size], sums)
        if grad is not None:
            self.ranges.add("grad_weight", exact.grad_weight)
            self.norms["grad_weight"] += _square(exact.grad_weight)
            for found, total in zip(self.sums, sums, strict=True):
                found.wrong["grad_weight"] += _square(total.double() - exact.grad_weight)

    def _add_block(self, exact: "_Exact", x: torch.Tensor, grad: torch.Tensor | None, grad_weights: list) -> None:
        exact.run(x, grad)
        for name, values in (("x", x), ("out", exact.out), ("grad_out", grad), ("grad_x", exact.grad_x)):
            self.ranges.add(name, values)
        for name in ("out", "grad_x"):
            values = getattr(exact, name)
            self.norms[name] += 0.0 if values is None else _square(values)
        for policy, found, total in zip(self.policies, self.sums, grad_weights, strict=True):
            out, grad_x, grad_weight = self._run(policy, exact, x, grad)
            wrong = out.double() - exact.out
            found.wrong["out"] += _square(wrong)
            if self.activation in (None, "relu") and found.bound_ratio is not None:
                ratio = exact.bound_ratio(policy, x.dtype, out.dtype, wrong)
                found.bound_ratio = None if ratio is None else max(found.bound_ratio, ratio)
            else:
                found.bound_ratio = None
            if grad is None:
                continue
            found.wrong["grad_x"] += _square(grad_x.double() / self.loss_scale - exact.grad_x)
            total += grad_weight.to(total.dtype) / self.loss_scale
            terms = grad.double() * wrong
            found.loss_change += float(terms.sum())
            found.noise += math.inf if not wrong.isfinite().all() else _square(terms)

    def _run(self, policy: Policy, exact: "_Exact", x, grad) -> tuple:
        """(out, grad_x, grad_weight) of the op under `policy`; with parameters of 16 bits, of what they are rounded to."""
        narrow = policy.param_dtype.itemsize == 2
        x, weight, bias = (
            t if t is None or not narrow else t.to(policy.param_dtype) for t in (x, exact.weight, exact.bias)
        )  # fmt: skip
        x, weight = x.detach().requires_grad_(grad is not None), weight.detach().requires_grad_(grad is not None)
        if policy.grad_dtype is not None and weight.is_leaf:
            weight.grad_dtype = policy.grad_dtype
        with torch.enable_grad():
            out = functional.linear_act(x, weight, bias, self.activation, policy)
            if grad is None:
                return out, None, None
            grads = torch.autograd.grad(out, (x, weight), (grad * self.loss_scale).to(out.dtype))
        return out.detach(), *grads

    def row(self, index: int) -> PolicyRow:
        policy, sums = self.policies[index], self.sums[index]
        N, K = self.weight.shape
        parameters = N * K + (0 if self.module.bias is None else N)
        compute = policy.compute_dtype.itemsize
        ranges = self.ranges.of(policy)
        held = parameters * policy.param_dtype.itemsize + (N * K * compute if policy.mixed else 0) + self.rows * K * compute
        read = compute * (3 * self.rows * K + 2 * N * K + 2 * self.rows * N)
        written = self.rows * N * formats(policy)["out"].itemsize + N * K * formats(policy)["grad_weight"].itemsize
        names = ("out", "grad_x", "grad_weight") if self.has_gradient else ("out",)
        return PolicyRow(
            policy=policy,
            range=ranges,
            error=MappingProxyType({n: _relative(sums.wrong[n], self.norms[n]) for n in names}),
            loss_change=sums.loss_change if self.has_gradient else None,
            noise=math.sqrt(sums.noise) if self.has_gradient else None,
            bound_ratio=sums.bound_ratio,
            max_loss_scale=_max_loss_scale(ranges, self.loss_scale),
            bytes=held,
            traffic=read + written,
            seconds=None,
        )


class _Exact:
    """The layer in fp64, on a block of rows at a time."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None):
        self.weight, self.bias, self.activation = weight, bias, activation
        self.wide = weight.double()
        self.grad_weight = torch.zeros_like(self.wide)
        self.out = self.grad_x = self.x = None

    def run(self, x: torch.Tensor, grad: torch.Tensor | None) -> None:
        self.x = x.double()
        z = self.x @ self.wide.t()
        z = z if self.bias is None else z + self.bias.double()
        if self.activation is None:
            self.out, grad_z = z, None if grad is None else grad.double()
        else:
            with torch.enable_grad():
                z = z.requires_grad_()
                out = _ACTIVATIONS[self.activation](z)
                grad_z = None if grad is None else torch.autograd.grad(out, z, grad.double())[0]
            self.out = out.detach()
        self.grad_x = None if grad_z is None else grad_z @ self.wide
        if grad_z is not None:
            self.grad_weight += grad_z.t() @ self.x
        self._magnitudes = None

    def bound_ratio(self, policy: Policy, x_dtype: torch.dtype, out_dtype: torch.dtype, wrong: torch.Tensor) -> float | None:
        """The largest `|out - exact| / bound`. bound: the roundings of operands, of the sum of K products, and of the store.

        Each operand is off by u of it and half a least subnormal where it is narrowed, and a sum of n terms by gamma_n of
        their magnitudes. None where an operand or the result overflows.
        """
        if not wrong.isfinite().all():
            return None
        K = self.x.shape[1]
        if self._magnitudes is None:
            ax, aw = self.x.abs(), self.wide.abs()
            bias = 0.0 if self.bias is None else self.bias.double().abs()
            self._magnitudes = ax @ aw.t(), ax.sum(1, keepdim=True), aw.sum(1), bias
        products, row, column, bias = self._magnitudes
        (ux, sx), (uw, sw) = (_rounding(d, policy.compute_dtype) for d in (x_dtype, self.weight.dtype))
        rounded = (1 + ux) * (1 + uw) * products + (1 + ux) * sw * row + (1 + uw) * sx * column + K * sx * sw
        ub, sb = _rounding(self.weight.dtype, policy.param_dtype)
        operands = rounded - products + ub * bias + sb
        v = 2.0**-53 if policy.compute_dtype == torch.float64 else _accumulator(self.x.device, policy.compute_dtype)
        n = (K + 2) * v
        acc_least = 2.0**-1074 if policy.compute_dtype == torch.float64 else 2.0**-149
        summed = n / (1 - n) * (rounded + (1 + ub) * bias + sb) + K * acc_least / 2
        uo, so = _unit(out_dtype), _least(out_dtype)
        bound = operands + uo * (self.out.abs() + operands) + (1 + uo) * summed + so
        return float((wrong.abs() / bound).max()) if wrong.numel() else 0.0


def _accumulator(device: torch.device, compute: torch.dtype) -> float:
    """Tensor cores truncate inside a block."""
    return 2.0**-23 if device.type == "cuda" and compute.itemsize == 2 else 2.0**-24


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _least(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def _rounding(stored: torch.dtype, dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) error of a rounding to `dtype` of what is stored: none to what holds it."""
    return (0.0, 0.0) if torch.promote_types(stored, dtype) == dtype else (_unit(dtype), _least(dtype) / 2)


def _wide(policy: Policy) -> torch.dtype:
    return torch.promote_types(torch.float32, policy.grad_dtype or policy.param_dtype)


def _square(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


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
