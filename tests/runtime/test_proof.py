# SPDX-License-Identifier: Apache-2.0
"""Verdicts, and what `auto` makes of them on a GPU. There need not be one: the machine is made up, the kernels only count."""

import json
import math
import warnings

import pytest
import torch

from mpkernels import __main__ as command
from mpkernels.ops.linear_act import Activation, forward_op
from mpkernels.ops.linear_act.call import CallKey
from mpkernels.runtime import cache, proof, resolve, tuned_table
from mpkernels.runtime.op import Implementation
from mpkernels.runtime.proof import Verdict
from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE, VERDICTS_VARIABLE, ops
from mpkernels.runtime.tuned_table import Entry
from tests.runtime import made_op

GPU, f16, f32 = torch.device("cuda", 0), torch.float16, torch.float32
MACHINE = {"name": "NVIDIA H200", "architecture": "sm90", "driver": "570", "torch": "2.13", "multiprocessors": "132"}
UNPROVEN = "python -m mpkernels prove"


class Call(made_op.Call):
    """A call whose tensor counts as one on the GPU."""

    @property
    def key(self) -> made_op.SizeKey:
        return super().key._replace(device=GPU)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there, in a process that has asked nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv(VERDICTS_VARIABLE, raising=False)
    monkeypatch.setattr(cache, "machine", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Implementation, "why_not", lambda self, device: None)
    forget()
    yield
    forget()


def forget():
    """As in a new process."""
    proof._read.clear()
    proof.agreed.clear()
    proof.key.cache_clear()
    proof._code.cache_clear()
    resolve.choose.cache_clear()
    tuned_table.tables.clear()
    cache._warned.clear()


@pytest.fixture
def op():
    """Of three implementations."""
    implementations = (Implementation(backend, ("cpu", "cuda")) for backend in ("eager", "triton", "native"))
    with made_op.made_op(*implementations, call=Call, package="mpkernels.ops.linear_act") as op:
        yield op


def found(op, path=None, part=None, **verdicts):
    """Write verdicts of an op, or of a part of its cases: a state, or speeds of what is right."""
    part = part or op.name
    for backend, value in verdicts.items():
        verdict = Verdict(value) if isinstance(value, str) else Verdict("right", speeds=dict(zip("abcd", value)))
        assert proof.record(path or proof.own_file(), proof.key(part, op.package, backend, GPU), verdict)


def chosen(op, size: int = 3) -> str:
    return {2: "eager", 3: "native", 4: "triton"}[int(op.run(Call(torch.ones(size)))[0])]


# ----- what is chosen ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({"native": "right", "triton": "right"}, "native"),
        ({"triton": "right"}, "triton"),
        ({"native": "wrong", "triton": "right"}, "triton"),
        ({"native": "crashed", "triton": "right"}, "triton"),
        ({"native": "started", "triton": "right"}, "triton"),  # a process ended in it
        ({"native": "not now"}, "eager"),
        ({"native": "wrong", "triton": "wrong"}, "eager"),
        ({"native": (2.0, 2.0, 0.5, 0.5)}, "native"),  # a majority decides
        ({"native": (2.0, 0.5, 0.5, 0.5)}, "eager"),
        ({"native": (0.98, 0.98, 0.98, 0.98)}, "native"),  # 3 % is noise
        ({"native": (0.96, 0.96, 0.96, 1.5), "triton": (1.1, 1.1, 1.1, 1.1)}, "triton"),
        ({"native": (1.01,) * 4, "triton": (9.0,) * 4}, "native"),  # fixed: times do not order what is right
    ],
)
def test_proof_decides_what_auto_takes(verdicts, expected, op):
    found(op, **verdicts)
    assert chosen(op) == expected


def test_proof_of_what_is_no_longer_there(op):
    found(op, native="right", triton="right")
    op._module.reasons["native"] = "no driver"
    assert chosen(op) == "triton"


def test_proof_is_frozen(op):
    """A switch in the middle would break replicas, graphs and compiled code."""
    found(op, native="right")
    assert chosen(op) == "native"
    found(op, native="wrong")
    resolve.choose.cache_clear()
    assert chosen(op, 5) == "native"
    forget()
    assert chosen(op) == "eager"


def test_proof_missing_is_eager_and_one_warning(op):
    """That names the command, once per process."""
    with pytest.warns(UserWarning, match=UNPROVEN) as warned:
        assert [chosen(op, size) for size in (1, 2, 3)] == ["eager"] * 3
    assert len(warned) == 1


def test_proof_missing_where_nothing_could_be_proven(op):
    op._module.reasons |= {"native": "not built", "triton": "not installed"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(op) == "eager"


def test_proof_that_found_nothing_right_does_not_warn(op):
    found(op, eager="right", native="wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(op) == "eager"


@pytest.mark.parametrize("changed", [*MACHINE, "code", "op"])
def test_proof_holds_for_its_machine_and_code(changed, op, monkeypatch):
    found(op, native="right")
    if changed == "code":
        monkeypatch.setattr(proof, "_code", type("Code", (), {"__call__": lambda *_: 1, "cache_clear": lambda _: None})())
    elif changed == "op":
        text = proof.own_file().read_text().replace(op.name, "another")
        proof.own_file().write_text(text)
    else:
        monkeypatch.setattr(cache, "machine", lambda device: MACHINE | {changed: "another"})
    forget()
    with pytest.warns(UserWarning, match=UNPROVEN):
        assert chosen(op) == "eager"


def test_proof_knows_the_code_that_ran(monkeypatch, tmp_path):
    """Another checksum where a source of the op, one that ops share, or the library changes."""
    import mpkernels.ops.optimizer_update as package
    from mpkernels.runtime import native

    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"one")
    monkeypatch.setattr(native, "LIBRARY", library)
    folder = tmp_path / "ops" / "optimizer_update"
    for path in (folder / "rules", folder.parent / "common"):
        path.mkdir(parents=True)
    monkeypatch.setattr(package, "__file__", str(folder / "__init__.py"))
    seen = []
    for path in (None, folder / "native.py", folder / "rules/adamw.py", folder.parent / "common" / "shared.py", library):
        if path is not None:
            path.write_text("two")
        proof._code.cache_clear()
        seen.append(proof._code("mpkernels.ops.optimizer_update", "native"))
    assert len(set(seen)) == 5
    assert proof._code("mpkernels.ops.optimizer_update", "triton") != seen[-1]


@pytest.mark.parametrize("busy", ["compile", "capture", "mode", "transform"])
def test_proof_is_not_read_in_the_middle(busy, op, monkeypatch):
    """A first question under capture or compile: eager serves, and nothing is decided."""
    found(op, native="right")
    with monkeypatch.context() as patch:
        if busy == "compile":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        elif busy == "capture":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        elif busy == "mode":
            patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
        else:
            patch.setattr(torch._C, "_are_functorch_transforms_active", lambda: True)
        assert op.backend(GPU, f32) == "eager"
        assert op.backend(GPU, f32) == "eager"
    assert op.backend(GPU, f32) == "native"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    resolve.choose.cache_clear()
    assert op.backend(GPU, f32) == "native", "what is read holds in a capture"


def test_proof_never_runs_unasked(op, monkeypatch):
    from mpkernels.testing import checks

    monkeypatch.setattr(checks, "wrong", lambda *_, **__: pytest.fail("a kernel was run"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.warns(UserWarning, match=UNPROVEN):
        assert chosen(op) == "eager"


def test_proof_does_not_force(op, monkeypatch):
    """And what is forced asks for no proof."""
    found(op, native="right")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f"{op.name}=triton")
    assert chosen(op) == "triton"


def test_proof_is_for_gpus(op):
    """On a CPU the tests have proven what auto takes."""
    assert op.backend(torch.device("cpu"), f32) == "eager"
    assert not proof._read


def test_proof_needs_a_gpu(op, monkeypatch):
    """A FakeTensor says that it is on one where there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(op) == "eager"
    assert not proof._read


# ----- by problem ---------------------------------------------------------------


def entry(size: int, backend: str):
    return {tuned_table.gemm_key("fprop", size, 1, 1, 0, f32): Entry(backend, None)}


def test_table_decides_by_problem_among_the_proven(op):
    found(op, native="right", triton="right")
    with tuned_table.override(GPU, entry(4, "triton") | entry(64, "eager")):
        assert [chosen(op, size) for size in (2, 4, 64)] == ["native", "triton", "eager"]
    assert chosen(op, 4) == "native"


def test_table_proves_nothing(op):
    found(op, triton="wrong", eager="right")
    with tuned_table.override(GPU, entry(4, "triton") | entry(64, "native")):
        assert [chosen(op, size) for size in (4, 64)] == ["eager", "eager"]


def test_table_may_prefer_what_is_slow_elsewhere(op):
    found(op, native="right", triton=(0.5, 0.5, 0.5, 2.0))
    with tuned_table.override(GPU, entry(4, "triton")):
        assert [chosen(op, size) for size in (2, 4)] == ["native", "triton"]


def test_calls_that_a_kernel_refuses_go_to_the_next(op):
    found(op, native="right", triton="right")
    op._module.reasons["native"] = lambda key: None if key.size % 8 == 0 else "needs multiples of 8"
    assert [chosen(op, size) for size in (8, 9, 16)] == ["native", "triton", "native"]
    op._module.reasons["triton"] = lambda key: "too small" if key.size < 10 else None
    resolve.choose.cache_clear()
    assert [chosen(op, size) for size in (8, 9, 17)] == ["native", "eager", "triton"]


@pytest.mark.parametrize(
    ("columns", "activation", "expected"), [(16, Activation.RELU, "native"), (10, Activation.RELU, "eager"), (16, 3, "eager")]
)
def test_hoppers_gemm_serves_what_it_can(columns, activation, expected):
    """A layer of 10 outputs, or with a GELU, is no error: it goes elsewhere, the mask that it saves too."""
    found(forward_op, native="right")
    kernel = forward_op._chosen(CallKey(GPU, f16, f16, activation, columns, 8))
    assert kernel.backend == expected
    assert kernel.saves_mask == (expected == "native")


@pytest.mark.parametrize("op_name", ["linear_act", "linear_act_backward"])
def test_proof_covers_what_its_cases_are(op_name):
    """And nothing else: of another activation or dtype a verdict says nothing."""
    from mpkernels.testing import cases

    op = ops[op_name]
    keys = [CallKey(GPU, *case.call) for few in (True, False) for case in cases.of(op_name, few=few, full=not few)]
    assert set(map(op.part_of, keys)) == set(op.parts)
    for part in op.parts:
        found(op, part=part, triton="right")
    for changed in ({"activation": Activation.GELU}, {"dtype": f32}, {"dtype": torch.float64}):
        assert op.part_of(keys[0]._replace(**changed)) is None
        assert resolve._candidates(op, keys[0]._replace(**changed), None) == ["eager"]


@pytest.mark.parametrize("wrong", ["linear_act", "linear_act 8-bit"])
@pytest.mark.parametrize("agreed", [False, True])
def test_proof_of_8_bits_is_one_of_its_own(wrong, agreed):
    """What is wrong with 8-bit sums says nothing of 16-bit ones, nor the reverse; ranks agree on each."""
    for part in forward_op.parts:
        found(forward_op, part=part, triton="wrong" if part == wrong else "right")
    if agreed:
        proof.agreed[GPU] = {part: forward_op.choices(part, GPU) for part in forward_op.parts}
    for part, dtype in forward_op.parts.items():
        taken = resolve._candidates(forward_op, CallKey(GPU, dtype), None)
        assert taken == (["eager"] if part == wrong else ["triton", "eager"])


# ----- files ---------------------------------------------------------------


def test_proof_from_a_named_file_goes_first(op, monkeypatch, tmp_path):
    """Shipped with an image, or pinned."""
    found(op, native="wrong", triton="right")
    found(op, path=tmp_path / "pinned.json", native="right")
    monkeypatch.setenv(VERDICTS_VARIABLE, str(tmp_path / "pinned.json"))
    assert chosen(op) == "native"
    assert op.choices(op.name, GPU) == {"native": False, "triton": False}


def test_proof_from_a_named_file_that_is_not_there(op, monkeypatch, tmp_path):
    found(op, native="right")
    monkeypatch.setenv(VERDICTS_VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.warns(UserWarning, match=f"{VERDICTS_VARIABLE}={tmp_path}/nowhere.json: there is no such file"):
        assert chosen(op) == "native"


def test_proof_from_a_cache_of_others_is_not_taken(op):
    found(op, native="right")
    proof.own_file().chmod(0o666)
    with pytest.warns(UserWarning, match="can be written by others"):
        assert chosen(op) == "eager"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ', "\x00\xff", "[" * 100000])
@pytest.mark.filterwarnings("ignore:mpkernels")
def test_proof_survives_a_broken_file(text, op):
    proof.own_file().parent.mkdir(parents=True)
    proof.own_file().write_text(text)
    assert chosen(op) == "eager"
    found(op, native="right")
    forget()
    assert chosen(op) == "native"


@pytest.mark.parametrize(
    "value",
    [
        7, True, None, [], {}, "right", {"state": "fine"}, {"state": ["right"]}, {"state": "right", "note": 3},
        {"state": "right", "note": "\x1b[2J"}, {"state": "right", "note": "x" * 501}, {"state": "right", "date": 3},
        *({"state": "right", "speeds": speeds} for speeds in (3, [1.0], {"a": "fast"}, {"a": 0}, {"a": -1}, {"a": math.inf})),
    ],
)  # fmt: skip
def test_proof_survives_verdicts_of_another_kind(value, op):
    """They count as absent, the others serve, and one warning names the file."""
    found(op, native="right", triton="right")
    key = proof.key(op.name, op.package, "native", GPU)
    path = proof.own_file()
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.warns(UserWarning, match=f"mpkernels ignores {path}: 1 of its verdicts"):
        assert chosen(op) == "triton"


def test_proof_is_one_printable_line(op):
    key = proof.key(op.name, op.package, "native", GPU)
    proof.record(proof.own_file(), key, Verdict("wrong", "off\tby \u00e9" + "9" * 999 + "\nand more"))
    note = proof.load(proof.own_file())[key].note
    assert note.startswith("off?by ?999")
    assert len(note) == proof.LONGEST


# ----- the report ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (None, ("unproven", UNPROVEN)),
        (Verdict("right", date="2026-11-30"), ("chosen", "right, 2026-11-30")),
        (
            Verdict("right", "", {"a": 1.5, "b": 2.0}, "2026-11-30"),
            ("chosen", "right, 2026-11-30, 1.50, 2.00 x the speed of eager"),
        ),
        (
            Verdict("right", "", {"a": 0.5}, "2026-11-30"),
            ("works", "right, 2026-11-30, 0.50 x the speed of eager: slower, left out"),
        ),
        (Verdict("wrong", "off", {}, "2026-11-30"), ("wrong", "wrong: off, 2026-11-30")),
        (Verdict("started", date="2026-11-30"), ("wrong", "crashed: it was begun and did not end, 2026-11-30")),
        (Verdict("not now", "no memory", {}, "2026-11-30"), ("unproven", "not now: no memory, 2026-11-30")),
    ],
)
@pytest.mark.filterwarnings("ignore:mpkernels")
def test_command_shows_verdicts(verdict, expected, op):
    """With date, and what auto takes; nothing is run on a GPU."""
    if verdict is not None:
        proof.record(proof.own_file(), proof.key(op.name, op.package, "native", GPU), verdict)
    assert command.state(op.name, GPU, "native") == expected
