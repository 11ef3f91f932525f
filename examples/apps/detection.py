# SPDX-License-Identifier: Apache-2.0
"""Detection: a window slides over a photograph, a small CNN says of each place whether a face is there (scikit-image's data).

python examples/apps/detection.py [--quick]

Trained on 80 faces of 25x25, 80 windows without one and places of photographs without one; tested on the other 20 faces and
every window of another photograph. Convolutions are not converted: inside torch.autocast they are 16-bit as well.
"""

import numpy as np
import runner
import torch
import torch.nn.functional as F
from matplotlib import image
from torch import nn

SIDE, STRIDE = 25, 3
WITHOUT_FACES = ("brick", "chelsea", "coffee", "coins", "grass", "gravel", "page", "text")
PHOTOGRAPH, SCALE, FACE = "astronaut", 150 / 512, (125, 227)  # row and column of the middle of the face, unscaled
NEAR = 4  # pixels, scaled, that the middle of a window may be off


class Detector(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(2 * channels * 36, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, windows):
        windows = windows - windows.mean((1, 2), keepdim=True)
        return self.head(self.features(windows.unsqueeze(1)).flatten(1)).squeeze(1)


class Detection(runner.Task):
    name, metric = "detection", "area under ROC"
    sizes = {
        "tiny": dict(channels=4, hidden=16, batch=8, steps=2),
        "cpu": dict(channels=8, hidden=128, batch=64, steps=100),
        "gpu": dict(channels=64, hidden=1024, batch=1024, steps=300),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        known = torch.from_numpy(np.load(folder() / "lfw_subset.npy")).float().to(device)
        self.faces, self.others, unseen = known[:80], known[100:180], known[80:100]
        self.photographs = [photograph(name).to(device) for name in WITHOUT_FACES]
        places = windows(photograph(PHOTOGRAPH).to(device))
        count = (round(512 * SCALE) - SIDE) // STRIDE + 1
        middle = torch.arange(count) * STRIDE + SIDE // 2
        off = torch.cartesian_prod(middle, middle) - torch.tensor(FACE) * SCALE
        is_face = off.abs().amax(1) <= NEAR
        self.test = torch.cat([places, unseen]), torch.cat([is_face, torch.ones(len(unseen)).bool()]).to(device)

    def model(self):
        return Detector(self.size.channels, self.size.hidden)

    def batches(self, model, seed):
        """Half of them faces, a quarter windows without one, a quarter places of photographs; mirrored, brighter or darker."""
        generator = torch.Generator().manual_seed(seed)
        draw = lambda most, count: torch.randint(most, (count,), generator=generator)
        quarter = self.size.batch // 4
        while True:
            places = []
            for number in draw(len(self.photographs), quarter):
                of = self.photographs[number]
                row, column = (int(draw(n - SIDE, 1)) for n in of.shape)
                places.append(of[row : row + SIDE, column : column + SIDE])
            faces, others = self.faces[draw(80, 2 * quarter).to(self.device)], self.others[draw(80, quarter).to(self.device)]
            batch = torch.cat([faces, others, torch.stack(places)])
            mirrored = (draw(2, len(batch)) == 1).to(self.device)[:, None, None]
            contrast = (0.6 + 0.8 * torch.rand(len(batch), 1, 1, generator=generator)).to(self.device)
            yield torch.where(mirrored, batch.flip(2), batch) * contrast, torch.arange(len(batch)).to(self.device) < len(faces)

    def loss(self, model, batch, is_face):
        return F.binary_cross_entropy_with_logits(model(batch).float(), is_face.float())

    def score(self, model):
        """How often a window on a face is given more than one that is not."""
        batch, is_face = self.test
        out = model(batch).float()
        return (out[is_face, None] > out[~is_face]).double().mean()


def folder():
    return runner.data_folder("skimage") / "data"


def photograph(name: str) -> torch.Tensor:
    """In gray, from 0 to 1, scaled."""
    pixels = torch.from_numpy(image.imread(folder() / f"{name}.png")).float()
    pixels = pixels[..., :3].mean(-1) if pixels.dim() == 3 else pixels
    return F.interpolate(pixels[None, None], scale_factor=SCALE, mode="area")[0, 0]


def windows(pixels: torch.Tensor) -> torch.Tensor:
    """(count, SIDE, SIDE): every STRIDE pixels one, row by row."""
    return pixels.unfold(0, SIDE, STRIDE).unfold(1, SIDE, STRIDE).flatten(0, 1)


TASKS = (Detection,)

if __name__ == "__main__":
    runner.main(*TASKS)
