# SPDX-License-Identifier: Apache-2.0
"""What the tests of the step ops share: where they run, their tensors, and comparison by bytes.

A test file of an op parametrizes its fixture `device` over `targets(op)`; the fixture forces the backend for that op.
"""

import functools
import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch

from mpkernels.ops.grad_stats import op as grad_stats
from mpkernels.runtime.op import Op
from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE
from tests import bounds

# 1,000 elements: tails of every vector width, and tensors that end inside a chunk.
SIZES = (1, 2, 7, 31, 64, 257, 638)
SHORT_SIZES = (1, 2, 7, 31, 64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BAD_VALUES = (math.inf, -math.inf, math.nan)
BAD_SCALES = (0.0, -1024.0, math.nan, math.inf, -math.inf)
STEPS = 200


def compute_copies(optimizer) -> list[torch.Tensor]:
    """Those that `optimizer` writes."""
    return [c.tensor for plan in optimizer._plans.plans[:1] for c in plan.compute_copies]


def targets(op: Op) -> list:
    """`(backend, device)` for every implementation on the devices here; one that cannot run is a skip with its reason."""
    result = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for implementation in op.implementations:
            backend = implementation.backend
            # Triton on a CPU is its interpreter: test_step_triton.py, in a process of its own.
            if device not in implementation.device_types or (backend, device) == ("triton", "cpu"):
                continue
            reason = op.why_not(backend, torch.device(device), torch.float32)
            marks = [] if reason is None else [pytest.mark.skip(reason=f"{backend}: {reason}")]
            result.append(pytest.param((backend, device), id=f"{backend}-{device}", marks=marks))
    return result


def force(op: Op, target: tuple[str, str], monkeypatch) -> torch.device:
    """Force the target's backend for `op`; its device."""
    return force_all([op], *target, monkeypatch)


def norm_is_in_fp32(grads) -> bool:
    """Whether grad_stats_ sums squares in fp32 first (see `bounds.check_norm`): eager on a CPU, of 16-bit gradients."""
    backends = {grad_stats.backend(grad.device, grad.dtype) for grad in grads if grad.dtype.itemsize == 2 and grad.is_cpu}
    return "eager" in backends


def force_all(ops: Iterable[Op], backend: str, device: str, monkeypatch) -> torch.device:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, ",".join(f"{op.name}={backend}" for op in ops))
    return torch.device(device)


def scalar(value: float, device="cpu", dtype=torch.float32) -> torch.Tensor:
    return torch.full((), value, dtype=dtype, device=device)


def counts(n: int, device="cpu") -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int64, device=device)


def step_counts(n: int, device="cpu", taken: float = 0) -> list[torch.Tensor]:
    return [scalar(taken, device) for _ in range(n)]


def taken(steps: list[torch.Tensor]) -> list[float]:
    return [step.item() for step in steps]


def split(flat: torch.Tensor, sizes: Iterable[int]) -> list[torch.Tensor]:
    """Copies of consecutive segments."""
    return [segment.clone() for segment in flat.split(list(sizes))]


def join(tensors: list[torch.Tensor]) -> np.ndarray:
    """All elements in order, on the host."""
    return torch.cat([t.detach().cpu().reshape(-1) for t in tensors]).numpy()


def raw(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """Bytes of the elements of each tensor, in its own order of dimensions: NaN equals itself, 0. differs from -0."""
    return [t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]


def clone(args: dict) -> dict:
    """The arguments of a call with tensors of their own. NOTE: these are aligned, whatever the originals are."""
    each = lambda value: [t.clone() for t in value] if isinstance(value, list) else value
    return {name: value.clone() if torch.is_tensor(value) else each(value) for name, value in args.items()}


def leaves(value) -> list[torch.Tensor]:
    """Every tensor in the arguments of a call."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [leaf for v in values for leaf in leaves(v)]


def check_raises_unchanged(call: Callable, args: dict, change: dict, message: str) -> None:
    """`call` with `change` over `args` raises RuntimeError with `message` and writes nothing."""
    bad = args | change
    watched = [t for t in leaves(bad) if t.layout == torch.strided and t.device.type != "meta"]
    before = raw(watched)
    with pytest.raises(RuntimeError, match=message):
        call(**bad)
    assert raw(watched) == before


def rounded_once(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype` by numpy's fp64 -> fp16 and by bounds.rounded: not by torch's casts, of which some round twice."""
    values = tensor.detach().cpu().double().numpy()
    once = bounds.rounded(values, dtype)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            assert np.array_equal(values.astype(np.float16).astype(np.float64), once, equal_nan=True)
    return torch.from_numpy(np.asarray(once)).to(dtype)


def check_copies(copies: list[torch.Tensor], masters: list[torch.Tensor]) -> None:
    """Bound 9: each copy is its master rounded once, bit for bit; a copy of size 0 is not wanted.

    NaN is one value here: torch's own casts write several.
    """
    for i, (copy, master) in enumerate(zip(copies, masters, strict=True)):
        if copy.numel():
            got, expected = (torch.where(t.isnan(), math.nan, t) for t in (copy.cpu(), rounded_once(master, copy.dtype)))
            assert raw([got]) == raw([expected]), f"copy {i} ({copy.dtype}) is not its master ({master.dtype}) rounded once"


def layouts(shape: tuple[int, int], dtype: torch.dtype, device, generator) -> dict[str, torch.Tensor]:
    """Tensors of one shape whose elements lie differently in memory."""
    rows, columns = shape

    def randn(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    return {
        "contiguous": randn(rows, columns),
        "transposed": randn(columns, rows).t(),
        "columns of a wider one": randn(rows, columns + 3)[:, :columns],
        "every second": randn(rows, 2 * columns)[:, ::2],
        "offset by one": randn(rows * columns + 1)[1:].view(rows, columns),
        "transposed slice": randn(columns, rows + 5).t()[:rows],
    }


class Problem:
    """Steps of gradients, the same for the op, for fp64 and for torch.

    fp16 gradients, scaled by 1024, of magnitudes from 1e-6 to 1; some are zero in some steps, some in all.
    """

    grad_scale = 1024.0

    def __init__(self, sizes=SHORT_SIZES, steps=STEPS, seed=0):
        generator = torch.Generator().manual_seed(seed)
        n = sum(sizes)
        self.sizes = sizes
        self.start = torch.randn(n, generator=generator, dtype=torch.float64)
        magnitude = 10 ** (-6 * torch.rand(n, generator=generator, dtype=torch.float64))
        noise = torch.randn(steps, n, generator=generator, dtype=torch.float64)
        drift = torch.randn(n, generator=generator, dtype=torch.float64)
        grads = (noise + drift) * magnitude
        grads[torch.rand(steps, n, generator=generator) < 0.05] = 0
        grads[:, -1] = 0
        self.grads = (grads * self.grad_scale).half()

    def unscaled(self, dtype: torch.dtype) -> torch.Tensor:
        """(steps, n), exact: the scale is a power of two."""
        return self.grads.to(dtype) / self.grad_scale


def torch_trajectory(make: Callable, start: torch.Tensor, grads: torch.Tensor) -> np.ndarray:
    """(steps, n): the weights after each step of torch's for-loop optimizer `make(params)`, in the dtype of `start`."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = make([weight])
    result = []
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        result.append(weight.detach().clone())
    return torch.stack(result).numpy()


@functools.cache
def problem() -> Problem:
    return Problem()


def clip_factors(max_norm) -> np.ndarray:
    """(steps, 1) fp64."""
    norms = problem().unscaled(torch.float64).norm(dim=1, keepdim=True)
    return (max_norm / (norms + 1e-6)).clamp(max=1).numpy() if max_norm else np.ones((len(norms), 1))


def trajectory(call: Callable, arguments: Callable, options: dict, dtype, device, copy_dtypes) -> np.ndarray:
    """(steps, n) masters of the op `call`; copies are held against them on the way."""
    masters = split(problem().start.to(device, dtype), problem().sizes)
    args = arguments(masters, masters, copy_dtypes, **options, grad_scale=scalar(problem().grad_scale, device))
    grads = problem().grads.to(device)
    norms = problem().unscaled(torch.float64).norm(dim=1).to(device)
    result = []
    for t in range(len(grads)):
        args["grads"] = split(grads[t], problem().sizes)
        if "max_norm" in options:
            args["grad_norm"] = norms[t]
        call(**args)
        result.append(join(masters))
        if t % 100 == 0:
            check_copies(args["copies"], masters)
    assert taken(args["steps"]) == [len(grads)] * len(masters)
    return np.stack(result)


# ----- tests that the updates share ---------------------------------------------------------------


def check_rounds_copies_once(call: Callable, arguments: Callable, dtype: torch.dtype, device) -> None:
    """Masters a little beside a tie of the 16-bit format, where going through fp32 rounds twice; inf, subnormals, -0."""
    u = bounds.unit_roundoff(dtype)
    near = [s * (1 + k * 2 * u + u) * (1 + d) for s in (1, -1) for k in range(40) for d in (-(2.0**-40), 0, 2.0**-40)]
    tiny = bounds.least_subnormal(dtype)
    extremes = [0.0, -0.0, tiny / 2, tiny * 0.75, -tiny * 1.5, 65519.99, 65520.0, 1e39, -1e300, 1e-320, math.inf, math.nan]
    master = torch.tensor(near + extremes, dtype=torch.float64, device=device)
    args = arguments([master], [torch.zeros_like(master)], (dtype,), lr=0.0)
    call(**args)
    check_copies(args["copies"], args["masters"])


def check_makes_saved_tensors_stale(call: Callable, arguments: Callable, device) -> None:
    """A step after forward makes backward an error, as autograd sees the write."""
    parameter = torch.nn.Parameter(torch.ones(3, device=device))
    loss = parameter.square().sum()
    with torch.no_grad():
        call(**arguments([parameter], [torch.ones(3, device=device)]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
