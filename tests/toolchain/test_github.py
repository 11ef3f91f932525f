# SPDX-License-Identifier: Apache-2.0
"""What GitHub reads: the workflow's commands are there and its versions are the project's, the forms ask for the report."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.paths import ROOT

GITHUB = ROOT / ".github"
WORKFLOW = yaml.safe_load((GITHUB / "workflows" / "tests.yml").read_text())
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
FILES = sorted(GITHUB.rglob("*.yml"))


def name(path: Path) -> str:
    return str(path.relative_to(GITHUB))


def steps() -> list[dict]:
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_github_files_name_no_host(path):
    """Registries are those of the tools' own settings, and everything else is in the repository."""
    text = path.read_text()
    assert yaml.safe_load(text)
    assert not re.findall(r"https?:|\b[\w-]+\.(?:org|com|io|net|dev)\b", text)
    assert not re.findall(r"pull_request_target|\$\{\{ *secrets|\$\{\{ *github\.event", text)


def test_github_actions_are_of_a_major_version():
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)


def test_github_workflow_runs_what_is_there():
    """Targets of the Makefile, files and modules; a value of the matrix is one word."""
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    commands = [re.sub(r"\$\{\{.*?\}\}", "X", step["run"]).split() for step in steps() if "run" in step]
    assert ["make", "test", "TORCH=X"] in commands
    for program, first, *others in commands:
        if program == "make":
            assert first in targets
        elif first == "-m":
            assert others[0] in ("pip", "mpkernels")
        else:
            assert program == "python"
            assert (ROOT / first).is_file()


def test_github_workflow_tests_the_oldest_the_pinned_and_the_newest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = re.search(r"torch>=([\d.]+)", " ".join(project["dependencies"]))[1]
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    newest = re.search(r"torch [\d.]+ to ([\d.]+\d)", (ROOT / "README.md").read_text())[1]
    rows = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert [row["torch"] for row in rows] == [f"{oldest}.0", pinned, f"{newest}.0"]
    first, last = re.search(r"Python (3\.\d+) to\s+(3\.\d+)", (ROOT / "README.md").read_text()).groups()
    assert f">={first}" == project["requires-python"]
    assert (rows[0]["python"], rows[-1]["python"]) == (first, last)
    torches = re.search(r"TORCHES:-([\d. ]+)\}", (ROOT / "tools" / "release_check.sh").read_text())[1]
    assert torches.split() == [row["torch"] for row in rows]


@pytest.mark.parametrize("path", FORMS, ids=name)
def test_github_forms_are_forms(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    for page in re.findall(r"\bdocs/[\w./-]+\.md", path.read_text()):
        assert (ROOT / page).is_file(), page


def test_github_bug_asks_for_the_report():
    """All that says what works there is required."""
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (field,) = [field for field in form["body"] if "python -m mpkernels --json" in str(field)]
    assert field["validations"]["required"]
    assert '"--json"' in (ROOT / "mpkernels" / "__main__.py").read_text()
