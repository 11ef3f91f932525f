# SPDX-License-Identifier: Apache-2.0
"""The step ops in Triton: on a GPU, or through Triton's interpreter (test_triton_interpreter.py starts it)."""

import contextlib
import math

import pytest
import torch

from mpkernels import optim
from mpkernels.ops import grad_stats, update_scale
from mpkernels.ops.common import triton_table as table
from mpkernels.ops.optimizer_update import adamw_, lion_, sgd_
from mpkernels.testing import checks, step_cases
from tests import bounds, steps, triton_target
from tests.ops.grad_stats import test_grad_stats
from tests.ops.optimizer_update import test_inputs, test_rules, test_skips, test_state_dtype
from tests.ops.optimizer_update.rules import ADAMW, LION, RULES, SGD
from tests.ops.update_scale import test_update_scale
from tests.steps import BAD_SCALES, BAD_VALUES, DTYPES, Problem, raw, scalar

device, _force_triton = triton_target.device, triton_target.forcing("adamw_", "sgd_", "lion_", "grad_stats_", "update_scale_")
test_interpreter_computes_bf16_by_value = triton_target.test_interpreter_computes_bf16_by_value

updates = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
SIZES = (1, 2, 7, 31, 64, 257, table.BLOCK + 1)


@pytest.mark.parametrize("what", ["parameter", "gradient"])
@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, optim.Lion])
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


@pytest.mark.parametrize("op", [adamw_, sgd_, lion_, grad_stats.op, update_scale.op], ids=lambda op: op.name)
def test_step_runs_in_triton(op, device):
    assert op.backend(device, torch.float32) == "triton"


@pytest.mark.parametrize("op", [adamw_, sgd_, lion_, grad_stats.op, update_scale.op], ids=lambda op: op.name)
def test_step_is_right_in_every_case(op, device, monkeypatch):
    monkeypatch.setitem(step_cases.SIZES, "several tensors", (1, 7, 0, 31))
    assert checks.wrong(op, "triton", device) is None


# ----- the updates ----------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """8 steps instead of 1,000."""
    problem = Problem(sizes=(1, 7, 31), steps=8)
    monkeypatch.setattr(steps, "problem", lambda: problem)


@test_rules.CASES
def test_step_matches_reference_fp32(rule, variant, device, short):
    rule.check(variant, torch.float32, device)


FEW = [(ADAMW, "adamw"), (ADAMW, "adam amsgrad maximize"), (SGD, "nesterov"), (LION, "decay")]


@pytest.mark.parametrize("rule, variant", [*FEW, *((rule, "clipped") for rule in RULES.values())])
def test_step_matches_reference_fp64(rule, variant, device, short):
    rule.check(variant, torch.float64, device)


@updates
def test_step_mixed_dtypes_and_tails(rule, device):
    """One call over all dtypes and tails of blocks and chunks: near eager's result, copies rounded once."""
    sizes = (*SIZES, table.CHUNK, 0, 2 * table.CHUNK + 3, table.CHUNK - 1)
    ours, eagers = (rule.mixed(device, sizes=sizes, weight_decay=0.1, **rule.busy) for _ in range(2))
    for _ in range(2):
        rule.call(**ours, grad_scale=scalar(64.0, device))
        rule.op.function("eager")(**eagers, grad_scale=scalar(64.0, device))
    steps.check_copies(ours["copies"], ours["masters"])
    assert steps.taken(ours["steps"]) == [2] * len(sizes)
    for got, expected in zip(ours["masters"], eagers["masters"], strict=True):
        if got.numel():
            expected = expected.double().cpu().numpy()[None]
            near = None if got.dtype == torch.float64 else expected
            bounds.check_trajectory(got.double().cpu().numpy()[None], expected, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_with_bf16_moments(dtype, device):
    for rule, options in (test_state_dtype.VARIANTS[1], test_state_dtype.VARIANTS[3], test_state_dtype.VARIANTS[-2]):
        test_state_dtype.test_state_dtype_step(rule, options, dtype, device)


def test_step_with_bf16_moments_that_are_not_finite(device):
    test_state_dtype.test_state_dtype_keeps_what_is_not_finite(math.inf, device)
    test_state_dtype.test_state_dtype_keeps_what_is_not_finite(math.nan, device)


@updates
def test_step_many_tensors(rule, device):
    sizes = [i % 4 for i in range(90)]
    many = rule.mixed(device, sizes=sizes, **rule.busy)
    rule.call(**many)
    assert steps.taken(many["steps"]) == [1] * len(sizes)
    steps.check_copies(many["copies"], many["masters"])
    for i in (1, 46, 89):
        lists = [k for k, v in many.items() if isinstance(v, list) and v]
        alone = rule.mixed(device, sizes=sizes, **rule.busy)
        rule.call(**alone | {n: alone[n][i : i + 1] for n in lists} | dict(steps=alone["steps"][i : i + 1]))
        assert raw([alone["masters"][i]]) == raw([many["masters"][i]])


def test_step_capture_refuses_lr_on_the_cpu(monkeypatch):
    """The value that it has then would be the graph's for ever."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="sgd_: lr is on the CPU and would be frozen in the CUDA graph"):
        table.lr_arguments("sgd_", torch.tensor(0.1), torch.device("cuda"))


@updates
def test_step_of_other_modules(rule, device):
    """What the other implementations are held to, where it is quick enough here."""
    test_rules.test_update_steps_differ_between_tensors(rule, device)
    test_inputs.test_update_empty(rule, device)
    test_inputs.test_update_bumps_versions(rule, device)
    test_inputs.test_update_writes_only_its_elements(rule, device)
    for kind in (torch.float32, torch.float64):
        test_rules.test_update_lr_tensor(rule, device, kind)
    for dtype in (torch.float16, torch.bfloat16):
        test_rules.test_update_copies_of_fp64_are_rounded_once(rule, device, dtype)
    for bits in test_rules.NANS:
        test_rules.test_update_nan_of_any_bits_stays_nan(rule, device, bits, 70)
    for norm in (math.nan, math.inf):
        test_skips.test_update_norm_that_is_not_finite(rule, device, norm)


def test_step_of_one_rule(device):
    test_inputs.test_update_strided(SGD, device)
    test_rules.test_sgd_first_step_ignores_the_buffer(device)
    test_rules.test_lion_sign_of_zero_and_nan(device)
    for rule, name, power in ((ADAMW, "exp_avg_sqs", 2), (LION, "exp_avgs", 1)):
        test_rules.test_update_stochastic_rounding_is_by_step_and_place(rule, name, power, device)
    for dtype, name in ((torch.float32, "exp_avg_sqs"), (torch.bfloat16, "max_exp_avg_sqs")):
        test_rules.test_adamw_maximum_keeps_nan(device, dtype, name)


@updates
def test_step_scaling_by_a_power_of_two_is_neutral(rule, device):
    test_rules.check_scaling_is_neutral(rule, device, (1.0, 2.0**7), 2)


@updates
def test_step_skip_leaves_state_bitwise(rule, device):
    args = rule.mixed(device, **rule.busy)
    rule.call(**args)
    before = raw(rule.state(args))
    for grad_scale in BAD_SCALES:
        rule.call(**args, grad_scale=scalar(grad_scale, device), found_inf=scalar(0.0, device))
    for found_inf in (1.0, -1.0, 1e-45, math.nan, math.inf):
        rule.call(**args, found_inf=scalar(found_inf, device))
    assert raw(rule.state(args)) == before
    rule.call(**args, grad_scale=scalar(2.0, device), found_inf=scalar(-0.0, device))
    assert steps.taken(args["steps"]) == [2] * len(args["masters"])


@updates
def test_step_inf_leaves_state_bitwise(rule, device):
    """A sample of positions; the other implementations are held to all of them."""
    args = rule.mixed(device, sizes=SIZES, **rule.busy)
    before, n = raw(rule.state(args)), len(SIZES)
    out = test_grad_stats.outputs(n, device, norm=False)
    grad_scale = scalar(8.0, device)
    for i, grad in enumerate(args["grads"]):
        position = (0, grad.numel() // 2, grad.numel() - 1)[i % 3]
        good = grad[position].clone()
        grad[position] = BAD_VALUES[i // 2 % 3]
        torch.ops.mpkernels.grad_stats_(args["grads"], grad_scale, *out.values())
        rule.call(**args, grad_scale=grad_scale, found_inf=out["found_inf"])
        assert out["nonfinite"].tolist() == [int(k == i) for k in range(n)]
        grad[position] = good
    assert raw(rule.state(args)) == before


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
    test_grad_stats.test_grad_stats_deterministic(device)


@pytest.mark.sweep
def test_grad_stats_norm_of_any_magnitude(device):
    test_grad_stats.test_grad_stats_norm_of_any_magnitude(device, (3, 700, 0, 5))


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
def test_table_of_a_capture_is_never_evicted(rule, device, capture):
    """What a capture was given stays as it is whatever comes after: a replay reads it again, on the device and the host."""
    args = rule.mixed(device, **rule.busy)
    rule.call(**args)  # the tables of these very tensors are there already
    with capture():
        rule.call(**args)
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
