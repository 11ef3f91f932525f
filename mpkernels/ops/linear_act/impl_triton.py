# SPDX-License-Identifier: Apache-2.0
"""linear_act in Triton: out = round(act(x @ weight.T + bias)) in one kernel, for GPUs from sm_80.

The GEMM is there twice: by tensor descriptors (TMA) on sm_90 and sm_100, and by pointers for every GPU, for what no
descriptor takes, which `tiles.tma_why_not` tells, and for activations other than ReLU. Backward is one streaming pass
(select, grad_bias) and two launches of the same GEMM, in whose epilogue dgrad can do that pass for the layer below. Same
inputs, same bits: no atomics, no split of K. Under TRITON_INTERPRET=1 the kernels run on the CPU.
"""

import contextvars
import functools

import torch

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import Activation, acc_dtype, empty_saved, mask_pitch
from mpkernels.ops.linear_act.tiles import TMA_SMS, Operand, plan
from mpkernels.runtime import tuned_table
from mpkernels.runtime.dispatch import triton_why_not

try:
    import triton

    from mpkernels.ops.linear_act import kernels_triton as kernels
    from mpkernels.ops.linear_act import kernels_triton_tma as tma
except ImportError:  # without Triton there is still `why_not`, which says so
    triton = kernels = tma = None

CAST_FIRST = 128  # rows from which a cast weight is worth the pass that makes it: the descriptor kernel reads no other
INTERPRETED_PROGRAMS = 3  # few, so that each works on several tiles
SELECT = {"BLOCK_M": 32, "BLOCK_N": 128}
SELECT_FP64 = SELECT | {"BLOCK_M": 4}  # slopes in fp64 spill with more
SELECT_ROWS = 256  # summed by one program of the select pass


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_why_not(device)


def linear_act(x, weight, bias, weight_copy, activation, compute_dtype, out_dtype, save, batch_invariant=False, *_):
    (*lead, K), N, M = x.shape, weight.shape[0], x.shape[:-1].numel()
    x_compute = cast(x, compute_dtype) if x.dtype != compute_dtype else x.new_empty(0)
    operand = x_compute if x.dtype != compute_dtype else x
    saved = empty_saved(x, N, activation if save else Activation.NONE, compute_dtype)
    b = _operand(weight, weight_copy)
    tile = None if batch_invariant else _tuned(x.device, "fprop", M, N, K, activation, compute_dtype, b.dtype, out_dtype)
    with torch.cuda.device_of(x):
        out, _ = _gemm(
            _rows(operand, M, K), b.t(), out_dtype, tile, bias=bias, activation=int(activation),
            saved=saved if save and activation else None, batch_invariant=batch_invariant,
        )  # fmt: skip
    return out if x.dim() == 2 else out.view(*lead, N), saved, x_compute


def linear_act_backward(
    grad_out, x, weight, weight_copy, saved, activation, compute_dtype, grad_x_dtype, grad_weight_dtype, grad_bias_dtype,
    output_mask, saved_below=None, activation_below=Activation.NONE, grad_bias_below_dtype=None,
):  # fmt: skip
    (N, K), M = weight.shape, grad_out.shape[:-1].numel()
    grad_x = grad_weight = grad_bias_below = None
    with torch.cuda.device_of(grad_out):
        grad_z, grad_bias = _select(
            _rows(grad_out, M, N),
            _matrix(saved, activation, M, N),
            int(activation),
            compute_dtype,
            output_mask[0] or output_mask[1],
            grad_bias_dtype if output_mask[2] else None,
        )
        if output_mask[0]:
            b, saved_below = _operand(weight, weight_copy), _matrix(saved_below, activation_below, M, K)
            plain = saved_below is None and grad_bias_below_dtype is None
            tile = _tuned(weight.device, "dgrad", M, N, K, 0, compute_dtype, b.dtype, grad_x_dtype) if plain else None
            grad_x, sums = _gemm(
                grad_z, b, grad_x_dtype, tile,
                below=saved_below, activation_below=int(activation_below), sums=grad_bias_below_dtype is not None,
            )  # fmt: skip
            grad_x = grad_x if grad_out.dim() == 2 else grad_x.view(*grad_out.shape[:-1], K)
            grad_bias_below = None if sums is None else _sum(sums, grad_bias_below_dtype)
        if output_mask[1]:
            tile = _tuned(weight.device, "wgrad", M, N, K, 0, compute_dtype, grad_weight_dtype)
            grad_weight, _ = _gemm(grad_z.t(), _rows(x, M, K), grad_weight_dtype, tile)
    dtypes = (grad_x_dtype, grad_weight_dtype, grad_bias_dtype, grad_bias_below_dtype)
    grads = (grad_x, grad_weight, grad_bias, grad_bias_below)
    return tuple(g if g is not None else grad_out.new_empty(0, dtype=d) for g, d in zip(grads, dtypes, strict=True))


def _operand(weight, weight_copy):
    return weight if weight_copy is None else weight_copy


def _rows(tensor, rows, columns):
    """`tensor` as a matrix."""
    return tensor if tensor.dim() == 2 else tensor.reshape(rows, columns)


def _matrix(saved, activation, rows, columns):
    """`saved` as a matrix: a mask, an output, a pre-activation; None where there is no activation."""
    if activation == Activation.NONE:
        return None
    return saved if saved.dtype == torch.int32 else saved.reshape(rows, columns)


def _tuned(device, *question):
    """The tile that a tuned table has for a GEMM, or None."""
    table = tuned_table.of(device)
    entry = table.get(tuned_table.problem(*question)) if table else None
    return None if entry is None else entry.tile


# ----- launches ---------------------------------------------------------------


class _Launch:
    """A kernel with all of a launch but its tensors.

    Triton looks at every argument of the first call and hands out what it compiled; that is launched by itself from then on,
    which takes a third of the time. So whoever keeps one sees to it that all its calls have tensors of one kind: dtype, None
    or not, and the address modulo 16. What is allocated here is at a multiple of 16.
    """

    __slots__ = ("by_tma", "constants", "grid", "kernel", "numbers", "run", "values")

    def __init__(self, kernel, grid: tuple[int], numbers: tuple[int, ...], constants: dict, by_tma: bool = False):
        self.kernel, self.grid, self.numbers, self.constants, self.by_tma = kernel, grid, numbers, constants, by_tma
        self.values = numbers + tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.run = None

    def __call__(self, *tensors) -> None:
        if self.run is not None:
            self.run(*tensors, *self.values)
            return
        # NOTE: fused multiply-adds by name: Triton 3.9 warns that the next one turns its default around, and bits would change.
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, enable_fp_fusion=True)
        if compiled is not None:  # the interpreter has nothing to hand out
            self.run = compiled[(*self.grid, 1, 1)]


def _kind(tensor: torch.Tensor | None) -> tuple | None:
    """What a launch depends on; the fields of an Operand."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16)


def _launch_tma(launch: _Launch, *tensors) -> None:
    """Launch with an allocator: a ContextVar, which autograd's threads do not have, and which is not ours to change."""
    triton.set_allocator(_allocate)
    launch(*tensors)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the tensor maps that a kernel makes; stream-ordered, so it may go when the launch is queued."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


# ----- the GEMM ---------------------------------------------------------------


def _gemm(
    a, b, out_dtype, tile=None, *, bias=None, activation=0, saved=None, below=None, activation_below=0, sums=False,
    batch_invariant=False,
):  # fmt: skip
    """(round(act(a @ b + bias)), None) for a (M, K) and b (K, N) of any stride; `saved` is filled where it is given.

    below: what the layer below saved, through whose activation the result goes back. sums: the second is then the sums of
    its columns, unrounded, of each row of tiles.
    """
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty((M, N), dtype=out_dtype)
    casts = b.dtype != a.dtype and a.dtype.itemsize == 2 and (M >= CAST_FIRST or batch_invariant)
    if casts and _device(a.device)[0] in TMA_SMS:
        b = cast(b, a.dtype)
    if batch_invariant and (a.stride() != (K, 1) or a.data_ptr() % 16):
        a = a.clone(memory_format=torch.contiguous_format)  # so that how it lies does not decide, either
    kinds = (_kind(a), _kind(b), out_dtype, _kind(bias), _kind(below))
    launch = _gemm_launch(a.device, *kinds, saved is not None, activation, activation_below, sums, tile, batch_invariant)
    partial = a.new_empty((-(-M // launch.constants["BLOCK_M"]), N), dtype=acc_dtype(a.dtype)) if sums else None
    if out.numel() == 0:
        return out, partial
    if launch.by_tma:
        contextvars.copy_context().run(_launch_tma, launch, a, b, bias, out, saved, below, partial)
    else:
        mask, pre = (saved, None) if activation == Activation.RELU else (None, saved)
        launch(a, b, bias, out, mask, pre, below, partial)
    return out, partial


@functools.lru_cache(maxsize=4096)
def _gemm_launch(
    device, a, b, out_dtype, bias, below, saves, activation, activation_below, sums, tile, batch_invariant
) -> _Launch:
    """For tensors of these kinds."""
    a, b = Operand(*a), Operand(*b)
    (M, K), N = a.shape, b.shape[1]
    smooth = activation > Activation.RELU or (below is not None and below[0] != torch.int32)
    chosen = plan(
        *_device(device), a, b, Operand(out_dtype, (M, N), (N, 1), 0), tile,
        below=sums or below is not None, smooth=smooth, batch_invariant=batch_invariant,
    )  # fmt: skip
    stride_bias = 0 if bias is None else bias[2][0]
    stride_mask = mask_pitch(N) if saves and activation == Activation.RELU else 0
    strides_below = (0, 0) if below is None else below[2]
    if chosen.by_tma:
        numbers = (M, N, K, a.pitch, b.pitch, stride_bias, stride_mask, *strides_below)
        return _Launch(tma.gemm_tma_kernel, chosen.grid, numbers, {"RELU": bool(activation)} | chosen.options, by_tma=True)
    numbers = (M, N, K, *a.stride, *b.stride, stride_bias, stride_mask, *strides_below)
    constants = {"ACTIVATION": activation, "ACTIVATION_BELOW": activation_below} | chosen.options
    return _Launch(kernels.gemm_kernel, chosen.grid, numbers, constants)


# ----- the passes of backward ---------------------------------------------------------------


def _select(grad_out, saved, activation, compute_dtype, wants_grad_z, grad_bias_dtype):
    """(grad_z in compute_dtype, grad_bias), None where not wanted; grad_out itself where it already is grad_z."""
    M, N = grad_out.shape
    is_grad_z = saved is None and grad_out.dtype == compute_dtype
    grad_z = grad_out.new_empty((M, N), dtype=compute_dtype) if wants_grad_z and not is_grad_z else None
    partial = None
    if grad_bias_dtype is not None:
        partial = grad_out.new_empty((-(-M // SELECT_ROWS), N), dtype=acc_dtype(compute_dtype))
    if grad_out.numel() and (grad_z is not None or partial is not None):
        kinds = (_kind(grad_out), _kind(saved), None if grad_z is None else compute_dtype)
        launch = _select_launch(grad_out.device, *kinds, None if partial is None else partial.dtype, activation)
        launch(grad_out, saved, grad_z, partial)
    grad_bias = None if partial is None else _sum(partial, grad_bias_dtype)
    return grad_out if is_grad_z else grad_z, grad_bias


@functools.lru_cache(maxsize=4096)
def _select_launch(device, grad_out, saved, grad_z_dtype, partial_dtype, activation) -> _Launch:
    _, (M, N), strides, _ = grad_out
    grid = (-(-M // SELECT_ROWS) * -(-N // SELECT["BLOCK_N"]),)
    tile = SELECT_FP64 if torch.float64 in (grad_z_dtype, partial_dtype) else SELECT
    constants = {"ACTIVATION": activation, "ROWS": SELECT_ROWS, **tile}
    return _Launch(kernels.select_kernel, grid, (M, N, *strides, *((0, 0) if saved is None else saved[2])), constants)


def _sum(partial, dtype):
    """The sum of partial (P, N) over its rows, rounded once to `dtype`."""
    out = partial.new_empty(partial.shape[1], dtype=dtype)
    if out.numel():
        _sum_launch(partial.device, partial.dtype, partial.shape, dtype)(partial, out)
    return out


@functools.lru_cache(maxsize=4096)
def _sum_launch(device, partial_dtype, shape, dtype) -> _Launch:
    return _Launch(kernels.sum_kernel, (-(-shape[1] // SELECT["BLOCK_N"]),), tuple(shape), SELECT)


# ----- the device ---------------------------------------------------------------


@functools.cache
def _device(device: torch.device) -> tuple[int, int, bool]:
    """(compute capability as 90 for 9.0, 0 interpreted; programs, one per multiprocessor; whether Triton specializes)."""
    if device.type != "cuda":
        return 0, INTERPRETED_PROGRAMS, specializes()
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count, specializes()


def specializes() -> bool:
    """Whether this Triton specializes warps of the descriptor kernel: 3.6 fails to compile its epilogue then."""
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
