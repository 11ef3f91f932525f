# SPDX-License-Identifier: Apache-2.0
"""The rules as the tests of this folder are parametrized by: one row each, its calls, and the bounds of its trajectory."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mpkernels.ops.optimizer_update import adamw_, lion_, reference, sgd_
from mpkernels.runtime.op import Op
from mpkernels.testing import update_cases
from tests import bounds, steps
from tests.steps import DTYPES, SIZES, scalar, step_counts

LR = 1e-2
COPIES = (torch.float16, torch.bfloat16, None)


@dataclass(frozen=True, eq=False)
class Rule:
    """states: the lists of them. busy: options of a call that uses all. fill: of a fresh state.

    torch_optimizer(params, options): torch's for-loop one, or None. advance: (w, g, states, t, options) -> (w, states) by the
    fp64 reference. check_step: see `update_cases`.
    """

    op: Op
    states: tuple[str, ...]
    defaults: dict
    variants: dict[str, dict]
    busy: dict
    advance: Callable
    check_step: Callable
    torch_optimizer: Callable | None = None
    fill: float = 0.0

    @property
    def call(self) -> Callable:
        """By the dispatcher."""
        return getattr(torch.ops.mpkernels, self.op.name)

    def has_states(self, options: dict) -> tuple[str, ...]:
        """Those of the lists that are not empty."""
        missing = {"max_exp_avg_sqs": "amsgrad", "momentum_buffers": "momentum"}
        return tuple(name for name in self.states if name not in missing or options.get(missing[name]))

    def arguments(self, masters, grads, copy_dtypes=(torch.float16,), lr=LR, **options) -> dict:
        """All arguments of a call by name, the state fresh. A copy dtype of None means no copy."""
        device, options = masters[0].device, self.defaults | options
        given, copies = self.has_states(options), []
        for i, master in enumerate(masters):
            dtype = copy_dtypes[i % len(copy_dtypes)]
            copies.append(torch.empty(0, device=device) if dtype is None else torch.empty_like(master, dtype=dtype).fill_(-7))
        states = {name: [torch.full_like(m, self.fill) for m in masters] if name in given else [] for name in self.states}
        options.pop("amsgrad", None)
        lists = dict(masters=masters, grads=grads, **states, copies=copies, steps=step_counts(len(masters), device))
        return lists | dict(lr=scalar(lr, dtype=torch.float64), **options)

    def state(self, args) -> list[torch.Tensor]:
        """Every tensor that a step may write."""
        return [t for name in ("masters", *self.states, "copies") for t in args[name]] + args["steps"]

    def mixed(self, device, sizes=SIZES, seed=0, **options) -> dict:
        """Masters, gradients and copies of every dtype in one call, and fp32 masters whose own dtype is their copy's."""
        generator = torch.Generator().manual_seed(seed)
        masters, grads = [], []
        for i, n in enumerate(sizes):
            masters.append(torch.randn(n, generator=generator, dtype=torch.float64).to(device, DTYPES[2 + i % 2]))
            grads.append((torch.randn(n, generator=generator) * 64).to(device, DTYPES[i // 2 % (3 + i % 2)]))
        return self.arguments(masters, grads, (torch.float16, torch.bfloat16, None, torch.float32, torch.float16), **options)

    # ----- trajectories ---------------------------------------------------------------

    def options(self, variant: str, wide=float) -> tuple[dict, float | None]:
        """(options of the reference, max_norm)."""
        options = self.defaults | self.variants[variant]
        max_norm = options.pop("max_norm", None)
        return {k: v if isinstance(v, bool) else wide(v) for k, v in options.items()}, max_norm

    def expected(self, variant: str, wide=np.float64, exact_start: bool = False) -> np.ndarray:
        """R of bound 8."""
        options, max_norm = self.options(variant, wide)
        start = steps.problem().start
        w = (start if exact_start or wide == np.longdouble else start.float()).numpy().astype(wide)
        given = self.has_states(options)
        states, result = tuple(np.zeros_like(w) if name in given else None for name in self.states), []
        options.pop("amsgrad", None)
        for t, g in enumerate(steps.problem().unscaled(torch.float64).numpy() * steps.clip_factors(max_norm).astype(wide), 1):
            w, states = self.advance(w, g, states, t, dict(lr=wide(LR), **options))
            result.append(w)
        return np.stack(result)

    def torchs(self, variant: str, dtype=torch.float32) -> np.ndarray:
        """P of bound 8."""
        options, max_norm = self.options(variant)
        factors = torch.from_numpy(steps.clip_factors(max_norm)).to(dtype)
        grads = steps.problem().unscaled(dtype) * factors
        return steps.torch_trajectory(lambda p: self.torch_optimizer(p, options), steps.problem().start.to(dtype), grads)

    def trajectory(self, variant: str, dtype, device, call=None, copy_dtypes=COPIES) -> np.ndarray:
        return steps.trajectory(call or self.call, self.arguments, self.variants[variant], dtype, device, copy_dtypes)

    def check(self, variant: str, dtype, device, call=None, copy_dtypes=COPIES) -> None:
        """Bound 8."""
        w = self.trajectory(variant, dtype, device, call, copy_dtypes)
        if dtype == torch.float64:
            bounds.check_trajectory(w, _expected(self, variant, np.longdouble, steps.problem()), None)
        else:
            bounds.check_trajectory(
                w, _expected(self, variant, np.float64, steps.problem()), _torchs(self, variant, steps.problem())
            )


@functools.cache
def _expected(rule, variant, wide, problem):
    return rule.expected(variant, wide)


@functools.cache
def _torchs(rule, variant, problem):
    return rule.torchs(variant)


class SignRule(Rule):
    """A sign near 0 can be another than fp64's and then all that follows, so each step is held against the states before it."""

    def check(self, variant: str, dtype, device, call=None, copy_dtypes=COPIES) -> None:
        options, call, before = self.options(variant)[0], call or self.call, []
        factors = steps.clip_factors(self.variants[variant].get("max_norm"))

        def checked(**args):
            w, g, m = (update_cases.wide(args[name]) for name in ("masters", "grads", "exp_avgs"))
            g = g / steps.problem().grad_scale * factors[len(before), 0]
            before.append(w)
            call(**args)
            self.check_step(dict(lr=LR) | options, w, g, [m], [args[name] for name in ("masters", "grads", "exp_avgs")])

        self.trajectory(variant, dtype, device, checked, copy_dtypes)


def _torch_adamw(params, options):
    kind = torch.optim.AdamW if options["decoupled"] else torch.optim.Adam
    return kind(
        params, lr=LR, betas=(options["beta1"], options["beta2"]), eps=options["eps"], weight_decay=options["weight_decay"],
        amsgrad=options.get("amsgrad", False), maximize=options["maximize"], foreach=False, fused=False,
    )  # fmt: skip


def _advance(function):
    def advance(w, g, states, t, options):
        w, *states = function(w, g, *states, t, **options)
        return w, tuple(states)

    return advance


ADAMW = Rule(
    op=adamw_,
    states=("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"),
    defaults=dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True, maximize=False),
    variants={
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
    },
    busy=dict(amsgrad=True),
    advance=_advance(reference.adamw),
    check_step=update_cases.check_adamw,
    torch_optimizer=_torch_adamw,
)
SGD = Rule(
    op=sgd_,
    states=("momentum_buffers",),
    defaults=dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False),
    variants={
        "plain": dict(),
        "decay": dict(weight_decay=0.1),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "momentum": dict(momentum=0.9),
        "dampening": dict(momentum=0.9, dampening=0.3, weight_decay=0.1),
        "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.1),
        "nesterov maximize": dict(momentum=0.8, nesterov=True, maximize=True),
        "clipped": dict(momentum=0.9, max_norm=0.5),
    },
    busy=dict(momentum=0.9),
    advance=_advance(reference.sgd),
    check_step=update_cases.check_sgd,
    torch_optimizer=lambda params, options: torch.optim.SGD(params, lr=LR, **options, foreach=False, fused=False),
    fill=math.nan,  # a buffer is not read at a first step
)
LION = SignRule(
    op=lion_,
    states=("exp_avgs",),
    defaults=dict(beta1=0.9, beta2=0.99, weight_decay=0.0, maximize=False),
    variants={
        "plain": dict(),
        "decay": dict(weight_decay=0.1),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "clipped": dict(max_norm=0.5, beta1=0.5),
    },
    busy=dict(),
    advance=_advance(reference.lion),
    check_step=update_cases.check_lion,
)
RULES = {"adamw": ADAMW, "sgd": SGD, "lion": LION}
