# SPDX-License-Identifier: Apache-2.0
"""The kernels of linear_act as they are launched: every GEMM role, dtype and tile, for tests/toolchain/triton_aot.py."""

from dataclasses import asdict

import torch

from mpkernels.ops.linear_act import Activation, tile_config, triton
from mpkernels.ops.linear_act.kernels_triton import gemm_kernel, select_kernel, sum_kernel, transpose_kernel
from mpkernels.ops.linear_act.kernels_triton_tma import gemm_tma_kernel

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
NAMES = {f16: "*fp16", bf16: "*bf16", f32: "*fp32", f64: "*fp64", torch.int32: "*i32", e4m3: "*fp8e4nv", e5m2: "*fp8e5"}

# Sizes, and strides of a and b: x and weight.T; grad_z and weight; grad_z.T and x. Aligned where moving 16
# bytes at once needs it and nowhere else.
SIZES = ("M", "N", "K")
STRIDES = ("stride_am", "stride_ak", "stride_bk", "stride_bn")
NON_RELU = ("non_relu", "prev non_relu")
HEAVY = ("prev", "sums", "added", *NON_RELU)
FPROP, DGRAD, WGRAD, ANY = (
    dict(zip(SIZES + STRIDES, kinds.split(), strict=True))
    for kinds in (
        "i32 i32:16 i32:16 i32:16 i32:1 i32:1 i32:16",
        "i32 i32:16 i32:16 i32:16 i32:1 i32:16 i32:1",
        "i32:16 i32:16 i32 i32:1 i32:16 i32:16 i32:1",
        "i64 i64 i64 i64 i64 i64 i64",
    )
)
ROLES = dict(fprop=FPROP, non_relu=FPROP, dgrad=DGRAD, prev=DGRAD, sums=DGRAD, wgrad=WGRAD, added=WGRAD, any=ANY)

FEW = (  # role, dtypes of a, b and out
    ("fprop", f16, f16, f16), ("fprop", bf16, f32, bf16), ("wgrad", f16, f16, f32), ("prev", f16, f16, f16),
    ("non_relu", f16, f16, f16), ("fprop", e4m3, e4m3, bf16),
)  # fmt: skip
MORE = (
    ("fprop", e5m2, e4m3, f32), ("fprop", e4m3, e5m2, f16), ("non_relu", e4m3, e4m3, bf16),
    ("any", e4m3, e4m3, bf16), ("any", e5m2, e4m3, f32),
    ("fprop", bf16, bf16, bf16), ("fprop", f16, f16, f32), ("fprop", f16, f32, f32), ("fprop", f32, f32, f32),
    ("fprop", f64, f64, f64),
    ("dgrad", f16, f16, f16), ("dgrad", f16, f16, f32), ("dgrad", bf16, f32, f32), ("dgrad", f32, f32, f32),
    ("dgrad", f64, f64, f64),
    ("prev", f16, f16, f32), ("sums", f16, f16, f16), ("sums", bf16, bf16, f32),
    ("prev", bf16, f32, bf16), ("prev", f32, f32, f32), ("prev", f64, f64, f64),
    ("prev non_relu", bf16, bf16, bf16), ("prev non_relu", f64, f64, f64),
    ("non_relu", bf16, f32, bf16), ("non_relu", f32, f32, f32), ("non_relu", f64, f64, f64),
    ("wgrad", bf16, bf16, bf16), ("wgrad", f32, f32, f32), ("wgrad", f64, f64, f64),
    ("added", f16, f16, f32), ("added", bf16, bf16, f32), ("added", f32, f32, f32),
    ("any", f16, f16, f16), ("any", f16, f64, f16), ("any", bf16, f64, bf16), ("any", f64, f64, bf16),
)  # fmt: skip


def cases(sm: int, every: bool):
    """(kernel, signature, constexprs, options) of what runs on `sm`; with every=False the largest and smallest tiles."""
    for role, a, b, out in (*FEW, *MORE) if every else FEW:
        candidates = tile_config.tiles(sm, a, b, role != "any", role in HEAVY)
        for tile in candidates if every else dict.fromkeys((candidates[0], candidates[-1])):
            yield _gemm(role, a, b, out, tile, sm)
        by_tma = a.itemsize == 1 or (a.itemsize == 2 and a == b)
        if role not in ("any", *NON_RELU) and by_tma and sm in tile_config.TMA_SMS:
            candidates = tile_config.tma_tiles(sm, a, out, triton.specializes() and role not in ("prev", "sums"))
            for tile in candidates if every else candidates[:1]:
                yield _gemm_tma(role, a, b, out, tile, sm)
    yield _select(f16, torch.int32, f16, f32)
    yield _select(bf16, f32, bf16, f32)
    yield _sum(f32, f16)
    yield _transpose()
    if every:
        yield _select(f32, None, f16, f32)
        yield _select(f64, f64, f64, f64)
        yield _sum(f64, f32)


def _scales(a, sm):
    """The dtypes of what 8-bit operands have besides, and the constants of all."""
    if a.itemsize > 1:
        return {}, {"FLOAT8": 0, "a_scale_ptr": None, "b_scale_ptr": None}
    return {"a_scale_ptr": "*fp32:16", "b_scale_ptr": "*fp32:16"}, {"FLOAT8": int(tile_config.float8(sm))}


def _name(operand, sm):
    decoded = operand == e4m3 and tile_config.float8(sm) == tile_config.Float8.DECODED
    return "*u8" if decoded else NAMES[operand]


def _gemm(role, a, b, out, tile, sm):
    """fprop has bias, ReLU and mask, the gradients none of them; `any` is fprop on odd sizes and strides; `prev` is dgrad
    with the pass of the previous layer, by a mask, `sums` without its activation; `added` is wgrad that is added to a sum;
    `non_relu` has GELU, which keeps the preactivation."""
    forward = role in ("fprop", "any", "non_relu")
    non_relu = role.endswith("non_relu")
    role = role.removesuffix(" non_relu")
    wide = "*fp64:16" if a == f64 else "*fp32:16"
    align = "" if role == "any" else ":16"
    scales, constants = _scales(a, sm)
    signature = {"a_ptr": _name(a, sm) + align, "b_ptr": _name(b, sm) + align, "out_ptr": NAMES[out] + align} | scales
    signature |= ROLES[role] | {"stride_bias": "i32", "stride_mask": "i32", "stride_sm": "i32", "stride_sn": "i32:1"}
    signature |= {"stride_as": "i32:1", "stride_bs": "i32"}
    if scales:  # K lies along memory, whatever the rest
        signature |= {"stride_ak": "i32:1", "stride_bk": "i32:1"}
    pointers = ("bias_ptr", "mask_ptr", "preactivation_ptr", "saved_ptr", "partial_ptr")
    present = {}
    if forward:
        present = {"bias_ptr": "*fp32:16"} | (
            {"preactivation_ptr": NAMES[bf16 if scales else a] + ":16"} if non_relu else {"mask_ptr": "*i32:16"}
        )
    if role in ("prev", "sums"):
        present = {"partial_ptr": wide}
    if role == "prev":
        present |= {"saved_ptr": (NAMES[a] if non_relu else "*i32") + ":16"}
    signature |= present
    constexprs = {name: getattr(tile, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
    activation = int(Activation.GELU if non_relu else Activation.RELU)
    constexprs |= {"ACTIVATION": activation * forward, "PREV_ACTIVATION": activation * (role == "prev")}
    constexprs |= {"ACCUMULATE": role == "added"}
    constexprs |= {name: None for name in pointers if name not in present} | constants
    return gemm_kernel, signature, constexprs, {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _gemm_tma(role, a, b, out, tile, sm):
    forward = role == "fprop"
    scales, constants = _scales(a, sm)
    signature = {"a_ptr": NAMES[a] + ":16", "b_ptr": NAMES[b] + ":16", "out_ptr": NAMES[out] + ":16"} | scales
    signature |= dict(stride_as="i32:1", stride_bs="i32")
    signature |= dict(M="i32", N="i32", K="i32", stride_a="i32", stride_b="i32", stride_bias="i32:1", stride_mask="i32")
    signature |= dict(stride_sm="i32", stride_sn="i32:1")
    present = {"bias_ptr": "*fp32:16", "mask_ptr": "*i32:16"} if forward else {}
    present |= {"partial_ptr": "*fp32:16"} if role in ("prev", "sums") else {}
    present |= {"prev_ptr": "*i32:16"} if role == "prev" else {}
    signature |= present
    constexprs = asdict(tile) | {"A_IS_KM": role in ("wgrad", "added"), "B_IS_NK": forward, "RELU": forward}
    constexprs |= {"ACCUMULATE": role == "added"}
    options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages")}
    pointers = ("bias_ptr", "mask_ptr", "prev_ptr", "partial_ptr")
    constexprs |= {name: None for name in pointers if name not in present} | constants
    return gemm_tma_kernel, signature, constexprs, options


def _select(grad_out, saved, grad_z, acc):
    signature = {
        "grad_out_ptr": NAMES[grad_out] + ":16",
        "grad_z_ptr": NAMES[grad_z] + ":16",
        "partial_ptr": NAMES[acc] + ":16",
    }
    signature |= {"M": "i32:16", "N": "i32:16", "stride_gm": "i32:16", "stride_gn": "i32:1"}
    signature |= {"stride_sm": "i32", "stride_sn": "i32:1"}
    activation = Activation.NONE if saved is None else Activation.RELU if saved == torch.int32 else Activation.GELU
    tile = triton.SELECT_FP64 if grad_z == f64 else triton.SELECT
    constexprs = {"ACTIVATION": int(activation), "ROWS": triton.SELECT_ROWS, **tile}
    if saved is None:
        constexprs["saved_ptr"] = None
    else:
        signature["saved_ptr"] = NAMES[saved] + ":16"
    return select_kernel, signature, constexprs, {}


def _transpose():
    signature = {"x_ptr": "*u8:16", "out_ptr": "*u8:16", "M": "i32:16", "N": "i32:16", "stride_xm": "i32:16"}
    return transpose_kernel, signature, triton.TRANSPOSE, {}


def _sum(acc, out):
    signature = {"partial_ptr": NAMES[acc] + ":16", "out_ptr": NAMES[out] + ":16", "P": "i32", "N": "i32:16"}
    return sum_kernel, signature, triton.SELECT, {}
