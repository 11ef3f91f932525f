# SPDX-License-Identifier: Apache-2.0
"""FSDP2 in fp16: `torchrun --nproc-per-node 2 docs/frameworks/with_fsdp2.py`; prints a row of JSON per step."""

import json

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import mpkernels as mpk


def main(steps: int = 30) -> None:
    """Train; the first rank prints the loss and the norm of all ranks' gradients before clipping."""
    distributed.init_process_group()
    rank, device = distributed.get_rank(), torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    policy = mpk.Policy.parse("mixed_float16")
    model = mpk.convert(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)).to(device), policy)
    for module in (model[0], model[2], model):
        fully_shard(module, mp_policy=policy.to_fsdp())
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=1e-2)
    scaler = mpk.GradScaler(init_scale=1024.0)  # one on each rank; lower: gradients are fp16 until they are reduced
    for _ in range(steps):
        x = torch.randn(32, 8, device=device)
        loss = nn.functional.mse_loss(model(x).float(), x[:, :2].sum(1, keepdim=True))
        scaler.scale(loss).backward()
        grad_norm = scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if rank == 0:
            print(json.dumps({"loss": loss.item(), "grad_norm": grad_norm.item()}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
