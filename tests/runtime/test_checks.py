# SPDX-License-Identifier: Apache-2.0
"""The checks of an implementation: each kind of wrong kernel is found, on this CPU, and what is right passes."""

import contextlib
import itertools

import pytest
import torch

from mpkernels.ops.linear_act.epilogues import pack_mask
from mpkernels.runtime.resolve import ops, parts
from mpkernels.testing import bounds, cases, checks, linear_act_cases, scaled_cases
from mpkernels.testing.linear_act_cases import _SUM
from mpkernels.testing.memory import GUARD, Memory
from tests import wrong_kernels

CPU = torch.device("cpu")
RETURNS = ("linear_act", "linear_act_backward", "quantize")
STEP = ("adamw_", "sgd_", "lion_", "grad_stats_", "update_scale_")


@pytest.fixture
def wrong(monkeypatch):
    """wrong(op, change): what the checks say of an implementation changed by change(right, arguments) -> results."""

    def run(name, change, backend="eager"):
        op = ops[name]
        if reason := op.why_not(backend, CPU, torch.float32):
            pytest.skip(reason)
        right = op.function(backend)
        with monkeypatch.context() as patch:
            patch.setattr(op, "function", lambda backend: lambda *arguments: change(right, arguments))
            return checks.wrong(op, "eager", CPU)

    return run


@pytest.mark.parametrize("name", sorted(ops))
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_checks_pass_what_is_right(name, backend):
    if reason := ops[name].why_not(backend, CPU, torch.float32):
        pytest.skip(reason)
    assert checks.wrong(ops[name], backend, CPU) is None


def test_checks_raise_what_is_not_here(monkeypatch):
    monkeypatch.setattr(ops["sgd_"], "why_not", lambda *_: "not built")
    with pytest.raises(RuntimeError, match="sgd_: native not built"):
        checks.wrong(ops["sgd_"], "native", CPU)


# ----- memory ---------------------------------------------------------------


@pytest.mark.parametrize("place", [-1, 12])
def test_memory_notices_a_write_outside(place):
    memory = Memory(CPU)
    inside = memory.put(torch.arange(12, dtype=torch.float32), shift=1)
    memory.check()
    assert inside.tolist() == list(range(12))
    whole = torch.empty(0).set_(inside.untyped_storage(), 0, (inside.untyped_storage().nbytes() // 4,), (1,))
    whole[inside.storage_offset() + place] = 0.0
    with pytest.raises(AssertionError, match="outside of an output"):
        memory.check()


def test_memory_is_poisoned_and_banded():
    memory = Memory(CPU)
    with memory.outputs():
        made = [torch.empty(3, 4), torch.ones(2).new_empty(5, dtype=torch.int32), torch.empty_like(torch.ones(2, 2).t())]
    assert made[0].isnan().all()
    assert (made[1] == -1).all()
    for tensor in made:
        offset = tensor.storage_offset() * tensor.element_size()
        assert offset == GUARD
        assert tensor.untyped_storage().nbytes() == offset + tensor.numel() * tensor.element_size() + GUARD
    assert memory.put(torch.ones(3), shift=1).data_ptr() % 16 == 4
    strided = memory.put(torch.arange(6.0).reshape(2, 3).t())
    assert strided.stride() == (1, 3)


def test_memory_behind_an_input_is_nan():
    """A kernel that reads too far has a wrong result."""
    tensor = Memory(CPU).put(torch.ones(3))
    assert tensor.as_strided((5,), (1,))[3:].isnan().all()


# ----- kernels that are wrong ---------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ops))
def test_checks_notice_a_write_outside_of_outputs(name, wrong):
    def change(right, arguments):
        results = right(*arguments)
        place = 0 if name == "quantize" else -3
        written = results[place] if results else arguments[3] if name == "update_scale_" else arguments[2]
        written = written[-1] if isinstance(written, list) else written
        past = torch.empty(0, dtype=written.dtype).set_(
            written.untyped_storage(), written.storage_offset() + written.numel(), (1,), (1,)
        )
        past.fill_(1)
        return results

    backend = "native" if name in RETURNS else "eager"  # of torch's own ops the outputs are not ours
    assert wrong(name, change, backend).endswith("memory outside of an output was written")


@pytest.mark.parametrize("name", sorted(ops))
def test_checks_notice_a_written_input(name, wrong):
    place = {"adamw_": 1, "sgd_": 1, "lion_": 1, "grad_stats_": 0, "update_scale_": 4}.get(name, 0)

    def change(right, arguments):
        results = right(*arguments)
        read = arguments[place]
        (read[-1] if isinstance(read, list) else read).fill_(0.25)
        return results

    assert f"argument {place} was written, which is read only" in wrong(name, change)


@pytest.mark.parametrize("name", sorted(ops))
def test_checks_notice_what_does_not_repeat(name, wrong):
    """One unit in the last place, from the second run on."""
    calls = itertools.count()

    def change(right, arguments):
        results = right(*arguments)
        if next(calls) % 2:
            written = results[0] if results else arguments[3 if name in ("grad_stats_", "update_scale_") else 2]
            written = written[-1] if isinstance(written, list) else written
            written.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[written.element_size()]).add_(1)
        return results

    assert wrong(name, change).endswith("two runs differ")


@pytest.mark.parametrize("name", sorted(ops))
def test_checks_notice_what_is_not_written(name, wrong):
    """Outputs keep their poison, states what they were."""
    empty = name in RETURNS

    def change(right, arguments):
        results = right(*arguments) if empty else None
        if empty:
            results = tuple(torch.empty_like(result) if result.numel() else result for result in results)
        return results

    assert wrong(name, change) is not None


@pytest.mark.parametrize(
    "kernel", ["accumulator_16_bit", "rounded_before_bias", "rounded_through_bfloat16", "nan_dropped", "last_row_missing"]
)
def test_checks_notice_a_wrong_forward(kernel, wrong):
    def change(right, arguments):
        x, weight, bias, _, activation, compute_dtype, out_dtype, save = arguments
        out = getattr(wrong_kernels, kernel)(x, weight, bias, activation, compute_dtype, out_dtype)
        return out, pack_mask(out) if save else x.new_empty(0, dtype=torch.int32), x.new_empty(0)

    assert "bound" in wrong("linear_act", change)


@pytest.mark.parametrize(
    "kernel",
    [
        "sound_scaled", "scaled_rounded_before_bias", "scaled_through_bfloat16", "scaled_accumulator_14_bits",
        "scaled_saturating", "scaled_as_another_format", "scaled_by_one_scale", "scaled_bias_too",
    ],
)  # fmt: skip
def test_checks_notice_a_wrong_scaled_forward(kernel, wrong, monkeypatch):
    monkeypatch.setattr(linear_act_cases, "forward", lambda few, full: ())  # the others

    def change(right, arguments):
        x, weight, bias, _, activation, _, out_dtype, save, *others = arguments
        if others[0]:  # batch_invariant, which a product of torch is not
            return right(*arguments)
        x_scale, weight_scale = others[-2:]
        out = getattr(wrong_kernels, kernel)(x, x_scale, weight, weight_scale, bias, activation, out_dtype)
        return out, pack_mask(out) if save else x.new_empty(0, dtype=torch.int32), x.new_empty(0)

    found = wrong("linear_act", change)
    if kernel == "sound_scaled":
        assert found is None
    else:
        assert "bound" in found or "not exact" in found


@pytest.mark.parametrize(
    ("capability", "K", "v"), [((8, 0), 4096, -23), ((9, 0), 100, -13), ((9, 0), 512, -14), ((10, 0), 4096, -23)]
)
def test_checks_allow_sums_in_14_bits_where_they_are(capability, K, v, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert scaled_cases.roundoff(torch.device("cuda"), K) == 2.0**v
    assert scaled_cases.roundoff(CPU, K) == 2.0**-24


def test_checks_notice_rows_that_depend_on_others(wrong):
    """Right to a rounding, but summed in another order for one row: not what batch_invariant guarantees."""

    def change(right, arguments):
        x, weight, *others = arguments
        if x.shape[0] > 1 or len(others) < 7:
            return right(*arguments)
        return right(x.flip(1), weight.flip(1), *others[:6], False)

    assert wrong("linear_act", change).endswith("rows have other bits alone than among others")


def test_checks_notice_a_wrong_mask(wrong):
    def change(right, arguments):
        out, saved, x = right(*arguments)
        if saved.numel():
            saved[-1, -1] ^= 1
        return out, saved, x

    assert "mask" in wrong("linear_act", change)


def test_checks_notice_a_mask_that_multiplies(wrong):
    """An inf behind a 0 becomes NaN."""
    from mpkernels.ops.linear_act.epilogues import unpack_mask

    def change(right, arguments):
        grad_out, x, weight, copy, saved, activation, *rest = arguments
        if saved is not None:
            grad_out, saved, activation = grad_out * unpack_mask(saved, weight.shape[0]), None, 0
        return right(grad_out, x, weight, copy, saved, activation, *rest)

    assert "special" in wrong("linear_act_backward", change)


@pytest.mark.parametrize(("mistake", "found"), [("not added", "bound 1"), ("added twice", "bound 1"), ("returned", "returned")])
def test_checks_notice_a_wrong_sum(mistake, found, wrong):
    def change(right, arguments):
        grad_x, grad_weight, *others = right(*arguments)
        if len(arguments) > _SUM:
            product = right(*arguments[:_SUM])[1]
            grad_weight = product if mistake == "returned" else grad_weight
            arguments[_SUM].add_(product, alpha={"not added": -1, "added twice": 1, "returned": 0}[mistake])
        return grad_x, grad_weight, *others

    assert found in wrong("linear_act_backward", change)


@pytest.mark.parametrize(
    ("name", "place", "value", "ending"),
    [
        ("adamw_", 17, None, "clipped"),  # max_norm
        ("adamw_", 15, None, "skipped"),  # found_inf
        ("adamw_", 9, 0.98, "plain"),  # beta2
        ("sgd_", 14, None, "clipped"),
        ("sgd_", 12, None, "skipped"),
        ("sgd_", 8, 0.0, "plain"),  # weight_decay
        ("lion_", 13, None, "clipped"),
        ("lion_", 11, None, "skipped"),
        ("lion_", 6, 0.0, "plain"),  # beta1
    ],
)
def test_checks_notice_a_wrong_step(name, place, value, ending, wrong):
    """What ignores one of its arguments."""

    def change(right, arguments):
        arguments = list(arguments)
        arguments[place] = value
        return right(*arguments)

    assert ending in wrong(name, change)


@pytest.mark.parametrize("name", ["adamw_", "sgd_", "lion_"])
def test_checks_notice_fp64_that_is_fp32_inside(name, wrong):
    def change(right, arguments):
        right(*arguments)
        for master in arguments[0]:
            master.copy_(master.float())

    assert "fp64 masters, plain" in wrong(name, change)


@pytest.mark.parametrize("name", ["adamw_", "sgd_", "lion_"])
def test_checks_notice_bf16_moments_that_are_cut(name, wrong):
    """By two of their last places, as a wrong rounding on the way would."""

    def change(right, arguments):
        right(*arguments)
        for moment in arguments[2]:
            if moment.dtype == torch.bfloat16:
                moment.view(torch.int16).bitwise_and_(~3)

    assert "bf16 moments, plain: moment" in wrong(name, change)


def test_checks_notice_a_copy_that_is_not_rounded_to_nearest(wrong):
    def change(right, arguments):
        right(*arguments)
        copies = arguments[5]
        for copy in copies:
            if copy.numel():
                copy.view(torch.int16).add_(1)

    assert wrong("adamw_", change).endswith("a copy is not its master rounded")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bad", [False, True])
def test_checks_let_a_gpu_leave_uncounted_what_is_not_finite(device, bad):
    """As eager does there, and nothing else."""
    case = next(case for case in cases.of("grad_stats_", few=True) if case.name.endswith("nan" if bad else " finite"))
    arguments = case.make(Memory(CPU))
    ops["grad_stats_"].function("eager")(*arguments)
    case.check((), arguments, (), torch.device(device))
    arguments[3][-1], arguments[4][-1] = torch.nan, -1
    if bad and device == "cuda":
        case.check((), arguments, (), torch.device(device))
        assert arguments[4][-1] == -1, "the next run is compared with what was found"
    else:
        with pytest.raises(AssertionError, match="found_inf, amax, nonfinite are"):
            case.check((), arguments, (), torch.device(device))


def test_random_sign_excess_is_bound_2():
    """Beside check_forward, which does not do it on the device."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).half() for shape in ((64, 256), (48, 256)))
    exact = x.double() @ weight.double().T
    sound = (x.float() @ weight.float().T).half()
    arguments = (exact, x, weight.T, 0, torch.float16, 2.0**-24)
    assert bounds.random_sign_excess(sound, *arguments) <= 1
    assert bounds.random_sign_excess(sound + sound * 2.0**-10, *arguments) > 1


def test_cases_have_names_of_their_own():
    """Which seed their numbers."""
    for name in ops:
        for few, full in ((True, False), (False, False), (False, True)):
            names = [case.name for case in cases.of(name, few=few, full=full)]
            assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize("part", sorted(parts()))
def test_checks_race(part):
    op = parts()[part]
    assert checks.race(op, "eager", CPU, part) == {}
    if op.why_not("native", CPU, torch.float32) is None:
        speeds = checks.race(op, "native", CPU, part)
        assert speeds.keys() == cases.sizes(part, CPU).keys()
        assert all(speed > 0 for speed in speeds.values())


class Graph:
    """Instead of a CUDA graph, on a machine without a GPU: what is captured runs at once."""

    states: list[str] = []  # noqa: RUF012

    def __getattr__(self, name):
        return lambda: self.states.append(name)


@pytest.mark.parametrize("name", STEP)
def test_checks_replay_what_they_capture(name, monkeypatch):
    """And end the capture where a kernel cannot be captured."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(Graph, "states", [])
    case = next(iter(cases.of(name, few=True)))
    function = ops[name].function("eager")
    checks._same(checks._run(function, case, CPU), checks._replay(function, case, CPU), "differ")
    assert Graph.states == ["capture_begin", "capture_end", "replay"]
    with pytest.raises(ZeroDivisionError):
        checks._replay(lambda *_: 1 / 0, case, CPU)
    assert Graph.states[3:] == ["capture_begin", "capture_end"]


@pytest.mark.parametrize("where", [None, "stream", "graph"])
@pytest.mark.parametrize("name", ["grad_stats_", "linear_act"])
def test_checks_on_a_gpu_ask_streams_and_graphs(name, where, monkeypatch):
    """On fake streams and graphs: what has other bits in one of them is found."""
    inside = []
    monkeypatch.setattr(checks, "Memory", lambda device: Memory(CPU))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(Graph, "states", [])
    stream = type("Stream", (), {"wait_stream": lambda *_: None})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    @contextlib.contextmanager
    def on(stream):
        inside.append(stream)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    op = ops[name]
    right = op.function("eager")

    def function(*arguments):
        results = right(*arguments)
        capturing = Graph.states[-1:] == ["capture_begin"]
        if inside and where == ("graph" if capturing else "stream"):
            (results[0] if results else arguments[3]).mul_(2)
        return results

    monkeypatch.setattr(op, "function", lambda backend: function)
    found = checks.wrong(op, "eager", torch.device("cuda", 0), few=True)
    assert (found is None) == (where is None)
    assert where is None or found.endswith(f"{where} gives other bits")
