from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from shared_networks.datasets.record import file_digest, training_record, write_model
from shared_networks.doors.bundles import label_names
from shared_networks.doors.inference import SIZES, check_owner, configured, default_weights, network_size
from shared_networks.errors import InputError
from shared_networks.settings.command_line import Given
from tests.conftest import BUNDLES, ROOT

PRETRAIN, BTCV, FLARE = (ROOT / name for name in BUNDLES)


def shipped(bundle: Path) -> Path:
    return bundle / "weights" / "small.pt"


def tiny_weights(folder: Path, **settings: Any) -> Path:
    """Random weights of a tiny network."""
    config = ConfigParser()
    config.read_config([BTCV / "configs" / f"{name}.json" for name in ("inference", "tiny")])
    config.update({"bundle_root": str(BTCV), "num_classes": 14, **settings})
    torch.save(config.get_parsed_content("network_def").state_dict(), folder / "model.pt")
    return folder / "model.pt"


def test_sizes_are_overlays_of_both_bundles() -> None:
    assert [(bundle / "configs" / f"{size}.json").is_file() for bundle in (BTCV, FLARE) for size in SIZES[:2]]
    assert SIZES == ("small", "tiny", "")


def test_the_network_has_the_size_of_the_weights(tmp_path: Path) -> None:
    assert network_size(BTCV, shipped(BTCV), []) == "small"
    assert network_size(BTCV, tiny_weights(tmp_path), []) == "tiny"


def test_the_network_may_be_one_that_settings_describe(tmp_path: Path) -> None:
    weights = tiny_weights(tmp_path, **{"network_def#feature_size": 4})
    assert network_size(BTCV, weights, [Given("network_def#feature_size", 4, 4)]) == "tiny"
    assert network_size(BTCV, weights, []) == "tiny"  # fits none; the nearest says best what does not


def test_weights_of_other_labels_are_measured_by_the_network_of_their_size(tmp_path: Path) -> None:
    names = Given("label_names", ["background", "liver"], ["background", "liver"])
    shutil.copy(shipped(BTCV), tmp_path / "small.pt")  # without its record, which has the labels
    for size, file in (("tiny", tiny_weights(tmp_path)), ("small", tmp_path / "small.pt")):
        assert network_size(BTCV, file, [names, Given("checkpoint", str(file), str(file))]) == size


def test_settings_may_be_numpys_numbers(tmp_path: Path) -> None:
    """As a nibabel header gives them; records are JSON, which knows Python's alone."""
    zooms = (np.float32(1.5), np.float32(2), np.float32(2.5))
    for spacing in (zooms, np.array(zooms), torch.tensor(zooms)):
        given = [Given("spacing", spacing, spacing), Given("overlap", np.float32(0.25), None)]
        config = configured(BTCV, "small", [*given, Given("sw_batch_size", np.int64(2), None)])
        found = {name: config.get_parsed_content(name) for name in ("spacing", "overlap", "sw_batch_size")}
        assert json.loads(json.dumps(found)) == {"spacing": [1.5, 2, 2.5], "overlap": 0.25, "sw_batch_size": 2}


def test_one_model_and_several_are_not_given_together() -> None:
    given = [Given("checkpoint", "a.pt", "a.pt"), Given("checkpoints", ["b.pt", "c.pt"], ["b.pt", "c.pt"])]
    with pytest.raises(
        InputError, match=r"^one model, a\.pt, and several, \['b\.pt', 'c\.pt'\], are given; give one of"
    ):
        configured(BTCV, "small", given)
    configured(BTCV, "small", [given[0], Given("checkpoints", [], [])])
    configured(BTCV, "small", given[1:])


def test_settings_are_values_and_paths_no_expressions() -> None:
    given = [Given("dataset_dir", "$1 + 1", "$1 + 1"), Given("overlap", "0.4", 0.4), Given("seed", "7", 7)]
    config = configured(BTCV, "small", given)
    assert config.get_parsed_content("dataset_dir") == "$1 + 1"
    assert config.get_parsed_content("overlap") == 0.4
    assert config.get_parsed_content("seed") == 7
    assert config.get_parsed_content("img_size") == [60, 60, 60]
    assert config.get_parsed_content("bundle_root") == str(BTCV)


@pytest.mark.parametrize("weights", [shipped(BTCV), BTCV / "weights" / "none.pt"], ids=["its own", "missing"])
def test_weights_of_the_bundle_are_left_to_its_own_check(weights: Path) -> None:
    check_owner(weights, BTCV)


def test_weights_without_a_record_are_left_to_its_own_check(tmp_path: Path) -> None:
    shutil.copy(shipped(FLARE), tmp_path / "model.pt")
    check_owner(tmp_path / "model.pt", BTCV)


def test_weights_of_labels_that_no_bundle_has_are_left_to_its_own_check(tmp_path: Path) -> None:
    shutil.copy(shipped(BTCV), tmp_path / "model.pt")
    record = json.loads((BTCV / "weights" / "small.json").read_text())
    record |= {"labels": {"background": 0, "liver": 1}, "weights_sha256": file_digest(tmp_path / "model.pt")}
    (tmp_path / "model.json").write_text(json.dumps(record))
    check_owner(tmp_path / "model.pt", BTCV)


@pytest.mark.parametrize(
    ("owner", "bundle", "fix"),
    [
        (FLARE, BTCV, "give --bundle flare"),
        (BTCV, FLARE, "give --bundle btcv"),
        (PRETRAIN, BTCV, f"give a model of {BTCV.name}"),
    ],
    ids=["flare", "btcv", "pretrain"],
)
def test_weights_of_another_bundle_are_refused(owner: Path, bundle: Path, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        check_owner(shipped(owner), bundle)
    assert str(caught.value) == f"{shipped(owner)}: weights of {owner.name}, not of {bundle.name}; {fix}"


def trained(bundle: Path, names: list[str]) -> Path:
    """A model in the folder in which the bundle trains."""
    record = training_record("", {"train": [], "validation": [], "test": []}, {}, label_names=names)
    write_model({"a": torch.zeros(1)}, bundle / "models" / "model.pt", record)
    return bundle / "models" / "model.pt"


def test_a_bundle_without_weights_that_ship_takes_the_model_that_it_trained(tmp_path: Path) -> None:
    """Also one that was copied by hand, with weights of the labels before."""
    names = ["background", "liver"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "inference.json").write_text(json.dumps({"label_names": names}))
    with pytest.raises(InputError) as caught:
        default_weights(tmp_path)
    none = f"{tmp_path}: has no weights of its labels, neither weights/small.pt nor models/model.pt; train it, or give"
    assert str(caught.value) == f"{none} --weights a model.pt of these labels"
    model = trained(tmp_path, names)
    assert default_weights(tmp_path) == model
    shutil.copytree(BTCV / "weights", tmp_path / "weights")
    assert default_weights(tmp_path) == model
    trained(tmp_path, ["background", "spleen"])
    with pytest.raises(InputError, match="has no weights of its labels"):
        default_weights(tmp_path)
    model.with_suffix(".json").unlink()  # of labels that nobody knows
    assert default_weights(tmp_path) == model


def test_weights_that_ship_come_before_a_model_that_was_trained(tmp_path: Path) -> None:
    for folder in ("configs", "weights"):
        shutil.copytree(BTCV / folder, tmp_path / folder)
    trained(tmp_path, label_names(BTCV))
    assert default_weights(tmp_path) == shipped(tmp_path)
