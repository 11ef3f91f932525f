# SPDX-License-Identifier: Apache-2.0
"""Which format each linear needs: a small transformer, one of whose layers leaves fp16's range, and a CNN with a linear head.

python examples/advise.py [--html FILE]
python -m mpkernels advise examples/advise.py:transformer
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import mpkernels as mpk


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))).square())


class Transformer(nn.Module):
    """Characters. The second block's `up` is as large as a squared ReLU can make it in a long run: `down` reads 1e5."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(40, 32), nn.Sequential(Block(32), Block(32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 40)
        with torch.no_grad():
            self.blocks[1].up.weight *= 200
            self.blocks[1].down.weight /= 40_000

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def transformer():
    torch.manual_seed(0)
    model, tokens = Transformer(), torch.randint(40, (8, 17))
    return model, lambda model: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def cnn():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    images, labels = torch.randn(32, 1, 12, 12), torch.randint(10, (32,))
    return model, lambda model: F.cross_entropy(model(images), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--html", help="write the picture of the transformer's ranges to this file")
    html = parser.parse_args().html
    for make in (transformer, cnn):
        model, step = make()
        advice = mpk.advise(model, step)
        print(f"{make.__name__}\n{advice}\n")
        for name in advice.policy:
            print(advice.why(name))
        print()
        mpk.convert(model, advice.policy)
        if html and make is transformer:
            advice.to_html(html)


if __name__ == "__main__":
    main()
