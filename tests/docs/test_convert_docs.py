# SPDX-License-Identifier: Apache-2.0
"""docs/convert.md runs from top to bottom, and the report that it shows is the one that is printed."""

import torch

import mpkernels as mpk
from tests.docs import page
from tests.paths import ROOT


def test_convert_doc_runs(tmp_path):
    torch.manual_seed(0)
    found, printed = page.run("convert", tmp_path)
    assert [printed] == page.blocks("convert", "text")
    model = found["model"]
    found["loss"].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert [row.name for row in mpk.convert_report(model) if not row.converted] == ["attention.out_proj"]


def test_convert_readme_says_what_is_not_converted():
    readme = (ROOT / "README.md").read_text()
    assert "Linears only: combine with autocast for convolutions." in readme
    assert "(docs/convert.md)" in readme
