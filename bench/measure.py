# SPDX-License-Identifier: Apache-2.0
"""One case: its implementations are made, held against fp64 and timed, in this process or in one of its own."""

import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
import torch._dynamo.config as dynamo

from bench import limits, timing
from bench.cases import Case
from bench.implementation import OURS, Implementation, Missing, served_by

LAST_LEVEL_CACHE = {"cpu": 1 << 25, "cuda": 1 << 26}  # bytes that rotation has to exceed
INSTANCES = 32
PRELOADED = ["bench.measure", "bench.overhead", "torch._dynamo"]  # the last is what an optimizer imports at its first use


def prepare(threads: int) -> None:
    """What holds in every process that measures."""
    torch.set_num_threads(threads)
    timing.keep_memory()
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 64, True  # else it would run eagerly, and not say so


def measure_alone(
    case: Case, device: torch.device, clock: timing.Clock, limit: dict, seconds: float
) -> tuple[list[dict], dict]:
    """`measure` in a process that has measured nothing: a call on next to nothing takes what it takes to reach its tensors,
    and between those would lie what cases before it have freed.

    It is forked from one that has imported torch, which takes seconds, and computed nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, context, prepare, (clock.threads,)) as pool:
        return pool.submit(measure, case, device, clock, limit, seconds).result()


def measure(case: Case, device: torch.device, clock: timing.Clock, limit: dict, seconds: float) -> tuple[list[dict], dict]:
    """(a row per implementation, {name: what is wrong with its result}); nothing is timed where the first one is wrong."""
    make = importlib.import_module(f"bench.{case.op}").implementations
    if getattr(case, "compiled", None):
        torch.compiler.reset()  # what it remembers of other cases' shapes would be looked at in every call
    torch.manual_seed(0)
    instance = make(case, device)
    subject = next(iter(instance))
    numerics, absent, wrong = check(instance)
    if subject not in instance:
        return [], wrong
    copies = 1
    if case.op == "linear_act":
        traffic = sum(implementation.bytes for implementation in instance.values())
        copies = min(INSTANCES, 1 + 2 * LAST_LEVEL_CACHE[device.type] // traffic)
    instances = [instance] + [
        {name: c for name, c in make(case, device).items() if name in instance} for _ in range(copies - 1)
    ]
    times = timing.interleave(instances, clock, seconds)
    result = [row(case, name, instance, times, numerics, limit, subject) for name in instance]
    for found in result:
        if found["implementation"].startswith(OURS):
            found.setdefault("backends", served_by(device))
    result[0]["left_out"] = absent
    return result, wrong


def check(instance: dict[str, Implementation]) -> tuple[dict[str, dict], dict[str, str], dict[str, str]]:
    """({name: its numerics}, {one that is not here: why}, {one that is wrong: how}); the latter two leave the instance.

    Whatever else a peer raises is a reason to go on without it; for ours it is an error.
    """
    numerics, absent, wrong = {}, {}, {}
    for name in list(instance):
        try:
            numerics[name] = instance[name].check()
        except Exception as error:
            peer = not name.startswith(OURS) and not isinstance(error, AssertionError)
            told = absent if peer or isinstance(error, Missing) else wrong
            told[name] = str(error).strip().split("\n")[0][:200] or type(error).__name__
            del instance[name]
    return numerics, absent, wrong


def row(case, name, instance, times, numerics, limit, subject) -> dict:
    implementation, measured = instance[name], times[name].summary()
    us, roof = measured["us_p50"], limits.roof_us(instance[name], limit)
    return {
        "case": case.name, "op": case.op, "implementation": name, **measured,
        "subject": subject, "bytes": implementation.bytes, "flops": implementation.flops,
        "gb_s": implementation.bytes / us / 1e3, "tflop_s": implementation.flops / us / 1e6,
        "share_of_roofline": roof / us if roof else None, **numerics[name], **implementation.after(),
    }  # fmt: skip
