# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: a pole on a cart is balanced by policy gradient, sampled and trained with the same bits or not.

python examples/apps/cartpole.py [--quick]

The policy plays 32 poles at a time and is trained on all that they did at once. Whether a log-probability has the same bits in
both is counted: docs/rl.md says why it matters. The environment is that of Barto, Sutton and Anderson 1983.
"""

import math

import runner
import torch
import torch.nn.functional as F
from torch import nn

import mpkernels as mpk

DISCOUNT = 0.98
LONG = 5  # times as long as in training, when it is tested


def push(state: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states (poles, 4) 20 ms after a push of 10 N to the right or left, and which of the poles have fallen."""
    _, speed, angle, turning = state.unbind(1)
    sin, cos = angle.sin(), angle.cos()
    force = (torch.where(right, 10.0, -10.0) + 0.05 * turning**2 * sin) / 1.1
    turned = (9.8 * sin - cos * force) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    moved = force - 0.05 * turned * cos / 1.1
    state = state + 0.02 * torch.stack([speed, moved, turning, turned], 1)
    return state, (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 12 * math.pi / 180)


def log_probs(model: nn.Module, state: torch.Tensor) -> torch.Tensor:
    """(poles, 2) in fp32: of a push to the left, and to the right."""
    return F.log_softmax(model(state).float(), 1)


class CartPole(runner.Task):
    name, metric = "cartpole", "steps balanced"
    lr = 5e-3
    recipes = runner.RECIPES | {"mixed_float16, same bits": runner.Recipe("mixed_float16,batch_invariant")}
    sizes = {
        "tiny": dict(hidden=16, poles=4, batch=8, length=8, steps=2),
        "cpu": dict(hidden=128, poles=32, length=100, steps=30),
        "gpu": dict(hidden=1024, poles=1024, length=200, steps=100),
    }

    def model(self):
        hidden = self.size.hidden
        return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    @torch.no_grad()
    def play(self, model, generator, length):
        """States, whether pushed to the right, log-probabilities and whether still up: (steps, poles, ...) each."""
        state = ((torch.rand(self.size.poles, 4, generator=generator) - 0.5) * 0.1).to(self.device)
        up = torch.ones(len(state), dtype=torch.bool, device=self.device)
        played = []
        for _ in range(length):
            sampled = log_probs(model, state)
            right = torch.rand(len(state), generator=generator).to(self.device) < sampled[:, 1].exp()
            played.append((state, right, sampled, up))
            state, fell = push(state, right)
            up = up & ~fell
        return [torch.stack(column) for column in zip(*played, strict=True)]

    def batches(self, model, seed):
        """Each is played by the policy as it then is: state, push, and what came of it beyond the mean, 0 once down."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            states, right, _, up = self.play(model, generator, self.size.length)
            returns = up.float()
            for t in range(len(returns) - 2, -1, -1):
                returns[t] += DISCOUNT * returns[t + 1]
            advantage = (returns - returns.mean(1, keepdim=True)) / returns.std() * up
            yield states.flatten(0, 1), right.flatten().long(), advantage.flatten()

    def loss(self, model, state, right, advantage):
        return (F.nll_loss(log_probs(model, state), right, reduction="none") * advantage).mean()

    def score(self, model):
        _, _, _, up = self.play(model, torch.Generator().manual_seed(0), LONG * self.size.length)
        return up.float().sum(0).mean()

    def note(self, model):
        """What sampling and training have in common: the bits of log-probabilities, by 32 and all at once."""
        states, _, sampled, _ = self.play(model, torch.Generator().manual_seed(0), self.size.length)
        trained = log_probs(model, states.flatten(0, 1)).unflatten(0, sampled.shape[:2])
        differ = (sampled.view(torch.int32) != trained.view(torch.int32)).double().mean()
        return (
            f"{differ:.2%} of log-probabilities have other bits in training; {mpk.check_batch_invariant(model, states[:, 0])}"
        )


TASKS = (CartPole,)

if __name__ == "__main__":
    runner.main(*TASKS)
