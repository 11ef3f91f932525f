# SPDX-License-Identifier: Apache-2.0
"""Every page: its links, anchors and paths lead somewhere, its lines are as agreed, the site has it once."""

import importlib
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import mpkernels
from tests.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "mpkernels" / "tuned" / "README.md", ROOT / "hub" / "CARD.md"])
WIDTH = 128
# Folders that a path in a page begins with.
TOP = ("bench", "csrc", "docs", "examples", "hub", "mpkernels", "notebooks", "tests", "tools", ".ci", ".github")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """The text with fenced and indented code left out, line by line, so that numbers of lines stay."""
    fenced = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    return re.sub(r"^ {4}\S.*$", "", fenced, flags=re.M)


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert linked.is_relative_to(DOCS) or not page.is_relative_to(DOCS), f"{target}: the site ends at docs/"
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_name_files_that_exist(page):
    """Paths in backticks, with a glob for several; CHANGELOG is about what was."""
    if page.name == "CHANGELOG.md":
        pytest.skip("of the past")
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for path in re.findall(r"[\w.*/-]+", code):
            if path.split("/")[0] in TOP and "/" in path and not path.startswith("bench/out"):
                assert list(ROOT.glob(path.rstrip("/."))), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_name_what_the_package_has(page):
    """`mpk.convert`, `mpkernels.optim.AdamW`: every public name in a page is there."""
    text = re.sub(r"^::: .*", "", page.read_text(), flags=re.M)  # paths: test_pages_api_has_every_public_name
    for dotted in re.findall(r"(?<![\w.])(?:mpk|mpkernels)((?:\.[A-Za-z_]\w*)+)", text):
        found = mpkernels
        for part in dotted[1:].split("."):
            if part in ("py", "md", "pth"):
                break
            assert hasattr(found, part), f"{dotted} in {page.name}"
            found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_lines_are_short(page):
    """Prose is; a row of a table is one line."""
    lines = enumerate(without_code(page.read_text()).splitlines(), 1)
    assert not [i for i, line in lines if len(line) > WIDTH and not line.startswith("|")]


def test_pages_of_the_site():
    """The navigation has every page once, and index.md links every one but itself."""
    nav = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = [str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)]
    assert sorted(nav) == pages
    linked = re.findall(r"\]\(([^)\s]+\.md)\)", (DOCS / "index.md").read_text())
    assert sorted({*linked, "index.md"}) == pages


def test_pages_site_is_built_strictly():
    """`make docs`: a link that leads nowhere, or a page that the navigation lacks, is a warning, and a warning fails."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--no-print-directory", "-n", "docs"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mkdocs build --strict" in said.splitlines()[-1]
    configuration = (ROOT / "mkdocs.yml").read_text()
    for what in ("omitted_files", "not_found", "anchors"):
        assert f"{what}: warn" in configuration


def test_pages_api_has_every_public_name():
    """docs/api.md, in which the site puts the docstrings: of what a path names, or of what its heading does."""
    blocks = re.findall(
        r"^::: mpkernels\.(\S+)$(?:\n    options:\n      heading: mpkernels\.(\S+)$)?", (DOCS / "api.md").read_text(), re.M
    )
    named = [heading or path for path, heading in blocks]
    modules = {"nn", "ops", "optim", "functional"}
    assert set(mpkernels.__all__) - modules <= set(named)
    assert {f"optim.{n}" for n in mpkernels.optim.__all__} <= set(named)
    for path, heading in blocks:
        module, _, name = f"mpkernels.{path}".rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert (found.__doc__ or "").strip(), path
        assert not heading or getattr(mpkernels, heading) is found, path
        # Where a file has the function's name, another path would be that of the file, for the site.
        assert module == found.__module__ or not found.__module__.endswith(f".{name}"), path


def test_pages_say_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
    assert f"\n## {project['version']} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "what, word",
    [
        ("AdamW's formula", r"\bbeta2\b"),
        ("the WGMMA main loop", r"\bwgmma_commit\b"),
        ("where `found_inf` is decided", r"\bisfinite\b"),
        ("growth and backoff", r"\bbackoff_factor\b"),
        ("the compute copy", r"\bclass ComputeCopy\b"),
    ],
)
def test_pages_architecture_leads_to_the_file(what, word):
    """The first file of a line of the table has what the line says."""
    (line,) = re.findall(rf"^\| {what}.*$", (DOCS / "architecture.md").read_text(), re.M)
    first = next(path for path in re.findall(r"`([\w./]+)`", line) if "/" in path)
    assert re.search(word, (ROOT / first).read_text()), first
