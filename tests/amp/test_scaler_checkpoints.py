# SPDX-License-Identifier: Apache-2.0
"""state_dict of GradScaler: copies, both ways with torch's, and a bad one that loads nothing."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import mpkernels as mpk
from tests.amp.scaling import iteration
from tests.optimizers import parameters, through_a_file


def worn_scaler() -> mpk.GradScaler:
    """A scaler with something in every entry of its state."""
    scaler, params = mpk.GradScaler(hysteresis=3, growth_interval=50, init_scale=2.0**10), parameters(torch.float32)
    optimizer = mpk.optim.SGD(params, lr=0.0)
    for event in "xxxx..x..":
        iteration(params, optimizer, scaler, math.inf if event == "x" else None)
    return scaler


WORN = {
    "scale": 2.0**7, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 50, "_growth_tracker": 2,
    "hysteresis_tracker": 0, "skipped": [5, 0],
}  # fmt: skip


def test_state_dict_ours_to_ours():
    scaler = worn_scaler()
    assert scaler.state_dict() == WORN
    loaded = through_a_file(scaler.state_dict())
    for fresh in (mpk.GradScaler(hysteresis=3), worn_scaler()):
        fresh.load_state_dict(loaded)
        assert fresh.state_dict() == WORN
        fresh.scale(torch.zeros(()))
        assert fresh.state_dict() == WORN


@pytest.mark.parametrize("renew", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_copies_of_the_scaler(renew):
    twin = renew(worn_scaler())
    assert twin.state_dict() == WORN
    assert twin.scale(torch.ones(())) == WORN["scale"]
    assert twin.state_dict() == WORN


def test_state_dict_both_ways_with_torchs():
    theirs = torch.amp.GradScaler("cpu")
    theirs.load_state_dict(worn_scaler().state_dict())
    assert theirs.state_dict() == {key: value for key, value in WORN.items() if key not in ("hysteresis_tracker", "skipped")}
    ours = worn_scaler()
    ours.load_state_dict(torch.amp.GradScaler("cpu", init_scale=4.0).state_dict())
    assert ours.state_dict() == torch.amp.GradScaler("cpu", init_scale=4.0).state_dict() | {
        "hysteresis_tracker": 3, "skipped": [0, 0],
    }  # fmt: skip


NO_COUNTS = (-1, 1.5, math.nan, "1", True, 2**31, [1], np.float64(1), np.bool_(1), torch.ones((), dtype=torch.int64))
NO_SKIPS = (*(count for count in NO_COUNTS if count != 2**31), 2**63)
NO_NUMBERS = ("1", True, [1.0], 10**400, 1j, torch.ones(()), np.ones(1), np.nan)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": 0.0}, "scale must be between"),
        ({"scale": math.nan}, "scale must be between"),
        ({"growth_factor": 1.0}, "growth_factor must be greater than 1"),
        ({"backoff_factor": 2.0}, "backoff_factor must be between 0 and 1"),
        ({"growth_interval": 0}, "growth_interval must be an int"),
        ({"growth_factor": None}, "state_dict lacks growth_factor"),
        ({"scale": "1"}, "scale must be a number, got '1'"),
        ({"backoff_factor": "1"}, "backoff_factor must be a number, got '1'$"),
        ({"backoff_factor": torch.tensor(0.5)}, r"backoff_factor must be a number, got tensor\(0.5000\): take its .item\(\)$"),
        *(({"_growth_tracker": v}, "_growth_tracker must be a count") for v in NO_COUNTS),
        *(({"hysteresis_tracker": v}, "hysteresis_tracker must be a count") for v in NO_COUNTS),
        *(({"growth_interval": v}, "growth_interval must be an int") for v in NO_SKIPS),
        *(({"skipped": v}, "skipped must be two counts") for v in ([1], [1, 2, 3], "ab", 3, torch.zeros(2), np.zeros(2), {})),
        *(({"skipped": pair}, "skipped must be a count") for v in NO_SKIPS for pair in ([v, 0], [0, v])),
        *(({"scale": v}, "scale must be") for v in NO_NUMBERS),
        *(({"growth_factor": v}, "growth_factor must be") for v in (*NO_NUMBERS, math.inf)),
        *(({"backoff_factor": v}, "backoff_factor must be") for v in NO_NUMBERS),
    ],
)
def test_bad_state_dict_loads_nothing(change, message):
    scaler = worn_scaler()
    bad = {key: value for key, value in (WORN | {"scale": 2.0} | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        scaler.load_state_dict(bad)
    assert scaler.state_dict() == WORN
    with pytest.raises(RuntimeError, match="The source state dict is empty"):
        scaler.load_state_dict({})
    with pytest.raises(TypeError, match="state_dict must be what a scaler's"):
        scaler.load_state_dict([1])


def test_state_dict_of_the_largest_counts():
    largest = {
        "_growth_tracker": 2**31 - 1,
        "hysteresis_tracker": 2**31 - 1,
        "skipped": [2**63 - 1, 7],
        "growth_interval": 2**63 - 1,
    }
    scaler = worn_scaler()
    scaler.load_state_dict(WORN | largest)
    assert scaler.state_dict() == WORN | largest


def test_state_dict_of_numpy_numbers():
    numpys = {
        "scale": np.float32(64), "growth_factor": np.float64(4), "backoff_factor": np.float32(0.25),
        "growth_interval": np.int64(7), "_growth_tracker": np.int32(1), "hysteresis_tracker": np.uint8(2),
        "skipped": (np.int64(5), np.int64(1)),
    }  # fmt: skip
    scaler = worn_scaler()
    scaler.load_state_dict(numpys)
    expected = {name: value for name, value in numpys.items() if name != "skipped"} | {"skipped": [5, 1]}
    assert scaler.state_dict() == expected
    assert {type(value) for value in scaler.state_dict().values()} == {float, int, list}
    params = parameters(torch.float32)
    iteration(params, mpk.optim.SGD(params, lr=0.0), scaler, math.inf)


def test_state_dict_is_not_the_scalers_own():
    given = WORN | {"skipped": [5, 1]}
    scaler = mpk.GradScaler()
    scaler.load_state_dict(given)
    given["skipped"][0] = 99
    scaler.state_dict()["skipped"][0] = 98
    assert scaler.skipped_steps == 5
