# SPDX-License-Identifier: Apache-2.0
"""Inputs of the tests of linear_act: dtype combinations, shapes, data and memory layouts, and one run with its checks."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from mpkernels.ops.linear_act import Activation, forward_op
from mpkernels.ops.linear_act.call import BackwardCall
from mpkernels.testing.linear_act_cases import check_sum
from tests import bounds

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Dtypes:
    """dtypes of one call; `weight` is the bias's too, `grad` that of grad_weight and grad_bias."""

    x: torch.dtype
    weight: torch.dtype
    compute: torch.dtype
    out: torch.dtype
    grad: torch.dtype


DTYPES = {
    "float64": Dtypes(f64, f64, f64, f64, f64),
    "float32": Dtypes(f32, f32, f32, f32, f32),
    "float16": Dtypes(f16, f16, f16, f16, f16),
    "bfloat16": Dtypes(bf16, bf16, bf16, bf16, bf16),
    "float16, fp32 gradients": Dtypes(f16, f16, f16, f16, f32),
    "bfloat16, fp32 gradients": Dtypes(bf16, bf16, bf16, bf16, f32),
    "mixed_float32": Dtypes(f64, f64, f32, f64, f64),
    "mixed_float32 inside": Dtypes(f32, f64, f32, f32, f64),
    "mixed_float16": Dtypes(f32, f32, f16, f32, f32),
    "mixed_float16 inside": Dtypes(f16, f32, f16, f16, f32),
    "mixed_float16 last": Dtypes(f16, f32, f16, f32, f32),
    "mixed_float16, grad=float16": Dtypes(f32, f32, f16, f16, f16),
    "mixed_bfloat16": Dtypes(f32, f32, bf16, f32, f32),
    "mixed_bfloat16 inside": Dtypes(bf16, f32, bf16, bf16, f32),
    "mixed_bfloat16, grad=bfloat16": Dtypes(f32, f32, bf16, bf16, bf16),
    "fp64 to fp16": Dtypes(f64, f64, f16, f16, f64),
    "fp64 to bf16": Dtypes(f64, f64, bf16, bf16, f32),
    "fp32 to bf16 output": Dtypes(f32, f32, f32, bf16, f32),
}
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "offset", "unaligned", "overlapping")
DISTRIBUTIONS = ("normal", "uniform", "lognormal", "small", "positive")


@dataclass(frozen=True)
class Case:
    """One call of the forward and the backward op. layout: of x, weight and grad_out. copy: pass the weight already cast."""

    M: int
    N: int
    K: int
    dtypes: Dtypes = DTYPES["mixed_float16"]
    bias: bool = True
    activation: Activation = Activation.RELU
    save: int = 1
    copy: bool = False
    lead: tuple[int, ...] | None = None
    distribution: str = "normal"
    layout: str = "contiguous"

    def tensors(self, generator, device="cpu"):
        """x, weight, bias, grad_out."""
        lead = (self.M,) if self.lead is None else self.lead
        shapes = ((*lead, self.K), (self.N, self.K), (self.N,), (*lead, self.N))
        dtypes = (self.dtypes.x, self.dtypes.weight, self.dtypes.weight, self.dtypes.out)
        x, weight, bias, grad_out = (
            data(shape, dtype, self.distribution, generator).to(device) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        laid = [laid_out(t, self.layout) for t in (x, weight, grad_out)]
        return laid[0], laid[1], bias if self.bias else None, laid[2]

    @property
    def random_sign(self) -> bool:
        return self.distribution != "positive" and self.layout not in ("expanded", "overlapping")


def data(shape, dtype, distribution, generator) -> torch.Tensor:
    """Random values in `dtype`; "small" reaches fp16's subnormals."""
    z = torch.randn(shape, generator=generator, dtype=f64)
    if distribution == "uniform":
        z = torch.rand(shape, generator=generator, dtype=f64) * 2 - 1
    elif distribution == "lognormal":
        z = z * torch.randn(shape, generator=generator, dtype=f64).exp()
    elif distribution == "small":
        z = z * 2.0**-12
    elif distribution == "positive":
        z = z.abs()
    return z.to(dtype)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (for "expanded": its first row repeated; for "overlapping": others) in another memory layout."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype, device=tensor.device)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "expanded" and tensor.dim() > 1 and tensor.shape[0]:
        return tensor[:1].expand_as(tensor)
    if layout == "overlapping" and tensor.dim() > 1 and tensor.numel():
        return tensor.flatten().as_strided(tensor.shape, (1,) * tensor.dim())
    if layout == "offset":
        return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "unaligned" and tensor.numel() and tensor.device.type == "cpu":
        room = bytearray(tensor.numel() * tensor.element_size() + 1)
        moved = torch.frombuffer(room, dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape)
        return moved.copy_(tensor)
    return tensor


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, the last row 2^31 bytes or more behind the first: memory of which a few pages are ever touched."""
    step = (1 << 31) // max(tensor.shape[0] - 1, 1) // tensor.element_size() + 8
    room = torch.empty(step * (tensor.shape[0] - 1) + tensor[0].numel(), dtype=tensor.dtype)
    return room.as_strided(tensor.shape, (step, *tensor[0].contiguous().stride())).copy_(tensor)


def forward(x, weight, bias, dtypes: Dtypes, activation=Activation.RELU, save=1, copy=None, batch_invariant=False):
    """(out, saved, x_compute) of the op."""
    op = torch.ops.mpkernels.linear_act
    return op(x, weight, bias, copy, int(activation), dtypes.compute, dtypes.out, save, batch_invariant, dtypes.grad)


def backward(
    grad_out, x, weight, saved, dtypes: Dtypes, activation=Activation.RELU, copy=None, output_mask=(True,) * 3, prev=(),
):  # fmt: skip
    """(grad_x, grad_weight, grad_bias) of the op; x in compute dtype. prev: its arguments of the previous layer."""
    op = torch.ops.mpkernels.linear_act_backward
    return op(
        grad_out, x, weight, copy, saved, int(activation), dtypes.compute, dtypes.x, dtypes.grad, dtypes.grad,
        list(output_mask), *prev,
    )[: 4 if prev else 3]  # fmt: skip


def backward_below(
    grad_out, x, weight, saved, prev_saved, dtypes: Dtypes, activation=Activation.RELU, prev_activation=Activation.RELU,
    *, wants_bias=True,
):  # fmt: skip
    """The same for a layer whose x is the output of another: (grad_x, grad_weight, grad_bias, grad_prev_bias)."""
    prev = prev_saved, int(prev_activation), dtypes.grad if wants_bias else None
    return backward(grad_out, x, weight, saved, dtypes, activation, prev=prev)


def saving_masks():
    """For `forward_op._chosen`: what serves writes masks, as kernels for GPUs do. The op on a CPU has the same two parts."""
    choose = forward_op._chosen
    return lambda *key: choose(*key)._replace(saves_mask=True)


def bits_of(mask: torch.Tensor, columns: int) -> np.ndarray:
    """(M, 32 * words) bool: every bit of a saved mask, tail included."""
    words = np.ascontiguousarray(mask.cpu().numpy()).astype("<i4")
    return np.unpackbits(words.view(np.uint8).reshape(words.shape[0], -1), axis=1, bitorder="little").astype(bool)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and values, zeros with their sign, NaN equal to NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    signs = torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())
    return signs and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan())


def run(case: Case, generator, device="cpu"):
    """Forward and backward of one case, held against every bound that applies; returns (out, grads)."""
    x, weight, bias, grad_out = case.tensors(generator, device)
    dtypes, compute = case.dtypes, case.dtypes.compute
    v = bounds.accumulator_roundoff(weight.device, compute)
    copy = None
    if case.copy:
        wide = bounds.rounded(weight.double().cpu().numpy(), compute)
        copy = torch.from_numpy(wide).to(device, compute)
    non_relu = case.activation not in (Activation.NONE, Activation.RELU)
    save = 1 if non_relu else case.save
    out, saved, x_compute = forward(x, weight, bias, dtypes, case.activation, save, copy)
    assert out.shape == (*x.shape[:-1], case.N)
    assert out.dtype == dtypes.out
    bounds.check_forward(out, x, weight, bias, case.activation, compute, v, case.random_sign)

    operand = x if x.dtype == compute else x_compute
    if non_relu:
        assert (saved.dtype, saved.shape) == (compute, (case.M, case.N))
        bounds.check_forward(saved, x, weight, bias, Activation.NONE, compute, v, case.random_sign)
        grads = backward(grad_out, operand, weight, saved, dtypes, case.activation, copy)
        check_slopes(grads, grad_out, operand, weight, saved, case, v)
        return out, grads
    selector, positive = None, None
    if case.activation == Activation.RELU:
        selector, positive = (saved if case.save else out), ~(out <= 0)
        bounds.check_mask(positive, x, weight, bias, compute, dtypes.out, v)
    grads = backward(grad_out, operand, weight, selector, dtypes, case.activation, copy)
    assert [(g.shape, g.dtype) for g in grads] == [
        (x.shape, dtypes.x), (weight.shape, dtypes.grad), (weight.shape[:1], dtypes.grad)
    ]  # fmt: skip
    bounds.check_backward(grads, grad_out, x, weight, positive, compute, v, case.random_sign)
    if positive is not None and case.save:
        by_out = backward(grad_out, operand, weight, out, dtypes, case.activation, copy)
        assert all(same_bits(a, b) for a, b in zip(grads, by_out, strict=True)), "by the mask and by out differ"
    return out, grads


def check_adds_grad_weight(linear_act_backward, sizes, dtype, shift, generator, device):
    """With the bits of a product that is added afterwards, wherever in a buffer the sum lies, and nothing beside it written."""
    M, N, K = sizes
    grad_out, x = (data((M, n), dtype, "normal", generator).to(device) for n in (N, K))
    weight, before = (data((N, K), f32, "normal", generator).to(device) for _ in range(2))
    call = BackwardCall(grad_out, x, weight, None, None, 0, dtype, dtype, f32, f32, [False, True, True])
    _, product, bias, _ = linear_act_backward(call)
    room = torch.full((shift + N * K + 8,), torch.nan, device=device)
    total = room[shift : shift + N * K].view(N, K).copy_(before)
    _, nothing, grad_bias, _ = linear_act_backward(call._replace(grad_weight_sum=total))
    assert nothing is None
    assert same_bits(total, before + product)
    assert same_bits(grad_bias, bias)
    assert room.isnan().sum() == shift + 8
    check_sum(total, before, grad_out, x, dtype, bounds.accumulator_roundoff(device, dtype))


def check_slopes(grads, grad_out, operand, weight, saved, case, v):
    """The gradients of an activation that multiplies: its own grad_z against fp64, and the products of that."""
    dtypes, compute = case.dtypes, case.dtypes.compute
    grad_z = grad_z_of(grad_out, saved, case.activation, dtypes)
    bounds.check_slope(grad_z, grad_out, saved, case.activation, compute, v)
    bounds.check_summed_slopes(grads[2], grad_out, saved, case.activation, compute, v)
    if grad_z.isfinite().all():
        bounds.check_backward((*grads[:2], None), grad_z, operand, weight, None, compute, v, case.random_sign)


def grad_z_of(grad_out, saved, activation, dtypes: Dtypes):
    """grad_z as the op rounds it for its products: what comes out of one with the identity.

    A column at a time where one is not finite: what it is times a zero of the identity is NaN in the others.
    """
    grad_out = grad_out.reshape(saved.shape)
    grad_z = _times_identity(grad_out, saved, activation, dtypes)
    if grad_z.isfinite().all():
        return grad_z
    columns = zip(grad_out.split(1, 1), saved.split(1, 1), strict=True)
    return torch.cat([_times_identity(grad, z, activation, dtypes) for grad, z in columns], 1)


def _times_identity(grad_out, saved, activation, dtypes: Dtypes):
    eye = torch.eye(saved.shape[1], dtype=dtypes.compute, device=saved.device)
    same = replace(dtypes, x=dtypes.compute)
    return backward(grad_out, None, eye, saved, same, activation, output_mask=(True, False, False))[0]


def fixed_cases(rows: int):
    """Every N and K of small awkward sizes for `rows`; dtypes, bias, activation, save and copy alternate."""
    sizes = (0, 1, 2, 3, 7, 16, 17, 32, 33, 65)
    names = list(DTYPES)
    for i, (N, K) in enumerate((n, k) for n in sizes for k in sizes):
        turn = i + rows
        case = Case(
            rows, N, K, DTYPES[names[turn % len(names)]], bias=turn % 3 > 0, activation=Activation(turn % len(Activation))
        )
        yield replace(case, save=turn % 2, copy=turn % 7 == 0)


def generated_case(random: np.random.Generator) -> Case:
    """Anything: one size may be long (to 16384), the others then are small."""
    primes = (2, 3, 5, 7, 11, 13, 31, 61, 97, 127, 131)

    def size(limit):
        kinds = (0, 1, random.choice(primes), 32 * random.integers(1, 5) + random.integers(-1, 2), random.integers(1, 200))
        return int(min(random.choice(kinds, p=(0.04, 0.1, 0.26, 0.3, 0.3)), limit))

    sizes = [size(100), size(100), size(200)]
    if random.random() < 0.1:
        sizes = [size(6), size(6), size(6)]
        sizes[random.choice(3, p=(0.2, 0.2, 0.6))] = int(random.integers(400, 16385))
    M, N, K = sizes
    leads = [(M,), (1, M), (M, 1), *([()] if M == 1 else []), *([(2, M // 2)] if M % 2 == 0 else [])]
    return Case(
        M, N, K,
        dtypes=DTYPES[random.choice(list(DTYPES))],
        bias=bool(random.random() < 0.7),
        activation=Activation(int(random.choice(6, p=(0.3, 0.4, 0.07, 0.08, 0.08, 0.07))) if N <= 1024 else int(N % 2)),
        save=int(random.integers(2)),
        copy=bool(random.random() < 0.2),
        lead=leads[random.integers(len(leads))],
        distribution=str(random.choice(DISTRIBUTIONS)),
        layout=str(random.choice(LAYOUTS, p=(0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05))),
    )  # fmt: skip
