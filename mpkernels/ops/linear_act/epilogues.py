# SPDX-License-Identifier: Apache-2.0
"""What linear_act does to its accumulator: a row per activation, in plain torch, and what backward reads of a forward.

    out = round(act(z))                                z = x @ weight.T + bias, the preactivation
    grad_z = grad_out * act'(saved)                    selected where the activation is a ReLU, times the slope elsewhere

kernels_triton.py and csrc/linear_act have the same formulas as branches, reference.py in fp64.
"""

import enum
import math
import typing
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from mpkernels.ops.common.cast import cast
from mpkernels.runtime.op import Op


class Activation(enum.IntEnum):
    """The activation as the schema carries it: a `str` argument of a compiled op leaks."""

    NONE = 0
    RELU = 1
    RELU2 = 2
    GELU = 3
    GELU_TANH = 4
    SILU = 5


ActivationName = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"]
_NAMES = {None: Activation.NONE} | {a.name.lower(): a for a in Activation if a != Activation.NONE}


def activation_of(name: str | None) -> Activation:
    """None or `"relu"`, `"relu2"`, `"gelu"`, `"gelu_tanh"`, `"silu"` as an Activation; ValueError for another name."""
    if name not in _NAMES:
        known = ", ".join(f'"{known}"' for known in _NAMES if known)
        raise ValueError(f"activation must be None or one of {known}, got {name!r}")
    return _NAMES[name]


def name_of(activation: Activation) -> ActivationName | None:
    """The inverse of activation_of."""
    return None if activation == Activation.NONE else typing.cast(ActivationName, activation.name.lower())


def acc_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """dtype of the accumulator."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


# ----- formulas ---------------------------------------------------------------

# torch's fused GELU, SiLU and sigmoid have other bits in the vectors of a tensor than in what is left over behind them; its
# exp, tanh and erf do not, nor does arithmetic. So activations are made of those, by segments that stay in the cache.

_SEGMENT = 1 << 15  # elements of a thread
STEEP = 1000.0  # from here on slopes of gelu and silu are 0 or 1 in fp64 too, and at infinity their formulas are NaN
TANH, CUBE = math.sqrt(2 / math.pi), 0.044715


def _normal_cdf(z):
    return (z * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)


def _tanh_term(z):
    return (z * z).mul_(TANH * CUBE).add_(TANH).mul_(z).tanh_()


def _gelu_slope(z):
    return (z * z).mul_(-0.5).exp_().mul_(z).mul_(1 / math.sqrt(2 * math.pi)).add_(_normal_cdf(z))


def _gelu_tanh_slope(z):
    t = _tanh_term(z)
    inner = (z * z).mul_(3 * TANH * CUBE).add_(TANH).mul_(z)
    return inner.mul_(1 - t).add_(1).mul_(t.add_(1)).mul_(0.5)


def _silu_slope(z):
    s = torch.neg(z).exp_().add_(1).reciprocal_()
    return (1 - s).mul_(z).add_(1).mul_(s)


def _times(slope):
    """grad * slope(z), in place of the gradient."""
    return lambda grad, z: grad.mul_(slope(z.clamp(-STEEP, STEEP)))


class Epilogue(NamedTuple):
    """An activation. forward_: act(z), which overwrites z; graph: the same as graphs have it, where nothing is overwritten.

    backward_: grad_z, which overwrites grad, from (grad, z) in the accumulator's dtype; None: grad is selected by a mask, or
    is grad_z. saves: what backward reads. backends: the implementations that have it.
    """

    forward_: Callable
    graph: Callable
    backward_: Callable | None
    saves: Literal["nothing", "mask", "preactivation"]
    backends: frozenset[str]


_ALL = frozenset({"eager", "cpu", "sm90", "triton"})
_NOT_SM90 = _ALL - {"sm90"}

EPILOGUES = {
    Activation.NONE: Epilogue(lambda z: z, lambda z: z, None, "nothing", _ALL),
    Activation.RELU: Epilogue(torch.relu_, torch.relu, None, "mask", _ALL),
    Activation.RELU2: Epilogue(
        lambda z: z.relu_().square_(),
        lambda z: torch.relu(z).square(),
        lambda grad, z: grad.mul_(2 * z).masked_fill_(z <= 0, 0),
        "preactivation",
        _NOT_SM90,
    ),
    Activation.GELU: Epilogue(
        lambda z: z.mul_(_normal_cdf(z)),
        lambda z: z * (0.5 * (1 + torch.erf(z * math.sqrt(0.5)))),
        _times(_gelu_slope),
        "preactivation",
        _NOT_SM90,
    ),
    Activation.GELU_TANH: Epilogue(
        lambda z: z.mul_(_tanh_term(z).add_(1).mul_(0.5)),
        lambda z: z * (0.5 * (1 + torch.tanh(z * (z * z * (TANH * CUBE) + TANH)))),
        _times(_gelu_tanh_slope),
        "preactivation",
        _NOT_SM90,
    ),
    Activation.SILU: Epilogue(
        lambda z: z.div_(torch.neg(z).exp_().add_(1)),
        lambda z: z / (1 + torch.exp(-z)),
        _times(_silu_slope),
        "preactivation",
        _NOT_SM90,
    ),
}


def why_not(backend: str, activation: int) -> str | None:
    """Why an implementation cannot serve an activation, or None."""
    if backend in EPILOGUES[activation].backends:
        return None
    return f"has no {Activation(activation).name.lower()}"


# ----- forward and backward ---------------------------------------------------------------


def finish(z, activation, preactivation, out_dtype):
    """round(act(z)); z is overwritten, and is rounded into `preactivation` where that is given."""
    if preactivation is not None:
        preactivation.copy_(cast(z, preactivation.dtype))
    if activation == Activation.RELU:
        z.relu_()
    elif activation != Activation.NONE:
        for segment in _segments(z):
            EPILOGUES[activation].forward_(segment)
    return cast(z, out_dtype)


def activation_backward(activation, saved, grad, compute_dtype):
    """The gradient before the activation: `grad` selected by a ReLU's mask or output, else times the slope at `saved`."""
    backward_ = EPILOGUES[activation].backward_
    if backward_ is None:
        return _select(saved, grad)
    acc = acc_dtype(compute_dtype)
    if Op.is_tracing():  # of a new tensor vmap does not know that it is one of a batch, of one made of both it does
        return backward_(torch.where(saved == 0, grad, grad).to(acc), saved.to(acc))
    out = torch.empty(grad.shape, dtype=acc, device=grad.device).copy_(grad)
    for segment, z in zip(_segments(out), _segments(saved.contiguous()), strict=True):
        backward_(segment, z.to(acc))
    return out


def _segments(tensor):
    """Views of a contiguous tensor that hold all of it."""
    return tensor.view(-1).split(_SEGMENT * torch.get_num_threads()) if tensor.is_cpu else (tensor,)


def _select(saved, grad_z):
    """grad_z where the output was positive or NaN, else 0; selects, so that an inf behind a 0 does not become NaN."""
    if saved.dtype == torch.int32:
        return torch.where(unpack_mask(saved, grad_z.shape[1]), grad_z, 0)
    saved = saved.reshape(grad_z.shape)
    if saved.dtype == grad_z.dtype:
        return torch.ops.aten.threshold_backward(grad_z, saved, 0)
    return torch.where(saved <= 0, 0, grad_z)


# ----- what is saved ---------------------------------------------------------------

GATHER = 0x0102040810204080  # times 8 bytes that are 0 or 1: bit i of the upper byte is byte i; no two terms meet


def mask_pitch(columns: int) -> int:
    """Words from one row of the mask to the next: a multiple of 4, so that rows start at 16 bytes."""
    return (columns + 127) // 128 * 4


def empty_mask(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """An uninitialized mask for `rows` x `columns` outputs, on the device of `like`."""
    words = (columns + 31) // 32
    return like.new_empty_strided((rows, words), (mask_pitch(columns), 1), dtype=torch.int32)


def empty_saved(x: torch.Tensor, columns: int, activation: int, compute_dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory for what `activation` saves of an output of `columns` for each row of x (*, K)."""
    rows, saves = math.prod(x.shape[:-1]), EPILOGUES[activation].saves
    if saves == "nothing":
        return x.new_empty(0, dtype=torch.int32)
    if saves == "mask":
        return empty_mask(x, rows, columns)
    return x.new_empty((rows, columns), dtype=compute_dtype)


def pack_mask(out: torch.Tensor) -> torch.Tensor:
    """The mask of `not (out <= 0)` for out (M, N)."""
    M, N = out.shape
    mask = empty_mask(out, M, N)
    if not mask.numel():
        return mask
    eights = F.pad(~(out <= 0), (0, mask.shape[1] * 32 - N)).view(torch.int64)  # 8 bytes that are 0 or 1
    mask.copy_(((eights * GATHER) >> 56).to(torch.uint8).view(torch.int32))
    return mask


def unpack_mask(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """(M, columns) bool from the mask."""
    if not mask.numel():
        return torch.empty((mask.shape[0], columns), dtype=torch.bool, device=mask.device)
    bits = torch.ones((), dtype=torch.uint8, device=mask.device) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask.contiguous().view(torch.uint8).unsqueeze(-1) & bits) != 0).flatten(1)[:, :columns]
