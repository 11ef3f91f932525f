# SPDX-License-Identifier: Apache-2.0
"""torch.library.opcheck on 30 samples of every op: sizes, dtypes, layouts and options drawn at random, a seed for each."""

import itertools
import random

import pytest
import torch

from mpkernels.ops.linear_act.epilogues import Activation, empty_saved
from mpkernels.ops.quantize import FORMATS
from mpkernels.runtime import resolve
from tests.linear_act_cases import laid_out

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (f16, bf16, f32, f64)
SIZES = (0, 1, 2, 5, 33)
LAYOUTS = ("contiguous", "transposed", "sliced", "offset")
SAMPLES = 30


class Draw(random.Random):
    """Random arguments. NOTE: opcheck itself cannot copy a tensor of size 0 that has gaps, or two sizes of 0."""

    def tensor(self, shape, dtype, requires_grad=False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(32))
        values = torch.randn(shape, generator=generator, dtype=f64).to(dtype)
        layout = self.choice(LAYOUTS) if shape and values.numel() else "contiguous"
        return laid_out(values, layout).detach().requires_grad_(requires_grad)

    def sizes(self, count: int) -> list[int]:
        found = [self.choice(SIZES) for _ in range(count)]
        return [size or int(0 in found[:i]) for i, size in enumerate(found)]

    def maybe(self, value):
        return value if self.random() < 0.5 else None


def linear_act(draw: Draw) -> dict:
    *lead, K, N = draw.sizes(draw.randint(2, 4))
    compute, activation = draw.choice(DTYPES), draw.choice(list(Activation))
    save = 1 if activation > Activation.RELU else draw.randint(0, 1)
    tensors = [draw.tensor(shape, draw.choice(DTYPES), draw.random() < 0.7) for shape in ((*lead, K), (N, K), (N,))]
    return dict(
        x=tensors[0], weight=tensors[1], bias=draw.maybe(tensors[2]), weight_copy=draw.maybe(draw.tensor((N, K), compute)),
        activation=int(activation), compute_dtype=compute, out_dtype=draw.choice(DTYPES), save=save,
        batch_invariant=draw.random() < 0.2,
    )  # fmt: skip


def linear_act_backward(draw: Draw) -> dict:
    *lead, K, N = draw.sizes(draw.randint(2, 4))
    compute, activation = draw.choice(DTYPES), draw.choice(list(Activation))
    like = draw.tensor((*lead, N), draw.choice(DTYPES))
    saved = None if activation == Activation.NONE else empty_saved(like, N, activation, compute).fill_(1)
    dtypes = {f"grad_{name}_dtype": draw.choice(DTYPES) for name in ("x", "weight", "bias")}
    return dict(
        grad_out=like, x=draw.tensor((*lead, K), compute), weight=draw.tensor((N, K), draw.choice(DTYPES)),
        weight_copy=draw.maybe(draw.tensor((N, K), compute)), saved=saved, activation=int(activation), compute_dtype=compute,
        **dtypes, output_mask=[draw.random() < 0.7 for _ in range(3)],
    )  # fmt: skip


def grad_stats_(draw: Draw) -> dict:
    grads = [draw.tensor(draw.sizes(draw.randint(0, 3)), draw.choice(DTYPES)) for _ in range(draw.randint(1, 5))]
    counts = dict(amax=torch.empty(len(grads), dtype=f64), nonfinite=torch.empty(len(grads), dtype=torch.int64))
    return dict(
        grads=grads, grad_scale=draw.maybe(torch.tensor(8.0)), found_inf=torch.empty(()), **counts,
        grad_norm=draw.maybe(torch.empty((), dtype=f64)),
    )  # fmt: skip


def update(draw: Draw, *moments: str) -> dict:
    """What the updates have in common."""
    shapes = [draw.sizes(draw.randint(0, 3)) for _ in range(draw.randint(1, 4))]
    masters = [draw.tensor(shape, draw.choice((f32, f64))) for shape in shapes]
    state_dtype = draw.maybe(bf16)
    copies = [draw.tensor(s, draw.choice((f16, bf16))) if draw.random() < 0.5 else torch.empty(0, dtype=f16) for s in shapes]
    norm = draw.maybe(torch.tensor(3.0, dtype=f64))
    return dict(
        masters=masters, grads=[draw.tensor(m.shape, draw.choice((f16, bf16, f32, m.dtype))) for m in masters], copies=copies,
        **{name: [draw.tensor(m.shape, state_dtype or m.dtype).abs() for m in masters] for name in moments},
        steps=[torch.tensor(float(draw.randint(0, 9))) for _ in shapes], lr=torch.tensor(0.1, dtype=draw.choice((f32, f64))),
        weight_decay=0.1, maximize=draw.random() < 0.5, grad_scale=draw.maybe(torch.tensor(8.0)),
        found_inf=draw.maybe(torch.tensor(float(draw.randint(0, 1)))), grad_norm=norm, max_norm=None if norm is None else 1.0,
    )  # fmt: skip


def adamw_(draw: Draw) -> dict:
    moments = ("exp_avgs", "exp_avg_sqs", *draw.choice(((), ("max_exp_avg_sqs",))))
    args = dict(max_exp_avg_sqs=[]) | update(draw, *moments)
    return args | dict(beta1=0.9, beta2=0.99, eps=1e-8, decoupled=draw.random() < 0.5)


def sgd_(draw: Draw) -> dict:
    momentum = draw.choice((0.0, 0.9))
    args = dict(momentum_buffers=[]) | update(draw, *(("momentum_buffers",) if momentum else ()))
    nesterov = bool(momentum) and draw.random() < 0.5
    return args | dict(momentum=momentum, dampening=0.0 if nesterov else 0.1, nesterov=nesterov)


def lion_(draw: Draw) -> dict:
    return update(draw, "exp_avgs") | dict(beta1=0.9, beta2=0.99)


def update_scale_(draw: Draw) -> dict:
    return dict(
        grad_scale=torch.tensor(2.0 ** draw.randint(-126, 127)), growth_tracker=torch.tensor(draw.randint(0, 3)).int(),
        hysteresis_tracker=torch.tensor(draw.randint(0, 3)).int(), skipped=torch.tensor([draw.randint(0, 9), 0]),
        found_inf=torch.tensor(float(draw.randint(0, 1))), growth_factor=2.0, backoff_factor=0.5,
        growth_interval=draw.randint(1, 4), hysteresis=draw.randint(1, 3), min_scale=2.0**-126, max_scale=2.0**127,
    )  # fmt: skip


def quantize(draw: Draw) -> dict:
    shape = draw.sizes(draw.randint(0, 4))
    x = draw.tensor(shape, draw.choice((f16, bf16, f32)))  # no gradient: the op refuses a backward
    dims = max(len(shape), 1)
    return dict(x=x, dtype=draw.choice(list(FORMATS)), axis=draw.maybe(draw.randint(-dims, dims - 1)))


MAKERS = (linear_act, linear_act_backward, grad_stats_, adamw_, sgd_, lion_, update_scale_, quantize)


def test_opcheck_has_every_op():
    assert {maker.__name__ for maker in MAKERS} == set(resolve.ops)


FEW = [pytest.param(seed, marks=pytest.mark.sweep if seed >= 2 else ()) for seed in range(SAMPLES)]


@pytest.mark.parametrize("seed", FEW)
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_opcheck(maker, seed):
    op = getattr(torch.ops.mpkernels, maker.__name__).default
    args = maker(Draw(seed))
    named = [argument.name for argument in op._schema.arguments]
    assert args.keys() <= set(named)
    given = list(itertools.takewhile(args.__contains__, named))
    torch.library.opcheck(op, tuple(args[name] for name in given), {name: args[name] for name in args if name not in given})
