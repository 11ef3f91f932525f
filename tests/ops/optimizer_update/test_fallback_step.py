# SPDX-License-Identifier: Apache-2.0
"""The step by torch's own fused ops: counted without a GPU beside GradScaler and fused AdamW; as on a GPU, but on the CPU."""

import math
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import mpkernels as mpk
from mpkernels.ops import grad_stats, update_scale
from mpkernels.ops.common import multi_tensor
from mpkernels.ops.grad_stats import eager as stats_module
from mpkernels.ops.optimizer_update import adamw_, eager, sgd_
from mpkernels.ops.optimizer_update import fused as torchs_fused
from mpkernels.ops.optimizer_update.rules import sgd as sgd_rule
from tests import bounds, steps
from tests.dispatch_count import Counting
from tests.ops.grad_stats import test_grad_stats
from tests.ops.optimizer_update.rules import ADAMW, RULES, SGD
from tests.paths import ROOT
from tests.steps import raw, scalar

TABLE = ROOT / "docs" / "fallback.md"
ELEMENTS = 2**22
f16, f32, f64 = torch.float16, torch.float32, torch.float64
adamw_eager, sgd_eager, stats_eager, scale_eager = (
    op.function("eager") for op in (adamw_, sgd_, grad_stats.op, update_scale.op)
)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """On the CPU, without looking at a value."""
    for module in (multi_tensor, stats_module, eager, sgd_rule):
        monkeypatch.setattr(module, "values_are_here", lambda device: False)


@pytest.fixture
def fused(monkeypatch):
    """The calls of torch's fused optimizers: name, positional arguments and options."""
    calls = []

    def watched(name, call):
        def run(*args, **options):
            calls.append((name, args, options))
            return call(*args, **options)

        return run

    for name in ("_fused_adamw_", "_fused_adam_", "_fused_sgd_"):
        monkeypatch.setattr(torch, name, watched(name, getattr(torch, name)))
    return calls


# ----- counted on a GPU that is not there ---------------------------------------------------------


def counts(run, n: int = 4) -> tuple[int, float]:
    """Launches of a step of ELEMENTS parameters in n tensors, and bytes per parameter, of what is as large as a tensor."""
    with FakeTensorMode(), Counting() as counted:
        lists = lambda dtype: [torch.empty(ELEMENTS // n, dtype=dtype, device="cuda") for _ in range(n)]
        run(n, lists)
    return counted.launches, counted.bytes_of(ELEMENTS // n) / ELEMENTS


def zero_d(dtype=f32):
    return torch.empty((), dtype=dtype, device="cuda")


def step(n, lists, grad_dtype=f16, clip=False, by_sgd=False, lr_device="cpu"):
    """The verdict, the update with its copies, and the scale's."""
    masters, grads, copies = lists(f32), lists(grad_dtype), lists(f16)
    norm, max_norm = (zero_d(f64), 1.0) if clip else (None, None)
    scale, found_inf, lr = zero_d(), zero_d(), torch.tensor(1e-3, dtype=f64, device=lr_device)
    rows = (torch.empty(n, dtype=dtype, device="cuda") for dtype in (f64, torch.int64))
    stats_eager(grads, scale, found_inf, *rows, norm)
    counted, rest = [zero_d() for _ in range(n)], (scale, found_inf, norm, max_norm)
    if by_sgd:
        sgd_eager(masters, grads, lists(f32), copies, counted, lr, 0.9, 0.0, 1e-4, False, False, *rest)
    else:
        moments = lists(f32), lists(f32), []
        adamw_eager(masters, grads, *moments, copies, counted, lr, 0.9, 0.999, 1e-8, 0.1, True, False, *rest)
    skipped = torch.empty(2, dtype=torch.int64, device="cuda")
    trackers = zero_d(torch.int32), zero_d(torch.int32)
    scale_eager(scale, *trackers, skipped, found_inf, 2.0, 0.5, 2000, 1, 2.0**-126, 2.0**127)


def torchs_step(n, lists):
    """GradScaler and AdamW(fused=True) of fp32 parameters, and the weights that autocast rounds in the next forward."""
    params, grads, found_inf, scale = lists(f32), lists(f32), zero_d(), zero_d()
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, zero_d())
    counted = [zero_d() for _ in range(n)]
    torch._foreach_add_(counted, 1)
    torch._fused_adamw_(
        params, grads, lists(f32), lists(f32), [], counted, lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.1, eps=1e-8,
        amsgrad=False, maximize=False, grad_scale=scale, found_inf=found_inf,
    )  # fmt: skip
    torch._foreach_sub_(counted, [found_inf] * n)
    torch._amp_update_scale_(scale, zero_d(torch.int32), found_inf, 2.0, 0.5, 2000)
    for param in params:
        param.to(f16)


ROWS = {
    "adamw_, gradients in fp16": step,
    "adamw_, gradients in fp16, clipped": lambda *args: step(*args, clip=True),
    "adamw_, gradients in fp32": lambda *args: step(*args, grad_dtype=f32),
    "adamw_, gradients in fp32, clipped": lambda *args: step(*args, grad_dtype=f32, clip=True),
    "sgd_ with momentum, gradients in fp16": lambda *args: step(*args, by_sgd=True),
    "torch: GradScaler, AdamW(fused=True), autocast's casts": torchs_step,
}


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("torch")])
def test_fallback_step_is_a_few_passes(name):
    """At most 50 bytes a parameter, and as many launches for 4 tensors as for 64."""
    (launches, moved), (of_many, moved_of_many) = counts(ROWS[name]), counts(ROWS[name], 64)
    assert launches == of_many
    assert max(moved, moved_of_many) < 50.5  # the half: rows that are as long as one of 64 tensors
    assert moved <= 50


@pytest.mark.parametrize("by_sgd", [False, True])
def test_fallback_step_does_not_wait_for_an_lr_on_the_gpu(by_sgd):
    """A tensor of FakeTensorMode has no value: reading one raises."""
    assert counts(lambda *args: step(*args, by_sgd=by_sgd, lr_device="cuda"))[1] <= 50


def test_fallback_step_table_is_what_is_counted():
    """docs/fallback.md, whose table `python tests/ops/optimizer_update/test_fallback_step.py` writes."""
    assert table() in TABLE.read_text(), "run python tests/ops/optimizer_update/test_fallback_step.py"


def table() -> str:
    lines = ["| step | launches, 4 tensors | 64 tensors | bytes per parameter |", "|---|---|---|---|"]
    for name, run in ROWS.items():
        launches, moved = counts(run)
        lines.append(f"| {name} | {launches} | {counts(run, 64)[0]} | {moved:g} |")
    return "\n".join(lines)


# ----- as on a GPU ---------------------------------------------------------------


@pytest.mark.parametrize("variant", ["adamw", "clipped", "adam with decay"])
def test_fallback_adamw_matches_reference(as_on_gpu, fused, variant):
    ADAMW.check(variant, f32, "cpu", adamw_eager)
    assert {name for name, *_ in fused} == {"_fused_adam_" if variant.startswith("adam ") else "_fused_adamw_"}


@pytest.mark.parametrize("variant", SGD.variants)
def test_fallback_sgd_matches_reference(as_on_gpu, fused, variant):
    """With NaN in the buffers of a first step; with dampening a tensor at a time."""
    SGD.check(variant, f32, "cpu", sgd_eager)
    options = SGD.defaults | SGD.variants[variant]
    assert bool(fused) != bool(options["momentum"] and options["dampening"])


def test_fallback_rejects_gradients_that_are_not_unscaled(as_on_gpu, monkeypatch):
    monkeypatch.setattr(eager, "grad_factor", lambda *args: None)
    with pytest.raises(AssertionError, match="bound 8"):
        ADAMW.check("other betas", f32, "cpu", adamw_eager)


def test_fallback_sgd_first_step_of_some(as_on_gpu):
    """Whose buffers are zeros, beside others that go on: the bits of a call for each."""
    sizes, generator = (5, 40, 7), torch.Generator().manual_seed(0)
    start, grad = (torch.randn(52, generator=generator) for _ in range(2))
    make = lambda: SGD.arguments(steps.split(start, sizes), steps.split(grad.half(), sizes), momentum=0.9)
    together, alone = make(), make()
    for args in (together, alone):
        args["steps"] = [scalar(value) for value in (0.0, 3.0, 0.0)]
        args["momentum_buffers"] = [torch.zeros(5), torch.ones(40), torch.zeros(7)]
    sgd_eager(**together)
    for i in range(3):
        sgd_eager(**alone | {n: alone[n][i : i + 1] for n in ("masters", "grads", "momentum_buffers", "copies", "steps")})
    assert raw(SGD.state(together)) == raw(SGD.state(alone))


def call_of(kind, **options):
    """(op, a call's arguments, what it may write) with every dtype, after one step."""
    rule = RULES[kind]
    op, args = rule.op.function("eager"), rule.mixed(torch.device("cpu"), **options)
    op(**args)
    return op, args, rule.state(args)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("found_inf", [1.0, 2.0, -1.0, 1e-45, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grad_scale", [None, 8.0, *steps.BAD_SCALES])
def test_fallback_skip_leaves_every_byte(as_on_gpu, kind, found_inf, grad_scale):
    op, args, state = call_of(kind)
    before, options = raw(state), dict(found_inf=scalar(found_inf))
    if grad_scale is not None:
        options |= dict(grad_scale=scalar(grad_scale))
    if grad_scale in steps.BAD_SCALES:
        options |= dict(found_inf=scalar(0.0))
    args["grads"][4][3] = math.nan
    op(**args, **options, grad_norm=scalar(math.nan, dtype=f64), max_norm=1.0)
    assert raw(state) == before


def test_fallback_verdict_of_2_is_none_to_torch():
    """Negative control: torch's fused AdamW, given what adamw_ is given, takes the step."""
    w, rest = torch.ones(20), [[torch.zeros(20)], [torch.zeros(20)], [], [scalar(1.0)]]
    options = dict(lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
    torch._fused_adamw_([w], [torch.ones(20)], *rest, **options, found_inf=scalar(2.0))
    assert (w != 1).all()


@pytest.mark.parametrize("kind", RULES)
def test_fallback_never_writes_gradients(as_on_gpu, kind):
    """torch's fused optimizers write what they unscale."""
    op, args, _ = call_of(kind)
    before = raw(args["grads"])
    for options in ({}, dict(grad_scale=scalar(8.0)), dict(grad_norm=scalar(5.0, dtype=f64), max_norm=1.0)):
        op(**args, **options)
    assert raw(args["grads"]) == before


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_fallback_lists_have_the_same_strides(fused, kind):
    """On a GPU torch's fused optimizers refuse others, and a size of 1 may have any stride."""
    rule, op = RULES[kind], RULES[kind].op.function("eager")
    masters = [torch.ones(6, 4).t(), torch.ones(5, 3, 1, 1), torch.ones(1), torch.ones(())]
    grads = [torch.ones(4, 6), torch.ones(5, 3).as_strided((5, 3, 1, 1), (3, 1, 3, 3)), torch.ones(2)[::2], torch.ones(())]
    for dtype in (f32, f16):
        op(**rule.arguments([m.clone() for m in masters], [g.to(dtype) for g in grads]), grad_scale=scalar(2.0))
    assert fused
    for _, lists, _ in fused:
        written = [tensors for tensors in lists[:4] if len(tensors) == len(lists[0])][: 4 if kind == "adamw" else 3]
        assert all(len({(t.shape, t.stride()) for t in same}) == 1 for same in zip(*written, strict=True))


def test_fallback_without_the_fused_op(monkeypatch):
    """What is private to torch may go: a tensor at a time."""
    op, args, _ = call_of("adamw")
    monkeypatch.delattr(torch, "_fused_adamw_")
    op(**args)
    assert steps.taken(args["steps"]) == [2.0] * len(args["steps"])
    steps.check_copies(args["copies"], args["masters"])


def test_fallback_segments_are_bounded(monkeypatch, fused):
    """A segment has no more elements than it may, or one tensor; every tensor is in one."""
    monkeypatch.setattr(torchs_fused, "_MOST", {"cpu": 100})
    sizes = (60, 50, 0, 30, 400, 10, 90, 1)
    adamw_eager(**ADAMW.arguments([torch.ones(n) for n in sizes], [torch.ones(n).half() for n in sizes]))
    segments = [[t.numel() for t in args[0]] for _, args, _ in fused]
    assert segments == [[60], [50, 30], [400], [10, 90], [1]]


# ----- the verdict ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, *steps.BAD_VALUES])
@pytest.mark.parametrize("grad_scale", [None, 1024.0, 2.0**-149])
def test_fallback_grad_stats(as_on_gpu, bad, grad_scale):
    """All dtypes and an empty one; a gradient that is not finite is not counted, and is found by a count later."""
    grads = test_grad_stats.random_grads("cpu", dtypes=steps.DTYPES) + [torch.empty(0), torch.empty(0).half()]
    if bad is not None:
        grads[4][3] = grads[5][0] = bad
    out = test_grad_stats.outputs(len(grads), "cpu")
    stats_eager(grads, None if grad_scale is None else scalar(grad_scale), *out.values())
    assert (out["nonfinite"] == -1).nonzero().flatten().tolist() == ([] if bad is None else [4, 5])
    test_grad_stats.count_what_was_not(grads, out)
    found, amax, nonfinite, norm = test_grad_stats.reference.grad_stats(grads, 1.0 if grad_scale is None else grad_scale)
    assert (bool(out["found_inf"]), out["amax"].tolist(), out["nonfinite"].tolist()) == (found, amax, nonfinite)
    if math.isfinite(norm):
        bounds.check_norm(out["grad_norm"].item(), norm, sum(steps.SIZES))
    else:
        assert not out["grad_norm"].isfinite()


def test_fallback_overflow_report_counts(as_on_gpu, monkeypatch):
    """Then, from the gradients; of one that is another by then it says so."""
    monkeypatch.setenv("MPKERNELS_BACKEND", "eager")
    model = torch.nn.Linear(3, 4)
    optimizer, scaler = mpk.optim.AdamW(model.named_parameters()), mpk.GradScaler()
    scaler.scale(torch.zeros(()))
    model.weight.grad, model.bias.grad = torch.full((4, 3), 2.0), torch.ones(4)
    model.weight.grad[0] = torch.tensor([math.inf, -math.inf, math.nan])
    scaler.step(optimizer)
    scaler.update()
    head = "step 1 skipped at scale 65536: weight has "
    assert scaler.overflow_report(optimizer) == head + "3 non-finite of 12, amax 2 of the finite ones"
    model.weight.grad = None
    gone = "non-finite of 12, not counted: the gradient was replaced before this report"
    assert scaler.overflow_report(optimizer) == head + gone
    model.weight.grad = torch.ones(4, 3)
    assert scaler.overflow_report(optimizer) == head + gone


if __name__ == "__main__":
    text = TABLE.read_text()
    TABLE.write_text(re.sub(r"\| step \|.*?(?=\n\n)", lambda _: table(), text, flags=re.DOTALL))
