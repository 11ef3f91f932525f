# SPDX-License-Identifier: Apache-2.0
"""sgd_ against fp64 over 1,000 steps, its copies and skips bit for bit, and wrong updates that the bounds reject."""

import functools
import math

import numpy as np
import pytest
import torch

from mpkernels.ops.common.multi_tensor import grad_factor
from mpkernels.ops.sgd import op, reference
from tests import bounds, steps
from tests.steps import BAD_SCALES, BAD_VALUES, DTYPES, SIZES, counts, force, join, raw, scalar, split, step_counts

sgd_ = torch.ops.mpkernels.sgd_
grad_stats_ = torch.ops.mpkernels.grad_stats_
LR = 1e-2
DEFAULTS = dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
VARIANTS = {
    "plain": dict(),
    "decay": dict(weight_decay=0.1),
    "maximize": dict(weight_decay=0.1, maximize=True),
    "momentum": dict(momentum=0.9),
    "dampening": dict(momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.1),
    "nesterov maximize": dict(momentum=0.8, nesterov=True, maximize=True),
    "clipped": dict(momentum=0.9, max_norm=0.5),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(params=steps.targets(op))
def device(request, monkeypatch):
    return force(op, request.param, monkeypatch)


# ----- the call, the reference, torch ---------------------------------------------------------------


def arguments(masters, grads, copy_dtypes=(torch.float16,), lr=LR, **options):
    """All arguments of a call by name, the state fresh. A copy dtype of None means no copy."""
    device, options = masters[0].device, DEFAULTS | options
    copies = []
    for i, master in enumerate(masters):
        dtype = copy_dtypes[i % len(copy_dtypes)]
        copies.append(torch.empty(0, device=device) if dtype is None else torch.empty_like(master, dtype=dtype).fill_(-7))
    return dict(
        masters=masters,
        grads=grads,
        momentum_buffers=[torch.full_like(m, math.nan) for m in masters] if options["momentum"] else [],
        copies=copies,
        steps=step_counts(len(masters), device),
        lr=scalar(lr, dtype=torch.float64),
        **options,
    )


def state(args) -> list[torch.Tensor]:
    """Every tensor that a step may write."""
    return [t for name in ("masters", "momentum_buffers", "copies") for t in args[name]] + args["steps"]


@functools.cache
def expected(variant: str, wide=np.float64) -> np.ndarray:
    """R of bound 8."""
    options = DEFAULTS | VARIANTS[variant]
    max_norm = options.pop("max_norm", None)
    options = {k: v if isinstance(v, bool) else wide(v) for k, v in options.items()}
    w = (steps.problem().start if wide == np.longdouble else steps.problem().start.float()).numpy().astype(wide)
    buffer, result = None, []
    for t, g in enumerate(steps.problem().unscaled(torch.float64).numpy() * steps.clip_factors(max_norm).astype(wide), 1):
        w, buffer = reference.sgd(w, g, buffer, t, lr=wide(LR), **options)
        result.append(w)
    return np.stack(result)


@functools.cache
def torchs(variant: str, dtype=torch.float32) -> np.ndarray:
    """P of bound 8."""
    options = DEFAULTS | VARIANTS[variant]
    factors = torch.from_numpy(steps.clip_factors(options.pop("max_norm", None))).to(dtype)
    make = lambda params: torch.optim.SGD(params, lr=LR, **options, foreach=False, fused=False)
    return steps.torch_trajectory(make, steps.problem().start.to(dtype), steps.problem().unscaled(dtype) * factors)


def trajectory(variant: str, dtype, device, call=sgd_, copy_dtypes=(torch.float16, torch.bfloat16, None)) -> np.ndarray:
    return steps.trajectory(call, arguments, VARIANTS[variant], dtype, device, copy_dtypes)


# ----- right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "clipped"])
def test_sgd_reference_matches_torch(variant):
    w, buffer, result = steps.problem().start.numpy(), None, []
    for t, g in enumerate(steps.problem().unscaled(torch.float64).numpy(), 1):
        w, buffer = reference.sgd(w, g, buffer, t, lr=LR, **DEFAULTS | VARIANTS[variant])
        result.append(w)
    bounds.check_trajectory(np.stack(result), torchs(variant, torch.float64), None)


@variants
def test_sgd_matches_reference_fp32(device, variant):
    bounds.check_trajectory(trajectory(variant, torch.float32, device), expected(variant), torchs(variant))


@variants
def test_sgd_matches_reference_fp64(device, variant):
    w = trajectory(variant, torch.float64, device, copy_dtypes=(torch.float16, torch.float32, torch.bfloat16))
    bounds.check_trajectory(w, expected(variant, np.longdouble), None)


def mixed(device, sizes=SIZES, seed=0, **options):
    """Masters, gradients and copies of every dtype in one call."""
    generator = torch.Generator().manual_seed(seed)
    masters, grads = [], []
    for i, n in enumerate(sizes):
        masters.append(torch.randn(n, generator=generator, dtype=torch.float64).to(device, DTYPES[2 + i % 2]))
        grads.append((torch.randn(n, generator=generator) * 64).to(device, DTYPES[i // 2 % (3 + i % 2)]))
    return arguments(masters, grads, (torch.float16, torch.bfloat16, None, torch.float32, torch.float16), **options)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_mixed_dtypes(device, momentum):
    """One call over all dtypes gives the bits of a call for each tensor."""
    together, alone = (mixed(device, momentum=momentum, weight_decay=0.1) for _ in range(2))
    options = dict(grad_scale=scalar(64.0, device), found_inf=scalar(0.0, device))
    lists = ("masters", "grads", "momentum_buffers", "copies")
    for _ in range(3):
        sgd_(**together, **options)
        for i in range(len(SIZES)):
            sgd_(**alone | {n: alone[n][i : i + 1] for n in lists} | dict(steps=alone["steps"][i : i + 1]), **options)
    assert raw(state(together)) == raw(state(alone))
    steps.check_copies(together["copies"], together["masters"])


def test_sgd_first_step_ignores_the_buffer(device):
    """A buffer of NaN at step 0 is not read; dampening does not hold there; each tensor has its own first step."""
    args = arguments(
        [torch.zeros(3, device=device) for _ in range(2)], [torch.ones(3, device=device)] * 2, momentum=0.5, lr=1.0
    )
    args |= dict(dampening=0.75)
    args["steps"][1].fill_(4)
    args["momentum_buffers"][1].fill_(8.0)
    sgd_(**args)
    assert args["momentum_buffers"][0].tolist() == [1.0] * 3
    assert args["momentum_buffers"][1].tolist() == [4.25] * 3
    assert steps.taken(args["steps"]) == [1, 5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sgd_copies_of_fp64_are_rounded_once(device, dtype):
    steps.check_rounds_copies_once(sgd_, arguments, dtype, device)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_scaling_by_a_power_of_two_is_neutral(device, momentum):
    results = []
    for scale in (1.0, 2.0**7, 2.0**-3):
        args = mixed(device, weight_decay=0.1, momentum=momentum)
        args["grads"] = [g * scale for g in args["grads"]]
        for _ in range(5):
            sgd_(**args, grad_scale=scalar(scale, device), grad_norm=scalar(5.0, device, torch.float64), max_norm=1.0)
        results.append(raw(state(args)))
    assert results[0] == results[1] == results[2]


def test_sgd_no_scale_is_a_scale_of_one(device):
    with_scale, without = (mixed(device, momentum=0.9) for _ in range(2))
    sgd_(**with_scale, grad_scale=scalar(1.0, device), found_inf=scalar(0.0, device))
    sgd_(**without)
    assert raw(state(with_scale)) == raw(state(without))


def test_sgd_deterministic(device):
    first, second = (mixed(device, sizes=(100_003, 5, 40_000), momentum=0.9) for _ in range(2))
    for args in (first, second):
        for _ in range(3):
            sgd_(**args)
    assert raw(state(first)) == raw(state(second))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_sgd_lr_tensor(device, kind):
    """On the CPU and on the device, and what it holds at the call counts."""
    here, there, again = (mixed(device) for _ in range(3))
    for lr in (0.25, 0.03125):
        sgd_(**here | dict(lr=scalar(lr, dtype=kind)))
        sgd_(**there | dict(lr=scalar(lr, device, kind)))
        sgd_(**again | dict(lr=scalar(0.25)))
    assert raw(state(here)) == raw(state(there))
    assert raw(again["masters"]) != raw(here["masters"])


def test_sgd_strided(device):
    """Whatever lies between the elements, the result is that of contiguous tensors."""
    shape, generator = (9, 13), torch.Generator().manual_seed(0)
    masters = steps.layouts(shape, torch.float32, device, generator)
    grads = list(steps.layouts(shape, torch.float16, device, generator).values())
    grads += [grads[0][:1, :1].expand(shape)]
    states = list(steps.layouts(shape, torch.float32, device, generator).values())
    for k, master in enumerate(masters.values()):
        for j, grad in enumerate(grads):
            args = arguments([master], [grad], weight_decay=0.1, momentum=0.9)
            buffer, copy = states[(k + j) % 6].clone(memory_format=torch.preserve_format), states[(k + j + 1) % 6].half()
            args |= dict(momentum_buffers=[buffer], copies=[copy], steps=step_counts(1, device, 1))
            lists = ("masters", "grads", "momentum_buffers", "copies")
            plain = args | {n: [t.clone(memory_format=torch.contiguous_format) for t in args[n]] for n in lists}
            plain["steps"] = [step.clone() for step in args["steps"]]
            sgd_(**args)
            sgd_(**plain)
            assert raw(state(args)) == raw(state(plain)), (list(masters)[k], j)


def test_sgd_empty(device):
    empty = torch.empty(0, device=device)
    sgd_(**(args := arguments([empty], [empty.half()])))
    assert steps.taken(args["steps"]) == [1]
    shapes = [(0,), (), (1,), (2, 0, 3), (1, 1, 1), (0,)]
    masters = [torch.ones(s, device=device) for s in shapes]
    args = arguments(masters, [torch.ones(s, device=device).half() for s in shapes], lr=0.5, momentum=0.9)
    sgd_(**args)
    assert steps.taken(args["steps"]) == [1] * len(shapes)
    assert join(masters).tolist() == [0.5] * 3


def test_sgd_many_tensors(device):
    """More tensors than a by-value table of a kernel holds."""
    sizes = [i % 4 for i in range(1400)]
    generator = torch.Generator().manual_seed(0)
    master, grad = (torch.randn(sum(sizes), generator=generator).to(device) for _ in range(2))
    many = arguments(split(master, sizes), split(grad, sizes), momentum=0.9)
    one = arguments([master], [grad], momentum=0.9)
    for args in (many, one):
        sgd_(**args)
    assert np.array_equal(join(many["masters"]), join(one["masters"]))
    assert np.array_equal(join(many["copies"]), join(one["copies"]))


# ----- skipped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.sweep), 0.9])
def test_sgd_inf_leaves_state_bitwise(device, momentum):
    """inf, -inf and NaN at each of 1,000 positions: grad_stats_ finds it, nothing is written, the first step stays first."""
    args = mixed(device, momentum=momentum)
    grad_scale, found_inf = scalar(8.0, device), scalar(0.0, device)
    before = raw(state(args))
    amax, nonfinite = torch.empty(len(SIZES), dtype=torch.float64, device=device), counts(len(SIZES), device)
    for i, grad in enumerate(args["grads"]):
        for position in range(grad.numel()):
            good = grad[position].clone()
            for bad in BAD_VALUES:
                grad[position] = bad
                grad_stats_(args["grads"], grad_scale, found_inf, amax, nonfinite)
                sgd_(**args, grad_scale=grad_scale, found_inf=found_inf)
            grad[position] = good
            if position % 50 == 0:
                assert raw(state(args)) == before
                assert nonfinite.nonzero().tolist() == [[i]]
    assert raw(state(args)) == before
    grad_stats_(args["grads"], grad_scale, found_inf, amax, nonfinite)
    sgd_(**args, grad_scale=grad_scale, found_inf=found_inf)
    assert steps.taken(args["steps"]) == [1] * len(SIZES)
    assert np.isfinite(join([m.double() for m in args["masters"]])).all()


@pytest.mark.parametrize("grad_scale", BAD_SCALES)
@pytest.mark.parametrize("found_inf", [None, 0.0])
def test_sgd_bad_scale_is_skipped(device, grad_scale, found_inf):
    args = mixed(device, momentum=0.9)
    before = raw(state(args))
    found = None if found_inf is None else scalar(found_inf, device)
    norm = dict(grad_norm=scalar(math.nan, device, torch.float64), max_norm=1.0)
    sgd_(**args, grad_scale=scalar(grad_scale, device), found_inf=found)
    sgd_(**args, grad_scale=scalar(grad_scale, device), found_inf=found, **norm)
    assert raw(state(args)) == before


@pytest.mark.parametrize("found_inf", [1.0, 2.0, -1.0, 1e-45, math.nan, math.inf])
@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_sgd_found_inf_is_skipped(device, found_inf, grad_scale):
    args = mixed(device, momentum=0.9)
    before = raw(state(args))
    sgd_(**args, found_inf=scalar(found_inf, device), grad_scale=None if grad_scale is None else scalar(grad_scale, device))
    assert raw(state(args)) == before


def test_sgd_nonfinite_without_a_check_is_applied(device):
    """Nobody asked for a check: as in torch, NaN goes into the weight where it stands and nowhere else."""
    args = mixed(device)
    args["grads"][4][3] = math.nan
    sgd_(**args)
    assert [int(m.isnan().sum()) for m in args["masters"]] == [0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.nan])
def test_sgd_norm_that_is_not_finite(device, norm):
    """Clipped by NaN all becomes NaN, by inf every gradient 0: as torch.nn.utils.clip_grad_norm_."""
    args = mixed(device, momentum=0.9)
    sgd_(**args, grad_norm=scalar(norm, device, torch.float64), max_norm=1.0)
    expected = torch.full((1,), 1.0 / (norm + 1e-6)).clamp(max=1.0).item()
    for buffer in args["momentum_buffers"]:
        assert (buffer.isnan() if math.isnan(expected) else buffer == 0).all()
    assert all(m.isnan().all() == math.isnan(expected) for m in args["masters"])


# ----- negative controls and wrong updates --------------------------------------------------------


def test_sgd_learns_from_small_gradients(device):
    """Gradients of 1e-9 are 0 in fp16: no learning without a scale, that of fp32 gradients with one."""
    exact = (torch.randn(300, generator=torch.Generator().manual_seed(0)).sign() * 1e-9).to(device)
    moved = {}
    for name, grads, scale in (("scaled", exact * 2.0**16, 2.0**16), ("fp16", exact, 1.0), ("fp32", exact, 1.0)):
        grad = grads if name == "fp32" else grads.half()
        args = arguments([torch.ones(300, device=device)], [grad], lr=1e6, momentum=0.9)
        for _ in range(100):
            sgd_(**args, grad_scale=scalar(scale, device))
        moved[name] = join(args["masters"]).astype(np.float64) - 1
    assert not moved["fp16"].any()
    bounds.check_learns_as_fp32(moved["scaled"], moved["fp32"], torch.float16)
    with pytest.raises(AssertionError, match="bound 10"):
        bounds.check_learns_as_fp32(moved["fp16"], moved["fp32"], torch.float16)


def test_sgd_small_updates_need_a_master(device):
    """Updates below half an ulp of fp16 stall without a master; with one the copy follows fp32."""
    grad = torch.ones(300, dtype=torch.float16, device=device)
    plain = lambda p: torch.optim.SGD(p, lr=1e-4, foreach=False)
    stalled = steps.torch_trajectory(plain, grad.cpu(), grad.cpu().expand(100, 300))
    assert (stalled == 1).all()
    fp32 = steps.torch_trajectory(plain, grad.cpu().float(), grad.cpu().float().expand(100, 300))[-1].astype(np.float64)
    args = arguments([torch.ones(300, device=device)], [grad], lr=1e-4)
    for _ in range(100):
        sgd_(**args)
    bounds.check_learns_as_fp32(join(args["masters"]) - 1.0, fp32 - 1, torch.float16)
    steps.check_copies(args["copies"], args["masters"])
    assert (join(args["copies"]) < 1).all()
    with pytest.raises(AssertionError, match="bound 10"):
        bounds.check_learns_as_fp32(stalled[-1] - 1.0, fp32 - 1, torch.float16)


def test_sgd_small_gradients_are_clipped_as_fp32s(device):
    """fp16 gradients of 1e-7: the update, clipped by the norm that grad_stats_ found, has the norm of fp32's."""
    exact = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * 1e-7).to(device)
    scaled, norms = (exact * 2.0**16).half(), {}
    for name, grad, scale in (("scaled", scaled, 2.0**16), ("unscaled", exact.half(), 1.0), ("fp32", exact, 1.0)):
        found_inf, grad_norm = scalar(0.0, device), scalar(0.0, device, torch.float64)
        amax, nonfinite, grad_scale = scalar(0.0, device, torch.float64).view(1), counts(1, device), scalar(scale, device)
        grad_stats_([grad], grad_scale, found_inf, amax, nonfinite, grad_norm)
        args = arguments([torch.zeros(300, device=device)], [grad], lr=1.0)
        sgd_(**args, grad_scale=grad_scale, found_inf=found_inf, grad_norm=grad_norm, max_norm=5e-7)
        norms[name] = float(np.linalg.norm(join(args["masters"]).astype(np.float64)))
    bounds.check_norm_follows_fp32(norms["scaled"], norms["fp32"])
    with pytest.raises(AssertionError, match="fp32 gradients"):
        bounds.check_norm_follows_fp32(norms["unscaled"], norms["fp32"])


def fp32_inside(**args):
    """An fp64 step that computes in fp32."""
    narrow = {n: [t.float() for t in args[n]] for n in ("masters", "momentum_buffers")}
    sgd_(**args | narrow)
    for name, tensors in narrow.items():
        torch._foreach_copy_(args[name], tensors)


def gradient_rounded_to_fp16(**args):
    """Unscale and clip, and round the gradient to fp16 again."""
    factor = grad_factor(args.pop("grad_scale"), args.pop("grad_norm"), args.pop("max_norm"), args["masters"][0].device)
    sgd_(**args | dict(grads=[(g * factor).half() for g in args["grads"]]))


def first_step_damped(**args):
    """Dampening from the first step on: a buffer of zeros instead of the rule."""
    if args["steps"][0] == 0:
        for buffer in args["momentum_buffers"]:
            buffer.zero_()
    torch._foreach_add_(args["steps"], 1)
    sgd_(**args)
    torch._foreach_sub_(args["steps"], 1)


def test_sgd_rejects_fp32_inside_of_fp64(device):
    with pytest.raises(AssertionError, match="bound 8"):
        bounds.check_trajectory(
            trajectory("momentum", torch.float64, device, fp32_inside, (None,)), expected("momentum", np.longdouble), None
        )


@pytest.mark.parametrize("wrong, variant", [(gradient_rounded_to_fp16, "clipped"), (first_step_damped, "dampening")])
def test_sgd_rejects_wrong_updates(device, wrong, variant):
    with pytest.raises(AssertionError, match="bound 8"):
        bounds.check_trajectory(trajectory(variant, torch.float32, device, wrong), expected(variant), torchs(variant))


# ----- contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_opcheck(device, momentum):
    args = mixed(device, momentum=momentum)
    options = dict(found_inf=scalar(0.0, device), grad_scale=scalar(2.0, device))
    torch.library.opcheck(sgd_.default, tuple(args.values()), options)


def test_sgd_bumps_versions(device):
    args = mixed(device, momentum=0.9)
    before = [t._version for t in state(args)]
    sgd_(**args)
    assert all(t._version > v for t, v in zip(state(args), before, strict=True))
    assert all(g._version == 0 for g in args["grads"])


def test_sgd_makes_stale_saved_tensors_an_error(device):
    steps.check_makes_saved_tensors_stale(sgd_, arguments, device)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(masters=[]), "masters is empty|expected 0"),
        (
            dict(masters=[torch.ones(3).half(), torch.ones(2).half()]),
            r"masters\[0\] must be float32, float64, got torch.float16",
        ),
        (dict(masters=[torch.ones(3), torch.ones(2, device="meta")]), r"masters\[1\] is on meta"),
        (dict(grads=[torch.ones(3)]), "grads has 1 tensors, expected 2"),
        (dict(grads=[torch.ones(3), torch.ones(3)]), r"grads\[1\] has shape \(3,\), expected \(2,\)"),
        (dict(grads=[torch.ones(3), torch.ones(2).double()]), r"grads\[1\] is torch.float64, wider than torch.float32"),
        (dict(grads=[torch.ones(3).to_sparse(), torch.ones(2)]), r"grads\[0\] must be a dense strided tensor"),
        (dict(grads=[torch.ones(3), torch.ones(2).int()]), r"grads\[1\] must be float16"),
        (dict(momentum=0.0), "momentum_buffers and a momentum other than 0 go together"),
        (dict(momentum_buffers=[]), "momentum_buffers and a momentum other than 0 go together"),
        (dict(momentum_buffers=[torch.ones(3)]), "momentum_buffers has 1 tensors"),
        (dict(momentum_buffers=[torch.ones(3), torch.ones(2).double()]), r"momentum_buffers\[1\] is torch.float64"),
        (dict(copies=[torch.ones(3).half()]), "copies has 1 tensors"),
        (dict(masters=[torch.ones(3), torch.ones(1).expand(2)]), r"masters\[1\] overlaps itself \(strides \(0,\)\)"),
        (dict(momentum_buffers=[torch.ones(1).expand(3), torch.ones(2)]), r"momentum_buffers\[0\] overlaps itself"),
        (dict(copies=[torch.ones(3).half(), torch.ones(1).half().expand(2)]), r"copies\[1\] overlaps itself"),
        (dict(copies=[torch.ones(3).half(), torch.ones(1).half()]), r"copies\[1\] has shape"),
        (dict(copies=[torch.ones(3).half(), torch.ones(2).int()]), r"copies\[1\] must be"),
        (dict(steps=step_counts(1)), "steps has 1 tensors, expected 2"),
        (dict(steps=[scalar(0.0), counts(1)[0]]), r"steps\[1\] must be \(\) torch.float32 on cpu, got \(\) torch.int64"),
        (dict(steps=[torch.zeros(1), scalar(0.0)]), r"steps\[0\] must be \(\) torch.float32 on cpu, got \(1,\)"),
        (dict(steps=[scalar(0.0), torch.zeros((), device="meta")]), r"steps\[1\] must be .* on cpu, got .* on meta"),
        (dict(lr=torch.ones(1)), "lr must be a 0-d float32 or float64 tensor"),
        (dict(lr=torch.ones((), dtype=torch.int64)), "lr must be"),
        (dict(lr=torch.ones((), device="meta")), "lr must be on the CPU"),
        (dict(grad_scale=torch.ones(1)), "grad_scale must be"),
        (dict(found_inf=scalar(1.0, dtype=torch.float16)), "found_inf must be"),
        (dict(grad_norm=scalar(1.0), max_norm=1.0), "grad_norm must be"),
        (dict(grad_norm=scalar(1.0, dtype=torch.float64)), "grad_norm and max_norm go together"),
        (dict(max_norm=1.0), "grad_norm and max_norm go together"),
    ],
)
def test_sgd_raises(device, change, message):
    if device.type != "cpu":
        pytest.skip("the arguments are made on the CPU")
    args = arguments([torch.ones(3), torch.ones(2)], [torch.ones(3), torch.ones(2).half()], momentum=0.9)
    steps.check_raises_unchanged(sgd_, args, change, message)
