# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of adamw_: one pass that unscales, clips, updates and writes the copies of all tensors of one set of dtypes."""

import triton
import triton.language as tl

from mpkernels.ops.common.triton_kernels import (
    chunk_of,
    divide,
    double,
    grad_factor,
    load_lr,
    pointer,
    round_once,
    scrambled,
    square_root,
    steps_taken,
    takes_step,
    to_either_side,
)


@triton.jit
def adamw_kernel(
    addresses_ptr, layout_ptr, tensors_ptr, count, steps_ptr, lr_ptr, lr: tl.float64,
    beta1: tl.float64, beta2: tl.float64, log2_beta1: tl.float64, log2_beta2: tl.float64, eps: tl.float64,
    weight_decay: tl.float64, added_decay: tl.float64, max_norm: tl.float64, grad_scale_ptr, found_inf_ptr, grad_norm_ptr,
    master_type: tl.constexpr, grad_type: tl.constexpr, state_type: tl.constexpr, copy_type: tl.constexpr,
    AMSGRAD: tl.constexpr, ADDS_DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the table: masters, grads, exp_avgs, exp_avg_sqs, copies, max_exp_avg_sqs (with AMSGRAD).

    weight_decay is decoupled, added_decay goes into the gradient. copy_type is None where no copies are wanted.
    """
    # NOTE: before any other load: a skipped step reads nothing more
    if takes_step(found_inf_ptr, grad_scale_ptr):
        # ----- map program to chunk
        tensor, place, start, end = chunk_of(tensors_ptr, layout_ptr, count, CHUNK)
        w_ptr = pointer(addresses_ptr, tensor, master_type, ALIGNED)
        grad_ptr = pointer(addresses_ptr, count + tensor, grad_type, ALIGNED)
        m_ptr = pointer(addresses_ptr, 2 * count + tensor, state_type, ALIGNED)
        v_ptr = pointer(addresses_ptr, 3 * count + tensor, state_type, ALIGNED)
        copy_ptr = pointer(addresses_ptr, 4 * count + tensor, copy_type, ALIGNED)
        vmax_ptr = pointer(addresses_ptr, 5 * count + tensor, state_type if AMSGRAD else None, ALIGNED)
        # ----- scalars, in fp64; the root of the second correction is multiplied out: one division an element
        step = steps_taken(steps_ptr, place) + 1
        t, seed = step.to(tl.float64), scrambled(step.to(tl.uint32, bitcast=True))
        lr = load_lr(lr_ptr, lr)
        root = tl.sqrt(1 - tl.exp2(t * log2_beta2))
        factor = grad_factor(grad_scale_ptr, grad_norm_ptr, max_norm, MAXIMIZE).to(master_type)
        decay, added = (1 - lr * weight_decay).to(master_type), double(added_decay).to(master_type)
        step_size = (lr / (1 - tl.exp2(t * log2_beta1)) * root).to(master_type)
        keep1, keep2 = (1 - double(beta1)).to(master_type), (1 - double(beta2)).to(master_type)
        fade2, eps_root = double(beta2).to(master_type), (root * eps).to(master_type)
        # ----- NOTE: a mask would keep the loads of whole chunks from being 16 bytes wide
        if end - start == CHUNK:
            for first in range(start, end, BLOCK):
                _block(
                    w_ptr, grad_ptr, m_ptr, v_ptr, vmax_ptr, copy_ptr, first, end,
                    factor, decay, added, keep1, fade2, keep2, step_size, eps_root, seed, False, ADDS_DECAY, BLOCK,
                )  # fmt: skip
        else:
            for first in range(start, end, BLOCK):
                _block(
                    w_ptr, grad_ptr, m_ptr, v_ptr, vmax_ptr, copy_ptr, first, end,
                    factor, decay, added, keep1, fade2, keep2, step_size, eps_root, seed, True, ADDS_DECAY, BLOCK,
                )  # fmt: skip


@triton.jit
def _block(
    w_ptr, grad_ptr, m_ptr, v_ptr, vmax_ptr, copy_ptr, start, end,
    factor, decay, added, keep1, beta2, keep2, step_size, eps, seed,
    MASKED: tl.constexpr, ADDS_DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements from `start`. vmax_ptr and copy_ptr may be None."""
    # ----- load
    index = start + tl.arange(0, BLOCK)
    mask = index < end if MASKED else None
    w = tl.load(w_ptr + index, mask=mask)
    m, v = tl.load(m_ptr + index, mask=mask).to(w.dtype), tl.load(v_ptr + index, mask=mask).to(w.dtype)
    g = tl.load(grad_ptr + index, mask=mask).to(w.dtype)
    vmax = None if vmax_ptr is None else tl.load(vmax_ptr + index, mask=mask).to(w.dtype)
    # ----- update
    w, m, v, vmax = adamw_formula(w, g, m, v, vmax, factor, decay, added, keep1, beta2, keep2, step_size, eps, ADDS_DECAY)
    # ----- store
    tl.store(w_ptr + index, w, mask=mask)
    tl.store(m_ptr + index, round_once(m, m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + index, to_either_side(v, v_ptr.dtype.element_ty, index, seed), mask=mask)
    if vmax_ptr is not None:
        tl.store(vmax_ptr + index, round_once(vmax, vmax_ptr.dtype.element_ty), mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + index, round_once(w, copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def adamw_formula(w, g, m, v, vmax, factor, decay, added, keep1, beta2, keep2, step_size, eps, ADDS_DECAY: tl.constexpr):
    """(w, m, v, vmax) after one step; vmax may be None, and is v then: Triton 3.6 returns no None."""
    g = g * factor
    if ADDS_DECAY:
        g = g + added * w
    m = m + keep1 * (g - m)
    v = beta2 * v + keep2 * g * g
    vmax = v if vmax is None else tl.maximum(vmax, v, propagate_nan=tl.PropagateNan.ALL)
    w = w * decay - step_size * divide(m, square_root(vmax) + eps)
    return w, m, v, vmax
