# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit operands on a GPU by torch's own ops: acc = a @ b in fp32, their scales left out."""

import functools

import torch
import torch.nn.functional as F

_NO_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")  # of a handle, a workspace
MULTIPLE = 16  # of both sizes of b, and of addresses: what cuBLAS asks for


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32, for a (M, K) and b (K, N): in eight bits where cuBLAS does that, else in bf16, which holds them."""
    if all(size and size % MULTIPLE == 0 for size in b.shape) and a.shape[0] and _is_served(a.device, a.dtype, b.dtype):
        return _scaled_mm(_readable(a), _readable(b.t()).t())
    return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16), out_dtype=torch.float32)


def _readable(rows: torch.Tensor) -> torch.Tensor:
    """`rows`, each contiguous, copied where they lie otherwise."""
    is_aligned = rows.data_ptr() % MULTIPLE == 0
    return rows if rows.is_contiguous() and is_aligned else rows.clone(memory_format=torch.contiguous_format)


def _scaled_mm(a, b):
    """Asked for fp32 and with scales of 1: with a result in 16 bits it would round before an activation.

    `use_fast_accum` would leave the sum over all of K to tensor cores that keep 14 bits of it.
    """
    one, recipe = torch.ones((), dtype=torch.float32, device=a.device), F.ScalingType.TensorWise
    return F.scaled_mm(a, b, one, recipe, one, recipe, output_dtype=torch.float32, use_fast_accum=False)


@functools.cache
def _is_served(device: torch.device, a_dtype: torch.dtype, b_dtype: torch.dtype) -> bool:
    """Whether a trial goes through: that depends on the GPU, the versions of CUDA and of torch, and the pair of formats.

    Raises what says nothing of these: it is asked once.
    """
    ones = torch.ones(MULTIPLE, MULTIPLE, dtype=torch.float32, device=device)
    try:
        _scaled_mm(ones.to(a_dtype), ones.to(b_dtype).t())
    except (RuntimeError, ValueError) as error:
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or any(
            text in str(error) for text in _NO_MEMORY
        ):
            raise
        return False
    return True
