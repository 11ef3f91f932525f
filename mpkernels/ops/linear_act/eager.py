# SPDX-License-Identifier: Apache-2.0
"""linear_act in plain torch: out = round(act(x @ weight.T + bias)), the sums in fp32 (fp64 for fp64).

On a CPU 16-bit operands are upcast and multiplied in fp32, by oneDNN or MKL: without AVX-512 FP16 torch's own fp16 GEMM is a
loop of dot products. Weights are upcast a block of rows at a time, into memory that stays in the cache.
"""

import contextlib
import functools
import threading

import torch
import torch.nn.functional as F

from mpkernels.ops.common.cast import cast
from mpkernels.ops.common.layout import overlaps
from mpkernels.ops.linear_act import epilogues, onednn, passes, scaled_mm
from mpkernels.ops.linear_act.call import BackwardCall, CallKey, ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation, acc_dtype, empty_saved, finish, pack_mask

BLOCK_ELEMENTS = 1 << 20  # of a weight, upcast at a time: 4 MB, a fresh larger buffer costs page faults
SMALL_GEMM = 1 << 20  # M * N * K up to which oneDNN's own set-up costs more than it saves
INVARIANT_ROWS = 16  # of a GEMM under batch_invariant: more make M=1 dearer, fewer a large M
GPU_ROWS = 512  # the same on a GPU: fewer leave it idle
_AFTER_ROUNDING = (Activation.NONE, Activation.RELU)  # which may as well come after it
FEW_ROWS = 2  # up to here reading the weight costs more than multiplying with it


def why_not(key: CallKey) -> str | None:
    return epilogues.why_not("eager", key.activation)


def linear_act(call: ForwardCall):
    if onednn.seen:
        onednn.forget(call)
    x, N, activation, compute_dtype = call.x, call.weight.shape[0], call.activation, call.compute_dtype
    x_compute = None if x.dtype == compute_dtype else cast(x, compute_dtype)
    multiplies = call.save and activation > Activation.RELU
    saved = empty_saved(x, N, activation, call.preactivation_dtype) if multiplies else None
    out = _matmul_nt(
        passes.rows(x if x_compute is None else x_compute), call.operand, compute_dtype, call.out_dtype,
        bias=call.bias, activation=activation, preactivation=saved, batch_invariant=call.batch_invariant,
        scales=(_column(call.x_scale), call.weight_scale) if call.is_scaled else None,
    )  # fmt: skip
    if call.save and activation == Activation.RELU:
        saved = pack_mask(out)
    return passes.shaped(out, x), saved, x_compute


def linear_act_backward(call: BackwardCall):
    return passes.backward(_matmul_nt, call, functools.partial(_matmul_nt, added_to=call.grad_weight_sum))


def _matmul_nt(
    a, b, compute_dtype, out_dtype, *, bias=None, activation=Activation.NONE, preactivation=None, batch_invariant=False,
    scales=None, again=(False, False), added_to=None,
):  # fmt: skip
    """round(act(a @ b.T + bias)) for a (M, K) in compute_dtype and b (N, K), which is cast and multiplied by blocks of rows.

    preactivation: filled where it is given. scales: of 8-bit operands. again: see passes.py.
    added_to: where there are several blocks, each is added to it, and it is returned.
    """
    a, b = (t.contiguous() if overlaps(t) else t for t in (a, b))  # oneDNN has no words for what lies in itself
    if scales is not None:
        return _matmul_nt_scaled(a, b, scales, bias, activation, preactivation, out_dtype, batch_invariant)
    acc = acc_dtype(compute_dtype)
    linear = _linear_batch_invariant if batch_invariant else _linear
    if a.device.type != "cpu" and compute_dtype.itemsize == 2:
        b = cast(b, compute_dtype).t()
        if not batch_invariant and out_dtype == compute_dtype and activation in _AFTER_ROUNDING:
            return _matmul_nt_rounded_once(a, b, bias, activation)
        return _matmul_nt_in_fp32(a, b, bias, activation, preactivation, out_dtype, batch_invariant)
    dtypes = {a.dtype, b.dtype, out_dtype, b.dtype if bias is None else bias.dtype}
    few = a.shape[0] <= FEW_ROWS and not batch_invariant and activation in _AFTER_ROUNDING
    if few and b.stride(1) == 1 and dtypes == {compute_dtype} and acc != compute_dtype:
        # torch's dot-product loop: sums and adds the bias in fp32, rounds once, and reads 16 bits of a weight, not 32.
        return finish(F.linear(a, b, bias), activation, None, out_dtype)
    if compute_dtype == out_dtype == torch.bfloat16 and activation in _AFTER_ROUNDING and not batch_invariant:
        narrow = cast(b, compute_dtype)
        if onednn.has_bf16_instructions() and onednn.products_stay_normal(a, narrow, bias, again):
            return onednn.multiply(a, narrow, bias, activation)
    a = a.to(acc).contiguous()
    bias = None if bias is None else bias.to(acc).contiguous()  # oneDNN reads a bias as if its stride were 1
    K, N = b.shape[1], b.shape[0]
    rows = max(64, BLOCK_ELEMENTS // max(K, 1))
    if b.dtype == acc or rows >= N:
        z = linear(a, cast(b, compute_dtype).to(acc), bias)
        return finish(z, activation, preactivation, out_dtype)
    out = a.new_empty((a.shape[0], N), dtype=out_dtype) if added_to is None else added_to
    for n in range(0, N, rows):
        block = _rows(b, n, rows, compute_dtype, acc)
        z = linear(a, block, None if bias is None else bias[n : n + rows])
        saved = None if preactivation is None else preactivation[:, n : n + rows]
        z = finish(z, activation, saved, out_dtype)
        columns = out[:, n : n + rows]
        columns.copy_(z) if added_to is None else columns.add_(z)
    return out


def _column(scale: torch.Tensor) -> torch.Tensor:
    """A scale by row (*, 1) as a matrix; one for all () as it is."""
    return passes.rows(scale) if scale.dim() else scale


def _matmul_nt_scaled(a, b, scales, bias, activation, preactivation, out_dtype, batch_invariant):
    """round(act((a @ b.T) * scale_a * scale_b + bias)) of 8-bit operands, products of which are normal numbers of fp32."""
    scale_a, scale_b = scales[0], scales[1].expand(b.shape[0], 1).t()
    bias = None if bias is None else bias.to(torch.float32)

    def finished(z, columns, preactivation):
        z = z.mul_(scale_a).mul_(scale_b[:, columns])
        return finish(z if bias is None else z.add_(bias[columns]), activation, preactivation, out_dtype)

    if a.device.type != "cpu":
        multiply = _by_equal_gemms_in_bf16 if batch_invariant else scaled_mm.multiply
        with _fp32_sums():
            z = multiply(a, b.t())
        return finished(z, slice(None), preactivation)
    linear = _linear_batch_invariant if batch_invariant else _linear
    a, rows = a.to(torch.float32).contiguous(), max(64, BLOCK_ELEMENTS // max(b.shape[1], 1))
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    for n in range(0, b.shape[0], rows):
        columns = slice(n, n + rows)
        z = linear(a, _rows(b, n, rows, b.dtype, torch.float32), None)
        out[:, columns] = finished(z, columns, None if preactivation is None else preactivation[:, columns])
    return out


def _rows(b, start, rows, compute_dtype, acc):
    """b[start : start + rows] rounded to compute_dtype, in the accumulator's dtype; b's memory order is kept."""
    block = b[start : start + rows]
    transposed = block.stride(0) == 1
    block = block.t() if transposed else block
    block = cast(block, compute_dtype).to(acc, memory_format=torch.contiguous_format)
    return block.t() if transposed else block


def _linear(a, b, bias):
    """a @ b.T + bias in the dtype of all three. oneDNN where there is AVX-512, which MKL leaves unused on AMD CPUs; where there
    is none the two take as long, and oneDNN's sums are less exact.

    NOTE: oneDNN's own ReLU turns NaN into 0, so the activation is applied afterwards.
    """
    large = a.shape[0] * b.numel() > SMALL_GEMM
    if large and a.dtype == torch.float32 and a.device.type == "cpu" and _has_onednn_avx512():
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


@functools.cache
def _has_onednn_avx512() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


# ----- whatever the batch -----


def _linear_batch_invariant(a, b, bias):
    """`_linear`, a row's bits whatever its place and the other rows. oneDNN gives all rows of a block the same bits, as a
    GPU does; other CPU libraries do not, they get one row at a time, always at one address."""
    if a.device.type != "cpu":
        return _by_blocks(lambda block: F.linear(block, b, bias), a, b.shape[0], rows=GPU_ROWS)
    if a.dtype == torch.float32 and b.numel() and torch.backends.mkldnn.is_available():
        return _by_blocks(lambda block: torch.ops.mkldnn._linear_pointwise(block, b, bias, "none", [], ""), a, b.shape[0])
    return _by_blocks(lambda block: F.linear(block, b, bias), a, b.shape[0], rows=1)


def _by_blocks(multiply, a, columns, rows=INVARIANT_ROWS):
    """multiply(a) in fp32 or wider, `rows` rows at a time: every call has one shape, whatever lies in the rows left over."""
    out, block = a.new_empty((a.shape[0], columns), dtype=acc_dtype(a.dtype)), a.new_zeros(rows, a.shape[1])
    for m in range(0, a.shape[0], rows):
        here = min(rows, a.shape[0] - m)
        block[:here] = a[m : m + here]
        out[m : m + here] = multiply(block)[:here]
    return out


# ----- on a GPU, by cuBLAS ---------------------------------------------------------------


def _matmul_nt_rounded_once(a, b, bias, activation):
    """round(act(a @ b + bias)) in the dtype of a and b: cuBLAS itself rounds what it summed, a bias of that dtype included.

    NOTE: the activation is applied afterwards, as the NaN of a fused ReLU cannot be trusted.
    """
    with _fp32_sums():
        if bias is None:
            z = torch.mm(a, b)
        elif bias.dtype == a.dtype:
            z = torch.addmm(bias, a, b)
        else:
            z = torch.add(torch.mm(a, b, out_dtype=torch.float32), bias, out=a.new_empty((a.shape[0], b.shape[1])))
    return z.relu_() if activation == Activation.RELU else z


def _matmul_nt_in_fp32(a, b, bias, activation, preactivation, out_dtype, batch_invariant):
    """The same in any dtype: 16-bit operands, fp32 result, so that no split of K is reduced in 16 bits."""
    with _fp32_sums():
        z = _by_equal_gemms(a, b) if batch_invariant else torch.mm(a, b, out_dtype=torch.float32)
    if bias is not None:
        z += bias.to(torch.float32)
    return finish(z, activation, preactivation, out_dtype)


def _by_equal_gemms(a, b):
    """a @ b in fp32, GPU_ROWS at a time, the last padded: cuBLAS chooses a kernel by the sizes, which thus never differ."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    for rows, result in zip(a.split(GPU_ROWS), out.split(GPU_ROWS), strict=True):
        missing = GPU_ROWS - rows.shape[0]
        if missing:
            result.copy_(torch.mm(F.pad(rows, (0, 0, 0, missing)), b, out_dtype=torch.float32).narrow(0, 0, rows.shape[0]))
        else:
            torch.mm(rows, b, out_dtype=torch.float32, out=result)
    return out


def _by_equal_gemms_in_bf16(a, b):
    """The same of 8-bit operands, which bf16 holds."""
    return _by_equal_gemms(a.to(torch.bfloat16), b.to(torch.bfloat16))


_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_settings = threading.Lock()  # backward runs in a thread of its own


@contextlib.contextmanager
def _fp32_sums():
    """Whatever the process allows cuBLAS, here it neither accumulates nor reduces in 16 bits."""
    matmul = torch.backends.cuda.matmul
    with _settings:
        allowed = {n: (getattr(matmul, n), getattr(matmul, f"{n}_split_k")) for n in _REDUCTIONS if getattr(matmul, n)}
        if matmul.allow_fp16_accumulation:
            allowed["allow_fp16_accumulation"] = True
        for name in allowed:
            setattr(matmul, name, False)
        try:
            yield
        finally:
            for name, value in allowed.items():
                setattr(matmul, name, value)
