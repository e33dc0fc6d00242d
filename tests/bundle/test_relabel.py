"""A copy of a bundle with other labels: nothing in it is of the labels before."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from shared_networks.bundle.card import card_labels, general_card, labels_section, relative_links
from shared_networks.bundle.config_format import format_config
from shared_networks.bundle.halve import halve
from shared_networks.bundle.relabel import relabel
from shared_networks.bundle.release import bundle_files
from shared_networks.datasets.record import training_record, write_model
from shared_networks.errors import InputError
from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT

PRETRAIN, BTCV, FLARE = BUNDLES
NAMES = ["background", "aorta", "left|right kidney", "liver"]
PARTS: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}


def copied(bundle: str, root: Path) -> Path:
    """A source tree with a copy of a bundle, as `cp -r` makes it."""
    for folder in ("docs", "shared_networks"):
        (root / folder).symlink_to(ROOT / folder)
    return Path(shutil.copytree(ROOT / bundle, root / "own_seg", ignore=shutil.ignore_patterns("models", "outputs")))


def dataset(root: Path, names: list[str]) -> Path:
    file = root / "dataset.json"
    file.write_text(json.dumps({"labels": {name: value for value, name in enumerate(names)}}))
    return file


@pytest.fixture(params=[BTCV, FLARE])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    bundle = copied(request.param, tmp_path)
    relabel(bundle, dataset(tmp_path, NAMES))
    return bundle


def model(file: Path, names: list[str], overlay: str = "tiny") -> Path:
    """Fresh weights of the network of an overlay, with a record of labels."""
    parser = ConfigParser()
    parser.read_config([ROOT / BTCV / "configs" / f"{name}.json" for name in ("inference", overlay)])
    parser.update({"bundle_root": str(ROOT / BTCV), "num_classes": len(names)})
    weights = parser.get_parsed_content("network_def").state_dict()
    write_model(weights, file, training_record("", PARTS, parser.get_parsed_content("preparation"), label_names=names))
    return file


def test_card_and_metadata_are_of_the_new_labels_and_of_no_other_data(own: Path) -> None:
    card, metadata = (own / "docs/README.md").read_text(), json.loads((own / "configs/metadata.json").read_text())
    assert card_labels(card) == dict(enumerate(NAMES))
    assert card.startswith("# Hi-End-MAE segmentation, own_seg\n") and metadata["name"] == card[2:].split("\n")[0]
    assert "`[B, 4, H, W, D]`" in card and "| encoder | 12 blocks, width 1536, 16 heads;" in card
    for text in (card, json.dumps(metadata)):
        assert not re.search(r"BTCV|FLARE|spleen|13 |14 |\.png|small\.pt|small weights|Landman B, Xu|Ma J", text), text
    assert metadata["description"].endswith("for the labels of own_seg.") and list(metadata["changelog"]) == [
        __version__
    ]
    assert {file.name for file in (own / "docs").iterdir()} == {"README.md"}
    for link in relative_links(card):
        assert (own / "docs" / link).is_file(), link


def test_weights_of_other_labels_go_and_small_json_takes_those_of_the_new_ones(own: Path, tmp_path: Path) -> None:
    """The way of the guide: relabel, train with small.json, halve, release."""
    assert list((own / "weights").iterdir()) == []
    small, before = (root / "configs/small.json" for root in (own, ROOT / BTCV))
    assert small.read_text() == before.read_text()
    file = own / "weights" / "small.pt"
    halve(model(tmp_path / "trained" / "model.pt", NAMES, overlay="small"), file)
    files = bundle_files(tmp_path, "own_seg", overlay="small")
    assert files["models/model.pt"] == file.read_bytes() and "models/model.json" in files
    assert not [path for path in files if path.startswith("weights/")]
    assert "Its weights are `models/model.pt`" in files["README.md"].decode()
    files = bundle_files(tmp_path, "own_seg")
    assert files["weights/small.pt"] == file.read_bytes() and "models/model.pt" not in files
    parser = ConfigParser()
    parser.read_config([own / "configs" / f"{name}.json" for name in ("inference", "small")])
    parser["bundle_root"] = str(own)
    assert Path(parser.get_parsed_content("checkpoint")) == file


def test_a_copy_whose_configs_are_of_mr_is_one_of_mr(tmp_path: Path) -> None:
    bundle = copied(BTCV, tmp_path)
    for name in ("train", "inference"):
        file = bundle / "configs" / f"{name}.json"
        file.write_text(file.read_text().replace('"modality": "CT"', '"modality": "MR"'))
    relabel(bundle, dataset(tmp_path, NAMES))
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    assert metadata["task"] == "Segmentation of 3 organ(s) in MR"
    assert metadata["network_data_format"]["inputs"]["image"]["modality"] == "MR"
    card = (bundle / "docs/README.md").read_text()
    assert "an MR scan in, the [labels]" in card and "| MR, 0 to 1 |" in card
    bundle_files(tmp_path, "own_seg")


def test_weights_of_the_new_labels_and_of_unknown_ones_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = copied(BTCV, tmp_path)
    model(bundle / "weights" / "own.pt", NAMES)
    torch.save({"a": torch.zeros(1)}, bundle / "weights" / "bare.pt")
    relabel(bundle, dataset(tmp_path, NAMES))
    assert {file.name for file in (bundle / "weights").iterdir()} == {"own.pt", "own.json", "bare.pt"}
    removed = re.findall("removed (.*), of", capsys.readouterr().out)
    pictures = [f"docs/{name}" for name in ("data_license.txt", "failure.png", "overlay.png")]
    assert removed == ["weights/small.pt", "weights/small.json", *pictures]


def test_a_copy_with_the_same_labels_keeps_its_weights(tmp_path: Path) -> None:
    bundle = copied(FLARE, tmp_path)
    relabel(bundle, dataset(tmp_path, json.loads((bundle / "configs/train.json").read_text())["label_names"]))
    assert {file.name for file in (bundle / "weights").iterdir()} == {"small.pt", "small.json"}
    assert "/weights/small.pt" in (bundle / "configs/small.json").read_text()


def test_a_release_of_a_copy_is_of_its_labels(own: Path, tmp_path: Path) -> None:
    """The way of the guide: relabel, train, release."""
    weights = model(own / "models" / "model.pt", NAMES)
    files = bundle_files(tmp_path, "own_seg", overlay="tiny", weights=weights)
    assert not [path for path in files if path.startswith("weights/") or path.endswith(".png")]
    assert files["models/model.pt"] == weights.read_bytes()
    for card in ("README.md", "docs/README.md"):
        assert card_labels(files[card].decode()) == dict(enumerate(NAMES))
    assert "--ckpt_dir trained" in files["README.md"].decode()
    assert "models/model.pt" not in bundle_files(tmp_path, "own_seg", overlay="small"), "no weights of that size"


def spoil(file: str, change: Callable[[str], str]) -> Callable[[Path], Path]:
    def spoiled(bundle: Path) -> Path:
        (bundle / file).write_text(change((bundle / file).read_text()))
        return bundle / file

    return spoiled


def with_weights(bundle: Path) -> Path:
    for name in ("small.pt", "small.json"):
        shutil.copy(ROOT / BTCV / "weights" / name, bundle / "weights" / name)
    return bundle / "weights" / "small.json"


@pytest.mark.parametrize(
    ("change", "there"),
    [
        (
            spoil("docs/README.md", lambda text: (ROOT / BTCV / "docs/README.md").read_text()),
            "1 is spleen there and aorta here",
        ),
        (
            spoil("docs/README.md", lambda text: text.replace("## Labels", "## Organs")),
            "0 is nothing there and background here",
        ),
        (
            spoil("docs/README.md", lambda text: text.replace("| 1 | aorta", "| 1 | Aorta")),
            "1 is Aorta there and aorta here",
        ),
        (spoil("configs/train.json", lambda text: text.replace('"aorta"', '"cava"')), "1 is cava there and aorta here"),
        (
            spoil("configs/metadata.json", lambda text: text.replace('"1": "aorta"', '"1": "cava"')),
            "1 is cava there and aorta here",
        ),
        (with_weights, "1 is spleen there and aorta here"),
    ],
    ids=["card", "no section", "name", "train", "metadata", "weights"],
)
def test_a_release_refuses_what_is_of_other_labels(change: Callable[[Path], Path], there: str, own: Path) -> None:
    file = change(own)
    with pytest.raises(InputError) as caught:
        bundle_files(own.parent, "own_seg")
    said = str(caught.value)
    assert said.startswith(f"{file}: its labels are not the label_names of configs/inference.json ({there}")
    assert "run python -m shared_networks.bundle.relabel" in said and "\n" not in said
    relabel(own, dataset(own.parent, NAMES))  # as it says
    bundle_files(own.parent, "own_seg")


@pytest.mark.parametrize("bundle", [BTCV, FLARE])
def test_cards_of_the_repository_list_the_labels_of_their_bundles(bundle: str) -> None:
    names = json.loads((ROOT / bundle / "configs/inference.json").read_text())["label_names"]
    assert card_labels((ROOT / bundle / "docs/README.md").read_text()) == dict(enumerate(names))


@pytest.mark.parametrize(
    "names", [["background", "1"], ["background", "a|b", "2 c", "d"], [f"n {n}" for n in range(7)]]
)
def test_labels_are_read_from_a_card_as_they_are_written(names: list[str]) -> None:
    card = general_card("A", names, ["One.", "Two."], "Recipe.")
    assert labels_section(names) in card and card_labels(card) == dict(enumerate(names))
    assert card_labels("# A\n\n## Data\n\n| 0 | background |\n") == {}


def test_configs_of_a_copy_have_the_layout_of_all(own: Path) -> None:
    for file in (own / "configs").glob("*.json"):
        assert file.read_text() == format_config(json.loads(file.read_text())), file
