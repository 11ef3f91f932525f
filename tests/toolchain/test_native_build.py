# SPDX-License-Identifier: Apache-2.0
"""The compiled library: what it is built against, how arguments arrive in C++, and its runs, chunks, threads and layouts.

That the steps are right is proven in test_rules.py, test_skips.py, test_grad_stats.py and test_update_scale.py.
"""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mpkernels.ops import grad_stats, update_scale
from mpkernels.ops.common.layout import is_dense
from mpkernels.ops.optimizer_update import adamw_, reference, sgd_
from mpkernels.runtime import native
from tests import bounds, steps
from tests.ops.optimizer_update.rules import RULES
from tests.paths import ROOT
from tests.steps import DTYPES, clone, counts, raw, scalar, split, step_counts

CHUNK = 16384  # elements of a chunk: csrc/common/chunk_partition.h
SIZES = (CHUNK - 1, 1, 0, 2 * CHUNK + 17, 63, CHUNK, 3, 64, 0)


@pytest.fixture(autouse=True)
def library():
    """NOTE: no skip. A tree whose library is missing is not tested."""
    reason = native.why_not()
    assert reason is None, f"the library is needed here: {reason}"


def native_of(op):
    return op.function("native")


# ----- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [("torch-abi-audit", "--check", "both"), ("abi3audit", "--strict", "--assume-minimum-abi3", "3.11")]
)
def test_library_uses_stable_abis_only(command):
    tool = Path(sys.executable).with_name(command[0])
    result = subprocess.run([tool, *command[1:], native.LIBRARY], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_library_names_no_path_of_the_machine_it_was_built_on():
    assert str(ROOT).encode() not in native.LIBRARY.read_bytes()


@pytest.mark.parametrize("op", [adamw_, grad_stats.op, sgd_, update_scale.op], ids=lambda op: op.name)
def test_native_is_what_auto_takes_on_the_cpu(op):
    assert op.why_not("native", torch.device("cpu"), torch.float32) is None
    assert op.backends[0] == "native"
    assert op.backend(torch.device("cpu"), torch.float32) == "native"


def test_native_says_why_not_when_not_built(monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", Path("nowhere/_C.abi3.so"))
    monkeypatch.setattr(native, "why_not", native.why_not.__wrapped__)
    reason = adamw_.why_not("native", torch.device("cpu"), torch.float32)
    assert reason == "not built; run pip install --no-build-isolation ."


@pytest.mark.parametrize(
    ("here", "there", "op"),
    [
        ('    "amax_(', '    "of_tomorrow_() -> ()",\n    "amax_(', "of_tomorrow_"),
        ("bool ignores_minus_inf=False", "int ignores_minus_inf=0", "amax_"),
        ("Tensor on, Tensor lr, float beta1, float beta2, float weight_decay", "Tensor on, float lr", "lion_"),
    ],
    ids=["another op", "another dtype", "other arguments"],
)
def test_native_says_why_not_of_an_older_library(here, there, op, monkeypatch, tmp_path):
    """It loads, and what is new would be an error in the middle of a step, or numbers in each other's place."""
    sources = native.SCHEMAS.read_text()
    assert here in sources
    assert native._first_difference(native.ops) is None
    (tmp_path / "ops.cpp").write_text(sources.replace(here, there))
    monkeypatch.setattr(native, "SCHEMAS", tmp_path / "ops.cpp")
    monkeypatch.setattr(native, "why_not", native.why_not.__wrapped__)
    assert adamw_.why_not("native", torch.device("cpu"), torch.float32) == (
        f"_C.abi3.so was built from other sources: its {op} is not that of ops.cpp; run pip install --no-build-isolation ."
    )


# ----- scalars --------------------------------------------------------------------------------------

# NOTE: a C++ `float` or `int` in the place of a `double` or `int64_t` compiles and receives something else.


def test_sgd_receives_every_scalar(generator):
    """Bit for bit: the reference's operations in the reference's order, on fp64."""
    options = dict(momentum=0.9, dampening=0.3, weight_decay=0.7)
    for nesterov, maximize in ((False, False), (True, False), (False, True)):
        w, g, b = torch.randn(3, 101, dtype=torch.float64, generator=generator).unbind()
        expected_w, expected_b = reference.sgd(
            *(t.numpy().copy() for t in (w, g, b)), 2, lr=0.1, nesterov=nesterov, maximize=maximize, **options
        )
        native_of(sgd_)(
            [w],
            [g],
            [b],
            [w[:0]],
            step_counts(1, taken=1),
            scalar(0.1, dtype=torch.float64),
            nesterov=nesterov,
            maximize=maximize,
            **options,
        )
        assert np.array_equal(w.numpy(), expected_w)
        assert np.array_equal(b.numpy(), expected_b)


def test_adamw_receives_every_scalar():
    """Powers of two, of which every operation is exact: g = 2, m = 1, v = 1, sqrt(1 - beta2) = 1/2."""
    w, m, v = torch.full((3, 37), 8.0, dtype=torch.float64).unbind()
    m.zero_(), v.zero_()
    arguments = [w], [torch.full_like(w, 2.0)], [m], [v], [], [w[:0]], step_counts(1), scalar(0.25, dtype=torch.float64)
    native_of(adamw_)(*arguments, beta1=0.5, beta2=0.75, eps=2.0, weight_decay=0.5, decoupled=True, maximize=False)
    assert w.eq(8 * (1 - 0.25 * 0.5) - 0.25 / 0.5 * 1 / (1 / 0.5 + 2)).all()
    assert m.eq(1).all()
    assert v.eq(1).all()


def test_update_scale_receives_every_scalar():
    def call(found, scale=1.0, tracker=0, **change):
        state = [scalar(scale), scalar(tracker, dtype=torch.int32), scalar(9, dtype=torch.int32), counts(2)]
        options = dict(growth_factor=1.1, backoff_factor=0.7, growth_interval=1, hysteresis=3, min_scale=1e-30, max_scale=1e30)
        native_of(update_scale.op)(*state, scalar(found), **options | change)
        return [t.tolist() for t in state]

    float32 = lambda x: float(np.float32(x))
    assert call(0.0) == [float32(1.1), 0, 3, [0, 0]]
    assert call(0.0, growth_interval=2**33) == [1.0, 1, 9, [0, 0]]
    assert call(0.0, scale=float32(1e30)) == [float32(1e30), 0, 3, [0, 0]]
    assert call(1.0) == [1.0, 0, 8, [1, 1]]


def test_max_norm_arrives():
    w = torch.zeros(5, dtype=torch.float64)
    options = dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
    norm = scalar(4 - 1e-6, dtype=torch.float64)
    native_of(sgd_)(
        [w],
        [torch.ones_like(w)],
        [],
        [w[:0]],
        step_counts(1),
        scalar(1.0),
        **options,
        grad_scale=scalar(2.0),
        grad_norm=norm,
        max_norm=0.5,
    )
    assert w.eq(-0.5 / 4 / 2).all()


# ----- runs, chunks and threads ---------------------------------------------------------------------


ADAMW = RULES["adamw"]


def problem(sizes, generator, grad_dtypes=(torch.float16,), master_dtypes=(torch.float32,), copy_dtypes=(torch.float16,)):
    """Arguments of an adamw_ call over tensors of these sizes, of alternating dtypes."""
    total = sum(sizes)
    w, g, m = split(torch.randn(3 * total, generator=generator, dtype=torch.float64), (total,) * 3)
    take = lambda flat, dtypes: [t.to(dtypes[i % len(dtypes)]) for i, t in enumerate(split(flat, sizes))]
    args = ADAMW.arguments(take(w, master_dtypes), take(g, grad_dtypes), copy_dtypes, weight_decay=0.1)
    return args | dict(exp_avgs=take(m, master_dtypes), exp_avg_sqs=take(m * m, master_dtypes), lr=scalar(1e-2))


def written(args) -> list[torch.Tensor]:
    return ADAMW.state(args)[: -len(args["steps"])]


def one_by_one(args) -> None:
    """The call, each element as a tensor of its own."""
    lists = [name for name, value in args.items() if isinstance(value, list) and value and name != "steps"]
    cut = {name: [e for t in args[name] for e in t.split(1)] for name in lists}
    native_of(adamw_)(**args | cut | dict(steps=step_counts(len(cut["masters"]))))


@pytest.mark.parametrize("master_dtype", [torch.float32, torch.float64])
def test_adamw_element_does_not_depend_on_its_place(generator, master_dtype):
    """10,000 tensors of one element give the bits of one tensor: of vectors, of their tails, of starts without alignment."""
    whole = problem((10_000,), generator, master_dtypes=(master_dtype,))
    single = clone(whole)
    native_of(adamw_)(**whole)
    one_by_one(single)
    assert raw(written(whole)) == raw(written(single))


@pytest.mark.parametrize("copy_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_adamw_runs_of_every_dtype(generator, grad_dtype, copy_dtype):
    """Tensors cut into runs give the bits of their elements taken together; copies are rounded once."""
    args = problem(SIZES, generator, (grad_dtype,), (torch.float32, torch.float64), (copy_dtype,))
    flat = {}
    for dtype in (torch.float32, torch.float64):
        mine = [i for i, t in enumerate(args["masters"]) if t.dtype == dtype]
        join = {n: [torch.cat([args[n][i] for i in mine])] for n in ("masters", "grads", "exp_avgs", "exp_avg_sqs", "copies")}
        flat[dtype] = (mine, args | join | dict(steps=step_counts(1)))
    native_of(adamw_)(**args)
    for mine, joined in flat.values():
        native_of(adamw_)(**joined)
        for name in ("masters", "exp_avgs", "exp_avg_sqs", "copies"):
            assert raw([torch.cat([args[name][i] for i in mine])]) == raw(joined[name])
    assert set(steps.taken(args["steps"])) == {1}
    steps.check_copies(args["copies"], args["masters"])


@pytest.mark.parametrize("size", [5, 1000, CHUNK + 5])
def test_copies_beside_their_neighbours(generator, size):
    """A copy that starts anywhere in memory: the bytes beside it stay."""
    for offset in (0, 1, 7, 31):
        args = problem((size,), generator)
        buffer = torch.full((size + 64,), -7, dtype=torch.float16)
        native_of(adamw_)(**args | dict(copies=[buffer[offset : offset + size]]))
        assert raw([buffer[offset : offset + size]]) == raw([args["masters"][0].half()])
        assert torch.cat([buffer[:offset], buffer[offset + size :]]).eq(-7).all()


@pytest.fixture
def two_threads():
    """A function that runs another with two threads."""

    def run(call):
        torch.set_num_threads(2)
        try:
            return call()
        finally:
            torch.set_num_threads(1)

    return run


def test_steps_have_the_same_bits_with_two_threads(generator, two_threads):
    one = problem(SIZES, generator, DTYPES, (torch.float32, torch.float64), (torch.float16, torch.bfloat16))
    two = clone(one)
    native_of(adamw_)(**one)
    two_threads(lambda: native_of(adamw_)(**two))
    assert raw(written(one)) == raw(written(two))


def test_grad_stats_have_the_same_bits_with_two_threads(generator, two_threads):
    grads = problem(SIZES, generator, DTYPES)["grads"]

    def stats():
        result = scalar(7.0), torch.empty(len(grads), dtype=torch.float64), counts(len(grads)), scalar(0.0, dtype=torch.float64)
        native_of(grad_stats.op)(grads, scalar(3.0), *result)
        return result

    found_inf, amax, nonfinite, grad_norm = stats()
    assert raw([found_inf, amax, nonfinite, grad_norm]) == raw(two_threads(stats))
    assert found_inf == 0
    assert amax.tolist() == [g.double().abs().max().item() if g.numel() else 0.0 for g in grads]
    exact = math.sqrt(math.fsum(x * x for g in grads for x in g.double().tolist())) / 3
    bounds.check_norm(grad_norm.item(), exact, sum(SIZES))


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_stats_counts_whole_runs_of_nonfinite(dtype):
    """A lane of the count is as wide as the gradient: it must hold what a block can bring."""
    for bad in (math.inf, math.nan):
        grads = [torch.full((3 * CHUNK + 1,), bad, dtype=dtype), torch.full((5,), -2.0, dtype=dtype)]
        found_inf, amax, nonfinite = scalar(7.0), torch.empty(2, dtype=torch.float64), counts(2)
        native_of(grad_stats.op)(grads, None, found_inf, amax, nonfinite)
        assert nonfinite.tolist() == [3 * CHUNK + 1, 0]
        assert amax.tolist() == [0.0, 2.0]
        assert found_inf == 1


@pytest.mark.parametrize("size", [1, 15, 16, 17, 16 * 7 + 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_norm_of_fp16_has_the_bits_of_fp32s(generator, size):
    """It is a loop of its own, in the same order."""

    def norm(grad):
        result = scalar(7.0), torch.empty(1, dtype=torch.float64), counts(1), scalar(0.0, dtype=torch.float64)
        native_of(grad_stats.op)([grad], None, *result)
        return result[-1]

    odd = torch.randn(size + 1, generator=generator).half()[1:]
    assert norm(odd) == norm(odd.float()) > 0


# ----- layouts --------------------------------------------------------------------------------------


def test_is_dense():
    base = torch.zeros(2, 3, 4)
    dense = [base, base.permute(2, 0, 1), base[1], base[:, :1].transpose(0, 1)[:, 1:], torch.zeros(()), torch.zeros(0, 3)]
    for tensor in dense:
        assert is_dense(tensor)
    for tensor in (base[:, 1:], base[..., ::2], base[0, 0, :1].expand(2, 3), base[0].t()[1:]):
        assert not is_dense(tensor)


@pytest.mark.parametrize("skip", [False, True])
def test_adamw_layouts_meet(generator, skip):
    """Each of the five tensors of an index in a layout of its own, every layout for each: the bits of contiguous tensors."""
    names = ("masters", "grads", "exp_avgs", "exp_avg_sqs", "copies")
    plain, args = problem((35,) * 6, generator), None
    args = clone(plain)
    for name in names:
        plain[name] = [t.view(5, 7) for t in plain[name]]
    for i in range(6):
        for j, name in enumerate(names):
            target = list(steps.layouts((5, 7), plain[name][i].dtype, "cpu", generator).values())[(i + j) % 6]
            args[name][i] = target.copy_(plain[name][i])
    before = raw(written(args))
    found_inf = scalar(float(skip))
    native_of(adamw_)(**plain, found_inf=found_inf)
    native_of(adamw_)(**args, found_inf=found_inf)
    assert raw(written(args)) == (before if skip else raw(written(plain)))
    assert set(steps.taken(args["steps"])) == {0 if skip else 1}


def test_dense_permutation_needs_no_copy(generator, monkeypatch):
    """channels_last and transposed weights take the way of contiguous ones."""
    args = problem((35, 36), generator)
    for name in ("masters", "grads", "exp_avgs", "exp_avg_sqs", "copies"):
        args[name] = [args[name][0].view(5, 7).t(), args[name][1].view(1, 3, 4, 3).to(memory_format=torch.channels_last)]
    monkeypatch.setattr(torch, "empty_strided", None)
    native_of(adamw_)(**args)
    steps.check_copies(args["copies"], args["masters"])


def test_parameters_that_require_grad(generator):
    """With autograd on, and a dense copy in place of the state: what is written is not part of a graph."""
    args = problem((35,), generator)
    master = args["masters"][0] = torch.nn.Parameter(args["masters"][0])
    args["exp_avgs"] = [torch.randn(70, generator=generator)[::2]]
    before = master._version
    torch.ops.mpkernels.adamw_(**args)
    assert master._version > before
    assert master.is_leaf
    assert not args["exp_avgs"][0].requires_grad
    steps.check_copies(args["copies"], args["masters"])
