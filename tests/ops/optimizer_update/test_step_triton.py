# SPDX-License-Identifier: Apache-2.0
"""The step ops in Triton: on a GPU, or through Triton's interpreter (test_triton_interpreter.py starts it)."""

import contextlib
import math

import numpy as np
import pytest
import torch

from mpkernels.ops import adamw, grad_stats, sgd, update_scale
from mpkernels.ops.common import triton_table as table
from mpkernels.optim import SGD, AdamW
from mpkernels.testing import checks, step_cases
from tests import bounds, steps
from tests.ops.grad_stats import test_grad_stats
from tests.ops.optimizer_update import test_adamw, test_sgd, test_state_dtype
from tests.ops.update_scale import test_update_scale
from tests.steps import BAD_SCALES, BAD_VALUES, DTYPES, Problem, raw, scalar

triton = pytest.importorskip("triton")
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1, which test_triton_interpreter.py sets", allow_module_level=True)
if INTERPRETED:
    from tests.toolchain import triton_interpreter

    triton_interpreter.install()

UPDATES = {"adamw": test_adamw, "sgd": test_sgd}
CALLS = {"adamw": torch.ops.mpkernels.adamw_, "sgd": torch.ops.mpkernels.sgd_}
updates = pytest.mark.parametrize("name", UPDATES)
SIZES = (1, 2, 7, 31, 64, 257, table.BLOCK + 1)
STATE = {"adamw": dict(amsgrad=True), "sgd": dict(momentum=0.9)}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _force_triton(monkeypatch):
    monkeypatch.setenv("MPKERNELS_BACKEND", "adamw_=triton,sgd_=triton,grad_stats_=triton,update_scale_=triton")


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_interpreter_computes_bf16_by_value():
    """First, and not to be skipped there: without it no bf16 test below means anything."""
    triton_interpreter.check()


@pytest.mark.parametrize("what", ["parameter", "gradient"])
@pytest.mark.parametrize("make", [AdamW, SGD])
def test_step_minus_that_torch_has_put_off(make, what, device):
    """`z.conj().imag` has the address of z, and values that lie nowhere."""
    results = []
    for laid in (torch.neg, torch._neg_view):
        value, grad = (torch.arange(5.0, device=device) + i for i in range(2))
        parameter = torch.nn.Parameter(laid(value) if what == "parameter" else value)
        parameter.grad = laid(grad) if what == "gradient" else grad
        make([parameter], lr=0.5).step()
        results.append(raw([parameter.detach().resolve_neg()]))
    assert results[0] == results[1]


@pytest.mark.parametrize("op", [adamw.op, sgd.op, grad_stats.op, update_scale.op], ids=lambda op: op.name)
def test_step_runs_in_triton(op, device):
    assert op.backend(device, torch.float32) == "triton"


@pytest.mark.parametrize("op", [adamw.op, sgd.op, grad_stats.op, update_scale.op], ids=lambda op: op.name)
def test_step_is_right_in_every_case(op, device, monkeypatch):
    monkeypatch.setitem(step_cases.SIZES, "several tensors", (1, 7, 0, 31))
    assert checks.wrong(op, "triton", device) is None


# ----- the updates ----------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """20 steps instead of 1,000."""
    problem = Problem(sizes=(1, 7, 31), steps=20)
    monkeypatch.setattr(steps, "problem", lambda: problem)
    for module in UPDATES.values():
        monkeypatch.setattr(module, "expected", module.expected.__wrapped__)
        monkeypatch.setattr(module, "torchs", module.torchs.__wrapped__)


CASES = [(name, variant) for name, module in UPDATES.items() for variant in module.VARIANTS]


@pytest.mark.parametrize("name, variant", CASES, ids=[f"{n}-{v}" for n, v in CASES])
def test_step_matches_reference_fp32(name, variant, device, short):
    module = UPDATES[name]
    bounds.check_trajectory(module.trajectory(variant, torch.float32, device), module.expected(variant), module.torchs(variant))


@pytest.mark.parametrize(
    "name, variant", [c for c in CASES if c[1] in ("adamw", "adam amsgrad maximize", "clipped", "nesterov")]
)
def test_step_matches_reference_fp64(name, variant, device, short):
    module = UPDATES[name]
    w = module.trajectory(variant, torch.float64, device, copy_dtypes=(torch.float16, torch.float32, torch.bfloat16))
    bounds.check_trajectory(w, module.expected(variant, np.longdouble), None)


@updates
def test_step_mixed_dtypes_and_tails(name, device):
    """One call over all dtypes and tails of blocks and chunks: near eager's result, copies rounded once."""
    sizes = (*SIZES, table.CHUNK, 0, 2 * table.CHUNK + 3, table.CHUNK - 1)
    module, options = UPDATES[name], dict(weight_decay=0.1, **STATE[name])
    ours, eagers = (module.mixed(device, sizes=sizes, **options) for _ in range(2))
    for _ in range(2):
        CALLS[name](**ours, grad_scale=scalar(64.0, device))
        module.op.function("eager")(**eagers, grad_scale=scalar(64.0, device))
    steps.check_copies(ours["copies"], ours["masters"])
    assert steps.taken(ours["steps"]) == [2] * len(sizes)
    for got, expected in zip(ours["masters"], eagers["masters"], strict=True):
        if got.numel():
            expected = expected.double().cpu().numpy()[None]
            near = None if got.dtype == torch.float64 else expected
            bounds.check_trajectory(got.double().cpu().numpy()[None], expected, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_with_bf16_moments(dtype, device):
    for amsgrad in (False, True):
        test_state_dtype.test_state_dtype_step_of_adamw(amsgrad, dict(decoupled=amsgrad), dtype, device)
    test_state_dtype.test_state_dtype_step_of_sgd(True, dtype, device)


def test_step_with_bf16_moments_that_are_not_finite(device):
    test_state_dtype.test_state_dtype_keeps_what_is_not_finite(math.inf, device)
    test_state_dtype.test_state_dtype_keeps_what_is_not_finite(math.nan, device)


@updates
def test_step_many_tensors(name, device):
    sizes = [i % 4 for i in range(300)]
    module = UPDATES[name]
    many = module.mixed(device, sizes=sizes, **STATE[name])
    CALLS[name](**many)
    assert steps.taken(many["steps"]) == [1] * len(sizes)
    steps.check_copies(many["copies"], many["masters"])
    for i in (1, 150, 299):
        lists = [k for k, v in many.items() if isinstance(v, list) and v]
        alone = module.mixed(device, sizes=sizes, **STATE[name])
        CALLS[name](**alone | {n: alone[n][i : i + 1] for n in lists} | dict(steps=alone["steps"][i : i + 1]))
        assert raw([alone["masters"][i]]) == raw([many["masters"][i]])


def test_step_capture_refuses_lr_on_the_cpu(monkeypatch):
    """The value that it has then would be the graph's for ever."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="sgd_: lr is on the CPU and would be frozen in the CUDA graph"):
        table.lr_arguments("sgd_", torch.tensor(0.1), torch.device("cuda"))


def test_step_of_other_modules(device):
    """What the other implementations are held to, where it is quick enough here."""
    test_sgd.test_sgd_strided(device)
    test_adamw.test_adamw_steps_differ_between_tensors(device)
    test_sgd.test_sgd_first_step_ignores_the_buffer(device)
    for module, name in ((test_adamw, "adamw"), (test_sgd, "sgd")):
        getattr(module, f"test_{name}_empty")(device)
        getattr(module, f"test_{name}_bumps_versions")(device)
        for kind in (torch.float32, torch.float64):
            getattr(module, f"test_{name}_lr_tensor")(device, kind)
        for dtype in (torch.float16, torch.bfloat16):
            getattr(module, f"test_{name}_copies_of_fp64_are_rounded_once")(device, dtype)
    test_adamw.test_adamw_writes_only_its_elements(device)
    test_adamw.test_adamw_bf16_exp_avg_sq_is_rounded_by_step_and_place(device)
    for dtype in (torch.float32, torch.bfloat16):
        test_adamw.test_adamw_maximum_that_is_nan_stays(device, dtype)
    for bits in test_adamw.NANS:
        test_adamw.test_adamw_nan_of_any_bits_stays_nan(device, bits, 70)
    for norm in (math.nan, math.inf):
        test_adamw.test_adamw_norm_that_is_not_finite(device, norm)
        test_sgd.test_sgd_norm_that_is_not_finite(device, norm)


@updates
def test_step_scaling_by_a_power_of_two_is_neutral(name, device):
    results = []
    for scale in (1.0, 2.0**7):
        args = UPDATES[name].mixed(device, weight_decay=0.1, **STATE[name])
        args["grads"] = [g * scale for g in args["grads"]]
        options = dict(grad_scale=scalar(scale, device), grad_norm=scalar(5.0, device, torch.float64), max_norm=1.0)
        for _ in range(2):
            CALLS[name](**args, **options)
        results.append(raw(UPDATES[name].state(args)))
    assert results[0] == results[1]


@updates
def test_step_skip_leaves_state_bitwise(name, device):
    args = UPDATES[name].mixed(device, **STATE[name])
    CALLS[name](**args)
    before = raw(UPDATES[name].state(args))
    for grad_scale in BAD_SCALES:
        CALLS[name](**args, grad_scale=scalar(grad_scale, device), found_inf=scalar(0.0, device))
    for found_inf in (1.0, -1.0, 1e-45, math.nan, math.inf):
        CALLS[name](**args, found_inf=scalar(found_inf, device))
    assert raw(UPDATES[name].state(args)) == before
    CALLS[name](**args, grad_scale=scalar(2.0, device), found_inf=scalar(-0.0, device))
    assert steps.taken(args["steps"]) == [2] * len(args["masters"])


@updates
def test_step_inf_leaves_state_bitwise(name, device):
    """A sample of positions; the other implementations are held to all of them."""
    args = UPDATES[name].mixed(device, sizes=SIZES, **STATE[name])
    before, n = raw(UPDATES[name].state(args)), len(SIZES)
    out = test_grad_stats.outputs(n, device, norm=False)
    grad_scale = scalar(8.0, device)
    for i, grad in enumerate(args["grads"]):
        position = (0, grad.numel() // 2, grad.numel() - 1)[i % 3]
        good = grad[position].clone()
        grad[position] = BAD_VALUES[i // 2 % 3]
        torch.ops.mpkernels.grad_stats_(args["grads"], grad_scale, *out.values())
        CALLS[name](**args, grad_scale=grad_scale, found_inf=out["found_inf"])
        assert out["nonfinite"].tolist() == [int(k == i) for k in range(n)]
        grad[position] = good
    assert raw(UPDATES[name].state(args)) == before


# ----- grad_stats_, update_scale_ --------------------------------------------------------------------


@pytest.mark.parametrize("grad_scale", [None, 1024.0, 2.0**-20])
def test_grad_stats_matches_reference(device, grad_scale):
    sizes = (*SIZES, table.CHUNK, 2 * table.CHUNK + 3)
    for dtypes in (DTYPES, DTYPES[::-1]):
        test_grad_stats.check(test_grad_stats.random_grads(device, sizes, dtypes), grad_scale)


def test_grad_stats_of_other_modules(device):
    for dtype in DTYPES:
        test_grad_stats.test_grad_stats_counts_nonfinite(device, dtype)
        test_grad_stats.test_grad_stats_strided(device, dtype)
    for dtype in (torch.bfloat16, torch.float64):
        test_grad_stats.test_grad_stats_overflow_by_unscaling(device, dtype)
    for grad_scale in BAD_SCALES:
        test_grad_stats.test_grad_stats_bad_scale_is_an_overflow(device, grad_scale)
    test_grad_stats.test_grad_stats_empty(device)
    test_grad_stats.test_grad_stats_norm_is_fp64(device)
    test_grad_stats.test_grad_stats_norm_of_mixed_magnitudes(device)
    test_grad_stats.test_grad_stats_norm_of_any_magnitude(device, (3, 700, 0, 5))
    test_grad_stats.test_grad_stats_deterministic(device)


def test_update_scale_of_other_modules(device):
    for found_inf in (math.nan, math.inf, -1.0, 1e-45):
        test_update_scale.test_update_scale_any_nonzero_found_inf_is_an_overflow(device, found_inf)
    test_update_scale.test_update_scale_hysteresis(device)
    for interval in (2**31 - 1, 2**40):
        test_update_scale.test_update_scale_counts_saturate(device, interval)
    test_update_scale.test_update_scale_matches_reference(device, 2, 0.3, 4)
    test_update_scale.test_update_scale_stops_at_max_scale(device, 1e30)


# ----- the table ------------------------------------------------------------------------------------


def test_table_covers_every_element_once(device):
    """Each element of each tensor is in exactly one chunk of one launch."""
    sizes = (0, 1, table.CHUNK - 1, 0, table.CHUNK, table.CHUNK + 1, 5 * table.CHUNK, 3)
    tensors = [torch.empty(n, device=device, dtype=DTYPES[i % 4]) for i, n in enumerate(sizes)]
    seen = []
    for launch in table.launches([tensors]):
        elements, first, places = launch.layout.tolist()
        for program, tensor in enumerate(launch.tensors.tolist()):
            start = (program - first[tensor]) * table.CHUNK
            seen += [(places[tensor], k) for k in range(start, min(start + table.CHUNK, elements[tensor]))]
        assert launch.addresses.tolist() == [[tensors[p].data_ptr() for p in places]]
    assert len(set(seen)) == len(seen) == sum(sizes)


@pytest.fixture
def capture(monkeypatch):
    """Inside, a CUDA graph is captured as far as the table can see."""

    @contextlib.contextmanager
    def capturing():
        with monkeypatch.context() as patch:
            patch.setattr(table, "_is_capturing", lambda device: True)
            patch.setattr(table, "lr_arguments", lambda op, lr, device: dict(lr_ptr=lr, lr=0.0))  # it is on this device
            yield

    monkeypatch.setattr(table, "_captured", [])
    return capturing


@updates
def test_table_of_a_capture_is_never_evicted(name, device, capture):
    """What a capture was given stays as it is whatever comes after: a replay reads it again, on the device and the host."""
    args = UPDATES[name].mixed(device, **STATE[name])
    CALLS[name](**args)  # the tables of these very tensors are there already
    with capture():
        CALLS[name](**args)
        (launch,) = table.launches([args["masters"][:1]])
    assert len(table._captured) > 3
    kept = [(pinned, sent, sent.tolist()) for pinned, sent in table._captured]
    assert {launch.addresses.data_ptr(), launch.layout.data_ptr(), launch.tensors.data_ptr()} <= {
        sent.data_ptr() for _, sent, _ in kept
    }
    for i in range(600):  # more than both caches hold
        table.numbers((i, -i), device)
        table._made(table._layout, (i + 1,), (0,), device)
    for pinned, sent, values in kept:
        assert sent.tolist() == pinned.tolist() == values


def test_table_of_a_capture_is_its_own(device, capture):
    """Nor does a call beside it, or after it, read what the graph writes at each replay."""
    before = table.numbers((3, 5), device)
    with capture():
        inside = table.numbers((3, 5), device)
        again = table.numbers((3, 5), device)
    after = table.numbers((3, 5), device)
    assert before is after
    assert len({before.data_ptr(), inside.data_ptr(), again.data_ptr()}) == 3
    assert before.tolist() == inside.tolist() == again.tolist()


def test_table_is_not_sent_twice(device):
    tensors = [torch.ones(3, device=device), torch.ones(5, device=device)]
    first, again = table.launches([tensors]), table.launches([tensors])
    assert first[0].addresses.data_ptr() == again[0].addresses.data_ptr()
    assert first[0].layout is again[0].layout
    other = table.launches([[torch.ones(3, device=device), tensors[1]]])
    assert other[0].addresses.tolist() != first[0].addresses.tolist()
