"""Pages for people are short, in short sentences, and in the field's words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared_networks.settings.table import SETTINGS
from shared_networks.synthetic import phantom
from tests.conftest import BUNDLES, ROOT

CARDS = [ROOT / bundle / "docs" / "README.md" for bundle in BUNDLES]
WRITTEN_BY_PROGRAMS = [ROOT / "docs" / "results" / "speed.md", ROOT / "docs" / "results" / "transfer.md"]
PAGES = [
    page
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *CARDS)
    if page not in WRITTEN_BY_PROGRAMS
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

LONGEST_SENTENCE = 25
PRIVATE_TERMS = {
    r"\btaps?\b": "encoder blocks, `out_indices`",
    r"\bbridges?\b": "decoder embedding",
    r"\bpublished way\b": "the authors' code, baseline",
    r"\bthere and back\b": "say what is done",
    r"\bwhat became of\b": "say what was made",
    r"\bas (?:it|they) (?:is|are)\b": "unchanged",
    r"\bthat of\b": "repeat the noun",
    r"\bthere (?:is|are|was|were)\b|\bwhere there\b": "name the subject",
}


def prose(page: str) -> list[str]:
    """The sentences of a page of Markdown: without code, tables, pictures and addresses."""
    text = re.sub(r"^(```|~~~).*?^\1", "\n", page, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]+`", "CODE", text)
    text = re.sub(r"^(\s*)(?:[-*]|\d+\.|#+)\s", "\n", text, flags=re.MULTILINE)  # an item or a heading is a block
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    return [sentence for block in blocks for sentence in re.split(r"(?<=[.!?])[*_)]*\s+", block) if sentence]


def test_sentences_are_told_from_code_tables_and_addresses() -> None:
    page = "# One head\n\nA [link here](x.y/z). `two words here` is code!\nOn\n- item one\n- item two. More\n\n"
    page += "| a. b |\n|---|\n\n```bash\nno. such thing\n```\n\n*Last one.* End\n"
    expected = ["One head", "A link here.", "CODE is code!", "On", "item one", "item two.", "More", "*Last one.", "End"]
    assert prose(page) == expected


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_sentences_are_short(page: Path) -> None:
    long = [sentence for sentence in prose(page.read_text()) if len(sentence.split()) > LONGEST_SENTENCE]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_words_are_those_of_the_field(page: Path) -> None:
    text = " ".join(page.read_text().split())
    found = {term[0]: better for private, better in PRIVATE_TERMS.items() if (term := re.search(private, text, re.I))}
    assert found == {}


GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("data", "inference", "pretraining", "training")]
OTHER_OPTIONS = {
    "config_file", "tracking",  # monai.bundle run
    "filepath", "ckpt_file", "meta_file", "input_shape", "precision", "bundle_path",  # monai.bundle's other commands
    "bundle", "label_set", "out",  # shared_networks: relabel and derive, phantom
    "standalone", "nproc_per_node", "nnodes", "rdzv_id", "rdzv_backend", "rdzv_endpoint",  # torchrun
    "logdir",  # tensorboard
    "weights", "fast", "json",  # hi-end-mae
}  # fmt: skip


@pytest.mark.parametrize("page", [*CARDS, *GUIDES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_and_settings_exist(page: Path) -> None:
    text = re.sub(r"^#SBATCH.*$", "", page.read_text(), flags=re.MULTILINE)
    options = set(re.findall(r"(?<![\w-])--([\w#]+)", text)) - OTHER_OPTIONS - phantom.OPTIONS.keys()
    assert options
    assert options - SETTINGS.keys() == set()
    parts = set(re.findall(r"`(\w+#[\w#]+)`", text))
    assert parts - SETTINGS.keys() == set()


def test_readme_fits_130_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("card", CARDS, ids=BUNDLES)
def test_card_has_at_most_1200_words(card: Path) -> None:
    assert len(card.read_text().split()) <= 1200


@pytest.mark.parametrize("page", [*PAGES, *WRITTEN_BY_PROGRAMS], ids=str)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)(?:#([^)]+))?\)", text):
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page}: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {path}#{anchor}"
