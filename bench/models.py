# SPDX-License-Identifier: Apache-2.0
"""The models of the training cases, in plain torch, with random data: (model, inputs, targets) by name."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def mlp(*widths: int) -> nn.Sequential:
    """Linears with ReLU between."""
    layers = [layer for K, N in itertools.pairwise(widths) for layer in (nn.Linear(K, N), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Dlrm(nn.Module):
    """Facebook's recommendation model: embeddings, dot products between them, an MLP below and one above."""

    def __init__(self, tables: int, rows: int, width: int, hidden: tuple[int, ...]):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.bottom = mlp(13, hidden[-1], width)
        pairs = tables * (tables + 1) // 2
        self.top = mlp(width + pairs, *hidden, 2)
        self.register_buffer("pairs", torch.tril_indices(tables + 1, tables + 1, -1))

    def forward(self, dense, sparse):
        bottom = self.bottom(dense)
        vectors = torch.stack([bottom.float(), *(table(ids) for table, ids in zip(self.tables, sparse, strict=True))], 1)
        products = (vectors @ vectors.mT)[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([bottom, products.to(bottom.dtype)], 1))


class Block(nn.Module):
    """A transformer's block, normalized first."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """ViT, BERT and GPT-2 but for details: `embed` makes (batch, tokens, width), `pooled` reads the mean of the tokens."""

    def __init__(self, embed: nn.Module, tokens: int, width: int, layers: int, heads: int, classes: int, *, causal, pooled):
        super().__init__()
        self.embed, self.pooled = embed, pooled
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.norm(self.blocks(self.embed(x) + self.positions))
        return self.head(x.mean(1) if self.pooled else x)


def _network(*widths: int, batch: int):
    return mlp(*widths), (torch.rand(batch, widths[0]),), torch.randint(widths[-1], (batch,))


def _dlrm(batch: int, tables: int, rows: int, width: int, hidden: tuple[int, ...]):
    sparse = torch.randint(rows, (tables, batch))
    return Dlrm(tables, rows, width, hidden), (torch.rand(batch, 13), sparse), torch.randint(2, (batch,))


def _vit(batch: int, image: int, patch: int, width: int, layers: int, heads: int, classes: int):
    tokens, features = (image // patch) ** 2, 3 * patch**2
    model = Transformer(nn.Linear(features, width), tokens, width, layers, heads, classes, causal=False, pooled=True)
    return model, (torch.rand(batch, tokens, features),), torch.randint(classes, (batch,))


def _text(batch: int, tokens: int, vocabulary: int, width: int, layers: int, heads: int, causal: bool):
    model = Transformer(nn.Embedding(vocabulary, width), tokens, width, layers, heads, vocabulary, causal=causal, pooled=False)
    ids = torch.randint(vocabulary, (batch, tokens + 1))
    return model, (ids[:, :-1],), ids[:, 1:]


def _cnn(batch: int, image: int, channels: int, hidden: int, classes: int):
    """Three convolutions, the last two of stride 2, and an MLP."""
    widths = (channels, 2 * channels, 4 * channels)
    convolutions = [
        layer
        for i, (K, N) in enumerate(itertools.pairwise((3, *widths)))
        for layer in (nn.Conv2d(K, N, 3, stride=2 if i else 1, padding=1), nn.ReLU())
    ]
    head = mlp(widths[-1] * (image // 4) ** 2, hidden, classes)
    return (
        nn.Sequential(*convolutions, nn.Flatten(), *head),
        (torch.rand(batch, 3, image, image),),
        torch.randint(classes, (batch,)),
    )


MODELS: dict[str, Callable] = {
    "digits": lambda: _network(64, 128, 128, 10, batch=64),
    "mlp": lambda: _network(784, 1024, 1024, 1024, 10, batch=256),
    "mlp6": lambda: _network(*[1024] * 6, 10, batch=256),
    "mlp6_wide": lambda: _network(*[4096] * 6, 1000, batch=4096),
    "dlrm": lambda: _dlrm(512, 8, 1000, 32, (512, 256)),
    "dlrm_wide": lambda: _dlrm(16384, 26, 100_000, 128, (4096, 4096, 1024)),
    "cnn": lambda: _cnn(128, 32, 16, 128, 10),
    "vit_tiny": lambda: _vit(8, 32, 4, 192, 4, 3, 100),
    "vit_b": lambda: _vit(64, 224, 16, 768, 12, 12, 1000),
    "bert_tiny": lambda: _text(8, 64, 2000, 256, 4, 4, causal=False),
    "bert_base": lambda: _text(32, 512, 30522, 768, 12, 12, causal=False),
    "gpt2_tiny": lambda: _text(8, 64, 2000, 256, 4, 4, causal=True),
    "gpt2_small": lambda: _text(16, 1024, 50257, 768, 12, 12, causal=True),
}


def make(name: str, device: torch.device) -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor]:
    """The same weights and data at every call."""
    torch.manual_seed(0)
    model, inputs, targets = MODELS[name]()
    return model.to(device), tuple(t.to(device) for t in inputs), targets.to(device)
