"""Weights that ship: found by `configs/small.json`, evaluated, and gone on from. Fresh ones stand in."""

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
import pytest
import torch
from monai.bundle import ConfigParser

from shared_networks.bundle.halve import halve
from shared_networks.datasets.record import read_record, training_record, write_model
from shared_networks.datasets.splits import Split
from shared_networks.synthetic.tissues import label_names
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

PRETRAIN, BTCV, _ = BUNDLES
QUICK = ["--epochs", "1", "--warmup_epochs", "1", "--num_samples", "1", "--batch_size", "1"]


def small(bundle: str, **settings: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([ROOT / bundle / "configs" / f"{name}.json" for name in ("inference", "small")])
    parser.update({"bundle_root": str(ROOT / bundle), **settings})
    return parser


@pytest.fixture(scope="module")
def shipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundles as a clone has them, with weights that ship."""
    root = tmp_path_factory.mktemp("clone")
    for name in (*BUNDLES, "shared_networks"):
        ignored = shutil.ignore_patterns("models", "outputs", "weights", "__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name, labels in ((PRETRAIN, ()), (BTCV, label_names("btcv"))):
        parser = small(name)
        split = Split({part: [] for part in ("train", "validation", "test")}, {"seed": 0})
        record = training_record("synthetic", split, parser.get_parsed_content("preparation"), label_names=labels)
        torch.manual_seed(0)
        weights = parser.get_parsed_content("network_def").state_dict()
        write_model(weights, root / "trained" / name / "model.pt", record)
        halve(root / "trained" / name / "model.pt", root / name / "weights" / "small.pt")
    return root


def run(folder: Path, configs: str, *words: str | Path) -> str:
    """Run a command as a user does, in the bundle's folder; returns all that it said."""
    files = repr([f"configs/{name}.json" for name in (*configs.split(), "small")])
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_file_of_weights_has_at_most_16_mb(bundle: str) -> None:
    network = small(bundle).get_parsed_content("network_def")
    assert sum(tensor.numel() for tensor in network.state_dict().values()) * 2 < 15.9e6
    for file in (ROOT / bundle).glob("weights/*.pt"):
        assert file.stat().st_size < 16e6 and read_record(file) is not None


@pytest.mark.parametrize("bundle", BUNDLES)
def test_patches_have_18_mm_as_in_the_paper(bundle: str) -> None:
    paper = ConfigParser(json.loads((ROOT / bundle / "configs" / "inference.json").read_text()))
    for config in (small(bundle), paper):
        assert [config["patch_size"] * mm for mm in config["spacing"]] == [18, 18, 18]


def test_scans_are_segmented_with_them_and_with_others_when_asked(
    shipping: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    data = ["--dataset_dir", datasets["btcv"], "--output_dir", tmp_path]
    assert "Restored all variables from ./weights/small.pt" in run(shipping / BTCV, "inference", *data)
    result, scan = (
        nib.load(tmp_path / "test_000_seg.nii.gz"),
        nib.load(datasets["btcv"] / "imagesTs/test_000_0000.nii.gz"),
    )
    assert result.shape == scan.shape  # type: ignore[attr-defined]
    (row,) = csv.DictReader((tmp_path / "volumes_ml.csv").open())
    assert list(row) == ["case", *label_names("btcv")[1:]]
    trained = shipping / "trained" / BTCV / "model.pt"
    shown = run(shipping / BTCV, "inference", *data, "--checkpoint", trained)
    assert f"Restored all variables from {trained}" in shown


def test_they_are_evaluated(shipping: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    run(shipping / BTCV, "train evaluate", "--dataset_dir", datasets["btcv"], "--output_dir", tmp_path)
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
    bundle: str, start: tuple[str, str], said: str, shipping: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    folders = ["--ckpt_dir", tmp_path, "--output_dir", tmp_path / "curves"]
    shown = run(shipping / bundle, "train", "--dataset_dir", datasets["btcv"], *QUICK, *start, *folders)
    assert f"weights from {start[1]}: " in shown and said in shown and "missing keys: none" in shown
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert read_record(tmp_path / "model.pt")["preparation"]["spacing"] == [3.0, 3.0, 3.0]  # type: ignore[index]
