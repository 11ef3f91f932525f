# SPDX-License-Identifier: Apache-2.0
"""Text classification: in which of fifty languages a message is, from its bytes, by a small transformer. Django's translations.

python examples/apps/languages.py [--quick]
"""

import gettext
from collections import defaultdict

import runner
import torch
import torch.nn.functional as F
from layers import Block
from torch import nn

LEAST = 500  # messages of a language that is taken


class Classifier(nn.Module):
    """Every three bytes in a row are a token; the mean of the tokens is classified."""

    def __init__(self, width: int, layers: int, classes: int):
        super().__init__()
        self.embed, self.trigram = nn.Embedding(256, width), nn.Linear(3 * width, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, text):
        x = self.embed(text)
        x = torch.relu(self.trigram(torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], 2)))
        return self.head(self.norm(self.blocks(x)).mean(1))


class Languages(runner.Task):
    name, metric = "languages", "accuracy"
    lr = 3e-3
    sizes = {
        "tiny": dict(width=16, layers=1, length=16, batch=8, steps=2),
        "cpu": dict(width=64, layers=1, length=48, batch=32, steps=80),
        "gpu": dict(width=512, layers=6, length=128, batch=128, steps=500),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        messages = translations()
        self.names = sorted(messages)
        rows = [(text, label) for label, name in enumerate(self.names) for text in sorted(messages[name])]
        length = self.size.length
        text = torch.tensor([list(line.encode()[:length].ljust(length, b"\0")) for line, _ in rows], dtype=torch.int32)
        labels = torch.tensor([label for _, label in rows])
        test = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)) < 0.1
        self.train, self.test = ((text[s].to(device), labels[s].to(device)) for s in (~test, test))

    def model(self):
        return Classifier(self.size.width, self.size.layers, len(self.names))

    def loss(self, model, text, labels):
        return F.cross_entropy(model(text).float(), labels)

    def score(self, model):
        text, labels = (t[::4] for t in self.test)
        return (model(text).argmax(1) == labels).double().mean()


def translations() -> dict[str, set[str]]:
    """{language: its messages}, of those that have many."""
    found = defaultdict(set)
    for path in sorted(runner.data_folder("django").glob("**/locale/*/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # NOTE: what has no public name is the list of all messages
        found[path.parts[-3]] |= {text for original, text in catalog.items() if original and len(text) >= 8}
    return {name: texts for name, texts in found.items() if len(texts) >= LEAST}


TASKS = (Languages,)

if __name__ == "__main__":
    runner.main(*TASKS)
