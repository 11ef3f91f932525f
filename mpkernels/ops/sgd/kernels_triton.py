# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of sgd_: one pass that unscales, clips, updates and writes the copies of all tensors of one set of dtypes."""

import triton
import triton.language as tl

from mpkernels.ops.common.triton_kernels import (
    chunk_of,
    double,
    grad_factor,
    load_lr,
    pointer,
    round_once,
    steps_taken,
    takes_step,
)


@triton.jit
def sgd_kernel(
    addresses_ptr, layout_ptr, tensors_ptr, count, steps_ptr, lr_ptr, lr: tl.float64,
    momentum: tl.float64, dampening: tl.float64, weight_decay: tl.float64, max_norm: tl.float64,
    grad_scale_ptr, found_inf_ptr, grad_norm_ptr,
    master_type: tl.constexpr, grad_type: tl.constexpr, state_type: tl.constexpr, copy_type: tl.constexpr,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the table: masters, grads, copies, momentum_buffers. copy_type and state_type may be None."""
    # NOTE: before any other load: a skipped step reads nothing more
    if takes_step(found_inf_ptr, grad_scale_ptr):
        # ----- map program to chunk
        tensor, place, start, end = chunk_of(tensors_ptr, layout_ptr, count, CHUNK)
        w_ptr = pointer(addresses_ptr, tensor, master_type, ALIGNED)
        grad_ptr = pointer(addresses_ptr, count + tensor, grad_type, ALIGNED)
        copy_ptr = pointer(addresses_ptr, 2 * count + tensor, copy_type, ALIGNED)
        b_ptr = pointer(addresses_ptr, 3 * count + tensor, state_type, ALIGNED)
        # ----- scalars, in fp64
        is_first = steps_taken(steps_ptr, place) == 0
        factor = grad_factor(grad_scale_ptr, grad_norm_ptr, max_norm, MAXIMIZE).to(master_type)
        rate = load_lr(lr_ptr, lr).to(master_type)
        decay, fade = double(weight_decay).to(master_type), double(momentum).to(master_type)
        keep = (1 - double(dampening)).to(master_type)
        # ----- NOTE: a mask would keep the loads of whole chunks from being 16 bytes wide
        if end - start == CHUNK:
            for first in range(start, end, BLOCK):
                _block(
                    w_ptr, grad_ptr, b_ptr, copy_ptr, first, end, is_first, factor, rate, decay, fade, keep,
                    False, DECAY, NESTEROV, BLOCK,
                )  # fmt: skip
        else:
            for first in range(start, end, BLOCK):
                _block(
                    w_ptr, grad_ptr, b_ptr, copy_ptr, first, end, is_first, factor, rate, decay, fade, keep,
                    True, DECAY, NESTEROV, BLOCK,
                )  # fmt: skip


@triton.jit
def _block(
    w_ptr, grad_ptr, b_ptr, copy_ptr, start, end, is_first, factor, rate, decay, fade, keep,
    MASKED: tl.constexpr, DECAY: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements from `start`. b_ptr and copy_ptr may be None."""
    # ----- load
    index = start + tl.arange(0, BLOCK)
    mask = index < end if MASKED else None
    w = tl.load(w_ptr + index, mask=mask)
    g = tl.load(grad_ptr + index, mask=mask).to(w.dtype)
    b = None if b_ptr is None else tl.load(b_ptr + index, mask=mask).to(w.dtype)
    # ----- update
    w, b = sgd_formula(w, g, b, is_first, factor, rate, decay, fade, keep, DECAY, NESTEROV)
    # ----- store
    tl.store(w_ptr + index, w, mask=mask)
    if b_ptr is not None:
        tl.store(b_ptr + index, round_once(b, b_ptr.dtype.element_ty), mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + index, round_once(w, copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sgd_formula(w, g, b, is_first, factor, rate, decay, fade, keep, DECAY: tl.constexpr, NESTEROV: tl.constexpr):
    """(w, b) after one step; b may be None, and is not used at a first step."""
    g = g * factor
    if DECAY:
        g = g + decay * w
    if b is not None:
        b = tl.where(is_first, g, fade * b + keep * g)
        if NESTEROV:
            g = g + fade * b
        else:
            g = b
    else:
        b = g  # Triton 3.6 returns no None
    return w - rate * g, b
