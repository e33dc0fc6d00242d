"""Documents are short, and written in plain sentences."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import BUNDLES, ROOT

DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / bundle / "docs" / "README.md" for bundle in BUNDLES),
]
MADE = ("settings.md", "speed.md", "transfer.md")  # by programs
PRIVATE = ("taps", "published way", "way there and back", "what became of", "as it is ", "landed")


def sentences(document: Path) -> list[str]:
    """Sentences of the prose: no code, tables, headings, references or metadata."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    text = text.split("\n## References")[0]
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#|\[|!\[)", line)]
    prose = re.sub(r"`[^`]*`", "CODE", "\n".join(lines))
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. )", prose)
    return [s for block in blocks for s in re.split(r"(?<=[.?!:;])\s+", " ".join(block.split())) if s]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_have_at_most_25_words_and_no_private_terms(document: Path) -> None:
    if document.name in MADE:
        return
    assert [s for s in sentences(document) if len(s.split()) > 25] == []
    text = document.read_text().casefold()
    assert [term for term in PRIVATE if term in text] == []


def test_the_readme_is_short_and_so_are_the_cards() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    words = {bundle: len((ROOT / bundle / "docs" / "README.md").read_text().split()) for bundle in BUNDLES}
    assert {bundle: count for bundle, count in words.items() if count > 1200} == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_hold(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = document.parent / file if file else document
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, link


def test_configs_describe_every_setting() -> None:
    table = (ROOT / "docs" / "settings.md").read_text()
    rows = [row for row in table.splitlines() if row.startswith("| `--")]
    assert len(rows) > 80 and [row for row in rows if row.endswith("|  |")] == []


def test_files_for_contributors_are_well_formed() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    commands = " ".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])
    parts = workflow["jobs"]["tests"]["strategy"]["matrix"]["part"]
    runtests, ci = (ROOT / "runtests.sh").read_text(), (ROOT / ".ci" / "run").read_text()
    assert all(part in runtests for part in parts) and "./runtests.sh" in commands
    assert all(tool in commands and tool in ci for tool in ("ruff check", "ruff format --check", "mypy"))
    for file in (*(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"), ROOT / ".pre-commit-config.yaml"):
        assert isinstance(yaml.safe_load(file.read_text()), dict), file
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = json.loads((ROOT / BUNDLES[0] / "configs" / "metadata.json").read_text())["version"]
    assert citation["version"] == version and citation["preferred-citation"]["journal"] == "Medical Image Analysis"
    assert (ROOT / "shared_networks" / "py.typed").is_file()
