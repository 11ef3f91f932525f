# SPDX-License-Identifier: Apache-2.0
"""A plain loop in fp16: `python docs/frameworks/plain.py`. Only the log waits for the device, once, at the end."""

import torch
from torch import nn

import mpkernels as mpk


def main(steps: int = 30) -> list[dict[str, float]]:
    """Train; the loss and the norm of the gradients before clipping, a row per step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
    model = mpk.convert(model, "mixed_float16")
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=1e-2)
    scaler = mpk.GradScaler()
    rows = []
    for _ in range(steps):
        x = torch.randn(32, 8, device=device)
        loss = nn.functional.mse_loss(model(x), x[:, :2].sum(1, keepdim=True))
        scaler.scale(loss).backward()
        grad_norm = scaler.clip_grad_norm_(optimizer, 1.0)  # one read of the gradients; the factor is left to the step
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        rows.append((loss.detach(), grad_norm))
    return [{"loss": loss.item(), "grad_norm": norm.item()} for loss, norm in rows]


if __name__ == "__main__":
    for step, row in enumerate(main()):
        print(f"step {step}: loss {row['loss']:.4f}, grad_norm {row['grad_norm']:.4f}")
