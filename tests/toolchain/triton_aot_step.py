# SPDX-License-Identifier: Apache-2.0
"""The kernels of the step ops as they are launched, for triton_aot.py: dtypes, optional arguments, alignment."""

import itertools

import torch

from mpkernels.ops.common import triton_table as table
from mpkernels.ops.common.kernels_triton import ADVANCE_BLOCK, TYPES, advance_kernel
from mpkernels.ops.grad_stats.kernels_triton import chunk_kernel, tensor_kernel, verdict_kernel
from mpkernels.ops.grad_stats.triton import REDUCE_BLOCK
from mpkernels.ops.optimizer_update import kernels_triton as kernels
from mpkernels.ops.update_scale.kernels_triton import update_scale_kernel

DTYPES = f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

TABLE = dict(addresses_ptr="*i64:16", layout_ptr="*i64:16", tensors_ptr="*i64:16", count="i32")
TILE = dict(CHUNK=table.CHUNK, BLOCK=table.BLOCK)
OPTIONS = {"num_warps": table.NUM_WARPS}
STEP = dict(steps_ptr="*i64:16", lr="fp64", max_norm="fp64")
SCALED = dict(grad_scale_ptr="*fp32:16", found_inf_ptr="*fp32:16", grad_norm_ptr="*fp64:16")


def cases(sm: int, every: bool):
    """(kernel, signature, constexprs, options); with every=False the usual dtypes only."""
    yield from _adamw(every)
    yield from _sgd(every)
    yield from _lion(every)
    yield from _grad_stats(every)
    yield _update_scale()
    for pointers in _scalars(every):
        signature, constexprs = _optional(pointers, ("found_inf_ptr", "grad_scale_ptr"))
        yield (
            advance_kernel,
            dict(steps_ptr="*i64:16", n="i32") | signature,
            dict(BLOCK=ADVANCE_BLOCK) | constexprs,
            {},
        )


def _dtypes(every: bool):
    """(master, grad, copy) of a launch."""
    if every:
        grads = {f32: (f16, bf16, f32), f64: DTYPES}
        return [(master, *rest) for master in grads for rest in itertools.product(grads[master], (None, f16, bf16, f32))]
    return [(f32, f16, f16), (f32, f32, bf16), (f64, f64, f16)]


def _scalars(every: bool):
    """The pointers that are not None."""
    return ({}, SCALED, SCALED | dict(lr_ptr="*fp32:16")) if every else (SCALED,)


def _optional(pointers: dict, names: tuple[str, ...]) -> tuple[dict, dict]:
    """(signature, constexprs) of pointers that may be None."""
    return {n: pointers[n] for n in names if n in pointers}, {n: None for n in names if n not in pointers}


def _update(rule, states, dtypes, pointers, aligned, **constexprs):
    signature, absent = _optional(pointers, ("lr_ptr", *SCALED))
    types = {f"{name}_type": TYPES[d] for name, d in zip(("master", "grad", "copy"), dtypes, strict=True)}
    types["state_type"] = TYPES[bf16 if dtypes[2] == bf16 else dtypes[0]] if states else None
    signature |= TABLE | STEP | dict.fromkeys((f"p{k}" for k in range(7)), "fp64")
    functions = dict(scalars=getattr(kernels, f"{rule}_scalars"), formula=getattr(kernels, f"{rule}_formula"), STATES=states)
    constexprs |= absent | types | functions | TILE
    return kernels.update_kernel, signature, constexprs | dict(ALIGNED=aligned), OPTIONS


def _updates(every: bool):
    """(dtypes, pointers, aligned, whether the options that add work are on): every dtype, and the rest in turn."""
    if not every:
        return [(dtypes, SCALED, True, dtypes[0] == f64) for dtypes in _dtypes(every)]
    rest = itertools.cycle(itertools.product(_scalars(every), (True, False), (True, False)))
    return [(dtypes, *next(rest)) for dtypes in _dtypes(every)]


def _adamw(every: bool):
    for dtypes, pointers, aligned, more in _updates(every):
        yield _update("adamw", 3 if more else 2, dtypes, pointers, aligned, FLAGS=more, MAXIMIZE=more)


def _sgd(every: bool):
    for dtypes, pointers, aligned, more in _updates(every):
        yield _update("sgd", int(more), dtypes, pointers, aligned, FLAGS=(more, more and aligned), MAXIMIZE=more)


def _lion(every: bool):
    for dtypes, pointers, aligned, more in _updates(every):
        yield _update("lion", 1, dtypes, pointers, aligned, FLAGS=None, MAXIMIZE=more)


def _grad_stats(every: bool):
    partial = dict(amax_ptr="*fp64:16", nonfinite_ptr="*i64:16", squares_ptr="*fp64:16")
    for dtype, aligned, norm in (
        itertools.product(DTYPES, (True, False), (True, False)) if every else ((f16, True, True), (f64, True, True))
    ):
        constexprs = dict(grad_type=TYPES[dtype], NORM=norm, ALIGNED=aligned)
        yield chunk_kernel, TABLE | partial | dict(starts_ptr="*i64:16"), constexprs | TILE, OPTIONS
    for pointers, norm in itertools.product(_scalars(every)[:2], (True, False) if every else (True,)):
        scale, absent = _optional(pointers, ("grad_scale_ptr",))
        constexprs = absent | dict(NORM=norm, BLOCK=REDUCE_BLOCK)
        signature = partial | {f"partial_{name}": kind for name, kind in partial.items()}
        signature |= dict(starts_ptr="*i64:16", is_double_ptr="*i64:16", bad_ptr="*i32:16")
        yield tensor_kernel, signature | dict(amax_stride="i32:1", nonfinite_stride="i32:1") | scale, constexprs, {}
        signature = dict(bad_ptr="*i32:16", squares_ptr="*fp64:16", amax_ptr="*fp64:16", amax_stride="i32:1", n="i32")
        signature |= dict(found_inf_ptr="*fp32:16")
        norms, absent = ({"grad_norm_ptr": "*fp64:16"}, {}) if norm else ({}, {"grad_norm_ptr": None})
        yield verdict_kernel, signature | norms | scale, constexprs | absent, {}


def _update_scale():
    signature = dict(grad_scale_ptr="*fp32:16", growth_tracker_ptr="*i32:16", hysteresis_tracker_ptr="*i32:16")
    signature |= dict(skipped_ptr="*i64:16", skipped_stride="i32:1", found_inf_ptr="*fp32:16", growth_interval="i64")
    signature |= dict.fromkeys(("growth_factor", "backoff_factor", "min_scale", "max_scale"), "fp64") | dict(hysteresis="i32")
    return update_scale_kernel, signature, {}, {"num_warps": 1}
