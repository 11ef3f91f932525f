# SPDX-License-Identifier: Apache-2.0
"""accelerate in fp16: `python docs/frameworks/with_accelerate.py`, or the same by `accelerate launch`."""

import torch
from accelerate import Accelerator
from torch import nn

import mpkernels as mpk


class MPAccelerator(Accelerator):
    """Accelerator with our scaler. mixed_precision stays "no": the converted model casts by itself."""

    def __init__(self, **kwargs):
        super().__init__(mixed_precision="no", **kwargs)
        self.scaler = mpk.GradScaler()  # before prepare(), which hands it to the optimizer

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        return self.scaler.clip_grad_norm_(self._optimizers[0].optimizer, max_norm)  # the factor is left to the step


def main(steps: int = 30, **kwargs) -> None:
    """Train, and log to what `log_with=` names the loss and the norm of the gradients before clipping."""
    accelerator = MPAccelerator(**kwargs)
    accelerator.init_trackers("mpkernels")
    model = mpk.convert(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)), "mixed_float16")
    model, optimizer = accelerator.prepare(model, mpk.optim.AdamW(model.named_parameters(), lr=1e-2))
    for step in range(steps):
        x = torch.randn(32, 8, device=accelerator.device)
        loss = nn.functional.mse_loss(model(x), x[:, :2].sum(1, keepdim=True))
        accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": loss.item(), "grad_norm": grad_norm.item()}, step)


if __name__ == "__main__":
    main(log_with="all")
