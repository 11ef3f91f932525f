# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of the step ops share: whether the step is taken, the factor, the way to a tensor, one rounding.

NOTE: a float argument that is not annotated arrives as fp32; under the interpreter it is a Python float, hence `double`.
"""

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    None: None,
}
ADVANCE_BLOCK = 256
CLIP_EPS = tl.constexpr(1e-6)  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@triton.jit
def double(x):
    """A scalar as fp64."""
    return tl.full((), x, tl.float64)


@triton.jit
def takes_step(found_inf_ptr, grad_scale_ptr):
    """found_inf is 0 and grad_scale positive and finite; either may be None. NOTE: false for NaN."""
    taken = tl.full((), 1, tl.int1)
    if found_inf_ptr is not None:
        taken = taken & (tl.load(found_inf_ptr) == 0)
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
        taken = taken & (grad_scale > 0) & (grad_scale < float("inf"))
    return taken


@triton.jit
def inv_scale(grad_scale_ptr):
    """1 / grad_scale, the reciprocal taken in fp64."""
    inv = double(1.0)
    if grad_scale_ptr is not None:
        inv = inv / tl.load(grad_scale_ptr).to(tl.float64)
    return inv


@triton.jit
def grad_factor(grad_scale_ptr, grad_norm_ptr, max_norm, MAXIMIZE: tl.constexpr):
    """What a gradient is multiplied by: min(1, max_norm / (grad_norm + 1e-6)) / grad_scale; NaN where the norm is."""
    factor = inv_scale(grad_scale_ptr)
    if grad_norm_ptr is not None:
        clip = double(max_norm) / (tl.load(grad_norm_ptr) + CLIP_EPS)
        factor = factor * tl.where(clip > 1, 1.0, clip)
    return -factor if MAXIMIZE else factor


@triton.jit
def load_lr(lr_ptr, lr):
    """fp64: by its address, or by value where lr_ptr is None."""
    if lr_ptr is not None:
        return tl.load(lr_ptr).to(tl.float64)
    else:
        return double(lr)


@triton.jit
def chunk_of(tensors_ptr, layout_ptr, count, CHUNK: tl.constexpr):
    """(tensor in this launch, place in the call's lists, first element, end) of this program's chunk."""
    program = tl.program_id(0)
    tensor = tl.load(tensors_ptr + program)
    size = tl.load(layout_ptr + tensor)
    start = (program - tl.load(layout_ptr + count + tensor)) * CHUNK
    return tensor, tl.load(layout_ptr + 2 * count + tensor), start, tl.minimum(start + CHUNK, size)


@triton.jit
def pointer(addresses_ptr, index, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address at `index` of the table as a pointer to `dtype`; None for a dtype of None."""
    if dtype is None:
        ptr = None
    else:
        ptr = tl.load(addresses_ptr + index).to(tl.pointer_type(dtype))
        if ALIGNED:
            ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def round_once(x, dtype: tl.constexpr):
    """`x` in `dtype`, to nearest even. fp64 -> 16 bits goes through fp32 rounded to odd: else it would be rounded twice."""
    if x.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        x = round_to_odd(x)
    return x.to(dtype)  # round: wide -> dtype


@triton.jit
def round_to_odd(x):
    """fp64 -> fp32 whose last bit records that something was cut.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".
    """
    nearest = x.to(tl.float32)
    back = nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    bits -= (tl.abs(back) > tl.abs(x)).to(tl.int32)
    bits |= ((back != x) & (x == x)).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def stochastic_round(x, dtype: tl.constexpr, index, seed):
    """`x` in its own dtype, or bf16, up or down with the probability that makes it the mean: optimizer_update/round.h."""
    if x.dtype == dtype:
        y = x
    else:
        wide = round_to_odd(x) if x.dtype == tl.float64 else x
        bits = wide.to(tl.uint32, bitcast=True) + (hash32(index.to(tl.uint32) ^ seed) >> 16)
        cut = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)  # round: fp32 -> bf16
        y = tl.where(wide != wide, wide, cut).to(dtype)
    return y


@triton.jit
def hash32(x):
    """A hash of a uint32. Source: Wellons, hash-prospector, "lowbias32"."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def divide(a, b):
    """a / b rounded to nearest; Triton's own fp32 division is not."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def square_root(x):
    """Rounded to nearest; Triton's own fp32 square root is not."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def steps_taken(steps_ptr, place):
    """The count of the tensor at this place of the call's lists; `steps_ptr` is where the addresses of all counts are."""
    return tl.load(tl.load(steps_ptr + place).to(tl.pointer_type(tl.float32)))


def advance(steps: torch.Tensor, found_inf: torch.Tensor | None, grad_scale: torch.Tensor | None) -> None:
    """Each of the counts that lie at the addresses `steps` += 1 if the step was taken.

    After the update, in a launch of its own: the programs of the update read them.
    """
    grid = (-(-steps.numel() // ADVANCE_BLOCK),)
    advance_kernel[grid](steps, steps.numel(), found_inf, grad_scale, BLOCK=ADVANCE_BLOCK)


@triton.jit
def advance_kernel(steps_ptr, n, found_inf_ptr, grad_scale_ptr, BLOCK: tl.constexpr):
    if takes_step(found_inf_ptr, grad_scale_ptr):
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ptrs = tl.load(steps_ptr + index, mask=index < n).to(tl.pointer_type(tl.float32))
        tl.store(ptrs, tl.load(ptrs, mask=index < n) + 1, mask=index < n)
