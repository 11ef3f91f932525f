# SPDX-License-Identifier: Apache-2.0
"""The updates against fp64 over many steps, their copies bit for bit, and wrong updates that the bounds reject."""

import math

import numpy as np
import pytest
import torch

from mpkernels.ops.common.multi_tensor import grad_factor
from tests import bounds, steps
from tests.ops.optimizer_update.rules import ADAMW, LION, RULES, SGD
from tests.steps import DTYPES, SIZES, join, raw, scalar, split, step_counts

NANS = (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF8000)
VARIANTS = [pytest.param(rule, variant, id=f"{name}-{variant}") for name, rule in RULES.items() for variant in rule.variants]
CASES = pytest.mark.parametrize("rule, variant", VARIANTS)


# ----- right ----------------------------------------------------------------------------------------


@CASES
def test_update_reference_matches_torch(rule, variant):
    if rule.torch_optimizer is None:
        pytest.skip("torch has no such optimizer")
    bounds.check_trajectory(rule.expected(variant, exact_start=True), rule.torchs(variant, torch.float64), None)


def test_update_reference_of_lion():
    """Two steps by hand: the sign of exactly 0 is 0, and the moment decays by beta2 after its use."""
    options = dict(lr=0.5, beta1=0.5, beta2=0.75, weight_decay=0.5)
    w, (m,) = LION.advance(np.array([4.0, 4.0, 4.0]), np.array([2.0, 0.0, -2.0]), (np.zeros(3),), 1, options)
    assert (w.tolist(), m.tolist()) == ([2.5, 3.0, 3.5], [0.5, 0.0, -0.5])
    w, (m,) = LION.advance(w, np.array([-0.5, 0.0, -2.0]), (m,), 2, options)
    assert (w.tolist(), m.tolist()) == ([1.875, 2.25, 3.125], [0.25, 0.0, -0.875])


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_matches_reference(rule, variant, dtype, device):
    rule.check(variant, dtype, device)


LONG = steps.Problem(steps=1000)


@pytest.mark.sweep
@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_matches_reference_for_1000_steps(rule, variant, dtype, device, monkeypatch):
    monkeypatch.setattr(steps, "problem", lambda: LONG)
    rule.check(variant, dtype, device)


def test_update_mixed_dtypes(rule, device):
    """One call over all dtypes gives the bits of a call for each tensor."""
    for options in (rule.busy, {}):
        together, alone = (rule.mixed(device, weight_decay=0.1, **options) for _ in range(2))
        scaled = dict(grad_scale=scalar(64.0, device), found_inf=scalar(0.0, device))
        for _ in range(3):
            rule.call(**together, **scaled)
            for i in range(len(SIZES)):
                rule.call(**alone | {n: t[i : i + 1] for n, t in alone.items() if isinstance(t, list)}, **scaled)
        assert raw(rule.state(together)) == raw(rule.state(alone))
        steps.check_copies(together["copies"], together["masters"])


def test_update_steps_differ_between_tensors(rule, device):
    args, alone = (rule.mixed(device, **rule.busy) for _ in range(2))
    args["steps"] = [scalar(i, device) for i in range(len(SIZES))]
    for i, buffer in enumerate(args.get("momentum_buffers", [])):
        buffer.zero_(), alone["momentum_buffers"][i].zero_()
    rule.call(**args)
    assert steps.taken(args["steps"]) == list(range(1, len(SIZES) + 1))
    for i in (0, 6):
        lists = {n: t[i : i + 1] for n, t in alone.items() if isinstance(t, list)}
        rule.call(**alone | lists | dict(steps=step_counts(1, device, i)))
        assert raw([alone["masters"][i]]) == raw([args["masters"][i]])


def test_update_steps_saturate(rule, device):
    """At 2^24, as torch's fp32 counts do: the update goes on as that of the last step."""
    args = rule.mixed(device, weight_decay=0.1)
    args["steps"] = step_counts(len(SIZES), device, 2.0**24 - 1)
    for _ in range(2):
        rule.call(**args)
        assert steps.taken(args["steps"]) == [2.0**24] * len(SIZES)


def test_update_steps_anywhere_in_memory(rule, device):
    """Counts in the middle of an array, at no multiple of 16 bytes, in any order; a skipped step and their neighbours stay."""
    args, plain = rule.mixed(device), rule.mixed(device)
    around = torch.full((2 * len(SIZES) + 1,), 3.0, device=device)
    args["steps"], plain["steps"] = list(around[1::2].unbind())[::-1], step_counts(len(SIZES), device, 3.0)
    for found in (0.0, 1.0):
        rule.call(**args, found_inf=scalar(found, device))
        rule.call(**plain, found_inf=scalar(found, device))
    assert raw(rule.state(args)) == raw(rule.state(plain))
    assert around.tolist() == [3.0, 4.0] * len(SIZES) + [3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_update_copies_of_fp64_are_rounded_once(rule, device, dtype):
    steps.check_rounds_copies_once(rule.call, rule.arguments, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 8, 16])
def test_update_copies_are_rounded_alike_in_long_tensors(rule, device, dtype, offset):
    """All kinds of fp32 numbers, in copies that are stored around the cache: aligned or not, with a tail, and no farther."""
    n = 5003
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(offset), dtype=torch.int64)
    bits[::7] = (bits[::7] & ~0xFFFF) | 0x8000  # halfway between two bf16
    bits[1::7] = (bits[1::7] & ~0x7FFFFF) | 0x7F800000  # inf of both signs; NaN is among the random ones
    master = bits.to(torch.int32).view(torch.float32)
    master[2::7] = torch.arange(len(master[2::7])) * 2.0**-25  # halfway between two subnormal fp16, and not
    args = rule.arguments([master.to(device)], [torch.zeros(n, device=device)], lr=0.0)
    around = torch.full((n + 64,), -7.0, dtype=dtype, device=device)
    args["copies"] = [around[offset : offset + n]]
    rule.call(**args)
    steps.check_copies(args["copies"], args["masters"])
    assert (around[:offset] == -7).all()
    assert (around[offset + n :] == -7).all()


def test_update_scaling_by_a_power_of_two_is_neutral(rule, device):
    check_scaling_is_neutral(rule, device, (1.0, 2.0**7, 2.0**-3), 5)


def check_scaling_is_neutral(rule, device, scales, count) -> None:
    for options in (rule.busy, {}):
        results = []
        for scale in scales:
            args = rule.mixed(device, weight_decay=0.1, **options)
            args["grads"] = [g * scale for g in args["grads"]]
            for _ in range(count):
                norm = dict(grad_norm=scalar(5.0, device, torch.float64), max_norm=1.0)
                rule.call(**args, grad_scale=scalar(scale, device), **norm)
            results.append(raw(rule.state(args)))
        assert results == results[:1] * len(scales)


def test_update_no_scale_is_a_scale_of_one(rule, device):
    with_scale, without = (rule.mixed(device, **rule.busy) for _ in range(2))
    rule.call(**with_scale, grad_scale=scalar(1.0, device), found_inf=scalar(0.0, device))
    rule.call(**without)
    assert raw(rule.state(with_scale)) == raw(rule.state(without))


def test_update_deterministic(rule, device):
    first, second = (rule.mixed(device, sizes=(100_003, 5, 40_000), **rule.busy) for _ in range(2))
    for args in (first, second):
        for _ in range(3):
            rule.call(**args)
    assert raw(rule.state(first)) == raw(rule.state(second))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_update_lr_tensor(rule, device, kind):
    """On the CPU and on the device, and what it holds at the call counts."""
    here, there, again = (rule.mixed(device) for _ in range(3))
    for lr in (0.25, 0.03125):
        rule.call(**here | dict(lr=scalar(lr, dtype=kind)))
        rule.call(**there | dict(lr=scalar(lr, device, kind)))
        rule.call(**again | dict(lr=scalar(0.25)))
    assert raw(rule.state(here)) == raw(rule.state(there))
    assert raw(again["masters"]) != raw(here["masters"])


def test_update_many_tensors(rule, device):
    """More tensors than a by-value table of a kernel holds."""
    sizes = [i % 4 for i in range(1400)]
    generator = torch.Generator().manual_seed(0)
    master, grad = (torch.randn(sum(sizes), generator=generator).to(device) for _ in range(2))
    many, one = (
        rule.arguments(split(master, sizes), split(grad, sizes), **rule.busy),
        rule.arguments([master], [grad], **rule.busy),
    )
    for args in (many, one):
        rule.call(**args)
    assert np.array_equal(join(many["masters"]), join(one["masters"]))
    assert np.array_equal(join(many["copies"]), join(one["copies"]))


def test_update_large_tensor(rule, device):
    """Many chunks and a tail: each element as alone, also where the copy begins in the middle of a vector."""
    n = 150_001
    generator = torch.Generator().manual_seed(1)
    master, grad = torch.randn(n, generator=generator).to(device), torch.randn(n, generator=generator).to(device)
    segments = rule.arguments(split(master, (70_000, n - 70_000)), split(grad, (70_000, n - 70_000)))
    whole, around = rule.arguments([master], [grad]), torch.full((n + 2,), -7.0, dtype=torch.float16, device=device)
    whole["copies"] = [around[1:-1]]
    rule.call(**segments)
    rule.call(**whole)
    assert np.array_equal(join(segments["masters"]), join(whole["masters"]))
    steps.check_copies(whole["copies"], whole["masters"])
    assert around[0] == around[-1] == -7


# ----- of one rule --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, options", [(SGD, dict(momentum=0.5)), (ADAMW, dict(decoupled=False))], ids=["sgd", "adam"])
def test_no_weight_decay_reads_no_weight(device, rule, options):
    """0 * inf is NaN: a weight of inf leaves the moments alone, as torch's `if weight_decay != 0` does."""
    args = rule.arguments([torch.full((70,), math.inf, device=device)], [torch.ones(70, device=device)], **options)
    args["weight_decay"] = 0.0
    rule.call(**args)
    assert (args["masters"][0] == math.inf).all()
    assert all(t.isfinite().all() for name in rule.states for t in args[name])


def test_sgd_first_step_ignores_the_buffer(device):
    """A buffer of NaN at step 0 is not read; dampening does not hold there; each tensor has its own first step."""
    args = SGD.arguments(
        [torch.zeros(3, device=device) for _ in range(2)], [torch.ones(3, device=device)] * 2, momentum=0.5, lr=1.0
    )
    args |= dict(dampening=0.75)
    args["steps"][1].fill_(4)
    args["momentum_buffers"][1].fill_(8.0)
    SGD.call(**args)
    assert args["momentum_buffers"][0].tolist() == [1.0] * 3
    assert args["momentum_buffers"][1].tolist() == [4.25] * 3
    assert steps.taken(args["steps"]) == [1, 5]


@pytest.mark.parametrize("name", ["max_exp_avg_sqs", "exp_avg_sqs"])
@pytest.mark.parametrize("state", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_adamw_maximum_keeps_nan(device, state, name):
    """amsgrad with NaN in one of the two: the maximum is NaN and reaches the weight, as torch.maximum has it."""
    master = torch.float64 if state == torch.float64 else torch.float32
    args = ADAMW.arguments([torch.ones(70, dtype=master, device=device)], [torch.ones(70, device=device)], amsgrad=True)
    args |= {name: [t.to(state) for t in args[name]] for name in ADAMW.states}
    where = torch.zeros(70, dtype=torch.bool, device=device)
    where[[0, 3, 64, 69]] = True
    args[name][0][where] = math.nan
    ADAMW.call(**args)
    assert torch.equal(args["max_exp_avg_sqs"][0].isnan(), where)
    assert torch.equal(args["masters"][0].isnan(), where)
    assert bool(args["exp_avg_sqs"][0].isfinite().all()) == (name == "max_exp_avg_sqs")


def lowbias32(x: int) -> int:
    """Wellons' hash of 32 bits."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


@pytest.mark.parametrize("rule, name, power", [(ADAMW, "exp_avg_sqs", 2), (LION, "exp_avgs", 1)], ids=["adamw", "lion"])
def test_update_stochastic_rounding_is_by_step_and_place(rule, name, power, device):
    """The bits themselves: those of the state plus 16 that a hash makes of the place and of the step count's bits."""
    generator = torch.Generator().manual_seed(0)
    for step in (0, 1, 2, 70_000):
        grad = torch.randint(1, 2**12, (200,), generator=generator).float()  # of which squares are exact
        args = rule.arguments([torch.ones(200, device=device)], [grad.to(device)], beta2=0.5)
        args |= {n: [torch.zeros(200, dtype=torch.bfloat16, device=device)] for n in rule.has_states({})}
        rule.call(**args | dict(steps=step_counts(1, device, step)))
        seed = lowbias32(scalar(step + 1.0).view(torch.int32).item())
        bits = (grad**power * 0.5).view(torch.int32).tolist()
        expected = [(b + (lowbias32(i ^ seed) >> 16)) >> 16 for i, b in enumerate(bits)]
        assert args[name][0].view(torch.int16).tolist() == expected


def test_stochastic_rounding_of_fp64_is_by_all_of_its_bits(device):
    """A second moment of an fp64 master: what fp32 would round away decides, one time in 65,536, which neighbour is taken."""
    n = 2**19
    grad = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    args = ADAMW.arguments([torch.ones(n, device=device, dtype=torch.float64)], [grad.to(device)], (None,), beta2=0.5)
    args |= {name: [torch.zeros(n, dtype=torch.bfloat16, device=device)] for name in ("exp_avgs", "exp_avg_sqs")}
    ADAMW.call(**args)
    place = np.arange(n, dtype=np.uint64) ^ lowbias32(scalar(1.0).view(torch.int32).item())
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        place = ((place ^ place >> shift) * factor) & 0xFFFFFFFF
    exact = grad.numpy() ** 2 * 0.5
    nearest = exact.astype(np.float32)
    toward_0 = np.where(nearest > exact, np.nextafter(nearest, np.float32(0)), nearest)
    odd = toward_0.view(np.uint32) | (toward_0 != exact)
    expected = (odd + ((place ^ place >> 16) >> 16).astype(np.uint32)) >> 16
    assert np.array_equal(args["exp_avg_sqs"][0].cpu().view(torch.int16).numpy(), expected.astype(np.int16))


def test_unscaling_of_fp64_is_fp64(device):
    """1 / 3 in fp32 is off by 1e-8."""
    args = SGD.arguments([torch.zeros(5, dtype=torch.float64, device=device)], [torch.ones(5, device=device).double()], lr=1.0)
    SGD.call(**args, grad_scale=scalar(3.0, device))
    assert np.abs(join(args["masters"]) * -3 - 1).max() < 1e-15


def test_lion_sign_of_zero_and_nan(device):
    """0 where gradient and moment cancel or are 0 of either sign, so that weights only decay; NaN where it is NaN."""
    grads = torch.tensor([0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e-30], device=device)
    args = LION.arguments([torch.ones(7, device=device)], [grads], lr=0.5, beta1=0.5, weight_decay=0.5)
    args["exp_avgs"][0][2] = 1.0
    LION.call(**args)
    expected = [0.75, 0.75, 0.75, math.nan, 0.25, 1.25, 0.25]
    assert np.array_equal(join(args["masters"]), np.array(expected, np.float32), equal_nan=True)


@pytest.mark.parametrize("bits", NANS, ids=hex)
@pytest.mark.parametrize("n", [70, 5003])
def test_update_nan_of_any_bits_stays_nan(rule, device, bits, n):
    """Rounded to 16 bits a NaN of all ones would carry over into a zero: in copies, short and long, and in states."""
    nan = torch.tensor([bits - (bits >> 31 << 32)], dtype=torch.int32).view(torch.float32).expand(n).contiguous()
    for dtype in (torch.float16, torch.bfloat16):
        args = rule.arguments([nan.to(device, copy=True)], [torch.zeros(n, device=device)], (dtype,), lr=0.0)
        rule.call(**args)
        assert args["copies"][0].isnan().all()
    args = rule.arguments([torch.ones(n, device=device)], [nan.to(device)], **rule.busy)
    states = {name: [t.bfloat16() for t in args[name]] for name in rule.states}
    rule.call(**args | states)
    assert all(tensor.isnan().all() for tensors in states.values() for tensor in tensors)


# ----- negative controls and wrong updates --------------------------------------------------------


@pytest.mark.parametrize("rule, lr", [(ADAMW, 1e-3), (SGD, 1e6), (LION, 1e-3)], ids=RULES)
def test_update_learns_from_small_gradients(rule, lr, device):
    """Gradients of 1e-9 are 0 in fp16: no learning without a scale, that of fp32 gradients with one."""
    exact = (torch.randn(300, generator=torch.Generator().manual_seed(0)).sign() * 1e-9).to(device)
    moved = {}
    for name, grads, scale in (("scaled", exact * 2.0**16, 2.0**16), ("fp16", exact, 1.0), ("fp32", exact, 1.0)):
        grad = grads if name == "fp32" else grads.half()
        args = rule.arguments([torch.ones(300, device=device)], [grad], lr=lr, **rule.busy)
        for _ in range(100):
            rule.call(**args, grad_scale=scalar(scale, device))
        moved[name] = join(args["masters"]).astype(np.float64) - 1
    assert not moved["fp16"].any()
    bounds.check_learns_as_fp32(moved["scaled"], moved["fp32"], torch.float16)
    with pytest.raises(AssertionError, match="bound 10"):
        bounds.check_learns_as_fp32(moved["fp16"], moved["fp32"], torch.float16)


def test_update_small_updates_need_a_master(rule, device):
    """Updates below half an ulp of fp16: the copy follows a master in fp32, which moves by 1e-4 a step, and stalls without."""
    grad = torch.ones(300, dtype=torch.float16, device=device)
    args = rule.arguments([torch.ones(300, device=device)], [grad], lr=1e-4)
    stalled = 1.0
    for _ in range(100):
        rule.call(**args)
        stalled = np.float16(stalled - 1e-4)
    assert stalled == 1
    bounds.check_learns_as_fp32(join(args["masters"]) - 1.0, np.full(300, -1e-2), torch.float16)
    steps.check_copies(args["copies"], args["masters"])
    assert (join(args["copies"]) < 1).all()


def test_sgd_small_gradients_are_clipped_as_fp32s(device):
    """fp16 gradients of 1e-7, scaled: the clipped update has the norm of fp32's."""
    exact = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * 1e-7).to(device)
    scaled, norms = (exact * 2.0**16).half(), {}
    for name, grad, scale in (("scaled", scaled, 2.0**16), ("unscaled", exact.half(), 1.0), ("fp32", exact, 1.0)):
        args = SGD.arguments([torch.zeros(300, device=device)], [grad], lr=1.0)
        SGD.call(**args, grad_scale=scalar(scale, device), grad_norm=grad.double().norm() / scale, max_norm=5e-7)
        norms[name] = float(np.linalg.norm(join(args["masters"]).astype(np.float64)))
    bounds.check_norm_follows_fp32(norms["scaled"], norms["fp32"])
    with pytest.raises(AssertionError, match="fp32 gradients"):
        bounds.check_norm_follows_fp32(norms["unscaled"], norms["fp32"])


def fp32_inside(rule, **args):
    """An fp64 step that computes in fp32."""
    narrow = {n: [t.float() for t in args[n]] for n in ("masters", *rule.states)}
    rule.call(**args | narrow)
    for name, tensors in narrow.items():
        if tensors:
            torch._foreach_copy_(args[name], tensors)


def gradient_rounded_to_fp16(rule, **args):
    """Unscale and clip, and round the gradient to fp16 again."""
    options = {name: args.pop(name, None) for name in ("grad_scale", "grad_norm", "max_norm")}
    factor = grad_factor(**options, device=args["masters"][0].device)
    rule.call(**args | dict(grads=[(g * factor).half() for g in args["grads"]]))


def one_step_late(rule, **args):
    """The bias correction of the next step, and an SGD that never takes a first step."""
    if args["steps"][0] == 0:
        torch._foreach_zero_(args.get("momentum_buffers", args["masters"][:0]) or [torch.zeros(1)])
    torch._foreach_add_(args["steps"], 1)
    rule.call(**args)
    torch._foreach_sub_(args["steps"], 1)


def moment_before_its_use(rule, **args):
    """The direction of the moment as it is after the step."""
    rule.call(**args | dict(beta1=args["beta1"] * args["beta2"]))


@pytest.mark.parametrize("rule, variant", [(ADAMW, "adamw"), (SGD, "momentum"), (LION, "decay")], ids=RULES)
def test_update_rejects_fp32_inside_of_fp64(rule, variant, device):
    with pytest.raises(AssertionError, match=r"bound 8|weight"):
        rule.check(variant, torch.float64, device, lambda **args: fp32_inside(rule, **args), (None,))


@pytest.mark.parametrize("rule, variant, wrong", [
    (ADAMW, "adamw", gradient_rounded_to_fp16), (ADAMW, "adamw", one_step_late), (SGD, "clipped", gradient_rounded_to_fp16),
    (SGD, "dampening", one_step_late), (LION, "decay", gradient_rounded_to_fp16), (LION, "decay", moment_before_its_use),
])  # fmt: skip
def test_update_rejects_wrong_updates(rule, variant, wrong, device):
    with pytest.raises(AssertionError, match=r"bound 8|weight|moment"):
        rule.check(variant, torch.float32, device, lambda **args: wrong(rule, **args))


def test_update_rejects_copies_rounded_twice(device):
    master = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64, device=device)
    with pytest.raises(AssertionError, match="rounded once"):
        steps.check_copies([master.float().half()], [master])
