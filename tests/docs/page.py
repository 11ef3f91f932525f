# SPDX-License-Identifier: Apache-2.0
"""A page of docs as a program: what its blocks of Python leave and print, and the blocks of text that show it."""

import contextlib
import io
import re
import runpy
from pathlib import Path

from tests.paths import ROOT


def blocks(page: str, language: str) -> list[str]:
    """Those of docs/<page>.md in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)


def run(page: str, folder: Path) -> tuple[dict, str]:
    """The names that its blocks of Python leave, run in `folder` from top to bottom, and what they print."""
    script, printed = folder / f"{page.replace('-', '_')}.py", io.StringIO()
    script.write_text("\n".join(blocks(page, "python")))
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        return runpy.run_path(str(script)), printed.getvalue()
