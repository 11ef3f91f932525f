# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of an update, and the rules' formulas that it is given.

One pass that unscales, clips, updates and writes the copies of all tensors of one set of dtypes. A rule has two functions:

    scalars(lr, taken, p0, ..., p6, T)             what the elements of a tensor share, a tuple, made in fp64; T: the master's
    formula(s, g, w, s0, s1, s2, index, S, FLAGS)  (w, s0, s1, s2) of a block after one step, in the master's dtype

s0, s1, s2: the states as they are stored, in S, None where there is none: then whatever is returned for it is not used (Triton
3.6 returns no None). p0 to p6 and FLAGS: the rule's own numbers, as its Rule.triton gives them.
"""

import triton
import triton.language as tl

from mpkernels.ops.common.kernels_triton import (
    chunk_of,
    divide,
    double,
    grad_factor,
    hash32,
    load_lr,
    pointer,
    round_once,
    square_root,
    steps_taken,
    stochastic_round,
    takes_step,
)


@triton.jit
def update_kernel(
    addresses_ptr, layout_ptr, tensors_ptr, count, steps_ptr, lr_ptr, lr: tl.float64,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64, p4: tl.float64, p5: tl.float64, p6: tl.float64,
    max_norm: tl.float64, grad_scale_ptr, found_inf_ptr, grad_norm_ptr,
    scalars: tl.constexpr, formula: tl.constexpr, FLAGS: tl.constexpr, MAXIMIZE: tl.constexpr, STATES: tl.constexpr,
    master_type: tl.constexpr, grad_type: tl.constexpr, state_type: tl.constexpr, copy_type: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the table: masters, grads, copies, and STATES lists of states. copy_type is None where no copies are wanted."""
    # NOTE: before any other load: a skipped step reads nothing more
    if takes_step(found_inf_ptr, grad_scale_ptr):
        # ----- map program to chunk
        tensor, place, start, end = chunk_of(tensors_ptr, layout_ptr, count, CHUNK)
        w_ptr = pointer(addresses_ptr, tensor, master_type, ALIGNED)
        grad_ptr = pointer(addresses_ptr, count + tensor, grad_type, ALIGNED)
        copy_ptr = pointer(addresses_ptr, 2 * count + tensor, copy_type, ALIGNED)
        s0_ptr = pointer(addresses_ptr, 3 * count + tensor, state_type if STATES > 0 else None, ALIGNED)
        s1_ptr = pointer(addresses_ptr, 4 * count + tensor, state_type if STATES > 1 else None, ALIGNED)
        s2_ptr = pointer(addresses_ptr, 5 * count + tensor, state_type if STATES > 2 else None, ALIGNED)
        # ----- scalars, in fp64
        s = scalars(load_lr(lr_ptr, lr), steps_taken(steps_ptr, place), p0, p1, p2, p3, p4, p5, p6, master_type)
        factor = grad_factor(grad_scale_ptr, grad_norm_ptr, max_norm, MAXIMIZE).to(master_type)
        # ----- NOTE: a mask would keep the loads of whole blocks from being 16 bytes wide
        masked = end - (end - start) % BLOCK
        for first in range(start, masked, BLOCK):
            _block(
                w_ptr, grad_ptr, s0_ptr, s1_ptr, s2_ptr, copy_ptr, first, end, factor, s, formula, state_type, FLAGS,
                False, BLOCK,
            )  # fmt: skip
        for first in range(masked, end, BLOCK // 4):  # an element a thread: masks of more take registers that fp64 has not
            _block(
                w_ptr, grad_ptr, s0_ptr, s1_ptr, s2_ptr, copy_ptr, first, end, factor, s, formula, state_type, FLAGS,
                True, BLOCK // 4,
            )  # fmt: skip


@triton.jit
def _block(
    w_ptr, grad_ptr, s0_ptr, s1_ptr, s2_ptr, copy_ptr, start, end, factor, s, formula: tl.constexpr,
    state_type: tl.constexpr, FLAGS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements from `start`. Pointers to states and copies may be None."""
    # ----- load
    lane = tl.arange(0, BLOCK)
    mask = lane < (end - start).to(tl.int32) if MASKED else None
    index = start + lane
    w = tl.load(w_ptr + index, mask=mask)
    s0 = None if s0_ptr is None else tl.load(s0_ptr + index, mask=mask)
    s1 = None if s1_ptr is None else tl.load(s1_ptr + index, mask=mask)
    g = tl.load(grad_ptr + index, mask=mask).to(w.dtype)
    s2 = None if s2_ptr is None else tl.load(s2_ptr + index, mask=mask)
    # ----- update
    w, s0, s1, s2 = formula(s, g * factor, w, s0, s1, s2, index, state_type, FLAGS)
    # ----- store
    tl.store(w_ptr + index, w, mask=mask)
    if s0_ptr is not None:
        tl.store(s0_ptr + index, s0, mask=mask)
    if s1_ptr is not None:
        tl.store(s1_ptr + index, s1, mask=mask)
    if s2_ptr is not None:
        tl.store(s2_ptr + index, s2, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + index, round_once(w, copy_ptr.dtype.element_ty), mask=mask)


# ----- adamw -----


@triton.jit
def adamw_scalars(lr, taken, beta1, beta2, log2_beta1, log2_beta2, eps, decoupled_decay, added_decay, T: tl.constexpr):
    """The root of the second correction is multiplied out: one division an element."""
    step = taken + 1
    t, seed = step.to(tl.float64), hash32(step.to(tl.uint32, bitcast=True))
    root = tl.sqrt(1 - tl.exp2(t * log2_beta2))
    decay, added = (1 - lr * decoupled_decay).to(T), double(added_decay).to(T)
    step_size = (lr / (1 - tl.exp2(t * log2_beta1)) * root).to(T)
    keep1, keep2 = (1 - double(beta1)).to(T), (1 - double(beta2)).to(T)
    return decay, added, keep1, double(beta2).to(T), keep2, step_size, (root * eps).to(T), seed


@triton.jit
def adamw_formula(s, g, w, exp_avg, exp_avg_sq, max_exp_avg_sq, index, S: tl.constexpr, ADDS_DECAY: tl.constexpr):
    decay, added, keep1, beta2, keep2, step_size, eps, seed = s
    if ADDS_DECAY:
        g = g + added * w
    m = exp_avg.to(w.dtype)
    m = m + keep1 * (g - m)
    v = beta2 * exp_avg_sq.to(w.dtype) + keep2 * g * g
    vmax = v if max_exp_avg_sq is None else tl.maximum(max_exp_avg_sq.to(w.dtype), v, propagate_nan=tl.PropagateNan.ALL)
    w = w * decay - step_size * divide(m, square_root(vmax) + eps)
    return w, round_once(m, S), stochastic_round(v, S, index, seed), round_once(vmax, S)


# ----- sgd -----


@triton.jit
def sgd_scalars(lr, taken, momentum, dampening, weight_decay, p3, p4, p5, p6, T: tl.constexpr):
    keep = (1 - double(dampening)).to(T)
    return taken == 0, lr.to(T), double(weight_decay).to(T), double(momentum).to(T), keep


@triton.jit
def sgd_formula(s, g, w, buffer, s1, s2, index, S: tl.constexpr, FLAGS: tl.constexpr):
    """FLAGS: (whether weights decay, nesterov)."""
    is_first, lr, decay, momentum, keep = s
    if FLAGS[0]:
        g = g + decay * w
    if buffer is None:
        return w - lr * g, w, w, w
    else:
        b = tl.where(is_first, g, momentum * buffer.to(w.dtype) + keep * g)
        g = g + momentum * b if FLAGS[1] else b
        return w - lr * g, round_once(b, S), w, w


# ----- lion -----


@triton.jit
def lion_scalars(lr, taken, beta1, beta2, weight_decay, p3, p4, p5, p6, T: tl.constexpr):
    decay, seed = (1 - lr * weight_decay).to(T), hash32((taken + 1).to(tl.uint32, bitcast=True))
    keep1, keep2 = (1 - double(beta1)).to(T), (1 - double(beta2)).to(T)
    return lr.to(T), decay, double(beta1).to(T), keep1, double(beta2).to(T), keep2, seed


@triton.jit
def lion_formula(s, g, w, exp_avg, s1, s2, index, S: tl.constexpr, FLAGS: tl.constexpr):
    lr, decay, beta1, keep1, beta2, keep2, seed = s
    m = exp_avg.to(w.dtype)
    direction = beta1 * m + keep1 * g
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction)).to(w.dtype)  # 0 at 0, NaN at NaN
    return w * decay - lr * sign, stochastic_round(beta2 * m + keep2 * g, S, index, seed), w, w
