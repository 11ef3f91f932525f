# SPDX-License-Identifier: Apache-2.0
"""Every bound that a test compares with; no test has a tolerance of its own.

Those that the proof on a GPU and the tuner share are in mpkernels/testing/bounds.py.
"""

import math

import numpy as np
import torch

from mpkernels.ops.linear_act import Activation, reference
from mpkernels.ops.quantize import reference as quantize_reference
from mpkernels.testing.bounds import (
    _ENOUGH_FOR_NORMS,
    RANDOM_SIGN_FACTOR,
    SLOPE_FACTOR,
    SLOPE_FACTOR_FP64,
    VALUE_FACTOR,
    _acc,
    _accumulated,
    _activated,
    _bound,
    _check_error,
    _check_nonfinite,
    _preactivation,
    _underflow,
    _wide,
    accumulator_roundoff,
    check_backward,
    check_backward_below,
    check_forward,
    check_moment,
    check_norm,
    check_sign_step,
    check_stepped,
    gamma,
    least_subnormal,
    overflow_threshold,
    rounded,
    unit_roundoff,
)

__all__ = [  # with what is defined here
    "RANDOM_SIGN_FACTOR",
    "VALUE_FACTOR",
    "accumulator_roundoff",
    "check_backward",
    "check_backward_below",
    "check_forward",
    "check_moment",
    "check_norm",
    "check_sign_step",
    "check_stepped",
    "overflow_threshold",
]

_BENDING = 0.8  # largest |act''|: 0.7979, 0.7979, 0.5
_BENDING_TIMES_Z = 0.34  # largest |z act''(z)|: 0.3314, 0.3309, 0.3024
_SHARE_CORRECTLY_ROUNDED = {torch.float16: 0.997, torch.bfloat16: 0.9997}
_LONGEST_FOR_SHARES = 1024  # K


def check_mask(positive, x, weight, bias, compute_dtype, out_dtype, acc_roundoff=2.0**-24) -> None:
    """The mask (bool, (*, N)) may differ from fp64's only where the pre-activation is within bound 1 of 0; NaN is 1."""
    x, weight, bias, z = _preactivation(x, weight, bias, compute_dtype)
    got = positive.reshape(z.shape).cpu().numpy()
    accumulated = _accumulated(x, weight.T, np.abs(bias), compute_dtype, acc_roundoff)
    doubtful = np.abs(z) <= _bound(z, accumulated, out_dtype)
    wrong = (got == (z <= 0)) & ~doubtful
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(f"mask: {int(wrong.sum())} wrong bits, first {at}: {got[at]} for the pre-activation {z[at]:.9g}")


def check_rearranged(a, b) -> None:
    """Two results of the same fp32 formula, sums of up to 64 terms in other orders, three deep: normwise."""
    error, norm = (a.double() - b.double()).norm(), b.double().norm()
    assert error <= 3 * math.sqrt(64) * unit_roundoff(torch.float32) * norm, f"{error / norm:.4g} apart, relative"


def check_bias_summed_unrounded(joined, single, rows, compute_dtype) -> None:
    """grad_bias_below beside the sum of the same `rows` terms each rounded to compute_dtype first, both of random signs.

    A rounded term is off by u times itself, and the norm of all columns grows by its share of at most u; without a look at
    the terms only this is known: |joined - single| <= c u sqrt(rows) rms(single), c = 4 for sums of less than sqrt(rows).
    """
    joined, single = joined.double(), single.double()
    allowed = 4 * unit_roundoff(compute_dtype) * math.sqrt(rows) * single.square().mean().sqrt()
    error = (joined - single).abs().max()
    assert error <= allowed, f"grad_bias_below is {error:.4g} away from the layers one by one, allowed {allowed:.4g}"


def check_slope(grad_z, grad_out, saved, activation, compute_dtype, acc_roundoff) -> None:
    """grad_z (M, N), in compute_dtype, is grad_out times the slope of the activation at what was saved, rounded once."""
    z, grad_out = saved.double(), grad_out.reshape(saved.shape).double()
    v = _acc(compute_dtype, acc_roundoff)[1]
    r = (grad_out * reference.slope(z, activation)).numpy(force=True)
    scale = _slope_scale(z, activation, compute_dtype)
    _check_slope(grad_z, r, (v * grad_out.abs() * scale).numpy(force=True), compute_dtype)


def check_slope_of_exact(grad_z, grad_out, x, weight, bias, activation, compute_dtype, acc_roundoff) -> None:
    """The same beside the slope at the exact pre-activation z: what is saved is z off by d = u |z| + (1 + u) acc + s.

    A slope moves by at most |act''| d between there and here; |z act''| and |act''| are bounded, so that the rounding of z
    costs at most 0.34 u |grad_out|, a third of what the rounding of grad_z may; ReLU squared: act'' is 2.
    """
    x, weight, bias, z = _preactivation(x, weight, bias, compute_dtype)
    z = z.astype(np.float64)
    accumulated = _accumulated(x, weight.T, np.abs(bias), compute_dtype, acc_roundoff).astype(np.float64)
    u, v = unit_roundoff(compute_dtype), _acc(compute_dtype, acc_roundoff)[1]
    size = np.abs(_wide(grad_out.reshape(z.shape), torch.float32))
    off = (1 + u) * accumulated + least_subnormal(compute_dtype)
    if activation == Activation.RELU2:
        moved = 2 * (u * np.abs(z) + off) + 8 * v * np.abs(z)
    else:
        moved = _BENDING_TIMES_Z * u + _BENDING * off + _slope_scale(0, activation, compute_dtype) * v
    r = _wide(grad_out.reshape(z.shape), torch.float32) * reference.slope(torch.from_numpy(z), activation).numpy()
    _check_slope(grad_z, r, moved * size, compute_dtype)


def check_summed_slopes(grad_bias, grad_out, saved, activation, compute_dtype, acc_roundoff) -> None:
    """grad_bias sums grad_out times the slope at what was saved, unrounded, over M rows."""
    z, grad_out = saved.double(), grad_out.reshape(saved.shape).double()
    terms, (acc, v) = grad_out * reference.slope(z, activation), _acc(compute_dtype, acc_roundoff)
    scale = _slope_scale(z, activation, compute_dtype)
    accumulated = gamma(len(z) + 2, v) * terms.abs().sum(0) + v * (grad_out.abs() * scale).sum(0)
    accumulated += _underflow(len(z), acc)
    got, r = _wide(grad_bias, torch.float32), terms.sum(0).numpy(force=True)
    allowed = _bound(r, accumulated.numpy(force=True), grad_bias.dtype)
    _check_error("grad_bias, bound 1", np.abs(got - r), allowed, got, r)


def _slope_scale(z, activation, compute_dtype):
    """What a slope may be off by, in v; the product with grad_out included."""
    if activation == Activation.RELU2:
        return 8 * z.abs()
    return SLOPE_FACTOR_FP64 if compute_dtype == torch.float64 else SLOPE_FACTOR


def _check_slope(grad_z, r, accumulated, compute_dtype) -> None:
    got = _wide(grad_z.reshape(r.shape), torch.float32)
    with np.errstate(invalid="ignore"):
        # |r| is its own magnitude: one product, in which nothing cancels
        _check_nonfinite("grad_z", got, r, accumulated, np.abs(r), compute_dtype, compute_dtype)
        finite = np.isfinite(got) & np.isfinite(r)
        error = np.where(finite, np.abs(got - r), 0)
        _check_error("grad_z, bound 1", error, np.where(finite, _bound(r, accumulated, compute_dtype), 1), got, r)


def check_correctly_rounded(out, x, weight, bias, activation, compute_dtype) -> None:
    """Forward bound 4: the share of 16-bit outputs that are r rounded; on a CPU, random signs, K <= 1024, no activation."""
    assert weight.shape[1] <= _LONGEST_FOR_SHARES, "bound 4 holds up to K = 1024"
    assert out.numel() >= _ENOUGH_FOR_NORMS, "bound 4 needs more outputs"
    r = _exact(x, weight, bias, activation, compute_dtype)
    share = (_wide(out.reshape(r.shape), compute_dtype) == rounded(r, out.dtype)).mean()
    least = _SHARE_CORRECTLY_ROUNDED[out.dtype]
    assert share >= least, f"out: {share:.4%} of the outputs are correctly rounded, expected {least:.2%}"


def check_not_worse_than(out, torch_out, x, weight, bias, activation, compute_dtype) -> None:
    """Forward bound 5: the maximal error beside that of torch's own result in the same dtype; fp32 normwise as well."""
    r = _exact(x, weight, bias, activation, compute_dtype)
    error, torchs = (np.abs(_wide(t.reshape(r.shape), compute_dtype) - r) for t in (out, torch_out))
    if out.dtype.itemsize == 2:
        allowed = 1.05 * torchs.max(initial=0)
    else:
        allowed = 2 * torchs.max(initial=0) + unit_roundoff(out.dtype) * np.abs(r).max(initial=0)
        norms = np.linalg.norm(error.astype(np.float64)), np.linalg.norm(torchs.astype(np.float64))
        assert norms[0] <= 3 * norms[1] or r.size < _ENOUGH_FOR_NORMS, f"out: error norm {norms[0]:.4g}, torch's {norms[1]:.4g}"
    assert error.max(initial=0) <= allowed, f"out: error {error.max():.4g} where torch's is {torchs.max():.4g}"


def check_no_farther(error: float, other: float) -> None:
    """Two ways through the same kernels: error norms against fp64 that differ at random alone."""
    assert error <= 1.05 * other, f"error norm {error:.4g}, of the other way {other:.4g}"


def check_loss(loss: float, fp32: float, dtype: torch.dtype) -> None:
    """The first loss of a model whose linears compute in `dtype`, beside that of the same model in fp32."""
    allowed = 16 * unit_roundoff(dtype) * abs(fp32)
    assert abs(loss - fp32) <= allowed, f"the first loss is {loss:.6g}, in fp32 {fp32:.6g}: off by more than {allowed:.3g}"


def check_quantized(back, x, scale, dtype) -> None:
    """|back - x| <= u |x| + scale * s / 2: one rounding to eight bits, u the unit roundoff, s the least subnormal."""
    x, error = x.double().cpu(), (back.double().cpu() - x.double().cpu()).abs()
    allowed = _quantized(x, scale.double().cpu(), dtype)
    assert (error <= allowed).all(), f"bound of {dtype}: error {(error / allowed).max():.4g} of what is allowed"


def check_quantized_product(out, x, weight, dtype) -> None:
    """out (M, N) of rows that were quantized to `dtype`, beside x @ weight.T: what the sums and their terms may be off by."""
    (a, off_a), (b, off_b) = (
        (t.double(), _quantized(t.double(), quantize_reference.quantize(t, dtype, -1)[1], dtype)) for t in (x, weight)
    )
    error, u = (out.double() - a @ b.T).abs(), unit_roundoff(out.dtype)
    allowed = off_a @ b.abs().T + a.abs() @ off_b.T + off_a @ off_b.T
    allowed += (u + gamma(x.shape[1] + 2, unit_roundoff(torch.float32))) * ((a.abs() + off_a) @ (b.abs() + off_b).T)
    assert (error <= allowed).all(), f"bound of {dtype}: error {(error / allowed).max():.4g} of what is allowed"


def _quantized(x, scale, dtype) -> torch.Tensor:
    """What a number may lose by one rounding to eight bits."""
    u, s = {torch.float8_e4m3fn: (2.0**-4, 2.0**-9), torch.float8_e5m2: (2.0**-3, 2.0**-16)}[dtype]
    return u * x.abs() + scale * s / 2


# ----- optimizer steps ---------------------------------------------------------------
#
# A trajectory is (steps, n): all weights after each step. R: the reference in fp64 on the same rounded gradients
# (longdouble where masters are fp64); P: torch's for-loop optimizer in fp32.

_NORM_FOLLOWS_FP32 = 1e-3  # relative, what is left of it where unscaled fp16 gradients would be subnormal


def check_trajectory(w: np.ndarray, r: np.ndarray, p: np.ndarray | None) -> None:
    """Bound 8 after every step; `p` is None for fp64 masters."""
    error, largest = _largest(w - r), _largest(r)
    if p is None:
        allowed = 64 * np.arange(1, len(r) + 1) * np.longdouble(2) ** -53 * largest
    else:
        allowed = 2 * _largest(p - r) + 4 * unit_roundoff(torch.float32) * largest
    wrong = ~(error <= allowed)
    if wrong.any():
        t = int(np.argmax(wrong))
        raise AssertionError(
            f"bound 8: after step {t + 1} the largest error is {error[t]:.4g}, allowed {allowed[t]:.4g}; "
            f"{int(wrong.sum())} of {len(r)} steps are outside"
        )


def check_norm_follows_fp32(norm: float, fp32: float) -> None:
    """Bound 10: the norm of scaled fp16 gradients beside that of the fp32 gradients they were rounded from."""
    assert abs(norm - fp32) <= _NORM_FOLLOWS_FP32 * fp32, f"grad_norm is {norm:.6g}, of the fp32 gradients {fp32:.6g}"


def check_learns_as_fp32(moved: np.ndarray, fp32: np.ndarray, grad_dtype: torch.dtype) -> None:
    """Bound 10: how far weights moved, beside fp32 gradients; gradients rounded once to grad_dtype, fp32 masters near 1."""
    allowed = 2 * unit_roundoff(grad_dtype) * np.abs(fp32) + 2 * unit_roundoff(torch.float32)
    wrong = ~(np.abs(moved - fp32) <= allowed)
    assert not wrong.any(), f"bound 10: {int(wrong.sum())} of {wrong.size} weights moved otherwise than with fp32 gradients"


def _largest(values: np.ndarray) -> np.ndarray:
    return np.abs(values).max(axis=1)


# ----- moments in bf16 ---------------------------------------------------------------
#
# exp_avg, momentum_buffer and max_exp_avg_sq are rounded to nearest, exp_avg_sq to either side with the probability that makes
# its mean right. To nearest and with beta2 = 0.999 it would never fall, as (1 - beta2) v is less than half a last place, and
# rise only where g^2 > 3..5 v: of the gradients of test_state_dtype.py, ten times smaller from step 500 on, it is 1.55 to 1.74
# times too large at step 1,000 and stays there.

_UNLIKELY = 1e-12  # that a sound implementation fails, for one element
_HOEFFDING = math.sqrt(math.log(2 / _UNLIKELY) / 2)  # P(|sum| > c s) <= 2 exp(-2 c^2); s^2 the sum of the widths' squares


def check_follows_mean(got: np.ndarray, exact: np.ndarray, beta2: float) -> None:
    """(steps, n) of exp_avg_sq as stored and in fp64: errors are a martingale whose increments are below one last place.

    Each element by Hoeffding's inequality, and the mean over the n elements too, which what is biased fails. Measured over
    the gradients of test_state_dtype.py: 0.51 of the bound of one element (16 % of v), 0.21 of the mean's (0.11 % of v).
    """
    width = 2 * unit_roundoff(torch.bfloat16) * np.exp2(np.floor(np.log2(np.maximum(got, least_subnormal(torch.bfloat16)))))
    squares = np.zeros(got.shape[1])
    for t in range(len(got)):
        squares = beta2**2 * squares + width[t] ** 2
        deviation = (got[t] - exact[t]) / np.sqrt(squares)
        largest, mean = np.abs(deviation).max(), abs(deviation.mean()) * math.sqrt(deviation.size)
        assert largest <= _HOEFFDING, f"after step {t + 1} an element is off by {largest / _HOEFFDING:.3g} x the bound"
        assert mean <= _HOEFFDING, f"after step {t + 1} the mean is off by {mean / _HOEFFDING:.3g} x the bound"


def check_bfloat16_moments(w: np.ndarray, r: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, betas, eps: float) -> None:
    """The weights (steps, n) of an AdamW with bf16 moments beside the reference's r, whose moments are m and v.

    The moments' errors, as bounded above, add up along the way: lr (E_m + |m| E_v / 2v) / sqrt(v) a step, bias-corrected.
    Measured there: 0.57 of it; norm of the error 0.7 % of the way gone.
    """
    u, (beta1, beta2) = unit_roundoff(torch.bfloat16), betas
    error_m, squares, allowed = np.zeros(w.shape[1]), np.zeros(w.shape[1]), np.zeros(w.shape[1])
    for t in range(len(w)):
        # what a step takes is rounded only afterwards: the errors are those of the step before
        root = np.sqrt(v[t]) / math.sqrt(1 - beta2 ** (t + 1)) + eps
        relative = np.minimum(_HOEFFDING * np.sqrt(squares) / np.maximum(v[t], np.finfo(np.float64).tiny), 0.75)
        worst = 1 / np.sqrt(1 - relative) - 1
        allowed += lr / (1 - beta1 ** (t + 1)) * (beta1 * error_m * (1 + worst) + np.abs(m[t]) * worst) / root
        wrong = ~(np.abs(w[t] - r[t]) <= allowed + 8 * (t + 1) * unit_roundoff(torch.float32) * np.abs(r).max())
        assert not wrong.any(), f"after step {t + 1} {int(wrong.sum())} of {wrong.size} weights are outside"
        error_m = beta1 * error_m * (1 + u) + u * np.abs(m[t])
        squares = beta2**2 * squares + (2 * u * v[t] * (1 + relative)) ** 2


# ----- whole models ---------------------------------------------------------------


def check_model_not_worse_than(out: torch.Tensor, torch_out: torch.Tensor, exact: torch.Tensor) -> None:
    """Forward bound 5 for a model: the error beside that of the plain model in torch's same precision, normwise.

    The largest of errors that went through many roundings is chance; their norm is not, of enough outputs.
    """
    assert out.numel() >= _ENOUGH_FOR_NORMS or out.shape[-1] == 2, "bound 5 of a model needs more outputs"
    error, torchs = (float((t.detach().double() - exact).norm()) for t in (out, torch_out))
    assert error <= 1.05 * torchs, f"error norm {error:.4g} where torch's is {torchs:.4g}"


def check_merged(merged: torch.Tensor, before: torch.Tensor, exact: torch.Tensor) -> None:
    """Outputs of a model whose adapters were added to its weights, beside its own before, normwise."""
    error, befores = (float((t.detach().double() - exact).norm()) for t in (merged, before))
    assert error <= 2 * befores, f"error norm {error:.4g} with merged weights, before {befores:.4g}"


def check_trained_loss(losses: list[float], fp32: list[float]) -> None:
    """What training ends at, within 2 % of fp32; the mean of the last tenth."""
    last = max(len(fp32) // 10, 1)
    got, expected = (float(np.mean(values[-last:])) for values in (losses, fp32))
    assert abs(got - expected) <= 0.02 * expected, f"the loss is {got:.5g}, {expected:.5g} in fp32"


def _exact(x, weight, bias, activation, compute_dtype) -> np.ndarray:
    return _activated(_preactivation(x, weight, bias, compute_dtype)[-1], activation)
