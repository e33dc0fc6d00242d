"""Training from MONAI Label, in order: a bundle without weights is trained, segments, and trains on further labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shared_networks.version import __version__

from .conftest import (
    BTCV,
    FLARE,
    LATER,
    NAMES,
    Server,
    as_slicer_asks,
    assert_segmentation_is_that_of_bundle_run,
    bundle_run,
    read,
    segmented,
)


def test_training_without_weights_says_that_it_needs_an_encoder(server: Server) -> None:
    done = server.run("train", BTCV, max_epochs=1)
    assert done["status"] == "ERROR"
    assert "error: " in done["log"]
    assert "hi_end_mae_pretrain/models/model.pt: no pre-trained encoder there" in done["log"]
    assert not (server.bundle(BTCV) / "models").exists()


def test_training_without_weights_and_validation(server: Server) -> None:
    """Two cases, of which none is left for validation; the encoder from scratch, as the guide says."""
    config = server.bundle(BTCV) / "configs" / "train.json"
    lines = config.read_text().splitlines()
    lines = ['    "pretrained_encoder": "",' if '"pretrained_encoder":' in line else line for line in lines]
    config.write_text("\n".join(lines))
    done = server.run("train", BTCV, max_epochs=1)
    assert done["status"] == "DONE", done["log"]
    assert "no validation cases: " in done["log"]
    weights = torch.load(server.bundle(BTCV) / "models" / "model.pt", weights_only=True)
    assert weights["out.conv.conv.bias"].shape == (14,)


def test_both_bundles_are_served_at_once(server: Server) -> None:
    server.reload()
    info = server.get("/info/")
    assert list(info["models"]) == list(info["trainers"]) == [BTCV, FLARE]
    for name, model in info["models"].items():
        assert model["version"] == __version__
        assert model["type"] == "segmentation"
        assert model["labels"] == {organ: value for value, organ in enumerate(NAMES[name]) if value}
        assert model["config"]["model_filename"] == ["model.pt"]


def test_segmentation_is_that_of_bundle_run(server: Server, scans: Path, tmp_path: Path) -> None:
    assert_segmentation_is_that_of_bundle_run(server, BTCV, scans, tmp_path)


def test_training_on_saved_labels_changes_the_next_segmentation(
    server: Server, studies: Path, scans: Path, tmp_path: Path
) -> None:
    """Labels are saved as a viewer saves them; with four cases one validates, and the better model takes over."""
    before, _ = segmented(server, BTCV, "oblique", tmp_path / "before.nii.gz")
    for name in LATER:
        server.save_label(name, studies.parent / "labels" / f"{name}.nii.gz")
    assert server.get("/info/")["datastore"]["completed"] == 4
    done = server.run("train", BTCV, **{**as_slicer_asks(server, "trainers", BTCV), "max_epochs": 60})
    assert done["status"] == "DONE", done["log"]
    assert server.has_said("only a better model replaces it")
    assert server.has_said(f"Restored all variables from {server.bundle(BTCV) / 'models' / 'model.pt'}")
    after, _ = segmented(server, BTCV, "oblique", tmp_path / "after.nii.gz")
    assert (after != before).mean() > 0.01
    np.testing.assert_array_equal(after, read(bundle_run(server, BTCV, scans, tmp_path / "run")["oblique"])[0])


@pytest.fixture
def weights(server: Server) -> Iterator[Path]:
    """BTCV's weights, put back afterwards."""
    file = server.bundle(BTCV) / "models" / "model.pt"
    right = file.read_bytes()
    yield file
    file.write_bytes(right)


def test_wrong_weights_are_refused_and_not_loaded_in_part(server: Server, weights: Path, tmp_path: Path) -> None:
    """With the right ones all is well again."""
    right = torch.load(weights, weights_only=True)
    expected, _ = segmented(server, BTCV, "lps", tmp_path / "expected.nii.gz")
    for wrong, said in (
        (dict(list(right.items())[::2]), "Missing key(s) in state_dict"),
        ({**right, "out.conv.conv.bias": torch.zeros(15)}, "size mismatch for out.conv.conv.bias"),
    ):
        torch.save(wrong, weights)
        assert server.infer(BTCV, "lps").status_code == 500
        assert server.has_said(said)
    torch.save(right, weights)
    np.testing.assert_array_equal(segmented(server, BTCV, "lps", tmp_path / "again.nii.gz")[0], expected)


@pytest.mark.parametrize(("recorded", "said"), [(True, "not the weights that"), (False, "is of another network (183")])
def test_training_does_not_start_from_wrong_weights(server: Server, weights: Path, recorded: bool, said: str) -> None:
    torch.save({"vit.norm.weight": torch.zeros(9)}, weights)
    record = weights.with_suffix(".json")
    if not recorded:
        record = record.rename(record.with_suffix(".kept"))
    wrong = weights.read_bytes()
    done = server.run("train", BTCV, max_epochs=1)
    record.rename(weights.with_suffix(".json"))
    assert done["status"] == "ERROR"
    assert server.has_said(f"{weights}: ")
    assert server.has_said(said)
    assert weights.read_bytes() == wrong
