# SPDX-License-Identifier: Apache-2.0
"""Ranks of one job choose alike: the verdicts of rank 0 where all have the same GPU, driver and code, else eager everywhere.

Verdicts lie on the disk of each node. Were a rank to take another kernel than the others, its step would have other bits, and
replicas would drift apart. So ranks compare through the default store of torch.distributed, once, where the model is
converted or the optimizer is made; no op waits for another rank.
"""

import contextlib
import datetime
import hashlib
import json

import torch
from torch import distributed

from mpkernels.runtime import cache, proof

LIMIT = 60.0  # seconds that ranks wait for each other
_PREFIX = "mpkernels/verdicts"

_agreed_in: list = []  # the store of the last agreement


def is_due() -> bool:
    """Whether this process is one of several with GPUs that have not agreed yet."""
    if not (distributed.is_available() and distributed.is_initialized()) or not torch.cuda.is_available():
        return False
    return distributed.get_world_size() > 1 and _store() not in _agreed_in


def agree(device: torch.device, decision: dict[str, dict[str, bool]], keys: list[str], wrong: list[str]) -> None:
    """Take what all ranks take: rank 0's `decision`, where all have its `keys` and none of them found it wrong."""
    store, rank, world = _store(), distributed.get_rank(), distributed.get_world_size()
    if store is None:  # of a torch that has it elsewhere
        proof.agreed[device] = {}
        return
    _agreed_in[:] = [store]
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    name = ", ".join(cache.machine(device).values())
    store.set(f"{_PREFIX}/{rank}", json.dumps({"digest": digest, "name": name, "wrong": wrong}))
    if rank == 0:
        reason = _difference(store, world, decision)
        outcome = {"decision": {} if reason else decision, "reason": reason}
    else:
        reason = _awaited(store, [f"{_PREFIX}/outcome"])
        outcome = {"decision": {}, "reason": reason}
    # The first to write decides: a rank that has waited in vain takes all to eager.
    text = store.compare_set(f"{_PREFIX}/outcome", "", json.dumps(outcome))
    outcome = json.loads(text)
    proof.agreed[device] = outcome["decision"]
    if rank == 0 and outcome["reason"]:
        cache.warn_once(f"mpkernels: {outcome['reason']}: on GPUs torch's own ops serve on every rank")


def _difference(store, world: int, decision) -> str | None:
    """Why ranks cannot all take rank 0's decision, or None."""
    reason = _awaited(store, [f"{_PREFIX}/{rank}" for rank in range(world)])
    if reason is not None:
        return reason
    ranks = [json.loads(store.get(f"{_PREFIX}/{rank}")) for rank in range(world)]
    for rank, found in enumerate(ranks):
        if found["digest"] != ranks[0]["digest"]:
            return f"rank {rank} has another GPU, driver or code than rank 0 ({found['name']}; {ranks[0]['name']})"
        bad = [f"{op}, {backend}" for op, chosen in decision.items() for backend in chosen]
        bad = sorted(set(bad) & set(found["wrong"]))
        if bad:
            return f"rank {rank} has found {'; '.join(bad)} wrong, which rank 0 has not"
    return None


def _awaited(store, keys: list[str]) -> str | None:
    """None once all are there, else why not."""
    try:
        store.wait(keys, datetime.timedelta(seconds=LIMIT))
    except Exception as error:  # of another class in every version of torch
        missing = "others"
        with contextlib.suppress(Exception):
            missing = ", ".join(key.rpartition("/")[2] for key in keys if not store.check([key]))
        return f"ranks did not convert a model or make an optimizer within {LIMIT:.0f} s ({missing}; {type(error).__name__})"
    return None


def _store():
    """The default store of torch.distributed; NOTE: its only way there is private."""
    get = getattr(distributed.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
