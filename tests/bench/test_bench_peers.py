# SPDX-License-Identifier: Apache-2.0
"""The benchmark's peers from other packages, and what becomes of a peer that is absent, broken or wrong."""

import json
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import __main__ as main
from bench import implementation, linear_act, measure, overhead, rows, step, training
from bench.cases import LinearAct, Overhead, Step, Training
from bench.implementation import Implementation, Missing, forced, package
from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE

CPU = torch.device("cpu")
FORWARD, STEP = LinearAct("forward", 37, 100, 29), Step(30_000, 3)


class FusedAdam(torch.optim.Optimizer):
    """What Apex and Transformer Engine call so: 16-bit parameters, fp32 masters, steps under torch's GradScaler."""

    _step_supports_amp_scaling = True

    def __init__(self, params, capturable, master_weights, **hyper):
        assert capturable
        assert master_weights
        super().__init__(params, {})
        model = self.param_groups[0]["params"]
        self.masters = [torch.nn.Parameter(p.detach().float()) for p in model]
        self.inner = torch.optim.AdamW(self.masters, **hyper)
        self.param_groups_master = [{"params": self.masters}]
        for p, master in zip(model, self.masters, strict=True):
            self.state[p]["master_param"] = master

    @torch.no_grad()
    def step(self):
        for p, master in zip(self.param_groups[0]["params"], self.masters, strict=True):
            master.grad = p.grad.float()
        self.inner.step()
        for p, master in zip(self.param_groups[0]["params"], self.masters, strict=True):
            p.copy_(master)


class Linear(torch.nn.Linear):
    def __init__(self, K, N, params_dtype, device):
        super().__init__(K, N, dtype=params_dtype, device=device)


def bnb_adamw(params, optim_bits, **hyper):
    assert optim_bits == 32
    return torch.optim.AdamW(params, **hyper)


def gemm_act(x, weight, bias, activation, store_preact):
    return None, F.linear(x, weight.t(), bias).relu()


def mlp_function(bias, activation, x, weight, b):
    assert (bias, activation) == (True, 1)
    return F.linear(x, weight, b).relu()


FAKES = {
    "quack": (FORWARD, {"quack.gemm_interface": {"gemm_act": gemm_act}}),
    "Apex of linear_act": (FORWARD, {"apex.mlp.mlp": {"mlp_function": mlp_function}}),
    "Transformer Engine of linear_act": (FORWARD, {"transformer_engine.pytorch": {"Linear": Linear}}),
    "Apex of step": (STEP, {"apex.optimizers": {"FusedAdam": FusedAdam}}),
    "Transformer Engine of step": (STEP, {"transformer_engine.pytorch.optimizers": {"FusedAdam": FusedAdam}}),
    "bitsandbytes": (STEP, {"bitsandbytes.optim": {"AdamW": bnb_adamw}}),
}


def install(monkeypatch, modules: dict[str, dict]) -> None:
    for path, members in modules.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
        vars(sys.modules[path]).update(members)


def checked(case, *names: str):
    module = {"linear_act": linear_act, "step": step, "training": training}[case.op]
    return measure.check({name: c for name, c in module.implementations(case, CPU).items() if name in names})


@pytest.mark.parametrize("what", FAKES)
def test_bench_picks_up_a_package(monkeypatch, what):
    name, (case, modules) = what.split(" of ")[0], FAKES[what]
    install(monkeypatch, modules)
    numerics, absent, wrong = checked(case, name)
    assert name in numerics, (absent, wrong)


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ImportError, KeyError])
@pytest.mark.parametrize("what", FAKES)
def test_bench_goes_on_without_a_broken_package(monkeypatch, what, error):
    name, (case, modules) = what.split(" of ")[0], FAKES[what]

    def broken(*args, **kwargs):
        raise error("built for another GPU")

    linear_act._once.cache_clear()
    install(monkeypatch, {path: dict.fromkeys(members, broken) for path, members in modules.items()})
    numerics, absent, wrong = checked(case, "mpkernels", name)
    assert list(numerics) == ["mpkernels"]
    assert "built for another GPU" in absent[name]
    assert not wrong


@pytest.mark.parametrize("name", [what.split(" of ")[0] for what in FAKES])
def test_bench_says_which_package_is_absent(name):
    case = STEP if name == "bitsandbytes" else FORWARD
    _, absent, _ = checked(case, name)
    assert absent[name].startswith("ModuleNotFoundError: No module named")


def test_bench_picks_up_liger(monkeypatch):
    install(monkeypatch, {"liger_kernel.transformers": {"LigerCrossEntropyLoss": torch.nn.CrossEntropyLoss}})
    monkeypatch.setattr(torch, "compile", lambda model: model)
    numerics, absent, wrong = checked(Training("digits", compiled=True), "torch autocast bf16, compiled, Liger")
    assert numerics, (absent, wrong)


# ----- absent, broken, wrong ---------------------------------------------------------------


def raising(error):
    def check():
        raise error

    return Implementation(lambda: None, check)


def test_bench_tells_absent_from_wrong():
    implementations = {
        "mpkernels": Implementation(lambda: None, lambda: {"error_to_best": 1.0}),
        "mpkernels native": raising(RuntimeError("no kernel image")),
        "slow": raising(Missing("would take 9 s")),
        "broken": raising(RuntimeError("out of memory\nsecond line")),
        "wrong": raising(AssertionError("computes something else")),
    }
    numerics, absent, wrong = measure.check(implementations)
    assert numerics == {"mpkernels": {"error_to_best": 1.0}}
    assert absent == {"slow": "would take 9 s", "broken": "out of memory"}
    assert wrong == {"mpkernels native": "no kernel image", "wrong": "computes something else"}
    assert list(implementations) == ["mpkernels"]


def test_bench_fails_after_timing_the_others(monkeypatch, capsys):
    """A peer that computes something else costs the run its exit status, not the case its rows."""
    monkeypatch.setattr(linear_act, "torch_linear", lambda x, weight, bias: F.linear(x, weight, bias))
    monkeypatch.setattr(main, "select", lambda *args: [FORWARD])
    monkeypatch.setattr(main, "SECONDS", {False: 0.01})
    monkeypatch.setattr(
        main.limits, "measure", lambda *args: {"gb_s": 1, "tflop_s": {"float32": 1, "float16": 1, "bfloat16": 1}}
    )
    monkeypatch.setattr(sys, "argv", ["bench", "--json"])
    assert main.main() == 1
    out, err = capsys.readouterr()
    assert '"implementation": "mpkernels"' in out
    assert '"implementation": "torch float16"' not in out
    assert "WRONG, not timed: linear_act/forward/float16/37x100x29: torch float16: the peer's error" in err


def test_bench_measures_overhead_in_a_process_of_its_own(monkeypatch, capsys):
    """What was changed in this one, its heap too, is not there."""
    monkeypatch.setattr(overhead, "implementations", lambda *_: pytest.fail("measured in the process of the others"))
    monkeypatch.setattr(main, "select", lambda *_: [Overhead("step of 1")])
    monkeypatch.setattr(main, "SECONDS", {False: 0.01})
    monkeypatch.setattr(main.limits, "measure", lambda *_: {"gb_s": 1, "tflop_s": {"float32": 1}})
    monkeypatch.setattr(sys, "argv", ["bench", "--json"])
    assert main.main() == 0
    assert '"case": "overhead/step of 1"' in capsys.readouterr().out


@pytest.mark.sweep
def test_bench_command():
    """In which what another process runs has to have a name that is not __main__."""
    said = rows.python("-m", "bench", "--quick", "--case", "overhead/forward", "--json")
    found = [json.loads(line)["implementation"] for line in said.splitlines()]
    assert found == ["mpkernels", "torch float16", "torch autocast"]


def test_bench_guards_a_package_only():
    with pytest.raises(Missing, match="AssertionError: needs CUDA"):
        package(raising(AssertionError("needs CUDA")).check)()


# ----- what only a GPU runs ---------------------------------------------------------------


def test_bench_forces_a_backend_for_check_and_run(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "auto")
    seen = []
    implementation = Implementation(lambda: seen.append(os.environ[ENVIRONMENT_VARIABLE]), lambda: seen.append("checked") or {})
    by_name = forced(implementation, "eager", "linear_act", CPU)
    assert by_name.check()["backends"]["linear_act"] == "eager"
    by_name.run()
    by_name.run()
    assert seen == ["checked", "eager", "eager"]
    assert os.environ[ENVIRONMENT_VARIABLE] == "auto"


def test_bench_forced_backend_that_cannot_serve_is_missing(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with pytest.raises(Missing, match="on cpu cannot use triton: "):
        forced(Implementation(lambda: None), "triton", "linear_act", CPU).check()
    monkeypatch.setattr(implementation, "served_by", lambda device: {"linear_act": "eager"})
    with pytest.raises(Missing, match="linear_act has no native implementation there"):
        forced(Implementation(lambda: None), "native", "linear_act", CPU).check()
    assert ENVIRONMENT_VARIABLE not in os.environ


def test_bench_gpu_has_ours_by_name_before_its_peers():
    """Where memory is short, what comes last is left out."""
    names = list(step.implementations(Step(10**9, 300), torch.device("cuda")))
    assert names[:3] == ["mpkernels", "mpkernels native", "mpkernels triton"]
    assert "mpkernels native" not in step.implementations(Step(10**9, 300), CPU)


def test_bench_asks_torch_for_what_it_has_on_a_gpu():
    """Shapes and dtypes alone, of a GPU that is not there."""
    with FakeTensorMode():
        x, weight, bias = (torch.empty(shape, dtype=torch.float16, device="cuda") for shape in ((8, 16), (4, 16), (4,)))
        for function in (linear_act.torch_linear, linear_act.addmm_activation):
            assert function(x, weight, bias).shape == (8, 4)
        assert torch.mm(x, weight.t(), out_dtype=torch.float32).dtype == torch.float32


def test_bench_gpu_torch_has_what_is_timed_with():
    for name in ("Event", "synchronize", "mem_get_info", "memory_reserved", "reset_peak_memory_stats", "max_memory_allocated"):
        assert callable(getattr(torch.cuda, name))
    assert callable(torch.cuda.set_sync_debug_mode)


def test_bench_leaves_out_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(step, "free_bytes", lambda device: 10**9)
    _, absent, _ = measure.check(step.implementations(Step(10**9, 300, devices=("cuda",)), CPU))
    assert absent["mpkernels"] == "needs 24 GB where 1 GB are free"


def test_bench_overhead_cases_have_a_peer():
    for what in ("forward", "forward+backward", "step of 1", "step of 100", *overhead.GROUPED):
        assert len(overhead.implementations(Overhead(what), CPU)) >= 2


def test_bench_counts_peak_memory():
    """Of the digits model: four copies of its parameters at least."""
    parameters = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    (row,) = checked(Training("digits"), "torch fp32")[0].values()
    assert 16 * parameters < row["peak_bytes"] < 64 * parameters
