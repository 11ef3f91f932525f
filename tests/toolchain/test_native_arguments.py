# SPDX-License-Identifier: Apache-2.0
"""What the native ops refuse, though no public op gives it to them: tensors that their raw pointers would read past the end."""

import pytest
import torch

from mpkernels.ops.common.layout import Tensors
from mpkernels.ops.linear_act import Activation
from mpkernels.runtime import native
from tests.emulator import host_kernels
from tests.emulator.host_kernels import HostOps
from tests.steps import counts, scalar

f16, bf16, f32, f64, i32, u8 = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8
HYPER = dict(adamw_=(0.9, 0.9, 1e-8, 0.0, True), sgd_=(0.9, 0.0, 0.0, False), lion_=(0.9, 0.9, 0.0))
HARMLESS = {"amax_": ("x",), "linear_act_products_stay_normal": ("a", "b", "bias")}  # of no elements


def ones(*shape, dtype=f32):
    return torch.ones(shape, dtype=dtype)


def table(*tensors):
    """As the step ops have a list of tensors, which lives as long as it."""
    made = Tensors(tensors)
    made.table.names = made
    return made.table


def update(name, states, absent=0):
    lists = [table(ones(4)) for _ in range(2 + states)] + [table()] * absent + [table(ones(4)), table(scalar(0.0))]
    numbers = scalar(0.5), *HYPER[name], False, scalar(2.0), scalar(0.0), scalar(1.0, dtype=f64), 1.0
    return *lists, ones(1), *numbers


def calls() -> dict[str, tuple]:
    """Valid arguments of every native op that takes tensors."""
    gelu, tile = int(Activation.GELU), (128, 1, 4, False)
    return {
        "grad_stats_": (table(ones(4)), scalar(2.0), scalar(0.0), ones(1, dtype=f64), counts(1), scalar(0.0, dtype=f64)),
        "amax_": (ones(4), ones(3), 0),
        "end_step_": (ones(3), ones(3), scalar(1.0), 0, 0.0),
        "adamw_": update("adamw_", 2, absent=1),
        "sgd_": update("sgd_", 1),
        "lion_": update("lion_", 1),
        "update_scale_": (
            scalar(2.0), scalar(0, dtype=i32), scalar(1, dtype=i32), counts(2), scalar(0.0), 2.0, 0.5, 9, 1, 0.1, 9.0,
        ),
        "quantize": (ones(8), 1, 8, 1, 3, ones(8, dtype=u8), ones(1)),
        "linear_act_multiply": (
            ones(2, 4), ones(3, 4), ones(3), f32, gelu, False, ones(2, 3), ones(2, 3), ones(2), ones(3),
        ),
        "linear_act_products_stay_normal": (ones(2, 4, dtype=bf16), ones(3, 4, dtype=bf16), ones(3)),
        "linear_act_gradients": (
            ones(2, 3), ones(2, 3), gelu, ones(2, 4), ones(3, 4), f32, ones(2, 3), ones(2, 4), ones(3, 4), ones(3), False,
        ),
        "linear_act_fprop": (
            ones(8, 64, dtype=f16), ones(8, 64, dtype=f16), ones(8), True, ones(8, 8, dtype=f16), ones(8, 1, dtype=i32),
            *tile, 1,
        ),
        "linear_act_dgrad": (
            ones(8, 8, dtype=f16), ones(8, 64, dtype=f16), ones(8, 2, dtype=i32), ones(8, 64, dtype=f16), ones(1, 64), *tile, 1,
        ),
        "linear_act_wgrad": (ones(8, 8, dtype=f16), ones(8, 64, dtype=f16), ones(8, 64), 1, *tile, True),
        "linear_act_select": (ones(8, 8, dtype=f16), ones(8, 1, dtype=i32), ones(8, 8, dtype=f16), ones(1, 8)),
        "linear_act_sum": (ones(2, 8, 8), ones(8, 8), ones(8), True, ones(8, 1, dtype=i32)),
    }  # fmt: skip


def ops_of(name, device):
    """Of the library on the CPU; of the CUDA kernels in the emulator."""
    if device == "cpu":
        assert native.why_not() is None, "the library is needed here"
        return native.ops
    if host_kernels.why_not() is not None:
        pytest.skip(host_kernels.why_not())
    return HostOps(library="mpkernels_hopper" if name.startswith("linear_act") else "mpkernels_host")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [name for name, schema in native.schemas().items() if "Tensor" in schema])
def test_native_refuses_tensors_that_are_too_small(name, device):
    """Each in turn of no elements, in one dimension and in two: a number too, whose address is none."""
    ops, valid, arguments = ops_of(name, device), calls()[name], torch._C.parse_schema(native.schemas()[name]).arguments
    try:
        op = getattr(ops, name)
        op(*valid)
    except (NotImplementedError, AttributeError):
        pytest.skip(f"{name} is not for {device}")
    for i, (argument, value) in enumerate(zip(arguments, valid, strict=False)):
        if not torch.is_tensor(value) or argument.name in ("on", *HARMLESS.get(name, ())):
            continue
        for shape in ((0,), (0, 0)):
            with pytest.raises(RuntimeError):
                op(*valid[:i], value.new_empty(shape), *valid[i + 1 :])


@pytest.mark.parametrize("compute", [f64, i32, u8, torch.int64])
def test_linear_act_multiply_refuses_other_compute_dtypes(compute):
    """Operands of that dtype would be read as fp32, those of fp32 multiplied in fp32."""
    for dtype in (compute, f32):
        a, b, out = ones(2, 4, dtype=dtype), ones(3, 4, dtype=dtype), ones(2, 3)
        with pytest.raises(RuntimeError, match="compute_dtype must be float16, bfloat16, float32 or an 8-bit float"):
            native.ops.linear_act_multiply(a, b, None, compute, 0, False, out)
