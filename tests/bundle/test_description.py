"""What a release says of its scans is what its configs do, and its weights are of such scans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from monai.bundle import ConfigParser

from shared_networks.bundle.config_format import format_config
from shared_networks.bundle.description import described_card, described_metadata, input_text, scans_of
from shared_networks.bundle.halve import halve
from shared_networks.bundle.release import bake, bundle_files, check_scans, overlay_weights
from shared_networks.datasets.record import training_record, write_model
from shared_networks.errors import InputError
from shared_networks.networks.checkpoints import network_settings
from tests.conftest import BUNDLES, ROOT

PRETRAIN, BTCV, _ = BUNDLES
PARTS: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
OWN: dict[str, Any] = {"modality": "MR", "spacing": [5.0, 5.0, 6.0], "intensity_range": [-160, 240]}
"""Scans prepared otherwise than by any config of the repository."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with bundles that hold no weights, and an overlay of their own: tiny.json and :data:`OWN`."""
    root = tmp_path / "tree"
    for folder in ("docs", "shared_networks"):
        (root / folder).parent.mkdir(exist_ok=True)
        (root / folder).symlink_to(ROOT / folder)
    for bundle in (PRETRAIN, BTCV):
        shutil.copytree(ROOT / bundle, root / bundle, ignore=shutil.ignore_patterns("models", "outputs", "weights"))
        tiny = json.loads((root / bundle / "configs/tiny.json").read_text())
        (root / bundle / "configs/own.json").write_text(format_config({**tiny, **OWN}))
    return root


def trained(bundle: Path, file: Path, overlay: str, **changes: Any) -> Path:
    """Fresh weights of an overlay's network, with the record of a training on scans prepared by it and by changes."""
    parser = ConfigParser()
    parser.read_config([bundle / "configs" / f"{name}.json" for name in ("inference", overlay)])
    names = parser.get("label_names", [])
    parser.update({"bundle_root": str(bundle), **({"num_classes": len(names)} if names else {}), **changes})
    network = parser.get_parsed_content("network_def")
    preparation = parser.get_parsed_content("preparation")
    record = training_record("", PARTS, preparation, label_names=names, network=network_settings(network))
    write_model(network.state_dict(), file, record)
    return file


@pytest.mark.parametrize("bundle", [PRETRAIN, BTCV])
def test_weights_of_scans_prepared_otherwise_are_released_with_an_overlay_that_prepares_them_so(
    bundle: str, tree: Path, tmp_path: Path
) -> None:
    weights = trained(tree / bundle, tmp_path / "model.pt", "own")
    with pytest.raises(InputError) as caught:
        bundle_files(tree, bundle, overlay="tiny", weights=weights)
    assert str(caught.value) == (
        f"{weights}: trained with other settings: modality was MR and is CT, spacing was [5.0, 5.0, 6.0] and is "
        "[4.0, 4.0, 4.0], intensity_range was [-160, 240] and is [-175, 250]. Put "
        '"modality": "MR", "spacing": [5.0, 5.0, 6.0], "intensity_range": [-160, 240] into an overlay of your own in '
        "the bundle, such as configs/own.json, a copy of configs/tiny.json, and release with --overlay own"
    )
    files = bundle_files(tree, bundle, overlay="own", weights=weights)
    assert files["models/model.pt"] == weights.read_bytes()
    assert "voxels of 5 x 5 x 6 mm" in files["README.md"].decode()


@pytest.mark.parametrize("recorded", [True, False])
def test_weights_of_another_network_are_released_with_its_overlay(recorded: bool, tree: Path, tmp_path: Path) -> None:
    weights = trained(tree / PRETRAIN, tmp_path / "model.pt", "own")
    if not recorded:
        weights.with_suffix(".json").unlink()
    with pytest.raises(InputError) as caught:
        bundle_files(tree, PRETRAIN, overlay="small", weights=weights)
    said = str(caught.value)
    if recorded:
        assert '"intensity_range": [-160, 240], "img_size": [48, 48, 48] into an overlay of your own in the' in said
        assert "such as configs/own.json, a copy of the one that it was trained with, and release with" in said
    else:
        assert said.endswith(" here). Release with the overlay that it was trained with, such as --overlay tiny")


@pytest.mark.parametrize(
    ("scans", "text"),
    [
        ({"modality": "CT"}, "CT, Hounsfield units from -160 to 240.5 scaled to 0 to 1 and clipped"),
        ({"modality": "MR"}, "MR, scaled to 0 to 1 by percentiles of the body and clipped"),
        ({"modality": None}, "CT or MR, values from -160 to 240.5 scaled to 0 to 1 and clipped"),
    ],
)
def test_the_input_is_said_by_modality_and_window(scans: dict[str, Any], text: str) -> None:
    assert input_text({**scans, "intensity_range": [-160.0, 240.5]}) == text


@pytest.mark.parametrize(("bundle", "task"), [(PRETRAIN, "vision transformer on MR"), (BTCV, "organs in MR, in the")])
def test_a_release_of_mr_says_mr_everywhere(bundle: str, task: str, tree: Path) -> None:
    files = bundle_files(tree, bundle, overlay="own")
    metadata = json.loads(files["configs/metadata.json"])
    image = metadata["network_data_format"]["inputs"]["image"]
    assert {key: image[key] for key in ("modality", "format", "spatial_shape")} == {
        "modality": "MR",
        "format": "magnitude",
        "spatial_shape": [48, 48, 48],
    }
    assert metadata["network_data_format"]["outputs"]["pred"]["spatial_shape"] == [48, 48, 48]
    assert metadata["image_classes"] == "one channel: MR, scaled to 0 to 1 by percentiles of the body and clipped"
    assert task in metadata["task"] and " CT" not in metadata["name"] + metadata["task"]
    for card in ("README.md", "docs/README.md"):
        text = files[card].decode()
        assert "| MR, 0 to 1 |" in text and "| CT, 0 to 1 |" not in text and "a CT scan in" not in text
        assert "Its input is MR, scaled to 0 to 1 by percentiles of the body and clipped." in text
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["tags"] == ["monai", "medical", "mr", "hi-end-mae"]


def test_a_baked_window_is_said(tree: Path) -> None:
    own = json.loads((tree / BTCV / "configs/own.json").read_text())
    own |= {"modality": "CT", "intensity_range": [-1000, 1000]}
    (tree / BTCV / "configs/own.json").write_text(json.dumps(own))
    files = bundle_files(tree, BTCV, overlay="own")
    values = "CT, Hounsfield units from -1000 to 1000 scaled to 0 to 1 and clipped"
    assert json.loads(files["configs/metadata.json"])["image_classes"] == f"one channel: {values}"
    assert f"Its input is {values}." in files["README.md"].decode()


def spoil(file: str, old: str, new: str) -> Callable[[Path], Path]:
    def spoiled(bundle: Path) -> Path:
        text = (bundle / file).read_text()
        assert old in text
        (bundle / file).write_text(text.replace(old, new, 1))
        return bundle / file

    return spoiled


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            spoil("configs/train.json", '"spacing": [1.5, 1.5, 1.5]', '"spacing": [2.0, 1.5, 1.5]'),
            "spacing is [2.0, 1.5, 1.5], and [1.5, 1.5, 1.5] in configs/inference.json",
        ),
        (
            spoil("configs/metadata.json", '"modality": "CT"', '"modality": "MR"'),
            'it says "modality": "CT", not "modality": "MR"; put',
        ),
        (spoil("configs/metadata.json", "-175 to 250", "-160 to 250"), "from -175 to 250 scaled to 0 to 1 and clipped"),
        (spoil("configs/metadata.json", "organs in CT", "organs in MR"), "organs in CT, in the label order of BTCV"),
        (spoil("docs/README.md", "| CT, 0 to 1 |", "| MR, 0 to 1 |"), "| CT, 0 to 1 |"),
        (spoil("docs/README.md", "a CT scan in", "an MR scan in"), "a CT scan in"),
    ],
)
def test_a_release_refuses_what_is_of_other_scans(change: Callable[[Path], Path], said: str, tree: Path) -> None:
    file = change(tree / BTCV)
    with pytest.raises(InputError) as caught:
        bundle_files(tree, BTCV)
    assert str(caught.value).startswith(f"{file}: ") and said in str(caught.value)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_bundles_of_the_repository_say_what_their_configs_do(bundle: str) -> None:
    files = [*(ROOT / bundle / "configs").glob("*.json"), ROOT / bundle / "docs/README.md"]
    check_scans(ROOT / bundle, {file.relative_to(ROOT / bundle).as_posix(): file.read_bytes() for file in files})


def test_own_words_on_channels_stay_and_expressions_are_evaluated() -> None:
    config = json.loads((ROOT / BTCV / "configs/inference.json").read_text())
    before = json.dumps(config)
    scans = scans_of({**config, "img_size": "$[48] * 2 + [36]"})
    assert scans["img_size"] == [48, 48, 36] and json.dumps(config) == before
    metadata = json.loads((ROOT / BTCV / "configs/metadata.json").read_text())
    metadata["image_classes"] = "2 channels, arterial and portal: CT"
    made = described_metadata(metadata, {**scans, "modality": None})
    assert made["image_classes"].startswith("2 channels, arterial and portal: CT or MR, values from -175 to 250")
    assert made["task"].startswith("Segmentation of 13 abdominal organs in CT or MR")
    assert described_metadata(made, {**scans, "modality": "CT"})["task"] == metadata["task"]
    card = (ROOT / BTCV / "docs/README.md").read_text()
    either = described_card(card, {"modality": None})
    assert "a CT or MR scan in" in either and described_card(either, {"modality": "CT"}) == card


def test_overlays_with_weights_keep_the_defaults_that_these_were_trained_with(tree: Path) -> None:
    """Which are the configs' own before another overlay is baked in."""
    bundle = tree / BTCV
    bundle.joinpath("weights").mkdir()
    halve(trained(bundle, tree / "trained/model.pt", "small"), bundle / "weights/small.pt")
    files = bundle_files(tree, BTCV, overlay="own")
    small = json.loads(files["configs/small.json"])
    assert small == {
        **json.loads((bundle / "configs/small.json").read_text()),
        "modality": "CT",
        "intensity_range": [-175, 250],
    }
    assert {"weights/small.pt", "weights/small.json"} <= files.keys()
    assert json.loads(files["configs/tiny.json"]) == json.loads((bundle / "configs/tiny.json").read_text())


@pytest.mark.parametrize("overlay", ["", "tiny", "small"])
def test_weights_that_ship_are_of_the_overlay_that_names_them(overlay: str, tree: Path) -> None:
    """A tiny model in the small one's place."""
    bundle = tree / BTCV
    bundle.joinpath("weights").mkdir()
    halve(trained(bundle, tree / "trained/model.pt", "tiny"), bundle / "weights/small.pt")
    with pytest.raises(InputError) as caught:
        bundle_files(tree, BTCV, overlay=overlay)
    said = str(caught.value)
    assert said.startswith(f"{bundle}/weights/small.pt: ") and "tensors do not fit the network" in said
    assert "spacing was [4.0, 4.0, 4.0] and is [3.0, 3.0, 3.0]" in said


def test_weights_that_ship_are_of_scans_prepared_as_by_their_overlay(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tree / BTCV
    bundle.joinpath("weights").mkdir()
    halve(trained(bundle, tree / "trained/model.pt", "small", spacing=[3.0, 3.0, 5.0]), bundle / "weights/small.pt")
    with pytest.raises(InputError) as caught:
        bundle_files(tree, BTCV, overlay="tiny")
    assert str(caught.value) == (
        f"{bundle}/weights/small.pt: trained with other settings: spacing was [3.0, 3.0, 5.0] and is [3.0, 3.0, 3.0]. "
        "configs/small.json takes it by default: write it from a model that was trained with it, or put "
        '"spacing": [3.0, 3.0, 5.0] there'
    )
    for suffix in (".pt", ".json"):
        (bundle / "weights/small").with_suffix(suffix).rename((bundle / "weights/more").with_suffix(suffix))
    capsys.readouterr()
    assert "weights/more.pt" in bundle_files(tree, BTCV, overlay="small"), "none but the overlay's own is left out"
    assert capsys.readouterr().out == (
        f"{BTCV}: no weights/small.pt, so it is released without models/model.pt\n"
        f"{BTCV}: no config names weights/more.pt, so it is not compared with one\n"
    )


def test_a_release_without_a_model_says_so(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overlay in ("", "tiny"):
        assert not [path for path in bundle_files(tree, BTCV, overlay=overlay) if path.startswith("models/")]
        assert capsys.readouterr().out == f"{BTCV}: no --weights, so it is released without models/model.pt\n"


def test_an_overlay_of_other_labels_is_not_released_under_the_card_before(tree: Path) -> None:
    own = tree / BTCV / "configs/own.json"
    own.write_text(json.dumps({"label_names": ["background", "liver"]}))
    with pytest.raises(InputError, match=r"docs/README\.md: its labels are not the label_names of .*relabel"):
        bundle_files(tree, BTCV, overlay="own")


def test_weights_are_named_below_the_bundle() -> None:
    for default, named in (
        ("$(@checkpoints or [@bundle_root + '/weights/small.pt'])[0]", "weights/small.pt"),
        ("weights/a-b.safetensors", "weights/a-b.safetensors"),
        ("$@bundle_root + '/models/model.pt'", None),
        ("/data/my_weights/x.pt", None),
    ):
        found = overlay_weights({"configs/own.json": json.dumps({"checkpoint": default}).encode(), "a.json": b"{"})
        assert found == ({"own": named} if named else {})


def test_metadata_stay_as_they_are_where_nothing_in_them_is_baked() -> None:
    files = {
        file.relative_to(ROOT / BTCV).as_posix(): file.read_bytes()
        for file in (*(ROOT / BTCV / "configs").glob("*.json"), ROOT / BTCV / "docs/README.md")
    }
    files["configs/own.json"] = b'{"sw_batch_size": 2}'
    assert bake(files, "own").keys() == {f"configs/{name}.json" for name in ("inference", "evaluate", "own")}
