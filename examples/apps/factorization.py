# SPDX-License-Identifier: Apache-2.0
"""Matrix factorization of MovieLens-100k by SGD, by alternating least squares, and without negative numbers (NMF).

python examples/apps/factorization.py [--quick]

The matrix and its factors are kept in 16 bits, sums are in fp32: products by mpk.functional.linear_act, which rounds nothing on
the way to an fp32 result. SGD has no linear: under `float16` the embeddings are 16-bit and the optimizer holds fp32 masters.
"""

import math
from dataclasses import dataclass

import report
import runner
import torch
import torch.nn.functional as F
from recommender import held_out
from torch import nn

import mpkernels as mpk

USERS, FILMS = 943, 1682


# ----- by SGD ---------------------------------------------------------------------------------


class Factors(nn.Module):
    """A rating is the product of two vectors and two more numbers; summed in fp32."""

    def __init__(self, rank: int):
        super().__init__()
        self.user, self.film = nn.Embedding(USERS, rank + 1), nn.Embedding(FILMS, rank + 1)
        for table in (self.user, self.film):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user, film):
        user, film = self.user(user).float(), self.film(film).float()
        return 3.5 + (user[:, :-1] * film[:, :-1]).sum(1) + user[:, -1] + film[:, -1]


class Sgd(runner.Task):
    name, metric, higher_is_better = "factorization_sgd", "RMSE of the rating", False
    lr = 1e-2
    recipes = {
        runner.FP32: runner.Recipe(),
        "torch autocast bf16": runner.Recipe(autocast=torch.bfloat16),
        "float16": runner.Recipe("float16"),
        "bfloat16": runner.Recipe("bfloat16"),
    }
    sizes = {
        "tiny": dict(rank=2, batch=32, steps=2),
        "cpu": dict(rank=16, batch=5000, steps=100),
        "gpu": dict(rank=256, batch=50000, steps=500),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        self.train, self.test = held_out(device)

    def model(self):
        return Factors(self.size.rank)

    def loss(self, model, user, film, rating):
        return F.mse_loss(model(user, film), rating)

    def score(self, model):
        return self.loss(model, *self.test).sqrt()


# ----- by turns -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """What the matrix and its factors are kept in, and whether products are summed in fp32 and not rounded."""

    dtype: torch.dtype
    fp32_sums: bool = True

    def product(self, a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """a @ b.T: (M, K) and (N, K), kept in `dtype`. Without fp32 sums the result has that dtype as well."""
        if self.dtype == torch.float32 or not self.fp32_sums:
            return a @ b.T
        return mpk.functional.linear_act(a, b, policy=mpk.Policy(torch.float32, self.dtype, out_dtype))


class Alternating(runner.Task):
    """The factors are improved in turn: users (USERS, rank) and films (FILMS, rank)."""

    metric, higher_is_better = "RMSE of the rating", False
    recipes = {
        runner.FP32: Storage(torch.float32),
        "torch bfloat16": Storage(torch.bfloat16, fp32_sums=False),
        "float16, fp32 sums": Storage(torch.float16),
        "bfloat16, fp32 sums": Storage(torch.bfloat16),
    }

    def __init__(self, device, size):
        super().__init__(device, size)
        (users, films, ratings), self.test = held_out(device)
        self.rated = torch.zeros(USERS, FILMS, device=device)
        self.rated[users, films] = 1
        self.ratings = torch.zeros(USERS, FILMS, device=device)
        self.ratings[users, films] = ratings

    def start(self, storage: Storage, seed: int):
        """The matrix both ways, and the factors at random."""
        generator = torch.Generator().manual_seed(seed)
        factors = [torch.rand(n, self.size.rank, generator=generator).to(self.device) for n in (USERS, FILMS)]
        scale = math.sqrt(3.5 / (self.size.rank / 4))
        matrices = [t.to(storage.dtype) for t in (self.rated, self.ratings)]
        return matrices, [t.T.contiguous() for t in matrices], [(f * scale).to(storage.dtype) for f in factors]

    def improved(self, storage: Storage, matrices, factor, other) -> torch.Tensor:
        """The factor of the rows of `matrices`, (rated, ratings), given that of their columns."""
        raise NotImplementedError

    def iterate(self, storage, by_user, by_film, factors) -> None:
        factors[0] = self.improved(storage, by_user, factors[0], factors[1]).to(storage.dtype)
        factors[1] = self.improved(storage, by_film, factors[1], factors[0]).to(storage.dtype)

    def measure(self, recipes, seeds):
        seconds, scores = ({name: [[] for _ in range(seeds)] for name in recipes} for _ in range(2))
        for seed in range(seeds):
            states = {name: self.start(storage, seed) for name, storage in recipes.items()}
            for _ in range(self.size.steps):
                for name, storage in recipes.items():
                    start = runner.clock(self.device)
                    self.iterate(storage, *states[name])
                    seconds[name][seed].append(runner.clock(self.device) - start)
            for name, (_, _, (users, films)) in states.items():
                scores[name][seed] = self.rmse(users, films)
        return [
            report.head(self, name, scores[name])
            | {"steps": seeds * self.size.steps, "skipped_steps": 0, "note": ""}
            | runner.times(seconds[name], seconds[runner.FP32])
            | self.memory(storage, states[name])
            for name, storage in recipes.items()
        ]

    def memory(self, storage, state) -> dict[str, int]:
        """Of the matrix, both ways, and the factors; and the most in an iteration."""
        by_user, by_film, factors = state
        kept = sum(t.numel() * t.element_size() for t in (*by_user, *by_film, *factors))
        work = lambda: self.iterate(storage, by_user, by_film, list(factors))
        return {"activation_bytes": kept, "peak_bytes": kept + runner.peak_bytes(work, self.device)}

    def rmse(self, users, films) -> float:
        user, film, rating = self.test
        found = (users.float()[user] * films.float()[film]).sum(1).clamp(1, 5)
        return F.mse_loss(found, rating).sqrt().item()


class Als(Alternating):
    """Least squares for every row, with 0.1 times the number of its ratings on the diagonal (Zhou et al. 2008)."""

    name = "factorization_als"
    sizes = {"tiny": dict(rank=2, steps=2), "cpu": dict(rank=12, steps=10), "gpu": dict(rank=64, steps=20)}

    def improved(self, storage, matrices, factor, other):
        rated, ratings = matrices
        rank = other.shape[1]
        squares = (other.unsqueeze(2) * other.unsqueeze(1)).flatten(1)  # round: 16-bit products, summed in fp32
        gram = storage.product(rated, squares.T.contiguous()).float().unflatten(1, (rank, rank))
        right = storage.product(ratings, other.T.contiguous()).float()
        count = rated.float().sum(1).clamp(min=1)
        gram = gram + 0.1 * count[:, None, None] * torch.eye(rank, device=self.device)
        return torch.linalg.solve(gram, right.unsqueeze(2)).squeeze(2)


class Nmf(Alternating):
    """Multiplicative updates over what was rated (Lee and Seung 2001)."""

    name = "factorization_nmf"
    sizes = {"tiny": dict(rank=2, steps=2), "cpu": dict(rank=12, steps=50), "gpu": dict(rank=64, steps=300)}

    def improved(self, storage, matrices, factor, other):
        rated, ratings = matrices
        found = storage.product(factor, other, storage.dtype).mul_(rated)  # 1 where there is a rating: rounds nothing
        across = other.T.contiguous()
        wanted, present = storage.product(ratings, across), storage.product(found, across)
        return factor * (wanted / (present + 1e-6))


TASKS = (Sgd, Als, Nmf)

if __name__ == "__main__":
    runner.main(*TASKS)
