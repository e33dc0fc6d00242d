"""Files that hosts and package tools read: they parse, agree with the package, and call what exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import tomllib
import yaml

from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [file for file in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if file.stem != "config"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_yaml(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def commands(workflow: Path) -> list[str]:
    jobs = read_yaml(workflow)["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "version", "license"}
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    paper = citation["preferred-citation"]
    assert citation["references"] == [paper]
    bibtex = (ROOT / "README.md").read_text().split("```bibtex")[1]
    assert paper["title"] in bibtex and paper["journal"] in bibtex and f"{{{paper['year']}}}" in bibtex
    assert all(f"{author['family-names']}, {author['given-names']}" in bibtex for author in paper["authors"])
    assert paper["identifiers"][0]["value"] in bibtex


def test_changelog_has_this_version_and_work_to_come() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^]]+)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert versions[1][0] == __version__
    assert str(read_yaml(ROOT / "CITATION.cff")["date-released"]) == versions[1][1]
    kinds = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.stem)
def test_issue_form_asks_for_what_is_needed(form: Path) -> None:
    content = read_yaml(form)
    assert content.keys() >= {"name", "description", "body"}
    assert "patient data" in content["body"][0]["attributes"]["value"]
    asked = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked)
    assert all(field["attributes"]["label"] for field in asked)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_workflow_calls_what_exists(workflow: Path) -> None:
    assert commands(workflow)
    for command in commands(workflow):
        program, *words = shlex.split(command, comments=True)
        if program.startswith(".venv/bin/"):
            assert program.removeprefix(".venv/bin/") in ("ruff", "mypy", "pip", "pip-audit")
            continue
        assert (ROOT / program).stat().st_mode & 0o111
        if words[0] in ("-m", "--monailabel", "--nnunet", "--gpu", "unit", "integration"):
            assert f"./runtests.sh {' '.join(words)}" in (ROOT / "runtests.sh").read_text()
        else:
            assert [word for word in words if not (ROOT / word).is_file()] == []


def test_workflows_run_all_that_continuous_integration_runs() -> None:
    own = {line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith((".", "./"))}
    run = {command.split("  #")[0] for workflow in WORKFLOWS for command in commands(workflow)}
    assert "./runtests.sh" in own  # which is both of these
    wanted = own - {"./runtests.sh"} | {"./runtests.sh unit", "./runtests.sh integration"}
    # A workflow may run all of what continuous integration runs a part of.
    assert {command.split(" tests/")[0] for command in wanted} <= run


def test_no_file_names_a_package_registry() -> None:
    files = [*WORKFLOWS, *FORMS, ROOT / ".pre-commit-config.yaml", ROOT / "pyproject.toml", ROOT / "runtests.sh"]
    assert [file.name for file in files if re.search(r"index-url|pypi\.|find-links", file.read_text())] == []


def test_hooks_call_the_tools_of_the_development_environment() -> None:
    hooks = [hook for repo in read_yaml(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    tools = [Path(hook["entry"].split()[0]).name for hook in hooks]
    assert tools == ["ruff", "ruff", "mypy"]
    needed = " ".join(PROJECT["optional-dependencies"]["dev"])
    assert all(f"{tool}>=" in needed for tool in tools)


@pytest.mark.integration
def test_wheel_says_that_it_is_typed_and_by_whom(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "shared_networks", tmp_path / "shared_networks", ignore=shutil.ignore_patterns("__pycache__")
    )
    build = "import setuptools.build_meta as build; print(build.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as content:
        names = content.namelist()
        (metadata,) = (content.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert "shared_networks/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", *BUNDLES))]
    for line in (
        "Author: Hi-End-MAE bundles contributors",
        "License-Expression: Apache-2.0",
        "Classifier: Typing :: Typed",
    ):
        assert line in metadata.splitlines()
