# SPDX-License-Identifier: Apache-2.0
"""A linear in fp64, a block of rows at a time, and the bound on what a policy's roundings make of its output."""

import torch

from mpkernels import functional
from mpkernels.ops.linear_act import Activation
from mpkernels.policy import Policy


class Exact:
    """The layer in fp64, on a block of rows at a time. dtype: another, in which nothing is exact but ranges are seen."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation, wanted: set[str],
        dtype: torch.dtype = torch.float64,
    ):  # fmt: skip
        self.weight, self.bias, self.activation, self.wanted = weight, bias, activation, wanted
        self.wide = weight.to(dtype)
        self.wide_bias = weight.new_zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)
        self.grad_weight = torch.zeros_like(self.wide) if "grad_weight" in wanted else None
        self.x = self.z = self.out = self.grad_out = self.grad_x = None
        self.tensor_scales: dict[Policy, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, x: torch.Tensor, grad: torch.Tensor | None) -> None:
        from mpkernels.ops.linear_act import reference

        self.x, self.grad_out = x.to(self.wide.dtype), None if grad is None else grad.to(self.wide.dtype)
        self.z = torch.addmm(self.wide_bias, self.x, self.wide.t())
        self.out, grad_z = reference.activate(self.z, self.activation), self.grad_out
        if grad is not None and self.activation == Activation.RELU:
            grad_z = torch.where(self.z <= 0, 0, grad_z)
        elif grad is not None and self.activation != Activation.NONE:
            grad_z = grad_z * reference.slope(self.z, self.activation)
        self.grad_x = grad_z @ self.wide if "grad_x" in self.wanted else None
        if "grad_weight" in self.wanted:
            self.grad_weight.addmm_(grad_z.t(), self.x)
        self._magnitudes = None
        self.stored_x, self.stored_grad = x, grad

    def scales(self, policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x and the weight in 8 bits: (rows, 1) and (N,), or one each, which the whole tensors give."""
        if policy.scaling == "tensor":
            return self.tensor_scales[policy]
        return scale_of(self.stored_x, policy, -1), scale_of(self.weight, policy, 1).reshape(-1)

    def bound_ratio(self, policy: Policy, out_dtype: torch.dtype, wrong: torch.Tensor) -> float:
        """The largest `|out - exact| / bound`. bound: the roundings of operands, of the sum of K products, and of the store.

        Each operand is off by u of it and half a least subnormal s where it is narrowed, and a sum of n terms by gamma_n of
        their magnitudes; an activation passes that on and adds its own. In 8 bits s is times the operand's scale. For the
        preactivation, P = |x| @ |weight.T|:
        (1 + gamma) ((1 + ux) (1 + uw) P + (1 + ux) sw |x| 1 + (1 + uw) sx |weight| 1 + K sx sw) - P, and so for the bias.
        """
        from mpkernels.testing.bounds import after_activation

        K, stored = self.x.shape[1], self.weight.dtype
        if self._magnitudes is None:
            products = (self.stored_x.abs() @ self.weight.abs().t()).double()
            self._magnitudes = products, self.x.abs().sum(1, keepdim=True), self.wide.abs().sum(1), self.wide_bias.abs()
        products, row, column, bias = self._magnitudes
        (ux, sx), (uw, sw) = (_rounding(d, policy.compute_dtype) for d in (self.stored_x.dtype, stored))
        if policy.float8:
            x_scale, weight_scale = self.scales(policy)
            sx, sw = sx * x_scale, sw * weight_scale
        ub, sb = _rounding(stored, policy.param_dtype)
        v = 2.0**-53 if policy.compute_dtype == torch.float64 else _accumulator(self.x.device, policy.compute_dtype)
        acc_least = 2.0**-1074 if policy.compute_dtype == torch.float64 else 2.0**-149
        gamma = (K + 2) * v / (1 - (K + 2) * v)
        exact = 1 / (1 - (K + 1) * _unit(stored))  # what the sums of `products` may have been rounded down by
        off = products * ((gamma + (1 + gamma) * (ux + uw + ux * uw)) * exact)
        off += (1 + gamma) * (1 + ux) * sw * row
        off += (1 + gamma) * (1 + uw) * sx * column + (ub + gamma * (1 + ub)) * bias
        off += (1 + gamma) * (K * sx * sw + sb) + K * acc_least
        off = after_activation(off, self.z, self.activation, v)
        uo, so = _unit(out_dtype), _least(out_dtype)
        bound = off.mul_(1 + uo).add_(self.out.abs(), alpha=uo).add_(so)
        return float(torch.div(wrong, bound, out=bound).abs_().max()) if wrong.numel() else 0.0


def _accumulator(device: torch.device, compute: torch.dtype) -> float:
    """Tensor cores truncate inside a block, and add products of 8 bits in some 14 bits."""
    return {1: 2.0**-13, 2: 2.0**-23}.get(compute.itemsize, 2.0**-24) if device.type == "cuda" else 2.0**-24


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _least(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def scale_of(operand: torch.Tensor, policy: Policy, axis: int | None) -> torch.Tensor:
    return functional.quantize(operand.float(), policy.compute_dtype, axis)[1].double()


def _rounding(stored: torch.dtype, dtype: torch.dtype) -> tuple[float, float]:
    """(relative, absolute) error of a rounding to `dtype` of what is stored: none to what holds it."""
    if dtype.itemsize == 1:  # which torch promotes to nothing; from fp64 by way of fp32
        return _unit(dtype) * (1 + 2.0**-20), _least(dtype) / 2 * (1 + 2.0**-20)
    return (0.0, 0.0) if torch.promote_types(stored, dtype) == dtype else (_unit(dtype), _least(dtype) / 2)
