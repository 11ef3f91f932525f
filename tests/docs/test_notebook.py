# SPDX-License-Identifier: Apache-2.0
"""notebooks/t4.ipynb: a notebook without outputs, of code that compiles and names that exist; make release runs it."""

import ast
import builtins
import json
import re

import pytest

import mpkernels as mpk
from tests.paths import ROOT

PATH = ROOT / "notebooks" / "t4.ipynb"
NOTEBOOK = json.loads(PATH.read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_notebook_has_no_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert PATH.stat().st_size < 20_000
    assert NOTEBOOK["metadata"].keys() == {"kernelspec", "language_info"}
    for cell in NOTEBOOK["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def test_notebook_names_are_there():
    """Each cell uses what it or an earlier one defines, and of mpkernels what is public."""
    known = set(dir(builtins))
    for code in CODE:
        tree = ast.parse(code)
        nodes = list(ast.walk(tree))
        imported = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        known |= {alias.asname or alias.name for alias in imported}
        known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        known |= {argument.arg for node in nodes if isinstance(node, ast.arguments) for argument in node.args}
        assert {node.id for node in nodes if isinstance(node, ast.Name)} <= known
        for dotted in re.findall(r"\bmpk((?:\.\w+)+)", code):
            found = mpk
            for part in dotted[1:].split("."):
                found = getattr(found, part)


def test_notebook_pages_are_there():
    text = PATH.read_text()
    pages = re.findall(r"`(docs/[\w-]+\.md)`", text)
    assert pages
    assert all((ROOT / page).is_file() for page in pages)


@pytest.mark.sweep
def test_notebook_runs(capsys):
    """Cell by cell; make release does it in a kernel of Jupyter."""
    found = {}
    for code in CODE:
        exec(code, found)
    said = capsys.readouterr().out
    assert "\nstep 1 skipped at scale" in said
    assert re.search(r"^taken at scale \d+\n$", said, re.M)
