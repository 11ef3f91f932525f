# SPDX-License-Identifier: Apache-2.0
"""The classic first example: fit a 10-50-1 network to 100 random samples, in the dtypes of a policy.

python examples/regression_mlp.py [--policy mixed_float32]

`mixed_float32`, the default, keeps parameters, gradients and updates in fp64 and computes in fp32.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import mse_loss

import mpkernels as mpk

POLICIES = (
    "float64", "float32", "mixed_float32", "mixed_float16", "mixed_bfloat16", "mixed_float8", "mixed_float8_hybrid", "float16",
    "bfloat16",
)  # fmt: skip
EPOCHS, BATCH = 10, 10


def samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten random numbers each, and a target that depends on the first three."""
    x = torch.randn(count, 10)
    return x, x[:, :3].sum(1, keepdim=True) + 0.1 * torch.randn(count, 1)


def network(policy: mpk.Policy) -> nn.Module:
    """Linear and ReLU become one op; the parameters start unrounded, and a 16-bit policy rounds them itself."""
    model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
    return mpk.convert(model.to(torch.promote_types(policy.param_dtype, torch.float32)), policy)


def train(policy: mpk.Policy) -> float:
    """Train, print the loss of every epoch, return the loss on samples that were not trained on."""
    torch.manual_seed(0)
    (x, target), test = samples(100), samples(100)
    model = network(policy)
    optimizer = mpk.optim.SGD(model.named_parameters(), lr=0.01)
    scaler = mpk.GradScaler(enabled=policy.compute_dtype == torch.float16)  # small gradients would be 0 in fp16
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for xs, targets in zip(x.split(BATCH), target.split(BATCH)):
            loss = mse_loss(model(xs).to(target.dtype), targets)  # in fp32, whatever the network computes in
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            total += loss.item() * len(xs)
        print(f"Epoch [{epoch}/{EPOCHS}], Loss: {total / len(x):.4f}")
    with torch.no_grad():
        return mse_loss(model(test[0]).to(target.dtype), test[1]).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", choices=POLICIES, default="mixed_float32")
    print(f"Test loss: {train(mpk.Policy.parse(parser.parse_args().policy)):.4f}")
