# SPDX-License-Identifier: Apache-2.0
"""Policy gradient where training and sampling agree to the last bit: actions are drawn one by one, trained on by thousands.

python examples/rl_logprob.py [--rounds 5] [--samples 4096]

The ratio of a trained to a sampled probability is 1 before the first update, and importance weights, clipping and KL terms
take it for granted. A GEMM that sums in another order at M=1 than at M=4096 breaks that. `batch_invariant` does not: the same
weights give the same log-probabilities, all bits. For comparison, torch's fp16 and bf16 with the same weights.
"""

import argparse
import copy

import torch
from torch import nn
from torch.nn.functional import log_softmax, one_hot

import mpkernels as mpk

OBSERVATIONS, HIDDEN, ACTIONS = 32, 256, 6
LR = 1e-3


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(OBSERVATIONS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, ACTIONS)
    )


def log_probs(model: nn.Module, observations: torch.Tensor) -> torch.Tensor:
    """(M, ACTIONS) fp32. log_softmax works on each row by itself."""
    return log_softmax(model(observations).float(), -1)


@torch.no_grad()
def one_by_one(model: nn.Module, observations: torch.Tensor) -> torch.Tensor:
    """`log_probs` of every observation in a batch of its own, as an agent acts."""
    return torch.cat([log_probs(model, row) for row in observations.split(1)])


def rewards(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """1 for the action that belongs to the largest of the first observations, else 0."""
    return (observations[:, :ACTIONS].argmax(1) == actions).float()


def difference(sampled: torch.Tensor, trained: torch.Tensor) -> tuple[int, float]:
    """How many log-probabilities differ in any bit, and by how much at most."""
    bits = sampled.view(torch.int32) != trained.view(torch.int32)
    return int(bits.sum()), (sampled - trained).abs().max().item()


def narrow_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same weights as a plain torch model in `dtype`."""
    return mpk.revert(copy.deepcopy(model)).to(dtype)


def main(rounds: int, samples: int) -> list[tuple[int, float]]:
    """Train; print and return ours of every round, then torch's with the trained weights."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = mpk.convert(network().to(device), "mixed_float16,batch_invariant")
    optimizer = mpk.optim.AdamW(model.named_parameters(), lr=LR, max_norm=1.0)
    scaler = mpk.GradScaler()
    found = []
    for number in range(1, rounds + 1):
        observations = torch.randn(samples, OBSERVATIONS, device=device)
        with mpk.cached_weights(model):
            sampled = one_by_one(model, observations)
        actions = torch.multinomial(sampled.exp(), 1).squeeze(1)
        reward = rewards(observations, actions)

        trained = log_probs(model, observations)
        found.append(difference(sampled, trained.detach()))
        chosen = (trained * one_hot(actions, ACTIONS)).sum(1)
        loss = -(chosen * (reward - reward.mean())).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        print(f"Round [{number}/{rounds}], reward {reward.mean():.3f}, {report(sampled, found[-1])}")
    for dtype in (torch.float16, torch.bfloat16):
        plain, narrow = narrow_copy(model, dtype), observations.to(dtype)
        with torch.no_grad():
            sampled, trained = one_by_one(plain, narrow), log_probs(plain, narrow)
        print(f"torch {str(dtype).removeprefix('torch.')}: {report(sampled, difference(sampled, trained))}")
    return found


def report(sampled: torch.Tensor, found: tuple[int, float]) -> str:
    return f"log-probabilities that differ: {found[0]} of {sampled.numel()}, by at most {found[1]:.1e}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4096)
    main(**vars(parser.parse_args()))
