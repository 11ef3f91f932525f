# SPDX-License-Identifier: Apache-2.0
"""What is measured, by name: shapes and sizes only, shared with the tests; how, stands in the file named after the op."""

from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

CPU, CUDA = ("cpu",), ("cuda",)
BOTH = CPU + CUDA


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the tables. quick: part of `--quick`; devices: where it is run unless asked for by its full name."""

    quick: bool = False
    devices: tuple[str, ...] = BOTH


@dataclass(frozen=True)
class LinearAct(Case):
    """act(x @ weight.T + bias) with ReLU; x: (M, K), weight: (N, K). direction: forward, backward or both."""

    direction: str
    M: int
    K: int
    N: int
    dtype: str = "float16"
    op: str = field(default="linear_act", init=False)

    @property
    def name(self) -> str:
        return f"linear_act/{self.direction}/{self.dtype}/{self.M}x{self.K}x{self.N}"


@dataclass(frozen=True)
class Mlp(Case):
    """A chain of linears with ReLU between, all of one width, forward and backward."""

    M: int
    width: int
    layers: int = 4
    dtype: str = "float16"
    op: str = field(default="mlp", init=False)

    @property
    def name(self) -> str:
        return f"mlp/{self.dtype}/{self.M}x{self.width}x{self.layers}"


@dataclass(frozen=True)
class Step(Case):
    """scaler.step and scaler.update of AdamW on `parameters` in `tensors` equal tensors. kind: plain, clip or skipped.

    grads float16: 16-bit parameters with fp32 masters; float32: fp32 parameters, from which a 16-bit copy is made.
    """

    parameters: int
    tensors: int
    grads: str = "float16"
    kind: str = "plain"
    op: str = field(default="step", init=False)

    @property
    def name(self) -> str:
        return f"step/{self.grads}/{self.kind}/{self.parameters:.0e}in{self.tensors}".replace("+0", "")


@dataclass(frozen=True)
class Training(Case):
    """Whole training steps of a model in bench/models.py: forward, loss, backward, optimizer. steps: per round."""

    model: str
    steps: int = 3
    op: str = field(default="training", init=False)

    @property
    def name(self) -> str:
        return f"training/{self.model}"


@dataclass(frozen=True)
class Overhead(Case):
    """What a call costs beside its arithmetic, which is next to none here."""

    what: str
    op: str = field(default="overhead", init=False)

    @property
    def name(self) -> str:
        return f"overhead/{self.what}"


# M, K, N. The first four are those of a figure in docs/performance.md; the last has nothing round.
_CPU_SHAPES = ((64, 784, 512), (256, 1024, 1024), (512, 1024, 4096), (1, 4096, 4096), (37, 1000, 129))
_CPU_MORE = ((512, 4096, 1024), (1024, 1024, 1024), (2048, 4096, 1024), (8, 1000, 37))
_CPU_OVER_K = tuple((256, K, 1024) for K in (64, 256, 4096))
_GPU_SHAPES = (
    (512, 1024, 4096), (4096, 1024, 4096), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 16384), (1, 4096, 4096),
    (37, 1000, 129),
)  # fmt: skip
_GPU_OVER_K = tuple((4096, K, 4096) for K in (256, 512, 2048, 16384))
_GPU_MORE = tuple((M, K, N) for M in (512, 2048, 8192, 16384) for K in (1024, 4096, 16384) for N in (1024, 4096, 16384))


def _linear_acts():
    for shape in _CPU_SHAPES + _CPU_OVER_K:
        yield LinearAct("forward", *shape, quick=True, devices=CPU)
    for shape in _CPU_SHAPES[:3] + _CPU_SHAPES[4:]:
        yield LinearAct("backward", *shape, quick=True, devices=CPU)
    for direction in ("forward", "backward", "both"):
        yield LinearAct(direction, 256, 1024, 1024, "bfloat16", quick=True, devices=CPU)
        yield from (LinearAct(direction, *shape, devices=CPU) for shape in _CPU_MORE)
    yield LinearAct("both", 256, 1024, 1024, quick=True, devices=CPU)
    for direction in ("forward", "backward", "both"):
        yield from (LinearAct(direction, *shape, quick=True, devices=CUDA) for shape in _GPU_SHAPES + _GPU_OVER_K)
        yield LinearAct(direction, 4096, 4096, 4096, "bfloat16", quick=True, devices=CUDA)
        yield from (LinearAct(direction, *shape, d, devices=CUDA) for shape in _GPU_MORE for d in ("float16", "bfloat16"))


def _steps():
    million = 10**6
    for tensors in (1, 300):
        yield Step(10 * million, tensors, quick=True)
        yield Step(50 * million, tensors, quick=True)
    yield Step(million, 300, quick=True)
    yield Step(10 * million, 10_000, quick=True)
    for kind in ("clip", "skipped"):
        yield Step(10 * million, 300, kind=kind, quick=True)
        yield Step(10 * million, 300, "float32", kind)
    yield Step(10 * million, 300, "float32", quick=True)
    yield Step(100 * million, 300)
    for parameters in (100 * million, 1000 * million):
        yield Step(parameters, 300, "float32", devices=CUDA)
    yield Step(1000 * million, 1, quick=True, devices=CUDA)
    yield Step(1000 * million, 300, quick=True, devices=CUDA)


def _trainings():
    for model in ("digits", "mlp"):
        yield Training(model, quick=True)
    for model in ("mlp6", "dlrm", "vit_tiny", "bert_tiny", "gpt2_tiny"):
        yield Training(model, 2, quick=True, devices=CPU)
    for model in ("mlp6_wide", "dlrm_wide", "vit_b", "bert_base", "gpt2_small"):
        yield Training(model, quick=True, devices=CUDA)


def _by_name(cases) -> tuple[Case, ...]:
    """A case that is named twice is run on both devices, and is quick if either is."""
    found = {}
    for case in cases:
        other = found.get(case.name, case)
        devices = tuple(dict.fromkeys(other.devices + case.devices))
        found[case.name] = replace(case, devices=devices, quick=case.quick or other.quick)
    return tuple(found.values())


_EVERYTHING = (
    *_linear_acts(),
    Mlp(256, 1024, quick=True, devices=CPU),
    Mlp(4096, 4096, quick=True, devices=CUDA),
    Mlp(16384, 1024, devices=CUDA),
    *_steps(),
    *_trainings(),
    *(
        Overhead(what, quick=True)
        for what in ("forward", "forward+backward", "step of 1", "step of 100", "step of 1000", "first_step")
    ),
)
CASES = _by_name(_EVERYTHING)


def select(device: str, ops: list[str] | None = None, glob: str = "*", quick: bool = False) -> list[Case]:
    """The cases of a run. A full name, no glob, is found whatever the device and `quick`."""
    by_name = [case for case in CASES if case.name == glob]
    return by_name or [
        case
        for case in CASES
        if device in case.devices and (case.quick or not quick) and (not ops or case.op in ops) and fnmatch(case.name, glob)
    ]
