# SPDX-License-Identifier: Apache-2.0
"""Ranks choose alike on GPUs: gloo processes with made-up GPUs and forged verdicts, each in a cache of its own."""

import os
import tempfile
import time
import warnings

import pytest
import torch
from torch import distributed, nn

import mpkernels as mpk
from mpkernels.runtime import agreement, cache, proof, resolve
from mpkernels.runtime.proof import Verdict
from tests.ranks import run_ranks

GPU = torch.device("cuda", 0)
STEP = ("adamw_", "grad_stats_")
MACHINE = {"name": "NVIDIA H200", "driver": "570"}
RIGHT, WRONG, SLOW = Verdict("right"), Verdict("wrong"), Verdict("right", speeds={"a": 0.5})


def choose(rank: int, verdicts: dict, machine: dict, how: str) -> tuple[dict, list[str]]:
    """What `auto` would take for the step's ops, after a model was converted or an optimizer made; what was warned of."""
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    os.environ.pop(resolve.ENVIRONMENT_VARIABLE, None)
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    cache.machine = lambda device: MACHINE | machine
    for (name, backend), verdict in verdicts.items():
        op = resolve.ops[name]
        assert proof.record(proof.own_file(), proof.key(name, op.package, backend, GPU), verdict)
    for name in STEP:
        resolve.ops[name].why_not_key = lambda backend, key: None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        prepare(how)
    return chosen(), [str(warning.message) for warning in warned if "mpkernels" in str(warning.message)]


def prepare(how: str) -> None:
    if how == "convert":
        mpk.convert(nn.Linear(2, 2), "mixed_float16")
    else:
        getattr(mpk.optim, how)([nn.Parameter(torch.ones(2))], lr=0.1)


def chosen() -> dict[str, str]:
    return {name: resolve.ops[name].backend(GPU, torch.float32) for name in STEP}


def _agree(rank, by_rank, machines, how, expected, message) -> None:
    found, warned = choose(rank, by_rank.get(rank, by_rank[0]), machines.get(rank, {}), how)
    assert found == dict(zip(STEP, expected)), f"{found}, {warned}"
    assert len(warned) == (message is not None and rank == 0), warned  # said once, by rank 0
    assert not warned or message in warned[0], warned
    prepare("SGD")  # at the second question none waits
    assert chosen() == found


NATIVE = {(name, "native"): RIGHT for name in STEP}
BOTH = NATIVE | {(name, "triton"): RIGHT for name in STEP}


@pytest.mark.parametrize("how", ["convert", "AdamW", "Adam", "SGD"])
def test_ranks_with_the_same_verdicts_take_them(how):
    run_ranks(2, _agree, {0: BOTH}, {}, how, ("native", "native"), None)


@pytest.mark.parametrize(
    ("by_rank", "machines", "expected", "message"),
    [
        # What was raced on another node, or not at all: rank 0's choice, where GPU, driver and code are the same.
        ({0: NATIVE, 1: BOTH}, {}, ("native", "native"), None),
        ({0: NATIVE, 3: {}}, {}, ("native", "native"), None),
        ({0: BOTH, 2: dict.fromkeys(NATIVE, SLOW)}, {}, ("native", "native"), None),
        ({0: dict.fromkeys(NATIVE, SLOW), 2: NATIVE}, {}, ("eager", "eager"), None),
        ({0: {("adamw_", "native"): RIGHT}, 1: BOTH}, {}, ("native", "eager"), None),
        ({0: {}, 1: BOTH}, {}, ("eager", "eager"), "python -m mpkernels prove"),
        # What differs: eager for all.
        ({0: BOTH}, {3: {"name": "NVIDIA A100"}}, ("eager", "eager"), "rank 3 has another GPU, driver or code than rank 0"),
        ({0: BOTH}, {1: {"driver": "550"}}, ("eager", "eager"), "rank 1 has another GPU, driver or code than rank 0"),
        ({0: BOTH, 2: BOTH | {("adamw_", "native"): WRONG}}, {}, ("eager", "eager"), "rank 2 has found adamw_, native wrong"),
        ({0: NATIVE, 2: {("adamw_", "triton"): WRONG}}, {}, ("native", "native"), None),  # which none takes
    ],
)
def test_ranks_agree_by_rank_0_or_take_eager(by_rank, machines, expected, message):
    run_ranks(4, _agree, by_rank, machines, "convert", expected, message)


def _one_stays_away(rank, away) -> None:
    agreement.LIMIT = 2.0
    if rank == away:
        time.sleep(6)
        began = time.monotonic()
        found, _ = choose(rank, BOTH, {}, "convert")
        assert time.monotonic() - began < 5
    else:
        found, warned = choose(rank, BOTH, {}, "convert")
        assert rank or f"within 2 s ({away};" in warned[0], warned
    assert set(found.values()) == {"eager"}, found


@pytest.mark.parametrize("away", [0, 1])
def test_ranks_of_which_one_stays_away_take_eager(away):
    """It waits for none, and when it comes at last it takes what the others do."""
    run_ranks(2, _one_stays_away, away)


def _not_on_a_cpu(rank) -> None:
    agreement.agree = None
    prepare("convert")
    prepare("AdamW")
    distributed.barrier()


def test_ranks_without_gpus_do_not_wait():
    run_ranks(2, _not_on_a_cpu)


def test_one_process_has_none_to_agree_with(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not agreement.is_due()
