# SPDX-License-Identifier: Apache-2.0
"""The cases of each op: the same for the proof on a GPU, `python -m mpkernels` and the tests."""

import itertools
from collections.abc import Callable, Iterator

import torch

from mpkernels.testing import gemm, linear_act_cases, quantize_cases, scaled_cases, step_cases, update_cases
from mpkernels.testing.case import Case


def of(op: str, *, few: bool, full: bool = False) -> Iterator[Case]:
    """Cases of an op; `few`: small ones, for a CPU and for interpreters."""
    families = {
        "linear_act": lambda *which: itertools.chain(linear_act_cases.forward(*which), scaled_cases.forward(*which)),
        "linear_act_backward": linear_act_cases.backward,
        "grad_stats_": step_cases.grad_stats,
        "adamw_": update_cases.adamw,
        "sgd_": update_cases.sgd,
        "lion_": update_cases.lion,
        "update_scale_": step_cases.update_scale,
        "quantize": quantize_cases.quantize,
    }
    return families[op](few, full)


def sizes(part: str, device: torch.device) -> dict[str, Callable[[str, torch.device], tuple]]:
    """What a race of a part of an op's cases is run on: a name, and what makes the op's arguments for a backend on a device."""
    few = device.type == "cpu"
    if part in gemm.RACES:
        return gemm.sizes(part, few)
    return (quantize_cases if part == "quantize" else step_cases).sizes(part, few)
