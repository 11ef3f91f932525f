# SPDX-License-Identifier: Apache-2.0
"""The tuner and its tables: what is rejected, what wins, what is written, and what reads it."""

import importlib
import itertools
import json
import re
import sys
import warnings

import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels import __main__ as command
from mpkernels.ops.linear_act import Activation, backward_op, forward_op
from mpkernels.ops.linear_act.call import ForwardCall
from mpkernels.ops.linear_act.epilogues import pack_mask
from mpkernels.runtime import cache, resolve, tuned_table
from mpkernels.runtime.op import Implementation
from mpkernels.runtime.tuned_table import Entry
from mpkernels.testing import gemm, timing
from tests import wrong_kernels
from tests.runtime.made_op import Call, made_op

CPU = torch.device("cpu")
f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
FPROP = tuned_table.gemm_key("fprop", 24, 40, 1024, Activation.RELU, f16, f16, f16)
BACKWARD = tuned_table.gemm_key("backward", 512, 40, 24, Activation.RELU, f16, f16, f16, f32)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned_table, "PACKAGED", tmp_path / "packaged")
    monkeypatch.delenv(resolve.ENVIRONMENT_VARIABLE, raising=False)
    forget()
    yield
    forget()


def forget():
    """As in a new process."""
    tuned_table.tables.clear()
    resolve.choose.cache_clear()


@pytest.fixture
def race(monkeypatch, request):
    """race(problem, candidate): the entry of a tuning of eager against `candidate`, a function with the op's arguments."""

    def run(problem, candidate, rows=24):
        op = forward_op if problem[0] == "fprop" else backward_op
        right = op.function
        candidates = [tune.Candidate("eager", "eager"), tune.Candidate("candidate", "triton")]
        monkeypatch.setattr(tune, "candidates_of", lambda *args: candidates)
        monkeypatch.setattr(op, "function", lambda backend: candidate if backend == "triton" else right(backend))
        return tune.tune_problem(problem, rows, CPU, rounds=1)[problem]

    return run


tune = importlib.import_module("mpkernels.tune")  # the attribute mpkernels.tune is the function


def forward_of(kernel):
    """A kernel of wrong_kernels as the op, with the mask of its output."""

    def function(x, weight, bias, copy, activation, compute_dtype, out_dtype, save):
        out = kernel(x, weight, bias, activation, compute_dtype, out_dtype)
        return out, pack_mask(out), x.new_empty(0)

    return function


def backward_of(kernel):
    def function(grad_out, x, weight, copy, saved, activation, compute_dtype, grad_x, grad_weight, grad_bias, output_mask):
        from mpkernels.ops.linear_act.epilogues import unpack_mask

        return kernel(torch.where(unpack_mask(saved, grad_out.shape[1]), grad_out, 0), x, weight, grad_weight)

    return function


# ----- what is rejected ---------------------------------------------------------------


def test_tune_races_each_gemm_alone(monkeypatch):
    """Triton's tiles of dgrad by grad_x, those of wgrad by grad_weight, and then the whole call."""
    for op in (forward_op, backward_op):
        monkeypatch.setattr(op, "why_not", lambda *_: None)
    seen = []
    monkeypatch.setattr(tune, "_race", lambda *args: seen.append(args[3:]))
    tune.tune_problem(BACKWARD, 512, CPU, 1)
    tune.tune_problem(FPROP, 24, CPU, 1)
    assert seen == [((True, False, False),), ((False, True, False),), (), ((True, True, True),), ()]


def test_tune_times_what_is_right(race, monkeypatch):
    """A sound candidate wins by its time alone, and the loser's reason is its time."""
    monkeypatch.setattr(tune, "interleave", lambda runs, device, rounds: {"eager": [30.0], "candidate": [20.0]})
    entry = race(FPROP, forward_of(wrong_kernels.sound))
    assert (entry["backend"], entry["us"]) == ("triton", 20.0)
    assert entry["lost"] == {"eager": "1.50 x the time: 30.0 us"}
    entry = race(BACKWARD, backward_of(wrong_kernels.sound_backward), rows=512)
    assert entry["backend"] == "triton"


@pytest.mark.parametrize("backend, mask", [("eager", False), ("native", False), ("triton", True)])
def test_tune_times_the_layers_call(backend, mask):
    """On a CPU C++ selects by the output, as eager does."""
    assert gemm.Inputs.random(FPROP, 24, CPU).arguments(backend, (True,) * 3)[-1] == mask
    saved = gemm.Inputs.random(BACKWARD, 512, CPU).arguments(backend, (True,) * 3)[4]
    assert saved.dtype == (torch.int32 if mask else f16)


@pytest.mark.parametrize(
    "name",
    ["accumulator_16_bit", "split_k_partials_16_bit", "rounded_before_bias", "rounded_through_bfloat16", "last_row_missing"],
)
def test_tune_rejects_a_wrong_forward(name, race):
    entry = race(FPROP, forward_of(getattr(wrong_kernels, name)))
    assert entry["backend"] == "eager"
    assert "times as far from fp64 as the bound allows" in entry["lost"]["candidate"]


def test_tune_rejects_fp32_products_of_fp64(race):
    def function(*args):
        out = wrong_kernels.sound(*(t.float() for t in args[:3]), args[4], f32, args[6])
        return out, pack_mask(out), args[0].new_empty(0)

    problem = tuned_table.gemm_key("fprop", 24, 40, 1024, Activation.RELU, *[torch.float64] * 3)
    assert "times as far from fp64 as the bound allows" in race(problem, function)["lost"]["candidate"]


@pytest.mark.parametrize("name", ["gradient_through_16_bit", "bias_gradient_in_16_bit", "split_rows_16_bit"])
def test_tune_rejects_a_wrong_backward(name, race):
    entry = race(BACKWARD, backward_of(getattr(wrong_kernels, name)), rows=512)
    assert entry["backend"] == "eager"
    assert "times as far from fp64 as the bound allows" in entry["lost"]["candidate"]


def test_tune_rejects_a_wrong_mask(race):
    def function(*args):
        out, mask, nothing = forward_of(wrong_kernels.sound)(*args)
        mask[3, 0] ^= 1 << 7
        return out, mask, nothing

    assert race(FPROP, function)["lost"]["candidate"] == "rejected: the mask is not that of the output"


def test_tune_rejects_what_does_not_repeat(race):
    """One unit in the last place of one output, every other time."""
    calls = itertools.count()

    def function(*args):
        out, _, nothing = forward_of(wrong_kernels.sound)(*args)
        largest = out.argmax()
        out.view(torch.int16).flatten()[largest] += next(calls) % 2
        return out, pack_mask(out), nothing

    assert race(FPROP, function)["lost"]["candidate"] == "rejected: two runs differ"


def test_tune_survives_what_cannot_run(race):
    def function(*args):
        raise RuntimeError("out of resource: shared memory\nand more")

    assert race(FPROP, function)["lost"]["candidate"] == "cannot run: RuntimeError: out of resource: shared memory"


def test_tune_without_a_right_candidate_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(tune, "candidates_of", lambda *args: [tune.Candidate("eager", "eager", reason="not today")])
    assert tune.tune_problems({(CPU, FPROP): 24}, rounds=1) == {}
    assert "no candidate is right" in capsys.readouterr().err


def test_tune_runs_candidates_in_turns(monkeypatch):
    """Interleaved, and the first round is not counted."""
    order, clock = [], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    times = timing.interleave({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 2)
    assert order == list("ababab")
    assert times == {"a": [1e6, 1e6], "b": [1e6, 1e6]}


@pytest.mark.parametrize(
    ("backend", "proven", "command"),
    [("triton", {}, "prove --full"), ("native", {}, "prove"), ("native", {"native": True}, None), ("eager", {}, None)],
)
def test_tune_says_what_auto_does_not_take_yet(backend, proven, command, monkeypatch):
    """On a GPU a table decides among the proven alone."""
    monkeypatch.setattr(cache, "machine", lambda device: {"name": device.type})
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(forward_op, "choices", lambda part, device: proven)
    monkeypatch.setattr(tune, "tune_problem", lambda *_: {FPROP: {"backend": backend, "tile": None, "us": 1.0, "lost": {}}})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tune.tune_problems({(torch.device("cuda", 0), FPROP): 24}, rounds=1)
    expected = [] if command is None else [f"python -m mpkernels {command}"]
    assert [str(warning.message).rpartition(": ")[2] for warning in warned] == expected


# ----- what is tuned ---------------------------------------------------------------


def test_tune_records_a_model():
    """Forward and backward of both layers, by rows; gradients, random numbers and weights stay as they were."""
    model = mpk.convert(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 4)), "mixed_float16")
    x, state = torch.randn(3, 5, 12), torch.get_rng_state()
    found = tune.record(model, x)
    assert {(p[0], *p[1:4]): rows for (_, p), rows in found.items()} == {
        ("fprop", 16, 20, 12): 15, ("backward", 16, 20, 12): 15, ("fprop", 16, 4, 20): 15, ("backward", 16, 4, 20): 15
    }  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert tune.record(model, (x,)).keys() == tune.record(model, {"input": x}).keys() == found.keys()


def test_tune_leaves_the_model_as_it_was():
    """Statistics of a batch norm too; and a watch takes what is recorded for no call of training."""
    model = mpk.convert(nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 4)), "mixed_float16")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with mpk.watch(model) as watch:
        seen = str(watch.report())
        assert tune.record(model, torch.randn(3, 12))
        assert str(watch.report()) == seen
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        model(torch.randn(3, 12))
        assert str(watch.report()) != seen


def test_tune_of_a_model_that_takes_a_list():
    """As models of detection do: a list is one argument, a tuple is several."""
    layer = mpk.MPLinear(12, 20, policy="mixed_float16")

    class Detector(nn.Sequential):
        def forward(self, images: list):
            return super().forward(torch.cat(images))

    assert tune.record(Detector(layer), [torch.ones(1, 12), torch.ones(2, 12)]) == tune.record(layer, torch.ones(3, 12))


def test_tune_leaves_activations_that_it_cannot_check():
    assert not tune.record(mpk.MPLinear(12, 20, activation="gelu", policy="mixed_float16"), torch.randn(3, 12))


def test_tune_asks_no_gpu_that_the_model_is_not_on(monkeypatch):
    forked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (forked.extend(devices), fork(()))[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert tune.record(mpk.MPLinear(12, 20, policy="mixed_float16"), torch.randn(3, 12))
    assert forked == []


def test_tune_refuses_no_rounds(capsys):
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        mpk.tune(nn.Linear(2, 2), torch.ones(1, 2), rounds=0)
    with pytest.raises(SystemExit):
        tune.main(["--rounds", "0"])
    assert "rounds must be 1 or more, got 0" in capsys.readouterr().err


def test_tune_a_model_writes_what_auto_reads():
    model = mpk.convert(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), "float16")
    x = torch.randn(5, 16).half()
    written = mpk.tune(model, x, rounds=1)
    assert {entry["backend"] for entry in written.values()} <= {"eager", "native"}
    forget()
    weight = model[0].weight
    fastest = next(entry["backend"] for name, entry in written.items() if name.startswith("fprop"))
    call, table = ForwardCall(x, weight, None, None, Activation.RELU, f16, f16, 0), tuned_table.load(CPU)
    assert table[call.gemm_key].backend == forward_op.resolve(call).backend == fastest
    assert table.get(call._replace(batch_invariant=True).gemm_key) is None
    assert table.get(call._replace(out_dtype=f32).gemm_key) is None
    assert len(written) == len(tuned_table.load(CPU)) == 2


def test_tune_a_model_in_eight_bits(recwarn):
    """Products of operands with scales, and the weight gradient in 16 bits; the table is read again."""
    written = mpk.tune(mpk.convert(nn.Sequential(nn.Linear(16, 8)), "mixed_float8"), torch.randn(5, 16), rounds=1)
    forget()
    assert [name.split()[5] for name in written] == ["float8_e4m3fn", "bfloat16"]
    assert len(tuned_table.load(CPU)) == 2
    assert not recwarn.list


@pytest.mark.parametrize(
    ("busy", "match"),
    [("torch.compiler.is_compiling", "under torch.compile"), ("torch.cuda.is_current_stream_capturing", "graph is captured")],
)
def test_tune_refuses_where_it_cannot_time(busy, match, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: "cuda" in busy)
    monkeypatch.setattr(busy, lambda: True)
    with pytest.raises(RuntimeError, match=match):
        mpk.tune(nn.Linear(2, 2), torch.ones(1, 2))


# ----- tables ---------------------------------------------------------------


@pytest.fixture
def op():
    """Of three implementations, of which a CPU's `auto` does not have triton."""
    with made_op(*(Implementation(backend, ("cpu",)) for backend in ("eager", "native", "triton"))) as op:
        yield op


def test_table_is_about_no_op_without_a_gemm():
    table = {tuned_table.gemm_key("fprop", 4, 1, 1, 0, f32): Entry("eager", None)}
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with tuned_table.override(CPU, table):
        mpk.optim.SGD([parameter], lr=1.0).step()
        q, _ = mpk.functional.quantize(parameter.detach(), torch.float8_e4m3fn)
    assert not parameter.any()
    assert not q.float().any()


def test_table_decides_by_problem_among_what_is_in_auto(op):
    table = {tuned_table.gemm_key("fprop", 4, 1, 1, 0, f32): Entry("native", None)}
    table[tuned_table.gemm_key("fprop", 64, 1, 1, 0, f32)] = Entry("triton", None)
    assert [op.run(Call(torch.ones(n)))[0].item() for n in (3, 4, 64)] == [2, 2, 2]
    with tuned_table.override(CPU, table):
        assert [op.run(Call(torch.ones(n)))[0].item() for n in (2, 3, 4, 5)] == [2, 3, 3, 2]
        assert op.run(Call(torch.ones(64)))[0].item() == 2  # never proven: no table makes it so
    assert op.run(Call(torch.ones(4)))[0].item() == 2


@pytest.mark.parametrize("backend", ["native", "unheard-of"])
def test_table_names_a_backend_that_no_longer_serves(backend, op):
    """It broke, or is of another version: another one serves."""
    op._module.reasons["native"] = "no driver"
    with tuned_table.override(CPU, {tuned_table.gemm_key("fprop", 4, 1, 1, 0, f32): Entry(backend, None)}):
        assert op.run(Call(torch.ones(4)))[0].item() == 2


def test_table_does_not_force(op, monkeypatch):
    monkeypatch.setenv(resolve.ENVIRONMENT_VARIABLE, f"{op.name}=triton")
    with tuned_table.override(CPU, {tuned_table.gemm_key("fprop", 4, 1, 1, 0, f32): Entry("native", None)}):
        assert op.run(Call(torch.ones(4)))[0].item() == 4


def test_table_rounds_rows_up():
    assert [tuned_table.gemm_key("fprop", M, 1, 1, 0)[1] for M in (0, 1, 2, 3, 4, 5, 4095, 4096, 4097)] == [
        1, 1, 2, 4, 4, 8, 4096, 4096, 8192,
    ]  # fmt: skip


def test_table_is_read_as_written():
    tile = {"BLOCK_M": 128, "SPECIALIZE": True}
    for key, entry in ((FPROP, {"backend": "triton", "tile": tile}), (BACKWARD, {"backend": "eager", "tile": None})):
        assert tuned_table.save(tuned_table.own_file(CPU), CPU, {tuned_table.key_to_str(key): entry})
    assert tuned_table.load(CPU) == {
        FPROP: Entry("triton", (("BLOCK_M", 128), ("SPECIALIZE", 1))),
        BACKWARD: Entry("eager", None),
    }


def test_table_of_the_user_goes_before_the_packaged():
    name = tuned_table.key_to_str(FPROP)
    assert tuned_table.save(tuned_table.packaged_file(CPU), CPU, {name: {"backend": "native"}})
    assert tuned_table.load(CPU)[FPROP].backend == "native"
    assert tuned_table.save(tuned_table.own_file(CPU), CPU, {name: {"backend": "eager"}})
    assert tuned_table.load(CPU)[FPROP].backend == "eager"


def test_table_of_other_versions_is_left_aside(monkeypatch):
    """A driver may have changed what is fast; a packaged table is for the model of GPU."""
    name, machine = tuned_table.key_to_str(FPROP), cache.machine(CPU)
    for path in (tuned_table.own_file(CPU), tuned_table.packaged_file(CPU)):
        assert tuned_table.save(path, CPU, {name: {"backend": "native" if path == tuned_table.own_file(CPU) else "eager"}})
    monkeypatch.setattr(cache, "machine", lambda device: machine | {"torch": "another"})
    assert tuned_table.load(CPU)[FPROP].backend == "eager"


NAME = tuned_table.key_to_str(FPROP)
TILE = '{"backend": "triton", "tile": {"BLOCK_M": %s}}'
JUNK = [  # of one entry
    *((NAME, TILE % value) for value in ("1e999", "-1e999", "Infinity", "NaN", "1.5", '"64"', "null", "{}", "-1", "9" * 400)),
    *((NAME, f'{{"backend": "triton", "tile": {value}}}') for value in ("3", "[1]", '"x"', '{"": 1}', '{"\\u001b[2J": 1}')),
    *((NAME, f'{{"backend": {value}}}') for value in ("3", "null", "[]", "{}", "1e999", '"cuda"', '"\\ud800"')),
    *((NAME, f'{{"backend": "eager", "us": {value}}}') for value in ("Infinity", "NaN", '"fast"', "-1", "[]")),
    *((NAME, f'{{"backend": "eager", "lost": {value}}}') for value in ("3", '["a"]', '{"native": 3}')),
    *((NAME, value) for value in ("3", "null", "[]", '"eager"', "{}", "1e999")),
    *((name, '{"backend": "eager"}') for name in (
        "", " ", "fprop", "fprop 1 1 1", "fprop 1 1 1 0 float8", "fprop x 1 1 0", "fprop -1 1 1 0",
        "fprop  1 1 1 0", "fprop \u0661 1 1 0", "fprop 01 1 1 0", f"fprop {'9' * 5000} 1 1 0", "other 1 1 1 0", "\ud800 1 1 0",
    )),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(JUNK)))
def test_table_leaves_out_what_is_not_well_formed(i, monkeypatch, capsys):
    """No call fails for it, the other entries serve, one warning names the file."""
    name, entry = JUNK[i]
    monkeypatch.setattr(cache, "_warned", set())
    path = tuned_table.own_file(CPU)
    assert tuned_table.save(path, CPU, {tuned_table.key_to_str(BACKWARD): {"backend": "eager"}})
    text = path.read_text().replace('"entries": {', f'"entries": {{{json.dumps(name)}: {entry},', 1)
    path.write_text(text)
    for count in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert tuned_table.load(CPU) == {BACKWARD: Entry("eager", None)}
        assert len(caught) == count
        assert all(str(one.message).startswith(f"mpkernels ignores {path}: 1 of its entries") for one in caught)
        forget()
    layer = mpk.MPLinear(1024, 40, policy="mixed_float16", activation="relu")
    layer(torch.ones(24, 1024)).sum().backward()
    assert tune.main(["--show"]) == 0
    assert name not in capsys.readouterr().out.split(": ") or not name
    assert tuned_table.save(path, CPU, {NAME: {"backend": "native"}})
    assert sorted(json.loads(path.read_text())["entries"]) == sorted([NAME, tuned_table.key_to_str(BACKWARD)]), (
        "junk does not stay"
    )


@pytest.mark.parametrize("entries", ["3", "null", "[]", '"x"', "1e999"])
def test_table_without_entries_is_empty(entries, monkeypatch):
    monkeypatch.setattr(cache, "_warned", set())
    path = tuned_table.packaged_file(CPU)
    path.parent.mkdir()
    path.write_text(f'{{"entries": {entries}}}')
    with pytest.warns(UserWarning, match=f"mpkernels ignores {path}: its entries are no JSON object"):
        assert tuned_table.load(CPU) == {}


def test_table_of_much_junk_is_read_fast():
    path = tuned_table.own_file(CPU)
    assert cache.update(path, {"machine": cache.machine(CPU), "entries": dict.fromkeys(map(str, range(200_000)), 0)})
    with pytest.warns(UserWarning, match="200000 of its entries"):
        assert tuned_table.load(CPU) == {}


def test_table_is_shown_without_control_characters(capsys):
    entry = {"backend": "triton", "tile": {"BLOCK_M": 8}, "lost": {"\x1b[2J": "\ud800\n"}}
    assert tuned_table.save(tuned_table.own_file(CPU), CPU, {NAME: entry})
    assert tune.main(["--show"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{NAME}: triton {{'BLOCK_M': 8}}, ? us", "    ?[2J: ??"]


@pytest.mark.parametrize("where", ["a file", "nowhere/to/be"])
def test_tune_where_the_cache_cannot_be_written(where, monkeypatch, tmp_path, capsys):
    """It says so, and the caller has the entries all the same. NOTE: root may write where permissions forbid it."""
    (tmp_path / "a file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "twice")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / where))
    written = tune.tune_problems({(CPU, FPROP): 24}, rounds=1)
    assert written[tuned_table.key_to_str(FPROP)]["backend"] in ("eager", "native")
    assert f"tune: {tuned_table.own_file(CPU)} cannot be written" in capsys.readouterr().err
    forget()
    assert tuned_table.load(CPU) == {}


def test_tune_shows_how_far_it_is(monkeypatch, capsys):
    """By a bar, or by lines where tqdm is not installed."""
    pytest.importorskip("tqdm")
    items = [((CPU, FPROP), 24), ((CPU, BACKWARD), 512)]
    assert list(tune._progress(items)) == items
    assert "tune: 100%" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(tune._progress(items)) == items
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"tune: {i + 1} of 2: {tuned_table.key_to_str(problem)}" for i, ((_, problem), _) in enumerate(items)]


# ----- the command ---------------------------------------------------------------


def test_tune_command(capsys):
    assert tune.main(["--show"]) == 0
    assert capsys.readouterr().out == "no table for cpu\n"
    assert tune.main(["--shapes", "8,16,24", "--rounds", "1", "--package"]) == 0
    printed = capsys.readouterr().out
    assert re.search("^fprop 8 24 16 1 float16 float16 float16: (eager|native), ", printed, re.MULTILINE)
    assert "    triton: needs a CUDA GPU" in printed
    assert json.loads(tuned_table.packaged_file(CPU).read_text())["machine"] == cache.machine(CPU)
    assert tune.main(["--show"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(printed.splitlines())


@pytest.mark.parametrize("shape", ["8,16", "8,16,24,32", "8,x,24", "8,0,24", ""])
def test_tune_command_refuses_a_shape(shape, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--shapes", shape])
    assert f"expected M,K,N, got {shape!r}" in capsys.readouterr().err


def test_command_says_what_table_there_is(monkeypatch):
    """By name of the GPU, with what to do."""
    assert command.tuned(CPU, "NVIDIA A100") == "no table for NVIDIA A100: python -m mpkernels tune"
    with tuned_table.override(CPU, {FPROP: Entry("eager", None)}):
        assert command.tuned(CPU, "NVIDIA H200") == "table of 1 problems for NVIDIA H200"


def test_command_help_lists_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mpkernels", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    text = capsys.readouterr().out
    assert "tune    find the fastest implementation" in text
    assert "--json" in text
    assert resolve.ENVIRONMENT_VARIABLE in text
    for name in re.search(r"\{([a-z,]+)\}", text)[1].split(","):
        assert re.search(rf"^  {name} +\w", text, re.MULTILINE), name
        monkeypatch.setattr(sys, "argv", ["mpkernels", name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            command.main()
