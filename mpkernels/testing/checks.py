# SPDX-License-Identifier: Apache-2.0
"""One implementation held against fp64: right values, nothing else written, the same bits every time, in streams and graphs."""

import statistics
from collections.abc import Callable

import torch

from mpkernels.runtime.op import Op
from mpkernels.testing import cases
from mpkernels.testing.memory import Memory
from mpkernels.testing.timing import interleave

ROUNDS = 5  # of a race


def wrong(
    op: Op, backend: str, device: torch.device, part: str | None = None, *, few: bool = True, full: bool = False
) -> str | None:
    """What `backend` first does wrong, in a sentence, or None. Raises what a kernel raises, or that it is not here.

    part: of the op's cases; None: all.
    """
    reason = op.why_not(backend, device, op.dtype)
    if reason is not None:
        raise RuntimeError(f"{op.name}: {backend} {reason}")
    function = op.function(backend)
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        for case in cases.of(op.name, few=few, full=full):
            key = op.key(device, *case.call)
            if op.why_not_key(backend, key) is not None or part not in (None, op.part_of(key)):
                continue
            try:
                _check(function, case, device)
            except AssertionError as error:
                return f"{op.name}, {case.name}: {error}"
    return None


def _check(function: Callable, case: cases.Case, device: torch.device) -> None:
    first = _run(function, case, device, check=True)
    _same(first, _run(function, case, device), "two runs differ")
    if case.parts is not None:
        arguments = case.make(Memory(device))
        parts = torch.cat([function(*part)[0] for part in case.parts(arguments)])
        _same(first[:1], [parts], "rows have other bits alone than among others")
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            second = _run(function, case, device)
        torch.cuda.current_stream(device).wait_stream(stream)
        _same(first, second, "another stream gives other bits")
        _same(first, _replay(function, case, device), "the replay of a CUDA graph gives other bits")


def _run(function, case, device, check: bool = False) -> list[torch.Tensor]:
    """All that was written and returned. `check`: against fp64, and that nothing else was written."""
    memory = Memory(device)
    arguments = case.make(memory)
    before = _copied(arguments)
    with memory.outputs():
        results = function(*arguments)
    results = () if results is None else tuple(results)
    memory.check()
    if check:
        for place, (old, new) in enumerate(zip(before, arguments, strict=True)):
            if place not in case.written:
                assert all(map(_equal, _tensors([old]), _tensors([new]))), f"argument {place} was written, which is read only"
        case.check(before, arguments, results, device)
    return _written(case, arguments, results)


def _replay(function, case, device) -> list[torch.Tensor]:
    memory = Memory(device)
    arguments = case.make(memory)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(device)):  # torch.cuda.graph also empties the cache, each time
        graph.capture_begin()
        try:
            results = function(*arguments)
        finally:
            graph.capture_end()
    graph.replay()
    torch.cuda.synchronize(device)
    memory.check()
    return [tensor.clone() for tensor in _written(case, arguments, () if results is None else tuple(results))]


def _written(case, arguments, results) -> list[torch.Tensor]:
    return [*_tensors(results), *_tensors([arguments[place] for place in case.written])]


def _tensors(values) -> list[torch.Tensor]:
    """The tensors among them, and those in lists."""
    found = []
    for value in values:
        found += value if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) else []
        found += [value] if isinstance(value, torch.Tensor) else []
    return found


def _copied(arguments: tuple) -> tuple:
    def copied(value):
        if isinstance(value, list):
            return [copied(item) for item in value]
        return value.clone() if isinstance(value, torch.Tensor) else value

    return tuple(map(copied, arguments))


def _same(first, second, complaint: str) -> None:
    assert len(first) == len(second), complaint
    assert all(map(_equal, first, second)), complaint


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """In every bit: NaN is NaN."""
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def race(op: Op, backend: str, device: torch.device, part: str) -> dict[str, float]:
    """How many times as fast as eager `backend` is, at each size; of eager itself nothing."""
    speeds = {}
    if backend == "eager":
        return speeds
    for name, make in cases.sizes(part, device).items():
        runs = {}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for which in ("eager", backend):
            function, arguments = op.function(which), make(which, device)
            runs[which] = lambda function=function, arguments=arguments: function(*arguments)
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            times = interleave(runs, device, ROUNDS)
        speeds[name] = round(statistics.median(times["eager"]) / statistics.median(times[backend]), 3)
    return speeds
