# SPDX-License-Identifier: Apache-2.0
"""What users call as functions: linear_act, its dtypes from a policy, from autocast, or from the tensors; quantize."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, handle_torch_function, has_torch_function_variadic
from torch.utils._device import DeviceContext

from mpkernels.ops.linear_act import float8
from mpkernels.ops.linear_act import linear_act as _linear_act
from mpkernels.ops.linear_act.call import FusedBackwardLink
from mpkernels.ops.linear_act.epilogues import Activation, ActivationName, activation_of, name_of
from mpkernels.ops.quantize import QuantizeCall, check_format
from mpkernels.ops.quantize import op as _quantize
from mpkernels.policy import Policy, PolicyName
from mpkernels.runtime.op import PLAIN, is_dtensor


def linear_act(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: ActivationName | None = None,
    policy: PolicyName | Policy | None = None, *, weight_copy: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`act(x @ weight.T + bias)`, rounded once.

    x: `(*, K)`; weight: (N, K); bias: (N,) or None; returns `(*, N)`. activation: as MPLinear. policy: a Policy, its name,
    or None: as `F.linear`, under `torch.autocast` too. With a policy its compute_dtype wins over autocast, and gradients
    of weight and bias have its grad_dtype, else their own dtype. weight_copy: the weight in the compute dtype, read in its
    place. Tensor subclasses, modes and torch.fx see this one call, by `__torch_function__`.
    Raises RuntimeError for shapes, dtypes, devices or layouts that do not fit, TypeError for what is not a tensor,
    ValueError for an unknown activation or policy. Source: torch.nn.functional.linear.
    """
    policy = None if policy is None else Policy.parse(policy)
    return forward(x, weight, bias, weight_copy, activation_of(activation), policy)


def quantize(x: torch.Tensor, dtype: torch.dtype, axis: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(q, scale)`: x in eight bits, rounded once, and the power of two that it was divided by; x is about `q * scale`.

    x: fp16, bf16 or fp32. dtype: torch.float8_e4m3fn or torch.float8_e5m2. axis: the dimension reduced away, which the
    fp32 scale keeps with size 1: -1 is a scale per row; None: one scale, 0-d. The scale brings the largest magnitude as high in
    the format as it goes without overflow. Where anything is inf or NaN, the scale and all that it scales is NaN.
    Neither result requires grad.
    Raises RuntimeError for tensors and dtypes other than these, IndexError for an axis out of range.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"quantize: x must be a Tensor, got {type(x).__name__}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"quantize: dtype must be a torch.dtype, got {type(dtype).__name__}")
    if axis is not None and not isinstance(axis, int):
        raise TypeError(f"quantize: axis must be an int or None, got {type(axis).__name__}")
    if is_dtensor(x):
        from mpkernels.ops.quantize import sharding  # noqa: F401 - which registers it
    return _quantize.run(QuantizeCall(x.detach() if x.requires_grad else x, dtype, axis))


def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`q * scale` in fp32, of what `quantize` returned.

    q: float8_e4m3fn or float8_e5m2. scale: fp32, 0-d, or of q's shape but for sizes of 1. Differentiable as torch's own ops.
    Raises RuntimeError for other dtypes and shapes.
    """
    for name, value in (("q", q), ("scale", scale)):
        if not isinstance(value, Tensor):
            raise TypeError(f"dequantize: {name} must be a Tensor, got {type(value).__name__}")
    check_format("dequantize: q", q.dtype)
    if scale.dtype != torch.float32:
        raise RuntimeError(f"dequantize: scale must be float32, got {scale.dtype}")
    sizes = zip(scale.shape, q.shape, strict=False)
    if scale.dim() not in (0, q.dim()) or not all(size in (1, whole) for size, whole in sizes):
        got = f"{tuple(scale.shape)} for q of shape {tuple(q.shape)}"
        raise RuntimeError(f"dequantize: scale must be 0-d, or of q's shape but for sizes of 1, got {got}")
    return q.to(torch.float32) * scale


def decompositions() -> dict[Any, Callable[..., torch.Tensor]]:
    """`linear_act` in ATen ops, for `ExportedProgram.run_decompositions`: what ONNX and processes without mpkernels can run.

    The numerics are the op's: operands rounded to the compute dtype, fp32 products and sums (fp64 for fp64), one rounding.
    For inference: the backward op has none. Rounding fp64 to 16 bits once takes bit operations that ONNX does not have.

    NOTE: inductor and AOTInductor leave out casts to fewer bits and back, and operands are not rounded then, unless they are
    told otherwise: `torch._inductor.config.emulate_precision_casts = True`, or `inductor_configs={"emulate_precision_casts":
    True}` of `aoti_compile_and_package`. `torch.compile` of a model needs no decompositions, and runs the op as it is.
    """
    from mpkernels.ops.linear_act import decomposition

    return {torch.ops.mpkernels.linear_act.default: decomposition.linear_act}


def forward(
    x, weight, bias, weight_copy, activation: Activation, policy: Policy | None,
    prev: FusedBackwardLink | None = None, next: FusedBackwardLink | None = None, out_dtype: torch.dtype | None = None,
):  # fmt: skip
    """`linear_act` with everything parsed: what the layers call.

    weight_copy: the weight in the compute dtype, or None. prev, next: the links between layers of one
    MPSequential. out_dtype: the output's; None: as the policy says.
    """
    if has_torch_function_variadic(x, weight, bias):
        is_fused = isinstance(prev, FusedBackwardLink) and prev.activation_grad_fused  # then no other call may take its place
        if not is_fused and _is_overridden(x, weight, bias):
            return _overridden(x, weight, bias, weight_copy, activation, policy, out_dtype)
    if not (type(x) in PLAIN and type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)):
        for name, value in (("x", x), ("weight", weight), ("bias", bias)):
            if not isinstance(value, Tensor) and not (value is None and name == "bias"):
                raise TypeError(f"linear_act: {name} must be a Tensor, got {type(value).__name__}")
        if x.is_nested and x.layout == torch.jagged:
            return _over_values(x, lambda values: forward(values, weight, bias, weight_copy, activation, policy))
    if policy is None:
        compute_dtype = out_dtype = _common_dtype(x, weight, bias)
        grad_dtype, batch_invariant, accumulate_grad, saved_dtype = None, False, False, None
    else:
        compute_dtype, grad_dtype = policy.compute_dtype, policy.grad_dtype
        out_dtype = out_dtype or policy.output_dtype or _output_dtype(x, weight, policy)
        batch_invariant, accumulate_grad, saved_dtype = policy.batch_invariant, policy.accumulate_grad, policy.saved_dtype
    if policy is not None and policy.float8:
        if weight_copy is not None:
            raise RuntimeError(f"linear_act: policy {policy} quantizes the weight itself and takes no weight_copy")
        recipe = float8.Recipe(compute_dtype, policy.dgrad_dtype, policy.wgrad_dtype, policy.scaling == "row")
        return float8.linear_act(
            x, weight, bias, activation=activation, recipe=recipe, out_dtype=out_dtype, grad_dtype=grad_dtype,
            batch_invariant=batch_invariant, accumulate_grad=accumulate_grad,
        )  # fmt: skip
    return _linear_act(
        x, weight, bias, weight_copy,
        activation=activation, compute_dtype=compute_dtype, out_dtype=out_dtype, grad_dtype=grad_dtype,
        batch_invariant=batch_invariant, accumulate_grad=accumulate_grad, saved_dtype=saved_dtype, prev=prev,
        next=next,
    )  # fmt: skip


def _overridden(x, weight, bias, weight_copy, activation: Activation, policy: Policy | None, out_dtype: torch.dtype | None):
    """`linear_act` by the class or the mode that takes the call."""
    if policy is not None:
        policy = str(dataclasses.replace(policy, output_dtype=out_dtype or policy.output_dtype))
    copy = {} if weight_copy is None else {"weight_copy": weight_copy}
    return handle_torch_function(linear_act, (x, weight, bias), x, weight, bias, name_of(activation), policy, **copy)


def _over_values(x, function):
    """`function` of the rows of a jagged nested tensor, which lie in one matrix; nested as it was."""
    if x._ragged_idx != 1:
        raise RuntimeError(f"linear_act: a jagged x must be ragged in dimension 1, got {x._ragged_idx}: transpose it back")
    lengths = {"min_seqlen": x._maybe_min_seqlen, "max_seqlen": x._maybe_max_seqlen}  # what is known of them
    return torch.nested.nested_tensor_from_jagged(function(x.values()), x.offsets(), x.lengths(), **lengths)


def _is_overridden(*tensors) -> bool:
    """Whether a class or a mode takes the call. A compiler asks them itself; a default device is about new tensors only."""
    if torch.compiler.is_compiling():
        return False
    if any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()):
        return True
    classes = {type(tensor) for tensor in tensors} - {torch.Tensor, type(None)}
    return any(getattr(c, "__torch_function__", _DISABLED) is not _DISABLED for c in classes)


_DISABLED = torch._C._disabled_torch_function_impl  # what Parameter has, and DTensor


def _output_dtype(x, weight, policy: Policy) -> torch.dtype:
    if policy.param_dtype == policy.compute_dtype:
        return weight.dtype
    return (torch._C._is_any_autocast_enabled() and autocast_dtype(x.device)) or x.dtype


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """None outside of autocast, and for a device that has none."""
    if not torch._C._is_any_autocast_enabled():
        return None
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _common_dtype(x, weight, bias) -> torch.dtype:
    """The dtype that F.linear would work in; RuntimeError where it would refuse."""
    dtypes = [tensor.dtype for tensor in (x, weight, bias) if tensor is not None]
    narrow = autocast_dtype(x.device)
    if narrow is not None:
        dtypes = [narrow if d.is_floating_point and d != torch.float64 else d for d in dtypes]
    if len(set(dtypes)) > 1:
        names = ", ".join(f"{n} {d}" for n, d in zip(("x", "weight", "bias"), dtypes, strict=False))
        raise RuntimeError(
            f"linear_act: dtypes differ ({names}) and there is no Policy to say which one to compute in: give policy=, "
            '"mixed_float16" for example, or cast them to one dtype'
        )
    return dtypes[0]
