# SPDX-License-Identifier: Apache-2.0
"""Bounds that results are held to, by tests, the proof on a GPU and the tuner: one formula for all of them."""

import math

import numpy as np
import torch

from mpkernels.ops.linear_act import Activation, reference

# ----- linear_act: forward and backward ---------------------------------------------------------------
#
# r is the result before its rounding, in fp64 (longdouble where the arithmetic is fp64) on the operands as they were
# rounded; u the unit roundoff of the output, s its least subnormal, v the unit roundoff of the accumulator.

# Factor c of the random-sign bound. A good fp32 GEMM (oneDNN, one thread, 2-core AMD EPYC with AVX-512, 2026-11-23) needs
# up to 3.96: the largest of 3e7 outputs, normal and uniform operands, K=96..576 (longer sums are split and need less);
# one chain of fp32 additions needs 3.56 in 1.6e5 outputs at K=4096. 4 would leave nothing for more outputs than these.
RANDOM_SIGN_FACTOR = 5.0

# Activations other than ReLU, z the pre-activation: values are off by at most VALUE_FACTOR v |z|, slopes by SLOPE_FACTOR v.
# torch's fp32 functions need 5.4 and 17.5 on a CPU with AVX-512 (2e6 points from -12 to 12, 2026-11-24; GELU, its tanh form:
# 1 - tanh**2 times z**3 until tanh is 1, which takes longer in fp64). 8 and 32 are for GPUs, whose exp is off by 2 ulp.
VALUE_FACTOR, SLOPE_FACTOR, SLOPE_FACTOR_FP64 = 8.0, 32.0, 96.0
_STEEPEST = 1.13  # largest |act'| of gelu, gelu_tanh and silu: 1.1290, 1.1290, 1.0998

_FORMATS = {  # dtype: (bits of the significand with the hidden one, exponent of the least subnormal, largest exponent)
    torch.float16: (11, -24, 15),
    torch.bfloat16: (8, -133, 127),
    torch.float32: (24, -149, 127),
    torch.float64: (53, -1074, 1023),
}
_ENOUGH_FOR_NORMS = 1024  # outputs below which a single rounding decides a ratio of norms or a share


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return 2.0 ** -_FORMATS[dtype][0]


def least_subnormal(dtype: torch.dtype) -> float:
    """Smallest positive number of the format."""
    return 2.0 ** _FORMATS[dtype][1]


def overflow_threshold(dtype: torch.dtype) -> float:
    """Smallest magnitude that rounds to inf: 65520 for fp16; longdouble, as fp64's own is not an fp64 number."""
    bits, _, top = _FORMATS[dtype]
    return np.ldexp(np.longdouble(2) - np.ldexp(np.longdouble(1), -bits), top)


def accumulator_roundoff(device: torch.device, compute_dtype: torch.dtype) -> float:
    """v of the op on `device`: tensor cores truncate inside a block."""
    if compute_dtype == torch.float64:
        return 2.0**-53
    return 2.0**-23 if device.type == "cuda" and compute_dtype.itemsize == 2 else 2.0**-24


def gamma(n: int, v: float) -> float:
    """Largest relative error of n roundings in a row."""
    return n * v / (1 - n * v)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """`values` rounded once to `dtype`, to nearest even, kept in their own wide format. Owes nothing to torch's casts."""
    bits, least, _ = _FORMATS[dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        exponent = np.frexp(np.where(np.isfinite(values), values, 0))[1]
        quantum = np.maximum(exponent - bits, least)
        result = np.ldexp(np.rint(np.ldexp(values, -quantum)), quantum)
        return np.where(np.abs(values) >= overflow_threshold(dtype), np.copysign(np.inf, values), result)


def check_forward(out, x, weight, bias, activation, compute_dtype, acc_roundoff=2.0**-24, random_sign=False) -> None:
    """Forward bounds 1 and 7, and with `random_sign` (operands with independent signs) 2 and 3 as well.

    out: (*, N); x: (*, K), weight: (N, K), bias: (N,) or None as they were given to the op; activation: an Activation or
    its int. acc_roundoff: 2**-23 on tensor cores; fp64 arithmetic has its own. Raises AssertionError.
    """
    x, weight, bias, z = _preactivation(x, weight, bias, compute_dtype)
    _check_product(
        "out", _wide(out.reshape(z.shape), compute_dtype), _activated(z, activation), out.dtype, x, weight.T, np.abs(bias),
        compute_dtype, acc_roundoff, random_sign, activation=activation, z=z,
    )  # fmt: skip


def check_backward(grads, grad_out, x, weight, positive, compute_dtype, acc_roundoff=2.0**-24, random_sign=False) -> None:
    """The same bounds for (grad_x, grad_weight, grad_bias), each of which may be None.

    positive: bool (*, N), the implementation's own mask (`check_mask` holds it), or None without an activation.
    grad_z is rounded to compute_dtype for the two products; grad_bias sums it unrounded.
    """
    grad_z, operand = _grad_z(grad_out, positive, compute_dtype)
    ones = np.ones((1, grad_z.shape[0]), grad_z.dtype)
    x, weight = _operand(x, compute_dtype), _operand(weight, compute_dtype)
    products = ((operand, weight), (operand.T, x), (ones, grad_z))
    for name, grad, (a, b) in zip(("grad_x", "grad_weight", "grad_bias"), grads, products, strict=True):
        if grad is not None:
            r = _product(a, b)
            got = _wide(grad.reshape(r.shape), compute_dtype)
            _check_product(name, got, r, grad.dtype, a, b, 0, compute_dtype, acc_roundoff, random_sign)


def check_backward_below(grads, grad_out, weight, positive, positive_below, compute_dtype, acc_roundoff, random_sign) -> None:
    """The same bounds for (grad_x, grad_bias_below or None), grad_x selected by the mask of the layer below, (*, K) or None.

    grad_bias_below sums the accumulators of grad_x before they are rounded: each is off by what N terms may be off by, and
    their sum by what M terms may be off by.
    """
    N, K = weight.shape
    _, operand = _grad_z(grad_out, positive, compute_dtype)
    weight = _operand(weight, compute_dtype)
    kept = np.ones((operand.shape[0], K), bool)
    if positive_below is not None:
        kept = positive_below.reshape(kept.shape).cpu().numpy()
    r = np.where(kept, _product(operand, weight), 0)
    grad_x = _wide(grads[0].reshape(r.shape), compute_dtype)
    assert not grad_x[~kept].any(), "grad_x: a gradient got through the mask of the layer below"
    _check_product("grad_x", grad_x, r, grads[0].dtype, operand, weight, 0, compute_dtype, acc_roundoff, random_sign)
    if grads[1] is None:
        return
    got, rows, (acc, v) = _wide(grads[1], compute_dtype), r.shape[0], _acc(compute_dtype, acc_roundoff)
    lost = _underflow(N * rows, acc)
    with np.errstate(invalid="ignore"):
        magnitude = np.where(kept, _product(np.abs(operand), np.abs(weight)), 0).sum(0)
        _check_sum(got, r.sum(0), gamma(N + rows + 2, v) * magnitude + lost, grads[1].dtype, "bound 1")
        if random_sign:
            spread = np.sqrt(np.where(kept, _product(operand * operand, weight * weight), 0).sum(0))
            allowed = RANDOM_SIGN_FACTOR * (math.sqrt(max(N, 1)) + math.sqrt(max(rows, 1))) * v * spread
            _check_sum(got, r.sum(0), allowed + lost, grads[1].dtype, "bound 2")


def _check_sum(got, r, accumulated, dtype, bound) -> None:
    """grad_bias_below; where terms are not finite, neither may the sum be."""
    finite = np.isfinite(r)
    assert not np.isfinite(got[~finite]).any(), "grad_bias_below, bound 7: finite where the sum is not"
    error, allowed = np.abs(got - r)[finite], _bound(r, accumulated, dtype)[finite]
    _check_error(f"grad_bias_below, {bound}", error, allowed, got[finite], r[finite])


def _wide(tensor: torch.Tensor, compute_dtype: torch.dtype) -> np.ndarray:
    """The values in the format that r is computed in."""
    return tensor.detach().cpu().double().numpy().astype(np.longdouble if compute_dtype == torch.float64 else np.float64)


def _rows(tensor: torch.Tensor, compute_dtype: torch.dtype) -> np.ndarray:
    """(rows, columns)."""
    return _wide(tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]), compute_dtype)


def _operand(tensor: torch.Tensor, compute_dtype: torch.dtype) -> np.ndarray:
    """(rows, K), rounded once to compute_dtype."""
    values = _rows(tensor, compute_dtype)
    return values if tensor.dtype == compute_dtype else rounded(values, compute_dtype)


def _preactivation(x, weight, bias, compute_dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x and weight as they are multiplied, the bias as it is added, and what comes of them."""
    x, weight = _operand(x, compute_dtype), _operand(weight, compute_dtype)
    bias = np.zeros(1) if bias is None else _wide(bias, compute_dtype)
    return x, weight, bias, _product(x, weight.T) + bias


def _grad_z(grad_out: torch.Tensor, positive: torch.Tensor | None, compute_dtype) -> tuple[np.ndarray, np.ndarray]:
    """(rows, N): grad_out where the mask is set, unrounded and as it is multiplied."""
    grad_z = _rows(grad_out, compute_dtype)
    if positive is not None:
        grad_z = np.where(positive.reshape(grad_z.shape).cpu().numpy(), grad_z, 0)
    return grad_z, grad_z if grad_out.dtype == compute_dtype else rounded(grad_z, compute_dtype)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b; fp64 by torch, whose threads the tests limit, longdouble by numpy."""
    if a.dtype == np.longdouble:
        with np.errstate(invalid="ignore", over="ignore"):
            return a @ b
    return (torch.from_numpy(np.ascontiguousarray(a)) @ torch.from_numpy(np.ascontiguousarray(b))).numpy()


def _activated(z: np.ndarray, activation) -> np.ndarray:
    """act(z); of what is not piecewise linear in fp64, whose own error `after_activation` has."""
    if activation == Activation.NONE:
        return z
    if activation == Activation.RELU:
        return np.where(z <= 0, 0, z)  # NaN stays
    return reference.activate(torch.from_numpy(z.astype(np.float64)), activation).numpy().astype(z.dtype)


def after_activation(accumulated, z, activation, v):
    """What act(acc) may be off by where acc is off from z by `accumulated` and arithmetic has roundoff v; arrays or tensors."""
    if activation in (Activation.NONE, Activation.RELU):
        return accumulated
    if activation == Activation.RELU2:
        return (2 * abs(z) + accumulated) * accumulated + 4 * v * z * z
    return _STEEPEST * accumulated + VALUE_FACTOR * v * abs(z)


def _acc(compute_dtype: torch.dtype, acc_roundoff: float) -> tuple[torch.dtype, float]:
    return (torch.float64, 2.0**-53) if compute_dtype == torch.float64 else (torch.float32, acc_roundoff)


def _accumulated(a, b, bias, compute_dtype, acc_roundoff) -> np.ndarray:
    """What the accumulator may be off by, whatever the order of the sum."""
    acc, v = _acc(compute_dtype, acc_roundoff)
    return gamma(a.shape[1] + 2, v) * (_product(np.abs(a), np.abs(b)) + bias) + _underflow(a.shape[1], acc)


def _underflow(products: int, acc_dtype: torch.dtype) -> float:
    """What so many products may lose below the accumulator's least normal number, where a rounding is no longer relative.

    Each is rounded to a multiple of the least subnormal, off by half of it; sums of such multiples are exact.
    """
    return products * least_subnormal(acc_dtype) / 2


def _bound(r, accumulated, dtype):
    """Bound 1 (or 2) with one rounding at the end; of arrays or tensors."""
    u = unit_roundoff(dtype)
    return u * abs(r) + (1 + u) * accumulated + least_subnormal(dtype)


def _check_product(
    name, got, r, dtype, a, b, bias, compute_dtype, acc_roundoff, random_sign, *, activation=Activation.NONE, z=None
) -> None:  # fmt: skip
    """r: act of a @ b + bias, which is z."""
    acc_dtype, v = _acc(compute_dtype, acc_roundoff)
    length = a.shape[1]
    accumulated = _accumulated(a, b, bias, compute_dtype, acc_roundoff)
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = accumulated / gamma(length + 2, v)
        accumulated = after_activation(accumulated, z, activation, v)
        _check_nonfinite(name, got, r, accumulated, magnitude, dtype, acc_dtype)
        finite = np.isfinite(got) & np.isfinite(r)
        error = np.where(finite, np.abs(got - r), 0)
        _check_error(f"{name}, bound 1", error, np.where(finite, _bound(r, accumulated, dtype), 1), got, r)
        if not random_sign:
            return
        spread = np.sqrt(_product(a * a, b * b)) + bias
        accumulated = RANDOM_SIGN_FACTOR * math.sqrt(max(length, 1)) * v * spread + _underflow(length, acc_dtype)
        accumulated = after_activation(accumulated, z, activation, v)
        _check_error(f"{name}, bound 2", error, np.where(finite, _bound(r, accumulated, dtype), 1), got, r)
    if dtype.itemsize == 2 and r.size >= _ENOUGH_FOR_NORMS and finite.all() and length <= 16384 and v <= 2.0**-23:
        norm, best = float(np.linalg.norm(got - r)), float(np.linalg.norm(rounded(r, dtype) - r))
        allowed = 1.001 if length <= 4096 else 1.01
        assert norm <= allowed * best, f"{name}, bound 3: error norm {norm:.6g} is {norm / best:.5f} x the least possible"


def random_sign_excess(got, exact, a, b, bias, compute_dtype, acc_roundoff) -> float:
    """How many times bound 2 a result is off from fp64, all of it on its own device: what is too large for a CPU's fp64.

    exact: fp64 of a @ b plus what `bias`, its magnitude or 0, stands for. NaN where a result is not finite.
    """
    acc_dtype, v = _acc(compute_dtype, acc_roundoff)
    length = a.shape[-1]
    spread = (a.double().square() @ b.double().square()).sqrt() + bias
    accumulated = RANDOM_SIGN_FACTOR * math.sqrt(max(length, 1)) * v * spread + _underflow(length, acc_dtype)
    return float(((got.double() - exact).abs() / _bound(exact, accumulated, got.dtype)).max())


def _check_error(name, error, bound, got, r) -> None:
    if not error.size:
        return
    ratio = error / bound
    at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    assert ratio[at] <= 1, (
        f"{name}: element {tuple(int(i) for i in at)} is {got[at]:.9g} for {r[at]:.9g}, "
        f"error {error[at]:.4g} is {ratio[at]:.4g} x the bound; {int((ratio > 1).sum())} of {ratio.size} are outside"
    )


def _check_nonfinite(name, got, r, accumulated, magnitude, dtype, acc_dtype) -> None:
    """Bound 7. Overflow is decided by the accumulator, which is within `accumulated` of r.

    Where the terms could overflow the accumulator although they cancel in r, the order of the sum decides: not judged.
    """
    threshold = overflow_threshold(dtype)
    may_cancel = np.isfinite(r) & (magnitude >= overflow_threshold(acc_dtype)) & (np.abs(r) + accumulated < magnitude)
    overflows = np.abs(r) - accumulated >= threshold
    stays = np.isfinite(r) & (np.abs(r) + accumulated < threshold)
    wrong = np.where(np.isnan(r), ~np.isnan(got), np.isnan(got))
    wrong |= np.isinf(r) & (got != r)
    wrong |= overflows & (got != np.copysign(np.inf, r))
    wrong |= stays & ~np.isfinite(got)
    wrong |= np.isinf(got) & (np.sign(got) != np.sign(r)) & ~np.isnan(r)
    wrong &= ~may_cancel
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(f"{name}, bound 7: element {at} is {got[at]} for {r[at]:.9g}; {int(wrong.sum())} are wrong")


# ----- optimizer steps ---------------------------------------------------------------

_MOMENT_ROUNDINGS = 6  # operations of a moment, each on values up to `magnitude`
_STEP_ROUNDINGS = 20  # of a weight, those of its moments and scalars included


# torch's cascade over 2^18 elements: 16 additions at each of three levels, up to 8 at the last, 4 to join the levels, 7 to join
# 4 rows and 16 lanes, rounded up for how what is left over is joined.
_CASCADE = 100


def check_norm(norm: float, exact: float, n: int, in_fp32: bool = False) -> None:
    """A norm of n elements summed in fp64, in whatever order.

    in_fp32: squares of 16-bit elements, exact there, are first summed in fp32, up to 2^18 of them, by torch's cascade. The
    relative error of a sum of squares is that of the worst part, and its root has half of it.
    """
    relative = gamma(n + 4, unit_roundoff(torch.float64))
    if in_fp32:
        relative += gamma(_CASCADE, unit_roundoff(torch.float32)) / 2
    allowed = relative * exact
    assert abs(norm - exact) <= allowed, f"grad_norm is {norm!r}, exactly {exact!r}: off by more than {allowed:.4g}"


def check_stepped(got: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, arithmetic: torch.dtype) -> None:
    """One step of a weight from stored moments: they are rounded after their use, so only the arithmetic is between them."""
    _check_error("weight", np.abs(got - exact), gamma(_STEP_ROUNDINGS, unit_roundoff(arithmetic)) * magnitude, got, exact)


def check_moment(got: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, nearest: bool, arithmetic: torch.dtype) -> None:
    """One step of a bf16 moment from its stored predecessor: one rounding, to nearest or to either side."""
    u = unit_roundoff(torch.bfloat16) * (1 if nearest else 2)
    error = gamma(_MOMENT_ROUNDINGS, unit_roundoff(arithmetic)) * magnitude
    _check_error(
        "moment", np.abs(got - exact), u * np.abs(exact) + (1 + u) * error + least_subnormal(torch.bfloat16), got, exact
    )


def check_sign_step(got, w, direction, size, lr, decay, arithmetic: torch.dtype) -> None:
    """One step of Lion: w * decay - lr * sign(direction), which is a sum of terms whose magnitudes add up to `size`.

    Nearer to 0 than its 6 roundings (factor, constants, products, sum) the direction may have another sign.
    """
    u, exact = unit_roundoff(arithmetic), w * decay - lr * np.sign(direction)
    is_near = (size > 0) & (np.abs(direction) <= gamma(6, u) * size + 4 * least_subnormal(arithmetic))
    _check_error("weight", np.abs(got - exact), gamma(4, u) * (np.abs(w) + lr) + is_near * 2 * lr, got, exact)
