# SPDX-License-Identifier: Apache-2.0
"""docs/convert.md runs from top to bottom, and the report that it shows is the one that is printed."""

import re
import runpy

import torch

import mpkernels as mpk
from tests.paths import ROOT

DOC = ROOT / "docs" / "convert.md"


def test_convert_doc_runs(tmp_path, capsys):
    text = DOC.read_text()
    script = tmp_path / "convert_doc.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    torch.manual_seed(0)
    found = runpy.run_path(str(script))
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert capsys.readouterr().out == shown
    model = found["model"]
    found["loss"].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert [row.name for row in mpk.convert_report(model) if not row.converted] == ["attention.out_proj"]


def test_convert_readme_says_what_is_not_converted():
    readme = (ROOT / "README.md").read_text()
    assert "Linears only: combine with autocast for convolutions." in readme
    assert "(docs/convert.md)" in readme
