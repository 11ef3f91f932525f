# SPDX-License-Identifier: Apache-2.0
"""docs/rl.md runs from top to bottom and prints what it shows; its trainer asks the device nothing."""

import contextlib
import io
import re
import runpy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.paths import ROOT

TEXT = (ROOT / "docs" / "rl.md").read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the blocks leave, and what they print."""
    folder = tmp_path_factory.mktemp("rl")
    script, printed = folder / "rl.py", io.StringIO()
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)))
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        return runpy.run_path(str(script)), printed.getvalue()


def test_rl_doc_runs(page):
    assert page[1] == "".join(re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL))


def test_rl_doc_trainer_counts_the_steps_it_takes(page):
    """Three updates, one of them skipped: the learning rate is that of two steps, whose EMA lies between start and end."""
    trainer = page[0]["trainer"]
    assert trainer.taken == 2
    assert trainer.lr == pytest.approx(3 * trainer.peak / trainer.warmup)
    for name, p in trainer.policy.named_parameters():
        assert not torch.equal(trainer.ema[name], p)


def test_rl_doc_trainer_does_not_wait(page):
    """An update reads no value: tensors that have none do."""
    Trainer, make = page[0]["Trainer"], page[0]["make"]
    with FakeTensorMode():
        trainer = Trainer(make())
        batch = (torch.randn(8, 16), torch.zeros(8, 1, dtype=torch.long), torch.randn(8, 1), torch.randn(8, 1))
        for _ in range(2):
            trainer.update([batch, batch])
        with pytest.raises(DataDependentOutputException):
            bool(trainer.scaler.last_step_skipped)
