# SPDX-License-Identifier: Apache-2.0
"""The comparisons that README and docs/performance.md show: ours and a baseline, on every machine, as "x faster"."""

import math
from dataclasses import dataclass

from bench.implementation import OURS
from bench.targets import doubtful

Cases = dict[str, dict[str, dict]]  # the rows of a machine by case and implementation

_BF16 = f"{OURS} mixed_bfloat16"
_MLP = "MLP training step"


@dataclass(frozen=True)
class Comparison:
    """`subject`, one of ours, against `baseline` in `case`; `what` says it in words."""

    what: str
    case: str
    subject: str
    baseline: str

    def on(self, cases: Cases) -> dict | None:
        """Time of the subject over the baseline's, and its uncertainty; None where the baseline was left out there."""
        found = cases[self.case]
        return between(found[self.subject], found[self.baseline]) if self.baseline in found else None

    def faster(self, cases: Cases) -> str:
        """`2.1x` where the subject takes 1 / 2.1 of the baseline's time; with the uncertainty where that is large."""
        row = self.on(cases)
        if row is None:
            return ""
        return times(row) + (f" ± {row['uncertainty']:.0%}" if doubtful(row) else "")


def times(row: dict) -> str:
    """A ratio of times as "x faster", two digits."""
    return f"{1 / row['ratio']:#.2g}".rstrip(".") + "x"


def between(subject: dict, baseline: dict) -> dict:
    """The subject's time over the baseline's, both of which were taken in rounds with the case's first implementation."""
    uncertainty = math.hypot(subject["uncertainty"], baseline["uncertainty"])
    return {"ratio": baseline["ratio"] / subject["ratio"], "uncertainty": uncertainty}


def _compare(what: str, case: str, subject: str, *baselines: str) -> tuple[Comparison, ...]:
    return tuple(Comparison(what, case, subject, baseline) for baseline in baselines)


KEY_FIGURES = (
    *_compare(
        "forward with ReLU, fp16, M=512 K=1024 N=4096", "linear_act/forward/float16/512x1024x4096", OURS,
        "torch float16", "MKL on fp32 copies", "oneDNN on fp32 copies, ReLU fused",
    ),
    *_compare(
        "forward with ReLU, bf16, M=256 K=1024 N=1024", "linear_act/forward/bfloat16/256x1024x1024", OURS,
        "torch bfloat16", "MKL on fp32 copies",
    ),
    *_compare(
        "backward, fp16, M=256 K=1024 N=1024", "linear_act/backward/float16/256x1024x1024", OURS,
        "torch float16", "MKL on fp32 copies", "oneDNN on fp32 copies",
    ),
    *_compare(
        "AdamW step with scaler, 50e6 fp16 parameters in 300 tensors", "step/float16/plain/5e7in300", OURS,
        "classical fp16 recipe", "fp32 parameters", "Apex's passes",
    ),
    *_compare(f"{_MLP}, mixed_float16", "training/mlp", OURS, "torch autocast fp16", "torch fp32"),
    *_compare(f"{_MLP}, mixed_bfloat16", "training/mlp", _BF16, "torch autocast bf16", "torch fp32"),
    *_compare("small GPT training step, mixed_float16", "training/gpt2_tiny", OURS, "torch autocast fp16", "torch fp32"),
    *_compare("small GPT training step, mixed_bfloat16", "training/gpt2_tiny", _BF16, "torch autocast bf16", "torch fp32"),
    *_compare("digits training step (64-128-128-10), mixed_float16", "training/digits", OURS, "torch fp32"),
)  # fmt: skip

AGAINST_AMP = (
    *_compare(f"{_MLP}, mixed_bfloat16", "training/mlp", _BF16, "torch fp32"),
    *_compare(f"{_MLP}, mixed_float16", "training/mlp", OURS, "torch fp32"),
    *_compare(f"{_MLP}, mixed_float16", "training/mlp", OURS, "torch autocast fp16"),
    *_compare(f"{_MLP}, mixed_bfloat16", "training/mlp", _BF16, "torch autocast bf16"),
)

IN_CHART = (
    *_compare("AdamW step", "step/float16/plain/5e7in300", OURS, "classical fp16 recipe", "fp32 parameters"),
    *_compare("linear + ReLU, fp16", "linear_act/forward/float16/512x1024x4096", OURS, "torch float16"),
    *AGAINST_AMP,
)
