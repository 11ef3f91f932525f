# SPDX-License-Identifier: Apache-2.0
"""docs/checkpoints.md runs from top to bottom, and its functions for ranks do what it says on ranks."""

from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.docs import page
from tests.ranks import run_ranks


def test_checkpoints_doc_runs(tmp_path):
    found, _ = page.run("checkpoints", tmp_path)
    assert found["scaler"].skipped_steps.item() < 6
    assert (tmp_path / "distributed").is_dir()


def sharded(rank, functions: str, folder: str) -> None:
    namespace: dict = {}
    exec(functions, namespace)
    model, optimizer = namespace["make"]("mixed_float16")
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[-1], model):
        fully_shard(layer, mesh=mesh)
    optimizer = type(optimizer)(model.parameters(), lr=1e-2)
    namespace["load"](folder, model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    namespace["save"](f"{folder}2", model, optimizer)


def test_checkpoints_doc_functions_change_the_number_of_ranks(tmp_path):
    """One process, two ranks of FSDP2, one process again: a step on the ranks is a step in one."""
    blocks = page.blocks("checkpoints", "python")
    functions = blocks[0] + next(block for block in blocks if "def save" in block).split("\n\nsave(")[0]
    namespace: dict = {}
    exec(functions, namespace)
    make, save, load, folder = namespace["make"], namespace["save"], namespace["load"], str(tmp_path / "saved")
    model, optimizer = make("mixed_float16")
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if not Path(folder).exists():
            save(folder, model, optimizer)
    run_ranks(2, sharded, functions, folder)
    other, other_optimizer = make("mixed_float16")
    load(f"{folder}2", other, other_optimizer)
    assert namespace["equal"](other.state_dict(), model.state_dict())
    for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert namespace["equal"](mine, theirs)
