# SPDX-License-Identifier: Apache-2.0
"""Run a function in several processes that form one gloo process group, within a time limit."""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback

import torch
from torch import distributed

LIMIT = 60  # seconds: what hangs must fail, on a busy machine too
_PRELOAD = [
    "mpkernels.optim",
    "mpkernels.amp",
    "torch._dynamo",  # three seconds; DTensor and every optimizer import it at first use
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
]


def run_ranks(world: int, function, *args) -> None:
    """`function(rank, *args)` in `world` processes; AssertionError with what each raised, or if one is not done in time.

    The processes are forked from a server that has imported torch and computed nothing: threads of autograd do not fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        failures = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(failures, folder, rank, world, function, args), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + LIMIT
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for rank in hanging:
            ranks[rank].kill()
            ranks[rank].join()
        messages = []
        while not failures.empty():
            messages.append(failures.get())
        codes = [process.exitcode for process in ranks]
    assert not hanging, f"ranks {hanging} were not done after {LIMIT} s\n" + "\n".join(messages)
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(messages)


def _rank(failures, folder: str, rank: int, world: int, function, args) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
            timeout=datetime.timedelta(seconds=LIMIT / 2),
        )  # fmt: skip
        function(rank, *args)
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)  # the group's threads wait for the others


def gathered(tensors) -> list[list[torch.Tensor]]:
    """The list of every rank."""
    result = [None] * distributed.get_world_size()
    distributed.all_gather_object(result, list(tensors))
    return result
