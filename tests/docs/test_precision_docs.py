# SPDX-License-Identifier: Apache-2.0
"""docs/which-precision.md and docs/my-loss-is-nan.md run from top to bottom, and print what they show, but for last digits."""

import re
import subprocess
import sys

import pytest
import torch

from tests.paths import ROOT


def printed(text: str) -> str:
    """Without the digits of numbers, their signs and the widths of columns, which another CPU's rounding changes."""
    return re.sub(r"[-+]?\d[\d.]*(e[-+]\d+)?", "#", re.sub(r"[ ]+", " ", text))


@pytest.mark.parametrize("page", ["which-precision", "my-loss-is-nan"])
def test_precision_doc_runs(page, tmp_path, capsys):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    script = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    torch.manual_seed(0)
    (tmp_path / "page.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "page.py"], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    shown = "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
    assert printed(done.stdout) == printed(shown)


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
