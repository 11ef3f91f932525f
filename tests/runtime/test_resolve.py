# SPDX-License-Identifier: Apache-2.0
"""Ops and the choice of what serves them: reading MPKERNELS_BACKEND, choosing an implementation, saying why not."""

import pytest
import torch

import mpkernels as mpk
from mpkernels.runtime import resolve
from mpkernels.runtime.op import Implementation
from mpkernels.runtime.resolve import BACKENDS, ENVIRONMENT_VARIABLE, ops, parse_setting
from tests.runtime.made_op import Call, made_op

CPU, f32 = torch.device("cpu"), torch.float32


@pytest.fixture
def op():
    """An op of two implementations, C++ first; of native nothing is proven on a GPU."""
    with made_op(Implementation("native", ("cpu", "cuda")), Implementation("eager", ("cpu", "cuda"))) as op:
        yield op
    parse_setting.cache_clear()


def run(op):
    """The factor of the implementation that served a call."""
    return getattr(torch.ops.mpkernels, op.name)(torch.ones(())).item()


# ----- the setting ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "forced"),
    [
        ("auto", {}),
        ("eager", {"*": "eager"}),
        ("triton", {"*": "triton"}),
        ("native", {"*": "native"}),
        ("linear_act=eager", {"linear_act": "eager"}),
        ("linear_act=eager,adamw_=native", {"linear_act": "eager", "adamw_": "native"}),
        (" linear_act=eager , native ", {"linear_act": "eager", "*": "native"}),
        ("adamw_=eager,adamw_=native", {"adamw_": "native"}),
    ],
)
def test_resolve_parses_the_setting(setting, forced):
    assert parse_setting(setting) == forced


@pytest.mark.parametrize(
    "setting", ["", "cuda", "Eager", "eager,", "linear=eager", "linear_act=cuda", "linear_act=", "=eager", "linear_act:eager"]
)
def test_resolve_refuses_a_bad_setting(setting, monkeypatch):
    """Where it is parsed and where an op is called, with every choice in the message."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, setting)
    x = torch.ones(2, 2)
    for attempt in (lambda: parse_setting(setting), lambda: mpk.functional.linear_act(x, x)):
        with pytest.raises(ValueError, match=ENVIRONMENT_VARIABLE) as refused:
            attempt()
        for word in ("auto", *BACKENDS, "op=backend", "linear_act", "adamw_"):
            assert word in str(refused.value)


# ----- the choice ---------------------------------------------------------------


def test_resolve_auto_takes_the_first_that_can(op, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert run(op) == 3
    op._module.reasons["native"] = "not built"
    resolve.choose.cache_clear()
    assert run(op) == 2


def test_resolve_auto_leaves_what_is_not_proven(op, monkeypatch):
    """`native` exists for cuda and is in `auto` for the CPU only."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert op.backend(torch.device("cuda"), f32) == "eager"
    assert op.backend(CPU, f32) == "native"


@pytest.mark.parametrize(("backend", "factor"), [("eager", 2), ("native", 3)])
def test_resolve_forces(op, monkeypatch, backend, factor):
    for setting in (backend, f"{op.name}={backend}", f"{op.name}={backend},triton"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, setting)
        assert run(op) == factor


def test_resolve_reads_the_setting_at_every_call(op, monkeypatch):
    for backend, factor in (("eager", 2), ("native", 3), ("eager", 2)):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        assert run(op) == factor


@pytest.mark.parametrize("by_op", [False, True])
def test_resolve_forced_that_cannot_serve_raises(op, monkeypatch, by_op):
    """With its reason, and it never falls back."""
    op._module.reasons["native"] = "needs sm90, got sm75"
    setting = f"{op.name}=native" if by_op else "native"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, setting)
    with pytest.raises(RuntimeError, match=f"{setting}.*{op.name} on cpu cannot use native: needs sm90, got sm75"):
        run(op)


def test_resolve_forced_for_all_leaves_ops_that_lack_it(op, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert run(op) == 3


@pytest.mark.parametrize("capability, backend", [((9, 0), "native"), ((8, 0), "eager"), ((10, 0), "eager")])
def test_resolve_forced_for_all_leaves_other_architectures(capability, backend, monkeypatch):
    """Hopper's GEMM exists on Hopper: forcing native for the step elsewhere leaves linear_act to auto."""
    from mpkernels.ops.linear_act import forward_op, sm90

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(resolve, "_candidates", lambda *_: ["eager"])
    monkeypatch.setattr(Implementation, "why_not", lambda self, device: None)
    monkeypatch.setattr(sm90, "why_not", lambda key: None)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    resolve.choose.cache_clear()
    assert forward_op.backend(torch.device("cuda", 0), torch.float16) == backend
    resolve.choose.cache_clear()


def test_resolve_forced_by_op_knows_no_exception(op, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f"{op.name}=triton")
    with pytest.raises(RuntimeError, match="cannot use triton: not implemented"):
        run(op)


def test_resolve_why_not(op):
    assert op.why_not("triton", CPU, f32) == "not implemented"
    assert op.why_not("eager", torch.device("mps"), f32) == "not implemented for mps"
    assert op.why_not("eager", CPU, f32) is None
    op._module.reasons["native"] = "not built"
    assert op.why_not("native", CPU, f32) == "not built"


def test_resolve_every_op_has_eager_everywhere():
    for op in ops.values():
        for device in ("cpu", "cuda"):
            assert op.why_not("eager", torch.device(device), f32) is None


def test_resolve_reasons_are_short_sentences():
    for op in ops.values():
        for backend in BACKENDS:
            reason = op.why_not(backend, CPU, f32)
            assert reason is None or (reason == reason.strip() and "\n" not in reason and 0 < len(reason) < 200)


def test_resolve_reports_hoppers_gemm(monkeypatch):
    """It has no fp32 arithmetic: the report and is_available ask for what it has."""
    from mpkernels import __main__ as command
    from mpkernels.ops.linear_act import backward_op, forward_op
    from mpkernels.runtime import native

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "cuda_why_not", lambda device: None)
    for op in (forward_op, backward_op):
        monkeypatch.setattr(op, "verdict", lambda part, backend, device: None)
        assert command.state(op.name, gpu, "native") == ("unproven", "python -m mpkernels prove")
    monkeypatch.setattr(native, "why_not", lambda: "not built")
    monkeypatch.setattr(resolve, "ops", {"linear_act": forward_op})
    assert mpk.is_available("native")
    assert mpk.why_not("native") is None
    resolve.choose.cache_clear()


# ----- is_available and why_not ---------------------------------------------------------------


def test_resolve_is_available():
    assert mpk.is_available("eager") is True
    assert mpk.why_not("eager") is None
    for backend in BACKENDS:
        reason = mpk.why_not(backend)
        assert mpk.is_available(backend) is (reason is None)
        assert reason is None or (reason and "\n" not in reason)


def test_resolve_says_why_not(monkeypatch):
    for op in ops.values():
        monkeypatch.setattr(op, "why_not", lambda backend, device, dtype: "no driver")
    assert mpk.is_available("native") is False
    assert mpk.why_not("native") == "no driver"


def test_resolve_does_not_take_a_rocm_gpu_for_hopper(monkeypatch):
    """gfx90a has the type cuda and the capability (9, 0)."""
    from mpkernels.runtime import native

    gpu = torch.device("cuda", 0)
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hopper = Implementation("native", ("cpu", "cuda"), sm=90)
    for hip in (None, "6.4.1"):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert hopper.exists_on(gpu) is (hip is None)
        assert hopper.exists_on(CPU)
    assert resolve.triton_why_not.__wrapped__(gpu) == "needs an NVIDIA GPU, this torch is built for ROCm 6.4.1"
    monkeypatch.setattr(native, "why_not", lambda: None)
    assert native.cuda_why_not.__wrapped__(gpu) == "needs an NVIDIA GPU, this torch is built for ROCm 6.4.1"


def test_resolve_asks_a_module_after_its_backend(monkeypatch):
    """It need not be there, nor what it imports, where nothing of its backend runs."""
    from mpkernels.runtime import native

    gpu, hopper = torch.device("cuda", 0), Implementation("native", ("cuda",), sm=90)
    monkeypatch.setattr(native, "cuda_why_not", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert hopper.why_not(gpu) == "needs sm90, got sm80"
    monkeypatch.setattr(native, "why_not", lambda: "not built")
    monkeypatch.setattr(resolve, "module_of", lambda *_: pytest.fail("a module was imported"))
    assert ops["sgd_"].why_not("native", CPU, torch.float32) == "not built"


@pytest.mark.parametrize("backend", ["cuda", "auto", "", None])
def test_resolve_is_available_refuses_names(backend):
    with pytest.raises(ValueError, match="backend must be one of eager, triton, native, got"):
        mpk.is_available(backend)
    with pytest.raises(ValueError, match="backend must be one of eager, triton, native, got"):
        mpk.why_not(backend)


def test_op_gives_implementations_no_lazily_negated_view(op):
    """`z.conj().imag` is a view of z with its negative bit set, which a kernel that is handed its address would not see."""
    seen = []
    function = lambda call: seen.append(call.x.is_neg()) or call.x * 3
    op._module = lambda implementation: type("Module", (), {op.name: staticmethod(function)})
    x = torch.tensor([2 + 3j]).conj().imag
    assert x.is_neg()
    assert op.run(Call(x)).item() == -9
    assert seen == [False]
