# SPDX-License-Identifier: Apache-2.0
"""What is measured, by name: shapes and sizes only, shared with the tests; how, stands in the file named after the op."""

from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

CPU, CUDA = ("cpu",), ("cuda",)
BOTH = CPU + CUDA


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the tables. devices: where it is run unless asked for by its full name; quick: where `--quick` has it."""

    quick: tuple[str, ...] = ()
    devices: tuple[str, ...] = BOTH


@dataclass(frozen=True)
class LinearAct(Case):
    """act(x @ weight.T + bias) with ReLU; x: (M, K), weight: (N, K). direction: forward, backward or both.

    compiled: the modes in which torch.compile competes, each of which takes half a minute.
    """

    direction: str
    M: int
    K: int
    N: int
    dtype: str = "float16"
    compiled: tuple[str, ...] = ()
    op: str = field(default="linear_act", init=False)

    @property
    def name(self) -> str:
        return f"linear_act/{self.direction}/{self.dtype}/{self.M}x{self.K}x{self.N}"


@dataclass(frozen=True)
class Mlp(Case):
    """A chain of linears with ReLU between, all of one width, forward and backward. compiled: torch.compile competes, too."""

    M: int
    width: int
    layers: int = 4
    dtype: str = "float16"
    compiled: bool = False
    op: str = field(default="mlp", init=False)

    @property
    def name(self) -> str:
        return f"mlp/{self.dtype}/{self.M}x{self.width}x{self.layers}"


@dataclass(frozen=True)
class Quantize(Case):
    """An fp32 matrix in float8_e4m3fn with a scale per row, from its largest magnitude."""

    rows: int
    columns: int
    op: str = field(default="quantize", init=False)

    @property
    def name(self) -> str:
        return f"quantize/{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Float8(Case):
    """A linear in float8_e4m3fn with scales by row; x: (M, K), weight: (N, K). direction: forward, of operands that are
    quantized, or both, of a layer."""

    direction: str
    M: int
    K: int
    N: int
    op: str = field(default="float8", init=False)

    @property
    def name(self) -> str:
        return f"float8/{self.direction}/{self.M}x{self.K}x{self.N}"


@dataclass(frozen=True)
class Step(Case):
    """scaler.step and scaler.update of an optimizer on `parameters` in `tensors` equal tensors. kind: plain, clip or skipped.

    grads float16: 16-bit parameters with fp32 masters; float32: fp32 parameters, from which a 16-bit copy is made.
    """

    parameters: int
    tensors: int
    grads: str = "float16"
    kind: str = "plain"
    optimizer: str = "adamw"
    op: str = field(default="step", init=False)

    @property
    def name(self) -> str:
        which = "" if self.optimizer == "adamw" else f"{self.optimizer}/"
        return f"step/{which}{self.grads}/{self.kind}/{self.parameters:.0e}in{self.tensors}".replace("+0", "")


@dataclass(frozen=True)
class Training(Case):
    """Whole training steps of a model in bench/models.py: forward, loss, backward, optimizer. compiled: as for Mlp.

    parts: micro-batches that the batch is cut into, whose gradients accumulate.
    """

    model: str
    compiled: bool = False
    parts: int = 1
    op: str = field(default="training", init=False)

    @property
    def name(self) -> str:
        return f"training/{self.model}" + f"/{self.parts} micro-batches" * (self.parts > 1)


@dataclass(frozen=True)
class Overhead(Case):
    """What a call costs beside its arithmetic, which is next to none here."""

    what: str
    op: str = field(default="overhead", init=False)

    @property
    def name(self) -> str:
        return f"overhead/{self.what}"


DEFAULT, EVERY_MODE = ("default",), ("default", "max-autotune-no-cudagraphs")

# M, K, N. Those of a figure in docs/performance.md come first; the last has nothing round.
_CPU_SHAPES = ((64, 784, 512), (256, 1024, 1024), (512, 1024, 4096), (1, 4096, 4096), (37, 1000, 129))
_CPU_OVER_K = tuple((256, K, 1024) for K in (64, 256, 4096))
_CPU_MORE = (
    (512, 4096, 1024), (512, 1024, 16384), (512, 16384, 1024), (1024, 1024, 1024), (2048, 4096, 1024), (16384, 1024, 1024),
    (8, 1000, 37),
)  # fmt: skip
_GPU_SHAPES = (
    (512, 1024, 4096), (8192, 8192, 8192), (16384, 4096, 16384), (1, 4096, 4096), (37, 1000, 129),
)  # fmt: skip
_GPU_COMPILED = ((4096, 1024, 4096), (4096, 4096, 4096))
_GPU_OVER_K = tuple((4096, K, 4096) for K in (256, 512, 2048, 16384))
_GPU_MORE = tuple((M, K, N) for M in (512, 2048, 8192, 16384) for K in (1024, 4096, 16384) for N in (1024, 4096, 16384))
DIRECTIONS = ("forward", "backward", "both")


def _linear_acts():
    for shape in _CPU_SHAPES + _CPU_OVER_K:
        yield LinearAct("forward", *shape, compiled=DEFAULT if shape == _CPU_SHAPES[0] else (), quick=CPU, devices=CPU)
    for shape in _CPU_SHAPES[:3] + _CPU_SHAPES[4:]:
        yield LinearAct("backward", *shape, quick=CPU, devices=CPU)
    yield LinearAct("both", *_CPU_SHAPES[1], quick=CPU, devices=CPU)
    for direction in DIRECTIONS:
        yield LinearAct(direction, *_CPU_SHAPES[1], "bfloat16", quick=CPU, devices=CPU)
        for shape in _CPU_MORE:
            yield from (LinearAct(direction, *shape, d, EVERY_MODE, devices=CPU) for d in ("float16", "bfloat16"))
    for direction in DIRECTIONS:
        yield from (LinearAct(direction, *shape, quick=CUDA, devices=CUDA) for shape in _GPU_SHAPES + _GPU_OVER_K)
        yield from (LinearAct(direction, *s, compiled=EVERY_MODE, quick=CUDA, devices=CUDA) for s in _GPU_COMPILED)
        yield LinearAct(direction, *_GPU_COMPILED[1], "bfloat16", quick=CUDA, devices=CUDA)
        for shape in _GPU_MORE:
            yield from (LinearAct(direction, *shape, d, EVERY_MODE, devices=CUDA) for d in ("float16", "bfloat16"))


def _float8s():
    """On a GPU from where eight bits are said to pay on."""
    for direction in ("forward", "both"):
        yield from (Float8(direction, *shape, devices=CPU) for shape in (_CPU_SHAPES[1], _CPU_SHAPES[2], _CPU_SHAPES[4]))
        for shape in ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 16384), (4096, 1024, 4096), (512, 1024, 4096)):
            yield Float8(direction, *shape, quick=CUDA if shape == (4096, 4096, 4096) else (), devices=CUDA)


def _steps():
    million = 10**6
    for parameters in (10 * million, 50 * million):
        for tensors in (1, 300):
            yield from (Step(parameters, tensors, kind=kind, quick=CPU) for kind in ("plain", "clip"))
    for tensors in (1, 300, 10_000):
        yield Step(million, tensors, quick=CPU if tensors == 300 else ())
        yield Step(10 * million, tensors, quick=CPU)
        yield Step(100 * million, tensors, quick=CUDA)
        yield from (Step(parameters, tensors, "float32") for parameters in (million, 10 * million))
    for kind in ("plain", "clip", "skipped"):
        yield Step(10 * million, 300, kind=kind, quick=CPU)
        yield Step(10 * million, 300, "float32", kind, quick=CPU if kind == "plain" else ())
        yield Step(100 * million, 300, kind=kind, quick=CUDA)
        yield Step(100 * million, 300, "float32", kind)
    yield from (Step(n * million, 300, optimizer="lion", quick=quick) for n, quick in ((10, CPU), (100, CUDA)))
    for tensors in (1, 300):
        yield Step(1000 * million, tensors, quick=CUDA, devices=CUDA)
    yield Step(1000 * million, 300, "float32", devices=CUDA)


def _trainings():
    yield Training("digits", compiled=True, quick=BOTH)
    yield Training("mlp", quick=BOTH)
    yield Training("mlp", parts=4)
    for model in ("mlp6", "dlrm", "vit_tiny", "bert_tiny", "gpt2_tiny"):
        yield Training(model, quick=CPU, devices=CPU)
    for model in ("mlp6_wide", "dlrm_wide", "vit_b", "bert_base", "gpt2_small"):
        yield Training(model, compiled=True, quick=CUDA, devices=CUDA)


def _by_name(cases) -> tuple[Case, ...]:
    """A case that is named twice is run, and is quick, where either is; the first says what competes."""
    found = {}
    for case in cases:
        first = found.setdefault(case.name, case)
        devices, quick = (tuple(dict.fromkeys(a + b)) for a, b in ((first.devices, case.devices), (first.quick, case.quick)))
        found[case.name] = replace(first, devices=devices, quick=quick)
    return tuple(found.values())


_EVERYTHING = (
    *_linear_acts(),
    Mlp(256, 1024, quick=CPU, devices=CPU),
    Mlp(64, 256, compiled=True, devices=CPU),
    Mlp(4096, 4096, compiled=True, quick=CUDA, devices=CUDA),
    Mlp(16384, 1024, compiled=True, devices=CUDA),
    Quantize(256, 1024, devices=CPU),
    Quantize(1024, 4096, devices=CPU),
    Quantize(4096, 4096, devices=CUDA),
    Quantize(16384, 4096, devices=CUDA),
    *_float8s(),
    *_steps(),
    *_trainings(),
    *(
        Overhead(what, quick=BOTH)
        for what in (
            "forward",
            "forward+backward",
            "forward+backward, 2 threads",
            "step of 1",
            "step of 100",
            "step of 1000",
            "step of 400 groups",
            "step of 400, alternating",
            "watch of digits",
            "watch of mlp",
            "first_step",
        )
    ),
)
CASES = _by_name(_EVERYTHING)


def select(device: str, ops: list[str] | None = None, glob: str = "*", quick: bool = False) -> list[Case]:
    """The cases of a run. A full name, no glob, is found whatever the device and `quick`."""
    by_name = [case for case in CASES if case.name == glob]
    return by_name or [
        case
        for case in CASES
        if device in (case.quick if quick else case.devices) and (not ops or case.op in ops) and fnmatch(case.name, glob)
    ]
