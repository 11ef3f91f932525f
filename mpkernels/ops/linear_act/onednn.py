# SPDX-License-Identifier: Apache-2.0
"""linear_act in bf16 by oneDNN, where the CPU has instructions for it: out = round(act(a @ b.T + bias)), the sums in fp32."""

import functools

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from mpkernels.ops.linear_act.call import ForwardCall
from mpkernels.ops.linear_act.epilogues import Activation

AMX_K = 32  # bf16 of a row that AMX takes at once
SEGMENT = 1 << 18  # elements looked at at a time: what is made of them stays in the cache


@functools.cache
def has_bf16_instructions() -> bool:
    """AVX-512 BF16 or AMX. NOTE: private names, without which fp32 serves."""
    return torch.backends.mkldnn.is_available() and (_supports("avx512_bf16") or _supports("amx_tile"))


@functools.cache
def _supports(instructions: str) -> bool:
    ask = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    return ask is not None and ask()


def multiply(a, b, bias, activation):
    """round(act(a @ b.T + bias)): sums in fp32, to which oneDNN adds a bias in fp32, rounded once.

    NOTE: where AMX's blocks of K are not whole it reads on into the next row and multiplies by 0, so that an inf or NaN there
    reaches this one, in F.linear too. AVX-512 BF16 takes pairs.
    """
    missing = -a.shape[1] % (AMX_K if _supports("amx_tile") else 2)
    if missing:
        a, b = (F.pad(t, (0, missing)) for t in (a, b))
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    if bias is None and a.stride(1) != 1:
        z = torch.mm(a, b.t())  # the same, but that it does not copy what lies by columns
    else:
        z = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return z.relu_() if activation == Activation.RELU else z  # NOTE: oneDNN's own turns NaN into 0


# ----- what the instructions would flush ---------------------------------------------------------------


def products_stay_normal(a, b, bias, again: tuple[bool, bool]) -> bool:
    """Whether nothing but 0 can come up that is below 2^-126, which these instructions take for 0.

    Products of bf16, of 8 bits each, that are not below 2^-100 are multiples of 2^-115, a bias in fp32 from 2^-100 on is one
    of 2^-123, and so are all sums. Empty operands are for others. again: whether a and b were multiplied before: see `seen`.
    """
    if not (a.numel() and b.numel()) or (bias is not None and bias.dtype == torch.float64):
        return False
    exponents = _remembered(a, again[0]), _remembered(b, again[1])
    if 0 in exponents or sum(exponents) < 2 * 127 - 100:
        return False
    return bias is None or _least_exponent(bias.float()) >= 127 - 100


# What was found of an operand, by its storage, until the product that is told to be of the same `again`: forward's operands
# are backward's too, and grad_z stands in two products there. A weak reference keeps a storage's name from being another's.
seen: dict[int, tuple[StorageWeakRef, tuple, int]] = {}
MOST_SEEN, FREED = 1024, 64  # entries; after how many to look for those of freed storages


def _remembered(matrix: torch.Tensor, again: bool) -> int:
    """`_least_exponent` of a matrix, which is looked at unless it was when it was multiplied before."""
    matrix = matrix.t() if matrix.stride(0) == 1 else matrix
    storage, place = matrix.untyped_storage(), (matrix.storage_offset(), matrix.shape, matrix.stride())
    before = seen.pop(storage._cdata, None)
    if again and before is not None and before[1] == place:
        return before[2]
    found = _least_exponent(matrix)
    if not again:
        if len(seen) % FREED == 0:
            _forget_freed()
        if len(seen) >= MOST_SEEN:
            seen.clear()
        seen[storage._cdata] = StorageWeakRef(storage), place, found
    return found


def _forget_freed() -> None:
    """Storages that no backward asked for: what remains of each, a few bytes, fragments the allocator's memory."""
    for name, (reference, *_) in list(seen.items()):
        if reference.expired():
            seen.pop(name, None)


def forget(call: ForwardCall) -> None:
    """What was found of the operands of `call`, which may have been written since, unseen by torch too."""
    for operand in (call.x, call.operand):
        seen.pop(operand.untyped_storage()._cdata, None)


def _least_exponent(tensor) -> int:
    """The biased exponent of the smallest magnitude but 0 in bf16 or fp32: 0 of subnormals, 256 where all are 0."""
    tensor = tensor.t() if tensor.dim() == 2 and tensor.stride(0) == 1 else tensor
    dtype, most, mantissa = (torch.int16, 0x7FFF, 7) if tensor.dtype.itemsize == 2 else (torch.int32, 0x7FFFFFFF, 23)
    # Twice the bits have no sign; with this added, in integers that wrap around, they keep their order, but 0 is the largest.
    offset, least = torch.tensor(most, dtype=dtype, device="cpu"), most
    for segment in tensor.reshape(-1).view(dtype).split(SEGMENT):
        least = min(least, torch.add(offset, segment, alpha=2).amin().item())
    return (least + most + 2) >> (mantissa + 1)
