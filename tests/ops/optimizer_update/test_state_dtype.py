# SPDX-License-Identifier: Apache-2.0
"""Moments in bf16: each step beside fp64, the long run of exp_avg_sq without a bias, optimizers and checkpoints."""

import functools
import pickle

import numpy as np
import pytest
import torch

import mpkernels as mpk
from mpkernels.ops.optimizer_update import reference
from mpkernels.testing import update_cases
from tests import bounds, steps
from tests.ops.optimizer_update.rules import ADAMW, LION, SGD
from tests.optimizers import parameters, train
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


VARIANTS = [
    *((ADAMW, options) for options in (dict(), dict(decoupled=False), dict(maximize=True))),
    *((ADAMW, options | dict(amsgrad=True)) for options in (dict(), dict(decoupled=False), dict(maximize=True))),
    (SGD, dict(momentum=0.9, dampening=0.1)),
    (SGD, dict(momentum=0.9, nesterov=True)),
    (LION, dict()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule, options", VARIANTS, ids=lambda value: "" if not isinstance(value, dict) else " ".join(value))
def test_state_dtype_step(rule, options, dtype, device):
    options = rule.defaults | dict(weight_decay=0.1) | options
    args = {name: [] for name in rule.states} | problem(dtype, device, rule.has_states(options))
    options.pop("amsgrad", None)
    lists = [args[name] for name in ("masters", "grads", *rule.states)]
    w, g, *states = (update_cases.wide(tensors) if tensors else None for tensors in lists)
    rule.call(**args, **options)
    rule.check_step(dict(lr=LR) | options, w, g, states, lists)
    steps.check_copies(args["copies"], args["masters"])


def test_state_dtype_skip_leaves_state_bitwise(rule, device):
    args = rule.mixed(device, **rule.busy) | dict(found_inf=scalar(1.0, device))
    args |= {name: [t.bfloat16() for t in args[name]] for name in rule.states}
    before = raw(steps.leaves(args))
    rule.call(**args)
    assert raw(steps.leaves(args)) == before


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
        weights.append(update_cases.wide(args["masters"]))
        squares.append(update_cases.wide(args["exp_avg_sqs"]))
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


def three(dtype=torch.float16) -> list[torch.nn.Parameter]:
    return parameters(*[dtype] * 3, n=40)


def moments(optimizer) -> list[torch.Tensor]:
    return [t for state in optimizer.state.values() for name, t in state.items() if name not in ("step", "master")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_state_dtype_of_an_optimizer(kind, dtype):
    params = three(dtype)
    optimizer = KINDS[kind](params, state_dtype=torch.bfloat16)
    train(params, optimizer, 3)
    assert {t.dtype for t in moments(optimizer)} == {torch.bfloat16}
    assert all(torch.equal(p, optimizer.state[p].get("master", p).to(dtype)) for p in params)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dtype_resumes_bitwise(kind):
    params = three()
    optimizer = KINDS[kind](params, state_dtype=torch.bfloat16)
    train(params, optimizer, 4)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = KINDS[kind](others, state_dtype=torch.bfloat16)
    other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert {t.dtype for t in moments(other)} == {torch.bfloat16}
    train(params, optimizer, 4, 4)
    train(others, other, 4, 4)
    assert raw([*others, *moments(other)]) == raw([*params, *moments(optimizer)])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_dtype_goes_between_torch_and_ours(kind):
    """From torch: its fp32 moments rounded to nearest. To torch: the bf16 values, which torch casts to the parameter's."""
    torchs = {"adamw": torch.optim.AdamW, "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)}[kind]
    params, others = three(torch.float32), three(torch.float32)
    theirs, ours = torchs(params, lr=LR), KINDS[kind](others, state_dtype=torch.bfloat16)
    train(params, theirs, 3)
    ours.load_state_dict(theirs.state_dict())
    assert raw(moments(ours)) == raw(t.bfloat16() for t in moments(theirs))
    train(others, ours, 2, 3)
    theirs.load_state_dict(ours.state_dict())
    assert raw(moments(theirs)) == raw(t.float() for t in moments(ours))
    train(params, theirs, 1, 5)
    full = KINDS[kind](three(torch.float32))
    full.load_state_dict(ours.state_dict())
    assert {t.dtype for t in moments(full)} == {torch.float32}


def test_state_dtype_goes_with_a_copy_of_the_optimizer():
    params = three()
    optimizer = pickle.loads(pickle.dumps(KINDS["adamw"](params, state_dtype=torch.bfloat16)))
    params = optimizer.param_groups[0]["params"]
    train(params, optimizer, 1)
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
        KINDS[kind](three(), **options)


def test_state_dtype_of_the_master_is_the_default():
    params, others = three(), three()
    for optimizer, some in ((KINDS["adamw"](params), params), (KINDS["adamw"](others, state_dtype=torch.float32), others)):
        train(some, optimizer, 2)
    assert raw(params) == raw(others)
