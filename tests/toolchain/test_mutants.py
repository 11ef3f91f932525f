# SPDX-License-Identifier: Apache-2.0
"""The mutation tool: what it changes in Python, and that its list names files, tests and lines that are there."""

import importlib.util
import tomllib

from tests.paths import ROOT

_spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
mutants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutants)

SOURCE = '''
def f(x: int = 2, *, late: bool = False) -> int:
    """Words, which are not 1 < 2."""
    if x <= 0 and late:
        raise ValueError(f"{x + 1}")
    x += 1
    return x
'''


def test_mutants_change_one_place_of_behaviour(tmp_path, monkeypatch):
    (tmp_path / "f.py").write_text(SOURCE)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    found = list(mutants.python_mutants("f.py", ()))
    changes = {(m.old.partition("[")[2].rstrip("]"), m.new) for m in found}
    assert changes == {
        ("2", "(3)"),
        ("False", "(True)"),
        ("x <= 0 and late", "(x <= 0 or late)"),
        ("x <= 0 and late", "(not (x <= 0 and late))"),
        ("x <= 0", "(x < 0)"),
        ("0", "(1)"),
        ("x += 1", "pass"),
        ("1", "(2)"),
        ("return x", "return None"),
    }
    assert len({m.name for m in found}) == len(found) == len(changes)
    for mutant in found:
        compile(mutant.source, "f.py", "exec")


def test_mutants_are_of_files_and_tests_that_exist():
    table = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text())
    assert all(any(ROOT.glob(glob)) for glob in table["tests"])
    tests = {test for entry in (*table["tests"].values(), *(e["tests"] for e in table["cpp"])) for test in entry}
    files = {entry["file"] for entry in (*table["cpp"], *table["equivalent"])}
    assert not [path for path in tests | files if not (ROOT / path).exists()]
    assert all(entry["reason"] for entry in table["equivalent"])
    stale = [entry for entry in table["cpp"] if (ROOT / entry["file"]).read_text().count(entry["old"]) != 1]
    assert not stale
    assert len(table["cpp"]) >= 50
