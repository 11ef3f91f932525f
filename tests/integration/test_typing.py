# SPDX-License-Identifier: Apache-2.0
"""The public face as type checkers see it: typical uses pass, typical mistakes do not, and names are those that run."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from mpkernels import policy
from mpkernels.ops.linear_act import epilogues
from mpkernels.runtime.resolve import BACKENDS, BackendName
from tests.paths import ROOT

USES = "tests/typing/typical_uses.py"
CHECKERS = {
    "mypy": ("--strict", "--follow-imports=silent", "--python-executable", sys.executable),
    "pyright": ("--project", "tests/typing/pyrightconfig.json", "--pythonpath", sys.executable),
}


@pytest.mark.parametrize("checker", [pytest.param("mypy", marks=pytest.mark.sweep), "pyright"])  # mypy reads all of torch
def test_typing_of_typical_uses(checker):
    """A mistake that is not refused fails as well: its `type: ignore` is unused."""
    tool = Path(sys.executable).with_name(checker)
    if not tool.exists():
        pytest.skip(f"{checker} is not installed")
    command = [tool, *CHECKERS[checker]]
    result = subprocess.run(
        [*command, *([USES] if checker == "mypy" else [])], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_typing_names_are_those_that_run():
    names = get_args(policy.PolicyName)
    assert [name for name in names if "," not in name] == list(policy._NAMED)
    assert len(set(map(policy.Policy.parse, names))) == len(names)
    assert [None, *get_args(epilogues.ActivationName)] == list(epilogues._NAMES)
    assert get_args(BackendName) == BACKENDS
