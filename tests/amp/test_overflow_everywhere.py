# SPDX-License-Identifier: Apache-2.0
"""Tests of inf, -inf and NaN at positions of 100,000 gradients: nothing moves but the scale, and that exactly.

State and scale are compared once per 1,000 positions: damage would persist.
"""

import numpy as np
import pytest
import torch
from torch import nn

import mpkernels as mpk
from mpkernels.runtime.resolve import ENVIRONMENT_VARIABLE
from tests.optimizers import OURS, everything
from tests.steps import BAD_VALUES, DTYPES, compute_copies, raw

names = pytest.mark.parametrize("name", ["AdamW", "SGD"])
SHORT = (1, 2, 7, 31, 64, 129, 257, 638, 0, 2049)  # tails of every vector width and block, of every dtype
# The native CPU kernels split at multiples of these: vectors, blocks of the update, blocks of the sums, runs of a thread.
EDGES = (16, 128, 2048, 16384)
TOTAL, BETWEEN = 100_000, 1000
SCALE, BACKOFF = 2.0**16, 63 / 64  # after 1,000 overflows neither bound of the scale is near


class Training:
    """Parameters of every dtype, one of them with a compute copy, whose optimizer has stepped twice under a scaler."""

    def __init__(self, name: str, **options):
        generator = torch.Generator().manual_seed(0)
        self.layer = mpk.MPLinear(129, 31, policy="mixed_float16")  # 4,030 elements
        self.layer(torch.ones(1, 129))
        rest = TOTAL - 4030 - len(DTYPES) * sum(SHORT)
        sizes = [n for n in SHORT for _ in DTYPES] + [rest // 4] * 3 + [rest - rest // 4 * 3]
        params = [nn.Parameter(torch.randn(n, generator=generator).to(DTYPES[i % 4])) for i, n in enumerate(sizes)]
        self.params = [*params[:4], *self.layer.parameters(), *params[4:]]
        assert sum(p.numel() for p in self.params) == TOTAL
        self.scaler = mpk.GradScaler(init_scale=SCALE, backoff_factor=BACKOFF)
        self.optimizer = OURS[name](self.params, lr=0.01, **options)
        self.scaler.scale(torch.ones(()))
        for parameter in self.params:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for _ in range(2):
            self.step()

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def everything(self) -> list[bytes]:
        assert compute_copies(self.optimizer), "the layer's compute copy must be watched"
        return [*everything(self.optimizer), *raw(p.grad for p in self.params)]


def poison(training: Training, positions: np.ndarray, bad_values=BAD_VALUES) -> None:
    """A step with each bad value at each of the positions (of all gradients, one after the other) in turn."""
    ends = np.cumsum([p.numel() for p in training.params])
    flat = [p.grad.view(-1) for p in training.params]
    before = training.everything()
    for begin in range(0, len(positions), BETWEEN):
        segment = positions[begin : begin + BETWEEN]
        for bad in bad_values:
            expected = np.float32(SCALE)
            for position in segment.tolist():
                tensor = int(np.searchsorted(ends, position, side="right"))
                grad, index = flat[tensor], position - int(ends[tensor])
                good = grad[index].clone()
                grad[index] = bad
                training.step()
                grad[index] = good
                expected = np.float32(np.float64(expected) * BACKOFF)
            assert training.scaler.get_scale() == expected, (bad, segment[0], segment[-1])
            assert training.everything() == before, (bad, segment[0], segment[-1])
            training.scaler.update(SCALE)


def edges(training: Training) -> np.ndarray:
    """Positions beside every edge: of tensors, and of blocks and runs within a tensor."""
    result, start = [], 0
    for parameter in training.params:
        n = parameter.numel()
        inside = {0, n - 1, n - n % 16, *(i + d for edge in EDGES for i in (edge, n - n % edge) for d in (-1, 0, 1))}
        result += [start + i for i in inside if 0 <= i < n]
        start += n
    return np.array(sorted(result))


@pytest.fixture(params=["native", "eager"])
def backend(request, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=["plain", "clipped"])
@names
def test_overflow_at_every_edge_leaves_state_bitwise(backend, name, options):
    training = Training(name, **options)
    positions = edges(training)
    poison(training, positions[:: 1 if backend == "native" else 10])
    before = training.everything()
    training.step()
    assert training.everything() != before, "the gradients themselves are good"


# 11 is odd, so that a tenth of the positions has every place in a vector.
@pytest.mark.parametrize("apart", [pytest.param(11, marks=pytest.mark.sweep), pytest.param(1, marks=pytest.mark.release)])
@pytest.mark.parametrize("bad", BAD_VALUES)
@names
def test_overflow_at_every_position_leaves_state_bitwise(monkeypatch, name, bad, apart):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    training, positions = Training(name), np.arange(0, TOTAL, apart)
    poison(training, positions, (bad,))
    assert training.scaler.skipped_steps == len(positions)
