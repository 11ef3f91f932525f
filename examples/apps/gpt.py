# SPDX-License-Identifier: Apache-2.0
"""A language model: a GPT over bytes, on the documentation and the library that come with Python. Nothing to install.

python examples/apps/gpt.py [--quick]
"""

import pydoc_data.topics
from pathlib import Path

import runner
import torch
import torch.nn.functional as F
from layers import Block
from torch import nn


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, context: int):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads=4, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text):
        return self.head(self.norm(self.blocks(self.embed(text) + self.positions[: text.shape[1]])))


class Language(runner.Task):
    name, metric, higher_is_better = "gpt", "bits per byte", False
    lr = 3e-3
    sizes = {
        "tiny": dict(width=16, layers=1, context=16, batch=4, steps=2),
        "cpu": dict(width=64, layers=2, context=64, batch=12, steps=80),
        "gpu": dict(width=512, layers=8, context=512, batch=16, steps=500),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        library = sorted(Path(pydoc_data.topics.__file__).parent.parent.glob("*.py"))
        sources = [path.read_bytes() for path in library]
        manual = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()
        text = torch.frombuffer(bytearray(b"".join([manual, *sources])), dtype=torch.uint8).to(device)
        windows = text[: len(text) // 1000 * 1000].view(-1, 1000)  # every tenth one is for the test
        test = torch.arange(len(windows)) % 10 == 0
        self.train, self.test = windows[~test].flatten(), windows[test][:, : self.size.context + 1]

    def model(self):
        return GPT(self.size.width, self.size.layers, self.size.context)

    def batches(self, model, seed):
        generator = torch.Generator().manual_seed(seed)
        steps = torch.arange(self.size.context + 1)
        while True:
            starts = torch.randint(len(self.train) - len(steps), (self.size.batch, 1), generator=generator)
            yield (self.train[(starts + steps).to(self.device)].int(),)

    def loss(self, model, text):
        logits = model(text[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].long().flatten())

    def score(self, model):
        text = self.test[:: max(1, len(self.test) // 64)].int()
        return self.loss(model, text) / torch.tensor(2.0).log()


TASKS = (Language,)

if __name__ == "__main__":
    runner.main(*TASKS)
