# SPDX-License-Identifier: Apache-2.0
"""Moments in bf16: each step beside fp64, the long run of exp_avg_sq without a bias, optimizers and checkpoints."""

import functools
import pickle

import numpy as np
import pytest
import torch

import mpkernels as mpk
from mpkernels.ops.optimizer_update import reference
from tests import bounds, steps
from tests.ops.optimizer_update.rules import ADAMW, LION
from tests.steps import SIZES, check_raises_unchanged, raw, scalar, split, step_counts

STEPS, LR, BETAS = 1000, 1e-2, (0.9, 0.999)
KINDS = {
    "adamw": lambda p, **o: mpk.optim.AdamW(p, lr=LR, **o),
    "adamw amsgrad": lambda p, **o: mpk.optim.AdamW(p, lr=LR, amsgrad=True, **o),
    "sgd": lambda p, **o: mpk.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, **o),
    "lion": lambda p, **o: mpk.optim.Lion(p, lr=LR, **o),
}


# ----- one step ---------------------------------------------------------------------------------------


def problem(dtype, device, names, seed=0):
    """Lists of tensors in the middle of training: masters, fp16 gradients, and moments (not negative) in bf16."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda: torch.randn(sum(SIZES), generator=generator, dtype=torch.float64)
    size = 10 ** (2 * randn().clamp(-2, 2))
    lists = dict(
        masters=split(randn().to(device, dtype), SIZES), grads=split((size * randn()).to(device, torch.float16), SIZES)
    )
    for name in names:
        values = (size * randn()) ** 2 if name.endswith("sqs") else size * randn()
        lists[name] = split(values.to(device, torch.bfloat16), SIZES)
    lists["copies"] = [torch.zeros_like(m, dtype=torch.bfloat16) for m in lists["masters"]]
    return lists | dict(steps=step_counts(len(SIZES), device, 3), lr=scalar(LR, dtype=torch.float64))


def wide(tensors) -> np.ndarray:
    return steps.join(tensors if tensors[0].dtype != torch.bfloat16 else [t.float() for t in tensors]).astype(np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [dict(), dict(decoupled=False), dict(maximize=True)], ids=["adamw", "adam", "maximize"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_dtype_step_of_adamw(amsgrad, options, dtype, device):
    names = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")[: 3 if amsgrad else 2]
    args = dict(max_exp_avg_sqs=[]) | problem(dtype, device, names)
    options = ADAMW.defaults | dict(weight_decay=0.1) | options
    w, g, m, v = (wide(args[name]) for name in ("masters", "grads", "exp_avgs", "exp_avg_sqs"))
    vmax = wide(args["max_exp_avg_sqs"]) if amsgrad else None
    exact = reference.adamw(w, g, m, v, vmax, 4, lr=LR, **options)
    torch.ops.mpkernels.adamw_(**args, **options)
    decay = 0 if options["decoupled"] else 0.1
    magnitude = np.abs(m) + np.abs(g) + decay * np.abs(w)
    bounds.check_moment(wide(args["exp_avgs"]), exact[1], magnitude, True, dtype)
    bounds.check_moment(wide(args["exp_avg_sqs"]), exact[2], v + magnitude**2, False, dtype)
    if amsgrad:
        bounds.check_moment(wide(args["max_exp_avg_sqs"]), exact[3], vmax + v + magnitude**2, True, dtype)
    root = np.sqrt(exact[2 + amsgrad] / (1 - options["beta2"] ** 4)) + options["eps"]
    bounds.check_stepped(
        wide(args["masters"]), exact[0], np.abs(w) + LR / (1 - options["beta1"] ** 4) * magnitude / root, dtype
    )
    steps.check_copies(args["copies"], args["masters"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
def test_state_dtype_step_of_sgd(nesterov, dtype, device):
    args = problem(dtype, device, ("momentum_buffers",))
    options = dict(momentum=0.9, dampening=0.0 if nesterov else 0.1, weight_decay=0.1, nesterov=nesterov, maximize=False)
    w, g, b = (wide(args[name]) for name in ("masters", "grads", "momentum_buffers"))
    stepped, exact = reference.sgd(w, g, b, 4, lr=LR, **options)
    torch.ops.mpkernels.sgd_(**args, **options)
    magnitude = np.abs(b) + np.abs(g) + np.abs(w)
    bounds.check_moment(wide(args["momentum_buffers"]), exact, magnitude, True, dtype)
    bounds.check_stepped(wide(args["masters"]), stepped, np.abs(w) + LR * 2 * magnitude, dtype)
    steps.check_copies(args["copies"], args["masters"])


def test_state_dtype_skip_leaves_state_bitwise(rule, device):
    args = rule.mixed(device, **rule.busy) | dict(found_inf=scalar(1.0, device))
    args |= {name: [t.bfloat16() for t in args[name]] for name in rule.states}
    before = raw(steps.leaves(args))
    rule.call(**args)
    assert raw(steps.leaves(args)) == before


def test_state_dtype_step_of_lion(device):
    for dtype in (torch.float32, torch.float64):
        args, options = problem(dtype, device, ("exp_avgs",)), LION.defaults | dict(weight_decay=0.1)
        w, g, m = (wide(args[name]) for name in ("masters", "grads", "exp_avgs"))
        LION.call(**args, **options)
        terms = options["beta1"] * m, (1 - options["beta1"]) * g
        decay, size = 1 - LR * options["weight_decay"], sum(map(np.abs, terms))
        bounds.check_sign_step(wide(args["masters"]), w, sum(terms), size, LR, decay, dtype)
        exact = reference.lion(w, g, m, 4, lr=LR, **options)[1]
        bounds.check_moment(wide(args["exp_avgs"]), exact, np.abs(m) + np.abs(g), False, dtype)
        steps.check_copies(args["copies"], args["masters"])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_state_dtype_keeps_what_is_not_finite(value, device):
    args = problem(torch.float32, device, ("exp_avgs", "exp_avg_sqs")) | dict(max_exp_avg_sqs=[])
    for grad in args["grads"]:
        grad.fill_(value)
    ADAMW.call(**args, **ADAMW.defaults)
    v = torch.cat(args["exp_avg_sqs"])
    assert (v.isnan() if value != value else v == value).all()


def test_state_dtype_raises(device):
    args = problem(torch.float64, device, ("exp_avgs", "exp_avg_sqs")) | ADAMW.defaults | dict(max_exp_avg_sqs=[])
    narrow = lambda dtype: [t.to(dtype) for t in args["exp_avgs"]]
    check = lambda change, message: check_raises_unchanged(torch.ops.mpkernels.adamw_, args, change, message)
    check(dict(exp_avgs=narrow(torch.float16)), r"exp_avgs\[0\] must be float32, float64, bfloat16, got torch.float16")
    check(dict(exp_avgs=narrow(torch.float32)), r"exp_avgs\[0\] is torch.float32, expected torch.float64 or torch.bfloat16")
    check(dict(exp_avgs=narrow(torch.float64)), r"exp_avg_sqs\[0\] is torch.bfloat16, expected torch.float64 as the other")


# ----- the long run -----------------------------------------------------------------------------------


@functools.cache
def gradients() -> torch.Tensor:
    """(steps, n); from the middle on ten times smaller, so that exp_avg_sq falls."""
    generator = torch.Generator().manual_seed(1)
    magnitude = 10 ** (-2 * torch.rand(SIZES[-1], generator=generator))
    falling = torch.where(torch.arange(STEPS) < STEPS // 2, 1.0, 0.1)[:, None]
    return ((torch.randn(STEPS, SIZES[-1], generator=generator) + 0.3) * magnitude * falling).half()


@functools.cache
def exact_run() -> tuple[np.ndarray, ...]:
    """(steps, n) each: weights, exp_avg and exp_avg_sq in fp64."""
    w = np.ones(SIZES[-1])
    m, v, result = np.zeros_like(w), np.zeros_like(w), []
    options = dict(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=1e-8, weight_decay=0.0, decoupled=True)
    for t, g in enumerate(gradients().double().numpy(), 1):
        w, m, v, _ = reference.adamw(w, g, m, v, None, t, **options)
        result.append((w, m, v))
    return tuple(map(np.stack, zip(*result, strict=True)))


def test_state_dtype_follows_fp64(device):
    one = torch.ones(SIZES[-1], device=device)
    zeros = lambda: [torch.zeros_like(one, dtype=torch.bfloat16)]
    args = dict(masters=[one], exp_avgs=zeros(), exp_avg_sqs=zeros(), max_exp_avg_sqs=[], copies=[one[:0].half()])
    args |= dict(steps=step_counts(1, device), lr=scalar(LR, dtype=torch.float64))
    weights, squares = [], []
    for grad in gradients().to(device):
        ADAMW.call(**args, grads=[grad], **ADAMW.defaults)
        weights.append(wide(args["masters"]))
        squares.append(wide(args["exp_avg_sqs"]))
    w, m, v = exact_run()
    bounds.check_follows_mean(np.stack(squares), v, BETAS[1])
    bounds.check_bfloat16_moments(np.stack(weights), w, m, v, LR, BETAS, 1e-8)


@pytest.mark.parametrize("way", ["to nearest", "down", "up"])
def test_state_dtype_bound_rejects_a_biased_rounding(way):
    v, squares = torch.zeros(SIZES[-1]), []
    for grad in gradients():
        v = BETAS[1] * v + (1 - BETAS[1]) * grad.float() ** 2
        bits = v.view(torch.int32) + {"to nearest": 0x8000, "down": 0, "up": 0xFFFF}[way]
        v = (bits & ~0xFFFF).view(torch.float32)
        squares.append(v.double().numpy())
    with pytest.raises(AssertionError, match=r"the mean is off|an element is off"):
        bounds.check_follows_mean(np.stack(squares), exact_run()[2], BETAS[1])


# ----- optimizers -------------------------------------------------------------------------------------


def parameters(dtype=torch.float16, seed=0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, 3, generator=generator).to(dtype)) for n in (5, 40, 7)]


def train(optimizer, params, first, count) -> None:
    for t in range(first, first + count):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def moments(optimizer) -> list[torch.Tensor]:
    return [t for state in optimizer.state.values() for name, t in state.items() if name not in ("step", "master")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_state_dtype_of_an_optimizer(kind, dtype):
    params = parameters(dtype)
    optimizer = KINDS[kind](params, state_dtype=torch.bfloat16)
    train(optimizer, params, 0, 3)
    assert {t.dtype for t in moments(optimizer)} == {torch.bfloat16}
    assert all(torch.equal(p, optimizer.state[p].get("master", p).to(dtype)) for p in params)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dtype_resumes_bitwise(kind):
    params = parameters()
    optimizer = KINDS[kind](params, state_dtype=torch.bfloat16)
    train(optimizer, params, 0, 4)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = KINDS[kind](others, state_dtype=torch.bfloat16)
    other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert {t.dtype for t in moments(other)} == {torch.bfloat16}
    train(optimizer, params, 4, 4)
    train(other, others, 4, 4)
    assert raw([*others, *moments(other)]) == raw([*params, *moments(optimizer)])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_dtype_goes_between_torch_and_ours(kind):
    """From torch: its fp32 moments rounded to nearest. To torch: the bf16 values, which torch casts to the parameter's."""
    torchs = {"adamw": torch.optim.AdamW, "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)}[kind]
    params, others = parameters(torch.float32), parameters(torch.float32)
    theirs, ours = torchs(params, lr=LR), KINDS[kind](others, state_dtype=torch.bfloat16)
    train(theirs, params, 0, 3)
    ours.load_state_dict(theirs.state_dict())
    assert raw(moments(ours)) == raw(t.bfloat16() for t in moments(theirs))
    train(ours, others, 3, 2)
    theirs.load_state_dict(ours.state_dict())
    assert raw(moments(theirs)) == raw(t.float() for t in moments(ours))
    train(theirs, params, 5, 1)
    full = KINDS[kind](parameters(torch.float32))
    full.load_state_dict(ours.state_dict())
    assert {t.dtype for t in moments(full)} == {torch.float32}


def test_state_dtype_goes_with_a_copy_of_the_optimizer():
    params = parameters()
    optimizer = pickle.loads(pickle.dumps(KINDS["adamw"](params, state_dtype=torch.bfloat16)))
    params = optimizer.param_groups[0]["params"]
    train(optimizer, params, 0, 1)
    assert {t.dtype for t in moments(optimizer)} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options, message", [
    (dict(state_dtype=torch.float16), "state_dtype must be None, the master's dtype or torch.bfloat16, got torch.float16"),
    (dict(state_dtype="bfloat16"), "state_dtype must be None, the master's dtype or torch.bfloat16, got bfloat16"),
    (dict(state_dtype=torch.float64), "state_dtype must be None, torch.float32 as the master of parameter 0"),
    (dict(state_dtype=torch.float32, master_dtype=torch.float64), "state_dtype must be None, torch.float64 as the master"),
])  # fmt: skip
def test_state_dtype_refuses(kind, options, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind](parameters(), **options)


def test_state_dtype_of_the_master_is_the_default():
    params, others = parameters(), parameters()
    for optimizer, some in ((KINDS["adamw"](params), params), (KINDS["adamw"](others, state_dtype=torch.float32), others)):
        train(optimizer, some, 0, 2)
    assert raw(params) == raw(others)
