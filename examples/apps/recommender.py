# SPDX-License-Identifier: Apache-2.0
"""A deep recommender: ratings of MovieLens-100k from user, film, occupation and genres (read from the package recbole).

python examples/apps/recommender.py [--quick]

The terms of MovieLens forbid passing the data on: it is read where the package has it and copied nowhere.
"""

import csv

import runner
import torch
import torch.nn.functional as F
from torch import nn


def read(kind: str) -> list[dict[str, str]]:
    """A table of MovieLens-100k: "inter", "user" or "item"; columns as recbole names them, without their types."""
    path = runner.data_folder("recbole") / "dataset_example" / "ml-100k" / f"ml-100k.{kind}"
    with path.open(encoding="utf-8") as file:
        return [
            {k.split(":")[0]: v for k, v in row.items()} for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def ratings(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(user, film, rating) of 100,000 ratings, users and films counted from 0; in an order of chance."""
    rows = read("inter")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    columns = (
        [int(row["user_id"]) - 1 for row in rows],
        [int(row["item_id"]) - 1 for row in rows],
        [float(row["rating"]) for row in rows],
    )
    return tuple(torch.tensor(column)[order].to(device) for column in columns)


def held_out(device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same, to train on and, a tenth of them, to test on."""
    columns = ratings(device)
    tenth = len(columns[0]) // 10
    return [c[tenth:] for c in columns], [c[:tenth] for c in columns]


class Recommender(nn.Module):
    """Embeddings of user and film with what is known of both, into an MLP."""

    def __init__(self, users: torch.Tensor, films: torch.Tensor, width: int, hidden: int):
        super().__init__()
        self.register_buffer("users", users)
        self.register_buffer("films", films)
        self.user, self.film = nn.Embedding(len(users), width), nn.Embedding(len(films), width)
        inputs = 2 * width + users.shape[1] + films.shape[1]
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, 1)
        )

    def forward(self, user, film):
        known = torch.cat([self.user(user), self.film(film), self.users[user], self.films[film]], 1)
        return 3.5 + self.net(known).squeeze(1)


class Recommend(runner.Task):
    name, metric, higher_is_better = "recommender", "RMSE of the rating", False
    sizes = {
        "tiny": dict(width=4, hidden=16, batch=32, steps=2),
        "cpu": dict(width=32, hidden=512, batch=1000, steps=80),
        "gpu": dict(width=256, hidden=4096, batch=10000, steps=500),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        self.train, self.test = held_out(device)
        self.users = one_hot([[row["occupation"], row["gender"]] for row in read("user")]).to(device)
        self.films = one_hot([row["class"].split() for row in read("item")]).to(device)

    def model(self):
        return Recommender(self.users, self.films, self.size.width, self.size.hidden)

    def loss(self, model, user, film, rating):
        return F.mse_loss(model(user, film).float(), rating)

    def score(self, model):
        return self.loss(model, *self.test).sqrt()


def one_hot(rows: list[list[str]]) -> torch.Tensor:
    """(rows, words): 1 where a row has the word."""
    words = sorted({word for row in rows for word in row})
    return torch.tensor([[float(word in row) for word in words] for row in rows])


TASKS = (Recommend,)

if __name__ == "__main__":
    runner.main(*TASKS)
