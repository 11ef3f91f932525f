# SPDX-License-Identifier: Apache-2.0
"""Random operands of one GEMM of linear_act, by the key of a tuned table: what a race is run on, and why results are wrong."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import op_of, reference
from mpkernels.ops.linear_act.call import ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation, pack_mask, unpack_mask
from mpkernels.runtime.op import without_defaults
from mpkernels.runtime.tuned_table import GemmKey, gemm_key
from mpkernels.testing import bounds, scaled_cases


@dataclass
class Inputs:
    """Random operands of a problem, and what its results must be."""

    problem: GemmKey
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    grad_out: torch.Tensor

    @classmethod
    def random(cls, problem: GemmKey, rows: int, device: torch.device) -> "Inputs":
        _, _, N, K, _, compute, weight, *_ = problem
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((rows, K), (N, K), (N,), (rows, N))
        dtypes = (compute, weight, torch.float32, compute)
        options = {"generator": generator, "dtype": torch.float32, "device": device}
        return cls(problem, *(torch.randn(shape, **options).to(dtype) for shape, dtype in zip(shapes, dtypes)))

    def arguments(self, backend: str, output_mask: tuple[bool, bool, bool]) -> tuple:
        """Of the op, as the layer would call it: kernels for GPUs write and read a mask, the others select by the output."""
        role, _, _, _, activation, compute, _, *dtypes = self.problem
        save = int(op_of(self.problem).kernel(backend, self.x.device).saves_mask and activation != Activation.NONE)
        if role == "fprop":
            call = ForwardCall(self.x, self.weight, self.bias, None, activation, compute, dtypes[0], save)
            if compute.itemsize == 1:
                ones = (self.bias.new_ones(len(operand), 1) for operand in (self.x, self.weight))
                call = call._replace(x_scale=next(ones), weight_scale=next(ones))
            return without_defaults(call)
        out = pack_mask(self._out()) if save else self._out()
        grads = (dtypes[0], dtypes[1], dtypes[1])
        return self.grad_out, self.x, self.weight, None, out, activation, compute, *grads, list(output_mask)

    def wrong(self, results: tuple, output_mask=(True, True, True)) -> str | None:
        """Why results of the op are wrong, or None."""
        role, _, N, _, activation, compute, *_ = self.problem
        weight = cast(self.weight, compute).double()
        if role == "fprop":
            out, saved, *_ = results
            if saved.numel() and not torch.equal(unpack_mask(saved, N), ~(out <= 0)):
                return "the mask is not that of the output"
            exact = reference.linear_act(self.x, self.weight, self.bias, activation, compute)
            return _outside("out", out, exact, self.x, weight.T, self.bias.double().abs(), compute)
        grad_z = self.grad_out
        positive = self._out() > 0 if activation != Activation.NONE else None
        expected = reference.linear_act_backward(grad_z, self.x, self.weight, positive, compute)
        grad_z = grad_z if positive is None else torch.where(positive, grad_z, 0)
        factors = ((grad_z, weight), (grad_z.T, self.x), (torch.ones_like(grad_z[:, 0]), grad_z))
        parts = zip(("grad_x", "grad_weight", "grad_bias"), results, expected, factors, output_mask, strict=False)
        reasons = [_outside(name, got, r, *pair, 0, compute) for name, got, r, pair, wanted in parts if wanted]
        return next(filter(None, reasons), None)

    def _out(self) -> torch.Tensor:
        """What backward takes for the layer's output: of either sign, as random as one."""
        return self.grad_out.roll(1, 0)


def _outside(name: str, got, exact, a, b, bias, compute: torch.dtype) -> str | None:
    """Why a result is further from fp64 than one rounding and the accumulator take it, or None."""
    device = got.device
    v = scaled_cases.roundoff(device, a.shape[-1]) if compute.itemsize == 1 else bounds.accumulator_roundoff(device, compute)
    excess = bounds.random_sign_excess(got, exact, a, b, bias, compute, v)
    return None if excess <= 1 else f"{name} is {excess:.3g} times as far from fp64 as the bound allows"


# ----- the race ---------------------------------------------------------------

_f16, _f32, _bf16, _e4m3 = torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn
RACES = {  # of a part of an op's cases: role, activation and dtypes of the key
    "linear_act": ("fprop", Activation.RELU, _f16, _f16, _f16),
    "linear_act 8-bit": ("fprop", Activation.NONE, _e4m3, _e4m3, _bf16),
    "linear_act_backward": ("backward", Activation.RELU, _f16, _f16, _f16, _f32),
}
_SIZES = {  # M, K, N of a race; in 1 GB with what flushes the cache
    True: ((16, 32, 24), (64, 64, 64), (8, 128, 64), (128, 32, 32)),
    False: ((512, 1024, 4096), (4096, 1024, 4096), (2048, 4096, 4096), (16384, 1024, 1024)),
}


def sizes(part: str, few: bool) -> dict[str, Callable[[str, torch.device], tuple]]:
    """What a race is run on: a name, and what makes the arguments for a backend on a device."""
    return {f"M={M} K={K} N={N}": functools.partial(_racing, part, M, N, K) for M, K, N in _SIZES[few]}


def _racing(part: str, M: int, N: int, K: int, backend: str, device: torch.device) -> tuple:
    role, activation, *dtypes = RACES[part]
    problem = gemm_key(role, M, N, K, activation, *dtypes)
    return Inputs.random(problem, M, device).arguments(backend, (True, True, True))
