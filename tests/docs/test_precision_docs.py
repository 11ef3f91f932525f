# SPDX-License-Identifier: Apache-2.0
"""docs/which-precision.md and docs/my-loss-is-nan.md run from top to bottom, and print what they show, but for last digits."""

import re

import pytest

from tests.docs import page
from tests.paths import ROOT


def without_digits(text: str) -> str:
    """Nor the signs of numbers and the widths of columns: what another CPU's rounding changes."""
    return re.sub(r"[-+]?\d[\d.]*(e[-+]\d+)?", "#", re.sub(r"[ ]+", " ", text))


@pytest.mark.parametrize("name", ["which-precision", "my-loss-is-nan"])
def test_precision_doc_runs(name, tmp_path):
    _, printed = page.run(name, tmp_path)
    assert without_digits(printed) == without_digits("".join(page.blocks(name, "text")))


def test_precision_example_and_command_agree(capsys, monkeypatch):
    from mpkernels.precision import command

    script = f"{ROOT / 'examples' / 'advise.py'}:transformer"
    assert command.main("advise", [script, "--loss-budget", "1e9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["layer", "policy"]
    (why,) = [line for line in lines if line.startswith("blocks.1.down: ")]
    assert why.startswith(
        "blocks.1.down: not mixed_float16: x reaches 1.46e+05 in forward, float16 ends at 65504; mixed_bfloat16"
    )
    assert command.main("advise", [script, "--policies", "mixed_fp16"]) == 1
    assert "did you mean 'mixed_float16'" in capsys.readouterr().err
    assert command.main("advise", ["nothing.py:make"]) == 1
    assert "there is no file nothing.py" in capsys.readouterr().err
    assert command.main("advise", [script.replace(":transformer", ":nothing")]) == 1
    assert "advise.py has no 'nothing'" in capsys.readouterr().err
