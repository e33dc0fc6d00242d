"""FLARE22's bundle is BTCV's with other labels; both lie in the repository as they are made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from shared_networks.bundle.config_format import WIDTH, format_config
from shared_networks.bundle.derive import FACTS, derive, derived_card, derived_files
from shared_networks.errors import InputError
from shared_networks.synthetic.tissues import label_names
from tests.conftest import ROOT

BTCV, FLARE = "hi_end_mae_btcv_seg", "hi_end_mae_flare_seg"


def test_the_second_bundle_is_what_its_facts_and_the_first_make() -> None:
    made = derived_files(ROOT / FLARE)
    different = [path for path, text in made.items() if (ROOT / FLARE / path).read_text(encoding="utf-8") != text]
    assert different == [], "run python -m shared_networks.bundle.derive --bundle hi_end_mae_flare_seg"
    configs = {f"configs/{file.name}" for file in (ROOT / BTCV / "configs").glob("*.json")}
    assert configs <= set(made)


def test_only_labels_validation_cases_and_facts_differ() -> None:
    for file in (ROOT / BTCV / "configs").glob("*.json"):
        one, other = (json.loads((ROOT / bundle / "configs" / file.name).read_text()) for bundle in (BTCV, FLARE))
        assert list(one) == list(other)
        differing = {key for key in one if one[key] != other[key]}
        if file.name != "metadata.json":
            assert differing <= {"label_names", "split"}
    train = json.loads((ROOT / FLARE / "configs" / "train.json").read_text())
    assert train["label_names"] == list(label_names("flare")) and train["split"]["val_cases"] == []


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A clone with an empty bundle, but for what its card shows."""
    shutil.copytree(ROOT / BTCV, tmp_path / BTCV, ignore=shutil.ignore_patterns("models", "outputs", "weights"))
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("results", "*.png"))
    (tmp_path / "own" / "docs").mkdir(parents=True)
    for name in ("overlay.png", "failure.png", "data_license.txt"):
        (tmp_path / "own" / "docs" / name).touch()
    return tmp_path


def test_a_third_bundle_is_made_by_the_command(beside: Path) -> None:
    tmp_path = beside
    facts = yaml.safe_load((ROOT / FLARE / FACTS).read_text())
    facts |= {"label_names": ["background", "liver"], "val_cases": ["a"], "words": {"BTCV": "OWN"}}
    (tmp_path / "own" / FACTS).write_text(yaml.safe_dump(facts))
    derive(str(tmp_path / "own"))
    train = json.loads((tmp_path / "own" / "configs" / "train.json").read_text())
    assert train["label_names"] == ["background", "liver"] and train["split"]["val_cases"] == ["a"]
    metadata = json.loads((tmp_path / "own" / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "liver"}
    assert "| 0 | background | 1 | liver |" in (tmp_path / "own" / "docs" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("words: null", r"facts.yaml: words missing or of another kind"),
        ("derived_from: nowhere", r"nowhere: has no configs/train.json"),
        ("card: {Weather: sunny}", r"there is no section 'Weather'; there are Intended use"),
        ("card: {Data: 2022}", r"facts.yaml: card: YAML reads 2022, which is no text; quote it"),
        ("words: {BTCV: 2022}", r"facts.yaml: words: YAML reads 2022, which is no text; quote it"),
        ("words: {yes: done}", r"facts.yaml: words: YAML reads True, which is no text"),
        ("val_cases: [0035, 0036]", r"facts.yaml: val_cases: YAML reads 29, .* such as '0035'"),
        ("label_names: [background, liver, yes]", r"facts.yaml: label_names: YAML reads True, which is no"),
        ("label_names: [background, liver, liver]", r"label_names: liver stand\(s\) for several values"),
        ("label_names: [liver, background]", r"label_names: begin with 'liver'; value 0 is background"),
        ("label_names: [background]", r"label_names: \['background'\] names no organ"),
    ],
)
def test_wrong_facts_are_said_in_one_line(change: str, said: str, beside: Path) -> None:
    """As they are written: of two entries of a name YAML takes the last."""
    (beside / "own" / FACTS).write_text(f"{(ROOT / FLARE / FACTS).read_text()}\n{change}\n")
    with pytest.raises(InputError, match=said) as caught:
        derived_files(beside / "own")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not readable as facts"):
        derived_files(beside / "none")


def test_files_that_the_card_links_to_must_be_there(beside: Path) -> None:
    facts = yaml.safe_load((ROOT / FLARE / FACTS).read_text())
    facts["card"]["Performance"] += (
        "\nSee [a guide](../../docs/gide.md), [scores](#data) and [more](https://monai.io).\n"
    )
    (beside / "own" / FACTS).write_text(yaml.safe_dump(facts))
    (beside / "own" / "docs" / "overlay.png").unlink()
    with pytest.raises(InputError, match=r"own/docs: \.\./\.\./docs/gide\.md, overlay\.png not there") as caught:
        derive(str(beside / "own"))
    assert "\n" not in str(caught.value)
    assert not (beside / "own" / "configs").exists()


def test_a_card_keeps_its_other_sections_with_words_replaced() -> None:
    card = "# A of X\n\nX.\n\n## One\n\nX here.\n\n## Two\n\nold\n"
    assert (
        derived_card(card, {"Two": "new X"}, {"X": "Y"}) == "# A of Y\n\nY.\n\n## One\n\nY here.\n\n## Two\n\nnew X\n"
    )


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("hi_end_mae_*/configs/*.json")), ids=lambda f: f"{f.parts[-3]}/{f.name}"
)
def test_configs_have_one_layout(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == format_config(json.loads(file.read_text(encoding="utf-8")))


def test_layout_of_a_config() -> None:
    content = {"a": [1, 2], "b": {"c": "d"}, "e": {"f": {"g": 1}}, "h": ["x" * 70, "y" * 70], "i": [{"j": []}], "k": {}}
    text = format_config(content)
    assert json.loads(text) == content and max(map(len, text.splitlines())) <= WIDTH
    assert text.splitlines()[1:6] == [
        '    "a": [1, 2],',
        '    "b": {"c": "d"},',
        '    "e": {',
        '        "f": {"g": 1}',
        "    },",
    ]
