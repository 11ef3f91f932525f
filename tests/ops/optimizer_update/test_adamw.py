# SPDX-License-Identifier: Apache-2.0
"""adamw_ against fp64 over 1,000 steps, its copies and skips bit for bit, and wrong updates that the bounds reject."""

import functools
import math

import numpy as np
import pytest
import torch

from mpkernels.ops.adamw import op, reference
from tests import bounds, steps
from tests.steps import BAD_SCALES, BAD_VALUES, DTYPES, SIZES, counts, force, join, raw, scalar, split, step_counts

adamw_ = torch.ops.mpkernels.adamw_
grad_stats_ = torch.ops.mpkernels.grad_stats_
LR = 1e-2
DEFAULTS = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, maximize=False)
VARIANTS = {
    "adamw": dict(weight_decay=0.1),
    "adamw without decay": dict(),
    "adamw maximize": dict(weight_decay=0.1, maximize=True),
    "adamw amsgrad": dict(weight_decay=0.1, amsgrad=True),
    "adam": dict(decoupled=False),
    "adam with decay": dict(decoupled=False, weight_decay=0.1),
    "adam amsgrad maximize": dict(decoupled=False, weight_decay=0.1, amsgrad=True, maximize=True),
    "other betas": dict(beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.01),
    "no momentum": dict(beta1=0.0, beta2=0.99),
    "clipped": dict(max_norm=0.5),
}
NANS = (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF8000)
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(params=steps.targets(op))
def device(request, monkeypatch):
    return force(op, request.param, monkeypatch)


# ----- the call, the reference, torch ---------------------------------------------------------------


def arguments(masters, grads, copy_dtypes=(torch.float16,), amsgrad=False, lr=LR, **options):
    """All arguments of a call by name, the state fresh. A copy dtype of None means no copy."""
    device = masters[0].device
    zeros = lambda: [torch.zeros_like(m) for m in masters]
    copies = []
    for i, master in enumerate(masters):
        dtype = copy_dtypes[i % len(copy_dtypes)]
        copies.append(torch.empty(0, device=device) if dtype is None else torch.empty_like(master, dtype=dtype).fill_(-7))
    return dict(
        masters=masters,
        grads=grads,
        exp_avgs=zeros(),
        exp_avg_sqs=zeros(),
        max_exp_avg_sqs=zeros() if amsgrad else [],
        copies=copies,
        steps=step_counts(len(masters), device),
        lr=scalar(lr, dtype=torch.float64),
        **DEFAULTS | options,
    )


def state(args) -> list[torch.Tensor]:
    """Every tensor that a step may write."""
    lists = ("masters", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "copies")
    return [t for name in lists for t in args[name]] + args["steps"]


@functools.cache
def expected(variant: str, wide=np.float64) -> np.ndarray:
    """R of bound 8."""
    options = DEFAULTS | VARIANTS[variant]
    amsgrad, max_norm = options.pop("amsgrad", False), options.pop("max_norm", None)
    options = {k: v if isinstance(v, bool) else wide(v) for k, v in options.items()}
    w = steps.problem().start.numpy() if wide == np.longdouble else steps.problem().start.float().numpy()
    w = w.astype(wide)
    m, v, vmax = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w) if amsgrad else None
    result = []
    for t, g in enumerate(steps.problem().unscaled(torch.float64).numpy() * steps.clip_factors(max_norm).astype(wide), 1):
        w, m, v, vmax = reference.adamw(w, g, m, v, vmax, t, lr=wide(LR), **options)
        result.append(w)
    return np.stack(result)


def torch_optimizer(variant: str):
    options = DEFAULTS | VARIANTS[variant]
    kind = torch.optim.AdamW if options["decoupled"] else torch.optim.Adam
    return lambda params: kind(
        params, lr=LR, betas=(options["beta1"], options["beta2"]), eps=options["eps"], weight_decay=options["weight_decay"],
        amsgrad=options.get("amsgrad", False), maximize=options["maximize"], foreach=False, fused=False,
    )  # fmt: skip


@functools.cache
def torchs(variant: str, dtype=torch.float32) -> np.ndarray:
    """P of bound 8."""
    factors = torch.from_numpy(steps.clip_factors(VARIANTS[variant].get("max_norm"))).to(dtype)
    return steps.torch_trajectory(
        torch_optimizer(variant), steps.problem().start.to(dtype), steps.problem().unscaled(dtype) * factors
    )


def trajectory(variant: str, dtype, device, call=adamw_, copy_dtypes=(torch.float16, torch.bfloat16, None)) -> np.ndarray:
    return steps.trajectory(call, arguments, VARIANTS[variant], dtype, device, copy_dtypes)


# ----- right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "clipped"])
def test_adamw_reference_matches_torch(variant):
    options = DEFAULTS | VARIANTS[variant]
    amsgrad = options.pop("amsgrad", False)
    w = steps.problem().start.numpy()
    m, v, vmax = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w) if amsgrad else None
    result = []
    for t, g in enumerate(steps.problem().unscaled(torch.float64).numpy(), 1):
        w, m, v, vmax = reference.adamw(w, g, m, v, vmax, t, lr=LR, **options)
        result.append(w)
    bounds.check_trajectory(np.stack(result), torchs(variant, torch.float64), None)


@variants
def test_adamw_matches_reference_fp32(device, variant):
    bounds.check_trajectory(trajectory(variant, torch.float32, device), expected(variant), torchs(variant))


@variants
def test_adamw_matches_reference_fp64(device, variant):
    w = trajectory(variant, torch.float64, device, copy_dtypes=(torch.float16, torch.float32, torch.bfloat16))
    bounds.check_trajectory(w, expected(variant, np.longdouble), None)


def mixed(device, sizes=SIZES, seed=0, **options):
    """Masters, gradients and copies of every dtype in one call, and fp32 masters whose own dtype is their copy's."""
    generator = torch.Generator().manual_seed(seed)
    masters, grads = [], []
    for i, n in enumerate(sizes):
        masters.append(torch.randn(n, generator=generator, dtype=torch.float64).to(device, DTYPES[2 + i % 2]))
        grads.append((torch.randn(n, generator=generator) * 64).to(device, DTYPES[i // 2 % (3 + i % 2)]))
    copy_dtypes = (torch.float16, torch.bfloat16, None, torch.float32, torch.float16)
    return arguments(masters, grads, copy_dtypes, **options)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_mixed_dtypes(device, amsgrad):
    """One call over all dtypes gives the bits of a call for each tensor."""
    together = mixed(device, amsgrad=amsgrad, weight_decay=0.1)
    alone = mixed(device, amsgrad=amsgrad, weight_decay=0.1)
    options = dict(grad_scale=scalar(64.0, device), found_inf=scalar(0.0, device))
    lists = ("masters", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "copies")
    for _ in range(3):
        adamw_(**together, **options)
        for i in range(len(SIZES)):
            adamw_(**alone | {n: alone[n][i : i + 1] for n in lists} | dict(steps=alone["steps"][i : i + 1]), **options)
    assert raw(state(together)) == raw(state(alone))
    steps.check_copies(together["copies"], together["masters"])


def test_adamw_steps_differ_between_tensors(device):
    args, alone = mixed(device), mixed(device)
    args["steps"] = [scalar(i, device) for i in range(len(SIZES))]
    adamw_(**args)
    assert steps.taken(args["steps"]) == list(range(1, len(SIZES) + 1))
    for i in (0, 6):
        lists = {n: alone[n][i : i + 1] for n in ("masters", "grads", "exp_avgs", "exp_avg_sqs", "copies")}
        adamw_(**alone | lists | dict(steps=step_counts(1, device, i)))
        assert raw([alone["masters"][i]]) == raw([args["masters"][i]])


def test_adamw_steps_saturate(device):
    """At 2^24, as torch's fp32 counts do: the update goes on as that of the last step."""
    args = mixed(device, weight_decay=0.1)
    args["steps"] = step_counts(len(SIZES), device, 2.0**24 - 1)
    for _ in range(2):
        adamw_(**args)
        assert steps.taken(args["steps"]) == [2.0**24] * len(SIZES)


def test_adamw_steps_anywhere_in_memory(device):
    """Counts in the middle of an array, at no multiple of 16 bytes, in any order; a skipped step and their neighbours stay."""
    args, plain = mixed(device), mixed(device)
    around = torch.full((2 * len(SIZES) + 1,), 3.0, device=device)
    args["steps"], plain["steps"] = list(around[1::2].unbind())[::-1], step_counts(len(SIZES), device, 3.0)
    for found in (0.0, 1.0):
        adamw_(**args, found_inf=scalar(found, device))
        adamw_(**plain, found_inf=scalar(found, device))
    assert raw(state(args)) == raw(state(plain))
    assert around.tolist() == [3.0, 4.0] * len(SIZES) + [3.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adamw_copies_of_fp64_are_rounded_once(device, dtype):
    steps.check_rounds_copies_once(adamw_, arguments, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 8, 16])
def test_adamw_copies_are_rounded_alike_in_long_tensors(device, dtype, offset):
    """All kinds of fp32 numbers, in copies that go past the cache: aligned or not, with a tail, and no farther."""
    n = 5003
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(offset), dtype=torch.int64)
    bits[::7] = (bits[::7] & ~0xFFFF) | 0x8000  # halfway between two bf16
    bits[1::7] = (bits[1::7] & ~0x7FFFFF) | 0x7F800000  # inf of both signs; NaN is among the random ones
    master = bits.to(torch.int32).view(torch.float32)
    master[2::7] = torch.arange(len(master[2::7])) * 2.0**-25  # halfway between two subnormal fp16, and not
    args = arguments([master.to(device)], [torch.zeros(n, device=device)], lr=0.0)
    around = torch.full((n + 64,), -7.0, dtype=dtype, device=device)
    args["copies"] = [around[offset : offset + n]]
    adamw_(**args)
    steps.check_copies(args["copies"], args["masters"])
    assert (around[:offset] == -7).all()
    assert (around[offset + n :] == -7).all()


def test_adamw_scaling_by_a_power_of_two_is_neutral(device):
    results = []
    for scale in (1.0, 2.0**7, 2.0**-3):
        args = mixed(device, weight_decay=0.1)
        args["grads"] = [g * scale for g in args["grads"]]
        for _ in range(5):
            adamw_(**args, grad_scale=scalar(scale, device), grad_norm=scalar(5.0, device, torch.float64), max_norm=1.0)
        results.append(raw(state(args)))
    assert results[0] == results[1] == results[2]


def test_adamw_no_scale_is_a_scale_of_one(device):
    with_scale, without = mixed(device), mixed(device)
    adamw_(**with_scale, grad_scale=scalar(1.0, device), found_inf=scalar(0.0, device))
    adamw_(**without)
    assert raw(state(with_scale)) == raw(state(without))


def test_adamw_deterministic(device):
    first, second = (mixed(device, sizes=(100_003, 5, 40_000), amsgrad=True) for _ in range(2))
    for args in (first, second):
        for _ in range(3):
            adamw_(**args)
    assert raw(state(first)) == raw(state(second))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_adamw_lr_tensor(device, kind):
    """On the CPU and on the device, and what it holds at the call counts."""
    here, there = mixed(device), mixed(device)
    for lr in (0.25, 0.03125):
        adamw_(**here | dict(lr=scalar(lr, dtype=kind)))
        adamw_(**there | dict(lr=scalar(lr, device, kind)))
    assert raw(state(here)) == raw(state(there))
    again = mixed(device)
    for _ in range(2):
        adamw_(**again | dict(lr=scalar(0.25)))
    assert raw(again["masters"]) != raw(here["masters"])


def test_adamw_strided(device):
    """Whatever lies between the elements, the result is that of contiguous tensors, and the rest of memory stays."""
    shape, generator = (9, 13), torch.Generator().manual_seed(0)
    masters = steps.layouts(shape, torch.float32, device, generator)
    grads = list(steps.layouts(shape, torch.float16, device, generator).values())
    grads += [g[:1, :1].expand(shape) for g in grads[:1]]
    states = list(steps.layouts(shape, torch.float32, device, generator).values())
    for k, master in enumerate(masters.values()):
        for j, grad in enumerate(grads):
            m, v, copy = (states[(k + j + s) % len(states)].clone(memory_format=torch.preserve_format) for s in range(3))
            args = arguments([master], [grad], weight_decay=0.1)
            args |= dict(exp_avgs=[m], exp_avg_sqs=[v.square_()], copies=[copy.half()])
            lists = ("masters", "grads", "exp_avgs", "exp_avg_sqs", "copies")
            plain = args | {n: [t.clone(memory_format=torch.contiguous_format) for t in args[n]] for n in lists}
            plain["steps"] = [step.clone() for step in args["steps"]]
            adamw_(**args)
            adamw_(**plain)
            assert raw(state(args)) == raw(state(plain)), (list(masters)[k], j)


def test_adamw_writes_only_its_elements(device):
    """Views into larger storages: what lies around them keeps its bytes."""
    storages = [torch.full((12, 12), math.nan, device=device) for _ in range(4)]
    views = [s[1:9, 2:7].t() if i % 2 else s[2:7, 1:9] for i, s in enumerate(storages)]
    for view in views:
        view.fill_(0.5)
    copy = torch.full((12, 12), math.nan, device=device, dtype=torch.float16)
    args = arguments([views[0]], [views[1]], (torch.float16,))
    args |= dict(exp_avgs=[views[2]], exp_avg_sqs=[views[3]], copies=[copy[3:8, 3:11]])
    outside = [s.isnan() for s in (*storages, copy)]
    adamw_(**args)
    for storage, mask in zip((*storages, copy), outside, strict=True):
        mask = (
            mask
            if storage is not copy
            else mask.index_put((torch.arange(3, 8)[:, None], torch.arange(3, 11)), mask.new_zeros(()))
        )
        assert torch.equal(storage.isnan(), mask)
    steps.check_copies(args["copies"], args["masters"])


def test_adamw_empty(device):
    empty = torch.empty(0, device=device)
    adamw_(**(args := arguments([empty], [empty.half()])))
    assert steps.taken(args["steps"]) == [1]
    shapes = [(0,), (), (1,), (2, 0, 3), (1, 1, 1), (0,)]
    masters = [torch.ones(s, device=device) for s in shapes]
    args = arguments(masters, [torch.ones(s, device=device).half() for s in shapes])
    adamw_(**args)
    assert steps.taken(args["steps"]) == [1] * len(shapes)
    one = arguments([torch.ones(1, device=device)], [torch.ones(1, device=device)])
    adamw_(**one)
    assert masters[1].item() == masters[2].item() == masters[4].item() == one["masters"][0].item() != 1


def test_adamw_many_tensors(device):
    """More tensors than a by-value table of a kernel holds."""
    sizes = [i % 4 for i in range(1400)]
    args = mixed(device, sizes=sizes)
    whole = [torch.cat([t.double() for t in args["masters"]]), torch.cat([t.double() for t in args["grads"]])]
    args["masters"] = split(whole[0], sizes)
    args |= {n: [torch.zeros_like(m) for m in args["masters"]] for n in ("exp_avgs", "exp_avg_sqs")}
    one = arguments([whole[0]], [whole[1]])
    adamw_(**args)
    adamw_(**one)
    assert np.array_equal(join(args["masters"]), join(one["masters"]))


def test_adamw_large_tensor(device):
    """Many chunks and a tail: each element as alone, also where the copy begins in the middle of a vector."""
    n = 150_001
    generator = torch.Generator().manual_seed(1)
    master, grad = torch.randn(n, generator=generator).to(device), torch.randn(n, generator=generator).to(device)
    pieces = arguments(split(master, (70_000, n - 70_000)), split(grad, (70_000, n - 70_000)))
    whole, around = arguments([master], [grad]), torch.full((n + 2,), -7.0, dtype=torch.float16, device=device)
    whole["copies"] = [around[1:-1]]
    adamw_(**pieces)
    adamw_(**whole)
    assert np.array_equal(join(pieces["masters"]), join(whole["masters"]))
    steps.check_copies(whole["copies"], whole["masters"])
    assert around[0] == around[-1] == -7


# ----- skipped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_adamw_inf_leaves_state_bitwise(device, amsgrad):
    """inf, -inf and NaN at each of 1,000 positions: grad_stats_ finds it and the step writes nothing."""
    args = mixed(device, amsgrad=amsgrad)
    grad_scale, found_inf = scalar(8.0, device), scalar(0.0, device)
    adamw_(**args, grad_scale=grad_scale, found_inf=found_inf)
    before = raw(state(args))
    amax, nonfinite = torch.empty(len(SIZES), dtype=torch.float64, device=device), counts(len(SIZES), device)
    for i, grad in enumerate(args["grads"]):
        for position in range(grad.numel()):
            good = grad[position].clone()
            for bad in BAD_VALUES:
                grad[position] = bad
                grad_stats_(args["grads"], grad_scale, found_inf, amax, nonfinite)
                adamw_(**args, grad_scale=grad_scale, found_inf=found_inf)
            grad[position] = good
            if position % 50 == 0:
                assert raw(state(args)) == before
                assert nonfinite.nonzero().tolist() == [[i]]
    assert raw(state(args)) == before
    grad_stats_(args["grads"], grad_scale, found_inf, amax, nonfinite)
    adamw_(**args, grad_scale=grad_scale, found_inf=found_inf)
    assert steps.taken(args["steps"]) == [2] * len(SIZES)


@pytest.mark.parametrize("grad_scale", BAD_SCALES)
@pytest.mark.parametrize("found_inf", [None, 0.0])
def test_adamw_bad_scale_is_skipped(device, grad_scale, found_inf):
    args = mixed(device, amsgrad=True)
    adamw_(**args)
    before = raw(state(args))
    found = None if found_inf is None else scalar(found_inf, device)
    norm = dict(grad_norm=scalar(math.nan, device, torch.float64), max_norm=1.0)
    adamw_(**args, grad_scale=scalar(grad_scale, device), found_inf=found)
    adamw_(**args, grad_scale=scalar(grad_scale, device), found_inf=found, **norm)
    assert raw(state(args)) == before


@pytest.mark.parametrize("found_inf", [1.0, 2.0, -1.0, 1e-45, math.nan, math.inf])
@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_adamw_found_inf_is_skipped(device, found_inf, grad_scale):
    args = mixed(device, amsgrad=True)
    adamw_(**args)
    before = raw(state(args))
    adamw_(**args, found_inf=scalar(found_inf, device), grad_scale=None if grad_scale is None else scalar(grad_scale, device))
    assert raw(state(args)) == before


def test_adamw_found_inf_of_minus_zero_is_taken(device):
    args = mixed(device)
    adamw_(**args, found_inf=scalar(-0.0, device))
    assert steps.taken(args["steps"]) == [1] * len(SIZES)


def test_adamw_nonfinite_without_a_check_is_applied(device):
    """Nobody asked for a check: as in torch, NaN and inf go into the weights where they stand and nowhere else."""
    args = mixed(device)
    args["grads"][4][3] = math.nan
    adamw_(**args)
    assert [int(m.isnan().sum()) for m in args["masters"]] == [0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.nan])
def test_adamw_norm_that_is_not_finite(device, norm):
    """Clipped by NaN all becomes NaN, by inf every gradient 0: as torch.nn.utils.clip_grad_norm_."""
    args = mixed(device)
    adamw_(**args, grad_norm=scalar(norm, device, torch.float64), max_norm=1.0)
    expected = torch.full((1,), 1.0 / (norm + 1e-6)).clamp(max=1.0).item()
    for moment in args["exp_avgs"]:
        assert (moment.isnan() if math.isnan(expected) else moment == 0).all()
    assert all(m.isnan().all() == math.isnan(expected) for m in args["masters"])


@pytest.mark.parametrize("state", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_adamw_maximum_that_is_nan_stays(device, state):
    """amsgrad with NaN in max_exp_avg_sqs alone: it stays NaN and reaches the weight, as torch.maximum has it."""
    master = torch.float64 if state == torch.float64 else torch.float32
    args = arguments([torch.ones(70, dtype=master, device=device)], [torch.ones(70, device=device)], amsgrad=True)
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        args[name] = [t.to(state) for t in args[name]]
    where = torch.zeros(70, dtype=torch.bool, device=device)
    where[[0, 3, 64, 69]] = True
    args["max_exp_avg_sqs"][0][where] = math.nan
    adamw_(**args)
    assert torch.equal(args["max_exp_avg_sqs"][0].isnan(), where)
    assert torch.equal(args["masters"][0].isnan(), where)
    assert args["exp_avg_sqs"][0].isfinite().all()


def lowbias32(x: int) -> int:
    """Wellons' hash of 32 bits."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ x >> 16


def test_adamw_bf16_exp_avg_sq_is_rounded_by_step_and_place(device):
    """The bits themselves: those of v plus 16 that a hash makes of the place and of the step count's bits."""
    generator = torch.Generator().manual_seed(0)
    for step in (0, 1, 2, 70_000):
        grad = torch.randint(1, 2**12, (200,), generator=generator).float()  # of which squares are exact
        args = arguments([torch.ones(200, device=device)], [grad.to(device)], beta2=0.5)
        args |= dict(steps=step_counts(1, device, step), exp_avgs=[torch.zeros(200, dtype=torch.bfloat16, device=device)])
        args["exp_avg_sqs"] = [torch.zeros(200, dtype=torch.bfloat16, device=device)]
        adamw_(**args)
        seed = lowbias32(scalar(step + 1.0).view(torch.int32).item())
        bits = (grad * grad * 0.5).view(torch.int32).tolist()
        expected = [(b + (lowbias32(i ^ seed) >> 16)) >> 16 for i, b in enumerate(bits)]
        assert args["exp_avg_sqs"][0].view(torch.int16).tolist() == expected


@pytest.mark.parametrize("bits", NANS, ids=hex)
@pytest.mark.parametrize("n", [70, 5003])
def test_adamw_nan_of_any_bits_stays_nan(device, bits, n):
    """Rounded to 16 bits a NaN of all ones would carry over into a zero: in copies, short and long, and in moments."""
    nan = torch.tensor([bits - (bits >> 31 << 32)], dtype=torch.int32).view(torch.float32).expand(n).contiguous()
    for dtype in (torch.float16, torch.bfloat16):
        args = arguments([nan.to(device, copy=True)], [torch.zeros(n, device=device)], (dtype,), lr=0.0)
        adamw_(**args)
        assert args["copies"][0].isnan().all()
    args = arguments([torch.ones(n, device=device)], [nan.to(device)], amsgrad=True)
    moments = {name: [t.bfloat16() for t in args[name]] for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")}
    adamw_(**args | moments)
    assert all(tensor.isnan().all() for tensors in moments.values() for tensor in tensors)


# ----- negative controls and wrong updates --------------------------------------------------------


def test_adamw_learns_from_small_gradients(device):
    """Gradients of 1e-9 are 0 in fp16: no learning without a scale, that of fp32 gradients with one."""
    exact = (torch.randn(300, generator=torch.Generator().manual_seed(0)).sign() * 1e-9).to(device)
    moved = {}
    for name, grads, scale in (("scaled", exact * 2.0**16, 2.0**16), ("fp16", exact, 1.0), ("fp32", exact, 1.0)):
        grad = grads if name == "fp32" else grads.half()
        args = arguments([torch.ones(300, device=device)], [grad], lr=1e-3)
        for _ in range(100):
            adamw_(**args, grad_scale=scalar(scale, device))
        moved[name] = join(args["masters"]).astype(np.float64) - 1
    assert not moved["fp16"].any()
    bounds.check_learns_as_fp32(moved["scaled"], moved["fp32"], torch.float16)
    with pytest.raises(AssertionError, match="bound 10"):
        bounds.check_learns_as_fp32(moved["fp16"], moved["fp32"], torch.float16)


def test_adamw_small_updates_need_a_master(device):
    """Updates below half an ulp of fp16 stall without a master; with one the copy follows fp32."""
    grad = torch.ones(300, dtype=torch.float16, device=device)
    stalled = steps.torch_trajectory(
        lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0, foreach=False), grad.clone(), grad.expand(100, 300)
    )
    assert (stalled == 1).all()
    args = arguments([torch.ones(300, device=device)], [grad], lr=1e-4)
    for _ in range(100):
        adamw_(**args)
    fp32 = steps.torch_trajectory(
        lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0, foreach=False), grad.float(), grad.float().expand(100, 300)
    )[-1].astype(np.float64)
    bounds.check_learns_as_fp32(join(args["masters"]) - 1.0, fp32 - 1, torch.float16)
    steps.check_copies(args["copies"], args["masters"])
    assert (join(args["copies"]) < 1).all()
    with pytest.raises(AssertionError, match="bound 10"):
        bounds.check_learns_as_fp32(stalled[-1] - 1.0, fp32 - 1, torch.float16)


def test_adamw_small_gradients_are_clipped_as_fp32s(device):
    """fp16 gradients of 1e-7, scaled: with lr and betas of 1 step, the clipped update is that of fp32 gradients."""
    exact = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * 1e-7).to(device)
    scaled, moved = (exact * 2.0**16).half(), {}
    for name, grad, scale in (("scaled", scaled, 2.0**16), ("unscaled", (exact * 1.0).half(), 1.0), ("fp32", exact, 1.0)):
        norm = grad.double().norm() / scale
        args = arguments([torch.ones(300, device=device)], [grad], lr=1.0, beta1=0.0, eps=1.0)
        adamw_(**args, grad_scale=scalar(scale, device), grad_norm=norm, max_norm=5e-7)
        moved[name] = join(args["exp_avgs"]).astype(np.float64)
    norms = {name: float(np.linalg.norm(m)) for name, m in moved.items()}
    bounds.check_norm_follows_fp32(norms["scaled"], norms["fp32"])
    largest = np.abs(moved["fp32"]).max()
    bounds.check_learns_as_fp32(moved["scaled"] / largest, moved["fp32"] / largest, torch.float16)
    with pytest.raises(AssertionError, match="bound 10"):
        bounds.check_learns_as_fp32(moved["unscaled"] / largest, moved["fp32"] / largest, torch.float16)


def fp32_inside(**args):
    """An fp64 step that computes in fp32."""
    lists = ("masters", "exp_avgs", "exp_avg_sqs")
    narrow = {n: [t.float() for t in args[n]] for n in lists}
    adamw_(**args | narrow)
    for name in lists:
        torch._foreach_copy_(args[name], narrow[name])


def gradient_rounded_to_fp16(**args):
    """Unscale, and round the gradient to fp16 again."""
    adamw_(**args | dict(grads=[(g.float() / args["grad_scale"]).half() for g in args["grads"]], grad_scale=None))


def bias_correction_one_late(**args):
    torch._foreach_add_(args["steps"], 1)
    adamw_(**args)
    torch._foreach_sub_(args["steps"], 1)


def test_adamw_rejects_fp32_inside_of_fp64(device):
    with pytest.raises(AssertionError, match="bound 8"):
        bounds.check_trajectory(
            trajectory("adamw", torch.float64, device, fp32_inside, (None,)), expected("adamw", np.longdouble), None
        )


@pytest.mark.parametrize("wrong", [gradient_rounded_to_fp16, bias_correction_one_late])
def test_adamw_rejects_wrong_updates(device, wrong):
    with pytest.raises(AssertionError, match="bound 8"):
        bounds.check_trajectory(trajectory("adamw", torch.float32, device, wrong), expected("adamw"), torchs("adamw"))


def test_adamw_rejects_copies_rounded_twice(device):
    master = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64, device=device)
    with pytest.raises(AssertionError, match="rounded once"):
        steps.check_copies([master.float().half()], [master])


# ----- contract -------------------------------------------------------------------------------------


def test_adamw_opcheck(device):
    for options in (dict(), dict(found_inf=scalar(0.0, device), grad_scale=scalar(2.0, device), amsgrad=True)):
        args = mixed(device, **options)
        order = [a.name for a in adamw_.default._schema.arguments]
        torch.library.opcheck(adamw_.default, tuple(args[n] for n in order if n in args and n not in options), {
            n: args[n] for n in order if n in options
        })  # fmt: skip


def test_adamw_bumps_versions(device):
    args = mixed(device, amsgrad=True)
    before = [t._version for t in state(args)]
    adamw_(**args)
    assert all(t._version > v for t, v in zip(state(args), before, strict=True))
    assert all(g._version == 0 for g in args["grads"])


def test_adamw_makes_stale_saved_tensors_an_error(device):
    steps.check_makes_saved_tensors_stale(adamw_, arguments, device)


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
        (dict(exp_avgs=[]), "must not be empty"),
        (
            dict(exp_avg_sqs=[torch.ones(3), torch.ones(2).double()]),
            r"exp_avg_sqs\[1\] is torch.float64, expected torch.float32",
        ),
        (dict(exp_avgs=[torch.ones(3).half(), torch.ones(2)]), r"exp_avgs\[0\] must be"),
        (dict(max_exp_avg_sqs=[torch.ones(3)]), "max_exp_avg_sqs has 1 tensors"),
        (dict(copies=[torch.ones(3).half()]), "copies has 1 tensors"),
        (dict(masters=[torch.ones(3), torch.ones(1).expand(2)]), r"masters\[1\] overlaps itself \(strides \(0,\)\)"),
        (dict(exp_avgs=[torch.ones(1).expand(3), torch.ones(2)]), r"exp_avgs\[0\] overlaps itself"),
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
        (dict(grad_scale=scalar(1.0, dtype=torch.float64)), "grad_scale must be"),
        (dict(found_inf=torch.ones(2)), "found_inf must be"),
        (dict(found_inf=scalar(1.0, dtype=torch.float16)), "found_inf must be"),
        (dict(grad_norm=scalar(1.0), max_norm=1.0), "grad_norm must be"),
        (dict(grad_norm=scalar(1.0, dtype=torch.float64)), "grad_norm and max_norm go together"),
        (dict(max_norm=1.0), "grad_norm and max_norm go together"),
    ],
)
def test_adamw_raises(device, change, message):
    if device.type != "cpu":
        pytest.skip("the arguments are made on the CPU")
    args = arguments([torch.ones(3), torch.ones(2)], [torch.ones(3), torch.ones(2).half()], amsgrad=True)
    steps.check_raises_unchanged(adamw_, args, change, message)
