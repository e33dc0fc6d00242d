"""Weights that ship: what they find in CTs that they never saw, and that every command takes them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from shared_networks.datasets.pairs import case_name
from shared_networks.datasets.record import read_record
from shared_networks.synthetic.tissues import label_names
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

PRETRAIN, BTCV, FLARE = BUNDLES
LABEL_SETS = {BTCV: "btcv", FLARE: "flare"}
REAL_CT = ROOT.parent / "shared" / "real_ct"
LEAST_ON_REAL_CT = {
    "liver": 0.9,
    "spleen": 0.85,
    "left kidney": 0.8,
    "right kidney": 0.8,
    "aorta": 0.7,
    "gallbladder": 0.6,
    "inferior vena cava": 0.55,
}
QUICK = ["--epochs", "1", "--warmup_epochs", "1", "--num_samples", "1", "--batch_size", "1"]


def small(bundle: str, **settings: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([ROOT / bundle / "configs" / f"{name}.json" for name in ("inference", "small")])
    parser.update({"bundle_root": str(ROOT / bundle), **settings})
    return parser


def run(bundle: str, configs: str, *words: str | Path) -> str:
    """Run a command as a user does, in the bundle's folder; returns all that it said."""
    files = repr([f"configs/{name}.json" for name in (*configs.split(), "small")])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=ROOT / bundle, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def dice(truths: Path, results: Path, bundle: str) -> dict[str, float]:
    """Dice by organ, over all voxels of all cases; of organs that are there."""
    sums: dict[str, list[int]] = {}
    for file in sorted(truths.glob("*.nii.gz")):
        truth = np.asanyarray(nib.load(file).dataobj)  # type: ignore[attr-defined]
        found = np.asanyarray(nib.load(results / f"{case_name(str(file))}_seg.nii.gz").dataobj)  # type: ignore[attr-defined]
        assert found.shape == truth.shape
        for value, organ in enumerate(label_names(LABEL_SETS[bundle])):
            both = np.count_nonzero((truth == value) & (found == value))
            either = np.count_nonzero(truth == value) + np.count_nonzero(found == value)
            before = sums.get(organ, [0, 0, 0])
            sums[organ] = [n + m for n, m in zip(before, (both, either, (truth == value).sum()), strict=True)]
    return {organ: 2 * both / either for organ, (both, either, true) in sums.items() if true and organ != "background"}


@pytest.mark.slow
@pytest.mark.parametrize("bundle", LABEL_SETS)
def test_organs_are_found_in_synthetic_cts_never_seen(bundle: str, tmp_path: Path) -> None:
    words = ["--label_set", LABEL_SETS[bundle], "--train", "0", "--test", "2", "--seed", "99", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "shared_networks.synthetic.phantom", *words], cwd=ROOT, check=True)
    run(bundle, "inference", "--dataset_dir", tmp_path, "--output_dir", tmp_path / "out", "--overlay", "False")
    found = dice(tmp_path / "labelsTs", tmp_path / "out", bundle)
    assert len(found) == 13
    assert np.mean(list(found.values())) > 0.75, found
    assert min(found[organ] for organ in ("liver", "left kidney", "right kidney", "aorta")) > 0.85, found


@pytest.mark.skipif(not REAL_CT.is_dir(), reason="the real CT is not part of the repository")
@pytest.mark.parametrize("bundle", LABEL_SETS)
def test_organs_are_found_in_a_real_ct(bundle: str, tmp_path: Path) -> None:
    data = REAL_CT / {BTCV: "Dataset001_BTCV", FLARE: "Dataset006_FLARE2022"}[bundle]
    run(bundle, "inference", "--dataset_dir", data / "imagesTr", "--output_dir", tmp_path, "--overlay", "False")
    found = dice(data / "labelsTr", tmp_path, bundle)
    for organ, least in LEAST_ON_REAL_CT.items():
        assert found[organ] >= least, found
    assert np.mean(list(found.values())) > 0.6, found


@pytest.mark.slow
def test_hidden_patches_of_synthetic_cts_never_seen_are_predicted(tmp_path: Path) -> None:
    words = ["--train", "0", "--test", "4", "--seed", "99", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "shared_networks.synthetic.phantom", *words], cwd=ROOT, check=True)
    (tmp_path / "imagesTs").rename(tmp_path / "imagesTr")
    options = ["--val_fraction", "0.75", "--output_dir", tmp_path / "out"]
    run(PRETRAIN, "train evaluate", "--dataset_dir", tmp_path, *options)
    errors = dict(csv.reader((tmp_path / "out" / "metrics.csv").open()))
    assert 0.2 < float(errors["val_masked_mse"]) < 0.85  # 1 is the error of the mean of each patch


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_file_of_weights_has_at_most_16_mb(bundle: str) -> None:
    network = small(bundle).get_parsed_content("network_def")
    assert sum(tensor.numel() for tensor in network.state_dict().values()) * 2 < 15.9e6
    file = ROOT / bundle / "weights" / "small.pt"
    assert file.stat().st_size < 16e6 and read_record(file) is not None


@pytest.mark.parametrize("bundle", BUNDLES)
def test_patches_have_18_mm_as_in_the_paper(bundle: str) -> None:
    paper = ConfigParser(json.loads((ROOT / bundle / "configs" / "inference.json").read_text()))
    for config in (small(bundle), paper):
        assert [config["patch_size"] * mm for mm in config["spacing"]] == [18, 18, 18]


def test_scans_are_segmented_with_them_and_with_others_when_asked(datasets: dict[str, Path], tmp_path: Path) -> None:
    data = ["--dataset_dir", datasets["btcv"], "--output_dir", tmp_path]
    assert "Restored all variables from ./weights/small.pt" in run(BTCV, "inference", *data)
    result, scan = (
        nib.load(tmp_path / "test_000_seg.nii.gz"),
        nib.load(datasets["btcv"] / "imagesTs/test_000_0000.nii.gz"),
    )
    assert result.shape == scan.shape  # type: ignore[attr-defined]
    rows = list(csv.DictReader((tmp_path / "statistics.csv").open()))
    assert [(row["case"], row["organ"]) for row in rows] == [("test_000", name) for name in label_names("btcv")[1:]]
    (model,) = json.loads((tmp_path / "report.json").read_text())["models"]
    assert model["file"] == "./weights/small.pt"
    trained = tmp_path / "trained" / "model.pt"
    trained.parent.mkdir()
    for ending in (".pt", ".json"):
        shutil.copy(ROOT / BTCV / "weights" / f"small{ending}", trained.with_suffix(ending))
    shown = run(BTCV, "inference", *data, "--checkpoint", trained)
    assert f"Restored all variables from {trained}" in shown


def test_they_are_evaluated(datasets: dict[str, Path], tmp_path: Path) -> None:
    run(BTCV, "train evaluate", "--dataset_dir", datasets["btcv"], "--output_dir", tmp_path)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert "weights/small.pt" in json.dumps(report)
    assert (tmp_path / "dice.csv").read_text().startswith("case,spleen,")


@pytest.mark.parametrize(
    ("bundle", "start", "said"),
    [
        (BTCV, ("--init_weights", "weights/small.pt"), "keys loaded into the segmenter"),
        (BTCV, ("--pretrained_encoder", "../hi_end_mae_pretrain/weights/small.pt"), "keys loaded into the encoder"),
        (PRETRAIN, ("--init_weights", "weights/small.pt"), "keys loaded into the network"),
    ],
)
def test_training_goes_on_from_them_in_float32(
    bundle: str, start: tuple[str, str], said: str, datasets: dict[str, Path], tmp_path: Path
) -> None:
    folders = ["--ckpt_dir", tmp_path, "--output_dir", tmp_path / "curves"]
    no_validation = ["--val_fraction" if bundle == PRETRAIN else "--split#val_fraction", "0"]
    shown = run(bundle, "train", "--dataset_dir", datasets["btcv"], *QUICK, *no_validation, *start, *folders)
    assert f"weights from {start[1]}: " in shown and said in shown and "missing keys: none" in shown
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert read_record(tmp_path / "model.pt")["preparation"]["spacing"] == [3.0, 3.0, 3.0]  # type: ignore[index]
