# SPDX-License-Identifier: Apache-2.0
"""linear_act: a linear layer with its activation, one rounding at the end.

    out = round(act(x @ weight.T + bias))              acc in fp32 (fp64 for fp64)
    grad_z = grad_out * act'(saved)                    grad_bias = grad_z.sum(0)
    grad_x = grad_z @ weight                           grad_weight = grad_z.T @ x

Backward can do the streaming pass of the layer below, whose output is x, in the epilogue of its own grad_x:

    grad_z_below = grad_x * act'(saved_below)          grad_bias_below = grad_z_below.sum(0)

Then grad_z_below stands where grad_x does, and the layer below, which `moved_up`, takes it as it is.

Shapes and dtypes
    | tensor      | shape                | dtype                                                       |
    | x           | (*, K)               | any; cast once to compute_dtype where it differs            |
    | weight      | (N, K)               | any; cast to compute_dtype in the kernel, or weight_copy    |
    | bias        | (N,)                 | any; added in the accumulator's dtype, never rounded before |
    | weight_copy | (N, K)               | compute_dtype: the weight already cast (read in its place)  |
    | out         | (*, N)               | out_dtype                                                   |
    | saved       | (M, ceil(N/32)) or 0 | ReLU: int32, bit j of word w is column 32w+j, tail bits 0   |
    |             | (M, N) or 0          | other activations: compute_dtype, x @ weight.T + bias       |
    | x_compute   | (*, K) or 0          | compute_dtype: x as it was cast, kept for backward          |
    | saved_below | as saved, of x       | what the forward of the layer below saved, or x itself      |
    | bias_below  | (K,)                 | any; the layer below's: its values are not read             |
    "any" is fp16, bf16, fp32, fp64. M is the product of the leading dimensions. Any stride, any size, 0 included.

Numerics
    Operands are rounded to compute_dtype once; products and sums are fp32 (fp64 for fp64), no partial sum is narrower;
    out, grad_x, grad_weight and grad_bias are rounded once, to their own dtype. grad_z is rounded to compute_dtype for
    the two GEMMs; grad_bias sums it unrounded, grad_bias_below the accumulator. Bounds: tests/bounds.py.
    With `batch_invariant` a row of out has the same bits whatever the other rows are and however many: one order of the
    sum, by K and N alone. On a CPU M=1 pays for it, and in bf16 every M where pairs of numbers are multiplied (AMX).

Activations, and what they save for backward, besides x
    | activation | act(z)                                                        | saved, bits per element        |
    | none       | z                                                             | 0                              |
    | relu       | z where not (z <= 0), else 0                                  | 1, or out (the next layer's x) |
    | relu2      | relu(z) ** 2                                                  | those of compute_dtype: z      |
    | gelu       | z * (1 + erf(z / sqrt(2))) / 2                                | those of compute_dtype: z      |
    | gelu_tanh  | z * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3))) / 2      | those of compute_dtype: z      |
    | silu       | z / (1 + exp(-z))                                             | those of compute_dtype: z      |
    ReLU: `save=1` writes the mask of `not (out <= 0)`, taken from the rounded output: 0 at zeros and at underflow, 1 at NaN.
    With `save=0` backward selects by `out` itself, which autograd keeps. It selects and never multiplies.
    The others need `save=1` where there is a backward, and multiply in the accumulator's dtype. z is rounded once for it,
    which moves grad_z by at most 0.34 unit roundoffs of compute_dtype times grad_out (gelu and silu; relu2: as grad_z's own
    rounding). NaN and inf go through as in torch, but for one case: where z is infinite, which it also is where it overflowed
    float16 when it was saved, the slope is the limit (0 or 1, relu2: inf), and torch's formula gives NaN.

Raises
    RuntimeError for shapes, dtypes, devices or layouts that do not fit, as torch does, before anything is computed.
    TypeError for what is not a tensor. RuntimeError for double backward.

Source: torch.nn.functional.linear, torch.relu, ATen threshold_backward.
"""

import enum
import inspect
import math
import sys
from typing import Literal, cast

import torch

from mpkernels.ops.common.cast import DTYPES
from mpkernels.ops.linear_act import flops
from mpkernels.runtime.dispatch import Implementation, Op
from mpkernels.runtime.tuned_table import problem


class Activation(enum.IntEnum):
    """The activation as the schema carries it: a `str` argument of a compiled op leaks."""

    NONE = 0
    RELU = 1
    RELU2 = 2
    GELU = 3
    GELU_TANH = 4
    SILU = 5


_ACTIVATIONS = frozenset(map(int, Activation))
_DTYPES = frozenset(DTYPES)


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
    return None if activation == Activation.NONE else cast(ActivationName, activation.name.lower())


def acc_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """dtype of the accumulator."""
    return torch.promote_types(compute_dtype, torch.float32)


class Seam:
    """Between two layers, the upper one of which alone reads what the lower returns: what moves up in backward.

    The lower layer's forward gets it as `above`, and fills it where kernels do the upper one's dgrad; the upper layer's
    gets it as `below`.
    """

    __slots__ = ("activation", "bias", "moved", "saved")

    def __init__(self):
        self.moved, self.saved, self.activation, self.bias = False, None, Activation.NONE, None


def linear_act(
    x, weight, bias=None, weight_copy=None, *, activation, compute_dtype, out_dtype, grad_dtype=None,
    batch_invariant=False, below: Seam | None = None, above: Seam | None = None,
):  # fmt: skip
    """`out` (*, N) in `out_dtype`; see the module. Differentiable once in x, weight and bias.

    activation: an Activation. grad_dtype: dtype of the gradients of weight and bias; None means their own.
    above: filled, and then has to be the `below` of the one call that reads `out`; gradients are wrong otherwise.
    """
    check_are_tensors(x, weight, bias)
    if type(weight) not in _PLAIN and _is_dtensor(weight):
        from mpkernels.ops.linear_act import sharding

        sharding.check(weight, bias, activation, out_dtype)
    compiling, with_grad = torch.compiler.is_compiling(), torch.is_grad_enabled()
    tuned, call, save, moves = None, None, 0, False
    if with_grad and (activation != Activation.NONE or above is not None):
        if not compiling:
            known = (x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, 0, batch_invariant)
            tuned, call = forward_op.tuned(*known), forward_op.gpu_call(x.device, *known)
        mask = (above is not None or activation == Activation.RELU) and writes_mask(x.device, compute_dtype, tuned, call)
        # A ReLU's mask is for kernels: torch selects faster by `out` itself.
        save = int(activation != Activation.NONE and (activation != Activation.RELU or mask))
        moves = above is not None and mask
    args = (x, weight, bias, weight_copy, int(activation), compute_dtype, out_dtype, save, batch_invariant, grad_dtype)
    seam = moves or (below is not None and below.moved)
    if seam:
        below = below or Seam()
        args += (moves, below.saved, int(below.activation), below.bias)
    if compiling and torch._C._are_functorch_transforms_active():
        op = _in_aten(batch_invariant)
    elif compiling or torch._C._get_tracing_state() is not None:  # by torch.jit.trace
        op = torch.ops.mpkernels.linear_act
    elif seam or torch._C._are_functorch_transforms_active():
        op = _LinearAct.apply
    elif (with_grad and _require_grad(x, weight, bias)) or torch.autograd.forward_ad._current_level >= 0:
        return _LinearActEager.apply(x, weight, bias, args[3:])
    else:
        op = forward_op
    out, saved, _ = op(*args)
    if moves:
        above.moved, above.saved, above.activation, above.bias = True, saved if save else None, activation, bias
    return out


def _in_aten(batch_invariant: bool):
    """What torch.compile traces below a transform of torch.func, where it can take neither the op nor a Function."""
    from mpkernels.ops.linear_act import decomposition

    if batch_invariant:
        raise RuntimeError("linear_act: batch_invariant does not hold where torch.compile traces a torch.func transform")
    return decomposition.linear_act


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_dtensor(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # imported by whoever made one
    return module is not None and isinstance(tensor, module.DTensor)


def check_are_tensors(x, weight, bias) -> None:
    """Raise TypeError for what is not a tensor; whoever reads a dtype before the op does, calls it before."""
    if isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor)):
        return
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(value, torch.Tensor) and not (value is None and name == "bias"):
            raise TypeError(f"linear_act: {name} must be a Tensor, got {type(value).__name__}")


def _require_grad(x, weight, bias) -> bool:
    return weight.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)


def writes_mask(device, compute_dtype, tuned=None, call=None) -> bool:
    """Whether the forward that serves such a call writes the mask, and its dgrad has an epilogue: kernels for GPUs."""
    return has_mask(forward_op.backend(device, compute_dtype, tuned, call), device)


def has_mask(backend: str, device: torch.device) -> bool:
    """Whether the layer asks that backend for a mask, and its backward selects by it."""
    return backend != "eager" and (backend, device.type) != ("native", "cpu")


# torch.compiler.assume_constant_result does just this, and loads the compiler, seconds long, to do it.
writes_mask._dynamo_marked_constant = True


def mask_pitch(columns: int) -> int:
    """Words from one row of the mask to the next: a multiple of 4, so that rows start at 16 bytes."""
    return (columns + 127) // 128 * 4


def empty_mask(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """An uninitialized mask for `rows` x `columns` outputs, on the device of `like`."""
    words = (columns + 31) // 32
    return like.new_empty_strided((rows, words), (mask_pitch(columns), 1), dtype=torch.int32)


def empty_saved(x: torch.Tensor, columns: int, activation: int, compute_dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory for what `activation` saves of an output of `columns` for each row of x (*, K)."""
    rows = math.prod(x.shape[:-1])
    if activation == Activation.NONE:
        return x.new_empty(0, dtype=torch.int32)
    if activation == Activation.RELU:
        return empty_mask(x, rows, columns)
    return x.new_empty((rows, columns), dtype=compute_dtype)


# ----- checks ---------------------------------------------------------------


# What every call pays for is asked first, in few words; who finds fault calls what finds the words for it.


def _are_good(device: torch.device, *tensors: torch.Tensor | None) -> bool:
    for tensor in tensors:
        if tensor is not None and not (
            tensor.dtype in DTYPES and tensor.layout == torch.strided and not tensor.is_nested and tensor.device == device
        ):
            return False
    return True


def _check_tensors(op: str, **tensors: torch.Tensor | None) -> None:
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else f"layout {tensor.layout}"
            advice = "; a nested x may have layout=torch.jagged" if tensor.is_nested else ""
            raise RuntimeError(f"{op}: {name} must be a dense strided tensor, got {kind}{advice}")
        if tensor.dtype not in DTYPES:
            raise RuntimeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise RuntimeError(f"{op}: {first[0]} is on {first[1]} but {name} is on {tensor.device}")


def _check_weight(op: str, weight, weight_copy, compute_dtype) -> None:
    if weight.dim() != 2:
        raise RuntimeError(f"{op}: weight must have shape (N, K), got {tuple(weight.shape)}")
    if weight_copy is not None and (weight_copy.shape != weight.shape or weight_copy.dtype != compute_dtype):
        raise RuntimeError(
            f"{op}: weight_copy must be {tuple(weight.shape)} {compute_dtype}, "
            f"got {tuple(weight_copy.shape)} {weight_copy.dtype}"
        )


def _check_dtypes(op: str, **dtypes: torch.dtype) -> None:
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise RuntimeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {dtype}")


def _check_activation(op: str, name: str, activation: int) -> None:
    if activation not in _ACTIVATIONS:
        known = ", ".join(f"{a:d} ({a.name})" for a in Activation)
        raise RuntimeError(f"{op}: {name} must be one of {known}, got {activation}")


def _check_saved(op: str, name: str, saved, activation: int, what: str, shape: tuple[int, ...], device) -> None:
    """What backward reads of an output of `shape`: a ReLU's mask or that output, called `what`; else the pre-activation."""
    if activation == Activation.RELU and saved is not None and saved.shape == shape and _are_good(device, saved):
        return
    rows, columns = math.prod(shape[:-1]), shape[-1]
    mask = (rows, (columns + 31) // 32)
    wide = saved is not None and saved.dtype in DTYPES
    if activation == Activation.RELU:
        by_mask = saved is not None and saved.dtype == torch.int32 and saved.shape == mask
        good = by_mask or (wide and saved.shape == shape)
        expected = f"the mask {mask} int32 or {what}"
    else:
        good = wide and saved.shape == (rows, columns)
        expected = f"the pre-activation {(rows, columns)}"
    if not good:
        got = "None" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
        raise RuntimeError(f"{op}: {name} must be {expected}, got {got}")
    if saved.device != device:
        raise RuntimeError(f"{op}: {name} is on {saved.device}, expected {device}")


def _check(
    x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, batch_invariant=False, grad_dtype=None,
    moved_up=False, saved_below=None, activation_below=0, bias_below=None,
) -> None:  # fmt: skip
    if not _are_good(x.device, x, weight, bias, weight_copy, bias_below):
        _check_tensors("linear_act", x=x, weight=weight, bias=bias, weight_copy=weight_copy, bias_below=bias_below)
    if compute_dtype not in DTYPES or out_dtype not in DTYPES:
        _check_dtypes("linear_act", compute_dtype=compute_dtype, out_dtype=out_dtype)
    _check_weight("linear_act", weight, weight_copy, compute_dtype)
    shape, (N, K) = x.shape, weight.shape
    if not shape:
        raise RuntimeError("linear_act: x must have shape (*, K), got a 0-d tensor")
    if shape[-1] != K:
        raise RuntimeError(f"linear_act: x has last dimension {shape[-1]}, weight expects {K}")
    if bias is not None and bias.shape != (N,):
        raise RuntimeError(f"linear_act: bias must have shape ({N},), got {tuple(bias.shape)}")
    _check_activation("linear_act", "activation", activation)
    if activation_below != Activation.NONE:
        _check_activation("linear_act", "activation_below", activation_below)
        _check_saved("linear_act", "saved_below", saved_below, activation_below, "x", shape, x.device)
    if bias_below is not None and bias_below.shape != (K,):
        raise RuntimeError(f"linear_act: bias_below must have shape ({K},), got {tuple(bias_below.shape)}")
    if save not in (0, 1):
        raise RuntimeError(f"linear_act: save must be 0 or 1, got {save}")


def _check_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=0, grad_bias_below_dtype=None,
) -> None:  # fmt: skip
    op = "linear_act_backward"
    if not _are_good(grad_out.device, grad_out, x, weight, weight_copy):
        _check_tensors(op, grad_out=grad_out, x=x, weight=weight, weight_copy=weight_copy)
    dtypes = (compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype, grad_bias_below_dtype or grad_bias_dtype)
    if not _DTYPES.issuperset(dtypes):
        names = ("compute_dtype", "grad_x_dtype", "grad_weight_dtype", "grad_bias_dtype", "grad_bias_below_dtype")
        _check_dtypes(op, **dict(zip(names, dtypes, strict=True)))
    _check_activation(op, "activation", activation)
    _check_activation(op, "activation_below", activation_below)
    _check_weight(op, weight, weight_copy, compute_dtype)
    shape, (N, K) = grad_out.shape, weight.shape
    if not shape or shape[-1] != N:
        raise RuntimeError(f"{op}: grad_out must have shape (*, {N}), got {tuple(shape)}")
    if output_mask[1] and (x is None or x.dtype != compute_dtype or x.shape != (*shape[:-1], K)):
        got = "None" if x is None else f"{tuple(x.shape)} {x.dtype}"
        raise RuntimeError(f"{op}: x must be {(*shape[:-1], K)} {compute_dtype}, got {got}")
    if activation != Activation.NONE:
        _check_saved(op, "saved", saved, activation, "the output", shape, grad_out.device)
    if activation_below != Activation.NONE:
        _check_saved(op, "saved_below", saved_below, activation_below, "x", (*shape[:-1], K), grad_out.device)
    if (activation_below != Activation.NONE or grad_bias_below_dtype is not None) and not output_mask[0]:
        raise RuntimeError(f"{op}: the gradients of the layer below come out of grad_x: output_mask[0] must be True")


# ----- fakes ---------------------------------------------------------------


def _fake(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, *_):
    columns = weight.shape[0]
    saved = empty_saved(x, columns, activation if save else Activation.NONE, compute_dtype)
    if x.dtype == compute_dtype:
        x_compute = x.new_empty(0)
    else:
        x_compute = torch.empty_like(x, dtype=compute_dtype)  # a cast keeps the order of memory: transposed stays transposed
    return x.new_empty((*x.shape[:-1], columns), dtype=out_dtype), saved, x_compute


def _fake_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=0, grad_bias_below_dtype=None,
):  # fmt: skip
    N, K = weight.shape
    shapes = ((*grad_out.shape[:-1], K), (N, K), (N,), (K,))
    dtypes = (grad_x_dtype, grad_weight_dtype, grad_bias_dtype, grad_bias_below_dtype)
    return tuple(
        grad_out.new_empty(shape if wanted else 0, dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, (*output_mask, grad_bias_below_dtype is not None), strict=True)
    )


# ----- what tuned tables are asked by ---------------------------------------------------------------


def _problem(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, batch_invariant=False, *_):
    """None where a table may not decide: with batch_invariant a row's bits would depend on the number of rows."""
    if batch_invariant:
        return None
    dtypes = (compute_dtype, (weight if weight_copy is None else weight_copy).dtype, out_dtype)
    return problem("fprop", math.prod(x.shape[:-1]), *weight.shape, int(activation), *dtypes)


def _problem_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, *_
):  # fmt: skip
    dtypes = (compute_dtype, (weight if weight_copy is None else weight_copy).dtype, grad_x_dtype, grad_weight_dtype)
    return problem("backward", math.prod(grad_out.shape[:-1]), *weight.shape, int(activation), *dtypes)


# ----- what a kernel for GPUs may refuse a call by, see impl_native.why_not_call ----------------------------------------------


def _call(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, *_):
    return (*weight.shape, int(activation), compute_dtype, out_dtype)


def _call_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=0, *_,
):  # fmt: skip
    worst = max(int(activation), int(activation_below))  # the one of the two that fewer implementations have
    return (*weight.shape, worst, compute_dtype, grad_out.dtype)


def _covers(call) -> bool:
    """Cases of a proof compute in 16 bits, without an activation or with a ReLU: see mpkernels/testing/linear_act_cases.py."""
    return call[2] <= Activation.RELU and call[3].itemsize == 2


# ----- the ops ---------------------------------------------------------------

_IMPLEMENTATIONS = (
    Implementation("native", device_types=("cpu", "cuda"), sm=90),
    Implementation("eager", device_types=("cpu", "cuda")),
    Implementation("triton", device_types=("cuda", "cpu")),
)

forward_op = Op(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, Tensor? weight_copy, int activation, ScalarType compute_dtype, "
    "ScalarType out_dtype, int save, bool batch_invariant=False, ScalarType? grad_dtype=None, bool moved_up=False, "
    "Tensor? saved_below=None, int activation_below=0, Tensor? bias_below=None) "
    "-> (Tensor out, Tensor saved, Tensor x_compute)",
    __name__,
    _IMPLEMENTATIONS,
    check=_check,
    fake=_fake,
    key=lambda x, weight, bias, weight_copy, activation, compute_dtype, *_: (x.device, compute_dtype),
    problem=_problem,
    call=_call,
    covers=_covers,
    dtype=torch.float16,
)
backward_op = Op(
    "linear_act_backward(Tensor grad_out, Tensor? x, Tensor weight, Tensor? weight_copy, Tensor? saved, int activation, "
    "ScalarType compute_dtype, ScalarType grad_x_dtype, ScalarType grad_weight_dtype, ScalarType grad_bias_dtype, "
    "bool[3] output_mask, Tensor? saved_below=None, int activation_below=0, ScalarType? grad_bias_below_dtype=None) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_bias_below)",
    __name__,
    _IMPLEMENTATIONS,
    check=_check_backward,
    fake=_fake_backward,
    key=lambda grad_out, x, weight, weight_copy, saved, activation, compute_dtype, *_: (grad_out.device, compute_dtype),
    problem=_problem_backward,
    call=_call_backward,
    covers=_covers,
    dtype=torch.float16,
)
flops.register()

# ----- autograd ---------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _keep(ctx, inputs, output):
    """What `_gradients` needs of a call."""
    x, weight, bias, weight_copy, activation, compute_dtype, _, save, _, grad_dtype, *seam = inputs
    out, saved, x_compute = output
    moved_up, saved_below, activation_below, bias_below = seam or (False, None, 0, None)
    ctx.activation = Activation.NONE if moved_up else activation
    if ctx.activation == Activation.NONE:
        kept = None
    else:
        kept = saved if save else out if ctx.activation == Activation.RELU else None
    kept_x = None if not ctx.needs_input_grad[1] else x_compute if x.dtype != compute_dtype else x
    ctx.save_for_backward(kept_x, weight, weight_copy, kept, saved_below)
    ctx.set_materialize_grads(False)
    ctx.compute_dtype, ctx.x_dtype = compute_dtype, x.dtype
    ctx.grad_weight_dtype = grad_dtype or weight.dtype
    ctx.grad_bias_dtype = grad_dtype or (weight if bias is None else bias).dtype
    ctx.moved_up, ctx.activation_below = moved_up, activation_below
    wants_below = bias_below is not None and ctx.needs_input_grad[13]
    ctx.grad_bias_below_dtype = (grad_dtype or bias_below.dtype) if wants_below else None


def _backward(ctx, grad_out, grad_saved, grad_x_compute):
    *grads, grad_bias_below = _gradients(ctx, grad_out)
    return *grads, *(None,) * 10, grad_bias_below


def _gradients(ctx, grad_out):
    """Of x, weight, bias and the bias of the layer below, None where not wanted."""
    below = ctx.activation_below != Activation.NONE or ctx.grad_bias_below_dtype is not None
    x_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:3]
    wanted = (x_wanted or ctx.grad_bias_below_dtype is not None, weight_wanted, bias_wanted and not ctx.moved_up)
    if grad_out is None or not any(wanted):
        return (None,) * 4
    x, weight, weight_copy, saved, saved_below = ctx.saved_tensors
    may_be_differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    op = _LinearActBackward.apply if may_be_differentiated else backward_op
    args = (
        grad_out, x, weight, weight_copy, saved, ctx.activation, ctx.compute_dtype,
        ctx.x_dtype, ctx.grad_weight_dtype, ctx.grad_bias_dtype, list(wanted),
    )  # fmt: skip
    if below and wanted[0]:
        args += (saved_below, ctx.activation_below, ctx.grad_bias_below_dtype)
    *grads, grad_bias_below = op(*args)
    grads = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return *grads, grad_bias_below if ctx.grad_bias_below_dtype is not None else None


def _no_double_backward(ctx, *grads):
    raise RuntimeError("linear_act: double backward is not supported")


# The ops as functions for torch.func: with `register_autograd` alone `grad` raises there and `jvp` is silently zero.
class _LinearAct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return forward_op(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# NOTE: Function.apply asks for forward's signature at every call; inspect answers from here, without taking it apart.
_LinearAct.forward.__signature__ = inspect.signature(_LinearAct.forward)


class _LinearActEager(torch.autograd.Function):
    """The same where there is no transform, which would need the parts one by one: half the host's time.

    others: the op's other arguments in one, as autograd need not see them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, others):
        output = forward_op(x, weight, bias, *others)
        _keep(ctx, (x, weight, bias, *others), output)
        return output[0]

    @staticmethod
    def backward(ctx, grad_out):
        return *_gradients(ctx, grad_out)[:3], None


class _LinearActBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return backward_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_no_double_backward)


# torch.compile, torch.export and callers of torch.ops.mpkernels differentiate the ops themselves.
torch.library.register_autograd("mpkernels::linear_act", _backward, setup_context=_setup_context)
torch.library.register_autograd("mpkernels::linear_act_backward", _no_double_backward)


def _refusing_forward_mode(op):
    """`register_autograd` drops tangents without a word. This refuses all of forward mode: it cannot see which have one."""

    def kernel(keyset, *args):
        if torch.autograd.forward_ad._current_level >= 0:
            raise NotImplementedError(f"{op._opname}: forward mode (jvp) is not supported")
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return kernel


_library = torch.library.Library("mpkernels", "FRAGMENT")
for _op in (torch.ops.mpkernels.linear_act.default, torch.ops.mpkernels.linear_act_backward.default):
    _library.impl(_op._opname, _refusing_forward_mode(_op), "ADInplaceOrView", with_keyset=True)


# ----- vmap ---------------------------------------------------------------


def _each(op, info, in_dims, args):
    """The op once per sample, results stacked."""

    def sample(i):
        return [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]

    return tuple(map(torch.stack, zip(*(op(*sample(i)) for i in range(info.batch_size)), strict=True)))


@torch.library.register_vmap("mpkernels::linear_act")
def _vmap(info, in_dims, *args):
    if any(dim is not None for dim in in_dims[1:4]):
        return _each(torch.ops.mpkernels.linear_act, info, in_dims, args), (0, 0, 0)
    x = args[0].movedim(in_dims[0], 0)
    out, saved, x_compute = torch.ops.mpkernels.linear_act(x, *args[1:10])  # the others are for backward
    if saved.dim() == 1:
        return (out, saved, x_compute), (0, None, 0 if x_compute.dim() > 1 else None)
    return (out, saved.unflatten(0, (info.batch_size, -1)), x_compute), (0, 0, 0 if x_compute.dim() > 1 else None)


@torch.library.register_vmap("mpkernels::linear_act_backward")
def _vmap_backward(info, in_dims, *args):
    return _each(torch.ops.mpkernels.linear_act_backward, info, in_dims[: len(args)], args), (0, 0, 0, 0)
