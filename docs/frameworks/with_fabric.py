# SPDX-License-Identifier: Apache-2.0
"""Lightning Fabric in fp16: `python docs/frameworks/with_fabric.py`; writes logs/fabric/version_*/metrics.csv."""

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger
from lightning_fabric.plugins.precision import MixedPrecision, Precision

import mpkernels as mpk


class MPPrecision(MixedPrecision):
    """Fabric's mixed precision, which scales, steps and saves by our scaler, with a converted model instead of autocast."""

    convert_module = staticmethod(lambda module: mpk.convert(module, "mixed_float16"))
    forward_context, convert_input = Precision.forward_context, Precision.convert_input  # the op casts by itself


class MPFabric(Fabric):
    def clip_gradients(self, module, optimizer, max_norm):
        return self._precision.scaler.clip_grad_norm_(optimizer.optimizer, max_norm)  # the factor is left to the step


def main(steps: int = 30, folder: str = "logs") -> None:
    """Train, and log the loss and the norm of the gradients before clipping."""
    precision = MPPrecision("16-mixed", "cpu", mpk.GradScaler())
    fabric = MPFabric(devices=1, plugins=precision, loggers=CSVLogger(folder, "fabric", flush_logs_every_n_steps=1))
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    model, optimizer = fabric.setup(model, mpk.optim.AdamW(model.named_parameters(), lr=1e-2))
    for step in range(steps):
        x = torch.randn(32, 8, device=fabric.device)
        fabric.backward(loss := torch.nn.functional.mse_loss(model(x), x[:, :2].sum(1, keepdim=True)))
        grad_norm = fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        fabric.log_dict({"loss": loss.item(), "grad_norm": grad_norm.item()}, step)


if __name__ == "__main__":
    main()
