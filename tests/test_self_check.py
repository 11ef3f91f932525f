# SPDX-License-Identifier: Apache-2.0
"""The self-check before `auto` uses a kernel on a GPU: when it runs, when it does not, what is remembered of it.

There need not be a GPU: the op below has no kernels, and its machine is a made-up one.
"""

import functools
import itertools
import math

import pytest
import torch

from mpkernels import _cache, _dispatch, _self_check, _table
from mpkernels._dispatch import Implementation, Op, ops
from mpkernels.ops import linear_act

GPU, f32 = torch.device("cuda", 0), torch.float32
unique = itertools.count()
MACHINE = {"name": "NVIDIA H200", "architecture": "sm90", "driver": "570", "torch": "2.13", "triton": "3.7.1"}


class Checked(Op):
    """Two implementations on a GPU, both in `auto`; `answer` is what their self-check says, `runs` counts it."""

    answer, runs = None, 0

    def _module(self, backend):
        return type("Module", (), {"why_not": staticmethod(lambda device, dtype: None), self.name: staticmethod(lambda x: x)})

    def self_check(self, backend, device):
        self.runs += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def op(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(_dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_cache, "machine", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = Checked(
        f"self_check_test_{next(unique)}(Tensor x) -> Tensor",
        "mpkernels.ops.linear_act",
        (Implementation("triton", ("cuda",), ("cuda",)), Implementation("eager", ("cuda",), ("cuda",))),
        check=lambda x: None,
        fake=lambda x: x.new_empty(x.shape),
        key=lambda x: (x.device, x.dtype),
    )
    forget()
    yield made
    del ops[made.name]
    forget()


def forget():
    """As in a new process."""
    _self_check._verdicts.clear()
    _self_check._code.cache_clear()
    _dispatch._choose.cache_clear()
    _table._tables.clear()


def test_self_check_runs_once_and_is_remembered(op):
    assert [op.backend(GPU, f32), op.backend(GPU, torch.float16)] == ["triton", "triton"]
    assert op.runs == 1
    forget()
    assert op.backend(GPU, f32) == "triton"
    assert op.runs == 1


def test_self_check_that_fails_becomes_the_reason(op):
    op.answer = "differs from fp64"
    for _ in range(2):
        assert op.backend(GPU, f32) == "eager"
        assert op.why_not("triton", GPU, f32) == "self-check: differs from fp64"
        forget()
    assert op.runs == 1


def test_self_check_that_raises_is_not_remembered(op):
    """A compiler out of memory, say, is no verdict for ever."""
    op.answer = RuntimeError("out of memory\nmore")
    assert op.backend(GPU, f32) == "eager"
    assert op.why_not("triton", GPU, f32) == "self-check: RuntimeError: out of memory"
    forget()
    op.answer = None
    assert op.backend(GPU, f32) == "triton"


@pytest.mark.parametrize("busy", ["compile", "capture", "mode", "transform"])
def test_self_check_waits_for_eager_execution(op, busy, monkeypatch):
    """Until then eager serves, and nothing is decided."""
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
    assert op.runs == 0
    assert op.backend(GPU, f32) == "triton"


@pytest.mark.parametrize("changed", [*MACHINE, "code"])
def test_self_check_holds_for_its_machine_and_code(op, changed, monkeypatch):
    assert op.backend(GPU, f32) == "triton"
    forget()
    if changed == "code":
        monkeypatch.setattr(_self_check, "_code", functools.cache(lambda package, backend: 1))
    else:
        monkeypatch.setattr(_cache, "machine", lambda device: MACHINE | {changed: "another"})
    assert op.backend(GPU, f32) == "triton"
    assert op.runs == 2


@pytest.mark.filterwarnings("ignore:mpkernels ignores")
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": ', "\x00\xff", "[" * 100000])
def test_self_check_survives_a_broken_cache(op, text):
    path = _cache.folder() / _self_check.FILE
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert op.backend(GPU, f32) == "triton"
    forget()
    assert op.backend(GPU, f32) == "triton"
    assert op.runs == 1


@pytest.mark.parametrize(
    "value",
    [7, math.inf, True, [], {}, "", "fine", "self-check: two\nlines", "self-check: \x1b[2J", "self-check: " + "x" * 9999],
)
def test_self_check_survives_verdicts_of_another_kind(op, value, monkeypatch):
    assert op.backend(GPU, f32) == "triton"
    monkeypatch.setattr(_cache, "_warned", set())
    path = _cache.folder() / _self_check.FILE
    _cache.update(path, dict.fromkeys(_cache.read(path), value))
    forget()
    with pytest.warns(UserWarning, match=f"mpkernels ignores {path}: what it says of this machine is no verdict"):
        assert op.backend(GPU, f32) == "triton"
    assert op.runs == 2


def test_self_check_remembers_one_printable_line(op):
    op.answer = "off\tby " + "9" * 9999 + "\nand more"
    assert op.backend(GPU, f32) == "eager"
    forget()
    assert op.backend(GPU, f32) == "eager"
    assert op.runs == 1
    assert op.why_not("triton", GPU, f32).startswith("self-check: off?by 999")


def test_self_check_survives_a_cache_that_cannot_be_written(op, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for runs in (1, 2):
        assert op.backend(GPU, f32) == "triton"
        assert op.runs == runs
        forget()


def test_self_check_is_for_gpus_and_kernels(op):
    """Nothing is checked for a forced backend that works, nor for eager, nor on a CPU, which the tests prove."""
    assert linear_act.forward_op.backend(torch.device("cpu"), torch.float64) == "eager"
    assert op.runs == 0
    assert not (_cache.folder() / _self_check.FILE).exists()


def test_self_check_forced_that_is_known_to_fail_raises(op, monkeypatch):
    op.answer = "differs from fp64"
    assert op.backend(GPU, f32) == "eager"
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, f"{op.name}=triton")
    with pytest.raises(RuntimeError, match="cannot use triton: self-check: differs from fp64"):
        op.backend(GPU, f32)


@pytest.mark.parametrize("name", ["linear_act", "linear_act_backward"])
def test_self_check_of_linear_act_finds_a_wrong_kernel(name, monkeypatch):
    """The check itself, on this CPU: an implementation that is off is told."""
    assert linear_act.forward_op.self_check("eager", torch.device("cpu")) is None
    op = linear_act.forward_op if name == "linear_act" else linear_act.backward_op
    right = op.function("eager")

    def off(*args):
        first, *others = right(*args)
        return (first + 2, *others) if name == "linear_act" else (first, others[0], others[1] * 0, *others[2:])

    monkeypatch.setattr(op, "function", lambda backend: off)
    assert op.self_check("eager", torch.device("cpu")).startswith(f"{name} differs from fp64 in torch.float16")
