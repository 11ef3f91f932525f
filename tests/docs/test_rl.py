# SPDX-License-Identifier: Apache-2.0
"""docs/rl.md runs from top to bottom and prints what it shows; its trainer asks the device nothing."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.docs import page


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the blocks leave, and what they print."""
    return page.run("rl", tmp_path_factory.mktemp("rl"))


def test_rl_doc_runs(ran):
    assert ran[1] == "".join(page.blocks("rl", "text"))


def test_rl_doc_trainer_counts_the_steps_it_takes(ran):
    """Three updates, one of them skipped: the learning rate is that of two steps, whose EMA lies between start and end."""
    trainer = ran[0]["trainer"]
    assert trainer.taken == 2
    assert trainer.lr == pytest.approx(3 * trainer.peak / trainer.warmup)
    for name, p in trainer.policy.named_parameters():
        assert not torch.equal(trainer.ema[name], p)


def test_rl_doc_trainer_does_not_wait(ran):
    """An update reads no value: tensors that have none do."""
    Trainer, make = ran[0]["Trainer"], ran[0]["make"]
    with FakeTensorMode():
        trainer = Trainer(make())
        batch = (torch.randn(8, 16), torch.zeros(8, 1, dtype=torch.long), torch.randn(8, 1), torch.randn(8, 1))
        for _ in range(2):
            trainer.update([batch, batch])
        with pytest.raises(DataDependentOutputException):
            bool(trainer.scaler.last_step_skipped)
