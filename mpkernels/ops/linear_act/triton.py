# SPDX-License-Identifier: Apache-2.0
"""linear_act in Triton: out = round(act(x @ weight.T + bias)) in one kernel, for GPUs from sm_80.

The GEMM is there twice: by tensor descriptors (TMA) on sm_90 and sm_100, and by pointers for every GPU, for what no
descriptor takes, which `tile_config.tma_why_not` tells, and for activations other than ReLU. Backward is one streaming pass
(select, grad_bias) and two launches of the same GEMM, in whose epilogue dgrad can do that pass for the previous layer. Same
inputs, same bits: no atomics, no split of K. Under TRITON_INTERPRET=1 the kernels run on the CPU.
"""

import contextvars
import functools

import torch
import triton

from mpkernels.ops.common.cast import cast
from mpkernels.ops.linear_act import epilogues, passes
from mpkernels.ops.linear_act import kernels_triton as kernels
from mpkernels.ops.linear_act import kernels_triton_tma as tma
from mpkernels.ops.linear_act.call import BackwardCall, CallKey, ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation, acc_dtype, empty_saved, mask_pitch
from mpkernels.ops.linear_act.tile_config import TMA_SMS, Float8, Operand, float8, plan
from mpkernels.runtime import tuned_table

CAST_FIRST = 128  # rows from which a cast weight is worth the pass that makes it: the descriptor kernel reads no other
INTERPRETED_PROGRAMS = 3  # few, so that each works on several tiles
SELECT = {"BLOCK_M": 32, "BLOCK_N": 128}
SELECT_FP64 = SELECT | {"BLOCK_M": 4}  # slopes in fp64 spill with more
TRANSPOSE = {"BLOCK": 128}
SELECT_ROWS = 256  # summed by one program of the select pass


def why_not(key: CallKey) -> str | None:
    return epilogues.why_not("triton", key.activation)


def linear_act(call: ForwardCall):
    x, activation, compute_dtype = call.x, call.activation, call.compute_dtype
    N, K = call.weight.shape
    x_compute = None if x.dtype == compute_dtype else cast(x, compute_dtype)
    saved = empty_saved(x, N, activation, call.preactivation_dtype) if call.save and activation else None
    a, b = passes.rows(x if x_compute is None else x_compute), call.operand
    gemm = ("fprop", a.shape[0], N, K, activation, compute_dtype, b.dtype, call.out_dtype)
    with torch.cuda.device_of(x):
        out, _ = _gemm(
            a, b.t(), call.out_dtype, None if call.batch_invariant else _tuned(x.device, *gemm), bias=call.bias,
            activation=int(activation), saved=saved, batch_invariant=call.batch_invariant,
            scales=(_flat(call.x_scale), _flat(call.weight_scale)),
        )  # fmt: skip
    return passes.shaped(out, x), saved, x_compute


def linear_act_backward(call: BackwardCall):
    grad_out, compute_dtype, b, device = passes.rows(call.grad_out), call.compute_dtype, call.operand, call.grad_out.device
    (N, K), M = call.weight.shape, grad_out.shape[0]
    wants_x, wants_weight, wants_bias = call.output_mask
    grad_x = grad_weight = grad_prev_bias = None
    with torch.cuda.device_of(grad_out):
        grad_z, grad_bias = _select(
            grad_out,
            _matrix(call.saved, call.activation),
            int(call.activation),
            compute_dtype,
            wants_x or wants_weight,
            call.grad_bias_dtype if wants_bias else None,
        )
        if wants_x:
            gemm = ("dgrad", M, N, K, 0, compute_dtype, b.dtype, call.grad_x_dtype)
            grad_x, sums = _gemm(
                grad_z, b, call.grad_x_dtype, None if call.is_fused else _tuned(device, *gemm),
                prev=_matrix(call.prev_saved, call.prev_activation), prev_activation=int(call.prev_activation),
                sums=call.grad_prev_bias_dtype is not None,
            )  # fmt: skip
            grad_x = passes.shaped(grad_x, call.grad_out)
            grad_prev_bias = None if sums is None else _sum(sums, call.grad_prev_bias_dtype)
        if wants_weight:
            tile = _tuned(device, "wgrad", M, N, K, 0, compute_dtype, call.grad_weight_dtype)
            add_to = call.grad_weight_sum
            grad_weight, _ = _gemm(grad_z.t(), passes.rows(call.x), call.grad_weight_dtype, tile, add_to=add_to)
            grad_weight = passes.add_to_sum(call, grad_weight)
    return grad_x, grad_weight, grad_bias, grad_prev_bias


def _flat(scale):
    """A scale (*, 1) or () as a vector."""
    return None if scale is None else scale.reshape(scale.numel())


def _matrix(saved, activation):
    """`saved` as a matrix: a mask, an output, a preactivation; None where there is no activation."""
    return passes.rows(saved) if activation else None


def _tuned(device, *gemm):
    """The tile that a tuned table has for a GEMM, or None."""
    table = tuned_table.load(device)
    entry = table.get(tuned_table.gemm_key(*gemm)) if table else None
    return None if entry is None else entry.tile


# ----- launches ---------------------------------------------------------------


class _Launch:
    """A kernel with all of a launch but its tensors.

    Triton looks at every argument of the first call and hands out what it compiled; that is launched by itself from then on,
    which takes a third of the time. So all calls of one must have tensors of one kind: dtype, None or not, and the address
    modulo 16. What is allocated here is at a multiple of 16.
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
    a, b, out_dtype, tile=None, *, bias=None, activation=0, saved=None, prev=None, prev_activation=0, sums=False,
    batch_invariant=False, add_to=None, scales=(None, None),
):  # fmt: skip
    """(round(act(a @ b + bias)), None) for a (M, K) and b (K, N) of any stride; `saved` is filled where it is given.

    scales: of 8-bit floats a and b, vectors of one or of M and N.
    prev: what the previous layer saved, by whose activation's gradient the result is multiplied. sums: the second is then the
    sums of its columns, unrounded, of each row of tiles. add_to: a contiguous matrix of `out_dtype` that the result is added to
    and that is returned, or None.
    """
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty((M, N), dtype=out_dtype) if add_to is None else add_to
    casts = b.dtype != a.dtype and a.dtype.itemsize == 2 and (M >= CAST_FIRST or batch_invariant)
    if casts and _device(a.device)[0] in TMA_SMS:
        b = cast(b, a.dtype)
    if a.dtype.itemsize == 1:
        a, b = _for_float8(a, b.t(), _device(a.device)[0])
    if batch_invariant and (a.stride() != (K, 1) or a.data_ptr() % 16):
        a = a.clone(memory_format=torch.contiguous_format)  # so that how it lies does not decide, either
    misalignment = None if add_to is None else out.data_ptr() % 16
    kinds = (_kind(a), _kind(b), *map(_kind, scales), out_dtype, misalignment, _kind(bias), _kind(prev))
    launch = _gemm_launch(a.device, *kinds, saved is not None, activation, prev_activation, sums, tile, batch_invariant)
    partial = a.new_empty((-(-M // launch.constants["BLOCK_M"]), N), dtype=acc_dtype(a.dtype)) if sums else None
    if out.numel() == 0:
        return out, partial
    if launch.by_tma:
        contextvars.copy_context().run(_launch_tma, launch, a, b, *scales, bias, out, saved, prev, partial)
    else:
        mask, preactivation = (saved, None) if activation == Activation.RELU else (None, saved)
        launch(a, b, *scales, bias, out, mask, preactivation, prev, partial)
    return out, partial


def _for_float8(a, b, sm: int):
    """8-bit a (M, K) and b (N, K) with K along memory, as tensor cores read them, and of a dtype that Triton has on `sm`."""
    a, b = (t if t.stride(1) == 1 else _transposed(t.t()) if t.stride(0) == 1 else t.contiguous() for t in (a, b))
    if float8(sm) == Float8.DECODED:
        a, b = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (a, b))
    return a, b.t()


def _transposed(x):
    """x.T, contiguous, of 8-bit x (M, N) in rows."""
    out = x.new_empty(x.shape[::-1])
    if out.numel():
        _transpose_launch(x.device, x.shape, x.stride(0), x.data_ptr() % 16)(x.view(torch.uint8), out.view(torch.uint8))
    return out


@functools.lru_cache(maxsize=4096)
def _transpose_launch(device, shape, stride, misalignment) -> _Launch:
    grid = (-(-shape[0] // TRANSPOSE["BLOCK"]) * -(-shape[1] // TRANSPOSE["BLOCK"]),)
    return _Launch(kernels.transpose_kernel, grid, (*shape, stride), TRANSPOSE)


def _stride(vector: tuple | None) -> int:
    """Of a kind; 0 where one number serves all."""
    return 0 if vector is None or vector[1] == (1,) else vector[2][0]


@functools.lru_cache(maxsize=4096)
def _gemm_launch(
    device, a, b, a_scale, b_scale, out_dtype, misalignment, bias, prev, saves, activation, prev_activation, sums, tile,
    batch_invariant,
) -> _Launch:  # fmt: skip
    """For tensors of these kinds; misalignment: of what is added to, or None."""
    a, b = Operand(*a), Operand(*b)
    (M, K), N = a.shape, b.shape[1]
    non_relu = activation > Activation.RELU or (prev is not None and prev[0] != torch.int32)
    chosen = plan(
        *_device(device), a, b, Operand(out_dtype, (M, N), (N, 1), misalignment or 0), tile,
        fuses_prev=sums or prev is not None, non_relu_activation=non_relu, batch_invariant=batch_invariant,
        accumulates=misalignment is not None,
    )  # fmt: skip
    strides_scale = (_stride(a_scale), _stride(b_scale))
    stride_bias = 0 if bias is None else bias[2][0]
    stride_mask = mask_pitch(N) if saves and activation == Activation.RELU else 0
    strides_prev = (0, 0) if prev is None else prev[2]
    constants = {"ACCUMULATE": misalignment is not None} | chosen.options
    if chosen.by_tma:
        numbers = (M, N, K, a.pitch, b.pitch, *strides_scale, stride_bias, stride_mask, *strides_prev)
        return _Launch(tma.gemm_tma_kernel, chosen.grid, numbers, {"RELU": bool(activation)} | constants, by_tma=True)
    numbers = (M, N, K, *a.stride, *b.stride, *strides_scale, stride_bias, stride_mask, *strides_prev)
    constants |= {"ACTIVATION": activation, "PREV_ACTIVATION": prev_activation}
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
