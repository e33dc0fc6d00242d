"""Every command that cards and documents print, run as users run it, with the tiny overlay on small synthetic CTs."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared_networks.synthetic.phantom import label_names
from tests.conftest import BUNDLES, ROOT

pytestmark = pytest.mark.integration

# No --val_interval: the epoch is fewer than it, and a model must come out all the same.
QUICK = "--epochs 1 --warmup_epochs 1 --num_samples 1 --batch_size 1"


def printed_commands(*documents: Path) -> list[str]:
    """Commands of the bash fences of documents that run a bundle, continuation lines joined, each once."""
    text = "\n".join(document.read_text() for document in documents)
    fences = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(fences).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if "-m monai.bundle run" in line))


def tiny(command: str, data: Path, store: Path) -> list[str]:
    """The words of a printed command, made small: tiny overlay last, small data, one epoch."""
    words = shlex.split(command)
    at = words.index("--config_file") + 1
    files = re.findall(r"[\w/]+\.json", words[at])
    more = []
    if files == ["configs/prepare.json"]:  # it knows no network to be made tiny
        more = ["--spacing", "[4.0,4.0,4.0]", "--min_size", "8", "--num_workers", "0"]
    else:
        words[at] = repr([*(file for file in files if not file.endswith("tiny.json")), "configs/tiny.json"])
    if "configs/train.json" in files and "configs/evaluate.json" not in files:
        more = QUICK.split()
        if "--resume" not in words:  # a card prints several ways to train, of which a user takes one
            more += ["--overwrite", "True"]
    words = [str(store) if word == "/data/store" else word for word in words]
    words = [re.sub(r"^/data/\w+(/imagesTs)?$", lambda m: f"{data}{m[1] or ''}", word) for word in words]
    python = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    return [*python, *words[1:], *more]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1" if "--nproc_per_node" in words else "2"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


DOCUMENTS = {bundle: [ROOT / bundle / "docs" / "README.md", ROOT / "docs" / "segmentation.md"] for bundle in BUNDLES}
DOCUMENTS[BUNDLES[0]][1] = ROOT / "docs" / "pretraining.md"
COMMANDS = [
    pytest.param(bundle, command, id=f"{bundle.removeprefix('hi_end_mae_')}-{index}")
    for bundle in BUNDLES
    for index, command in enumerate(printed_commands(*DOCUMENTS[bundle]))
    if "hi_end_mae_10k" not in command  # on files of its true shapes in test_checkpoints.py
]


@pytest.mark.parametrize(("bundle", "command"), COMMANDS)
def test_printed_command_runs(bundle: str, command: str, clone: Path, datasets: dict[str, Path]) -> None:
    """In the order printed, pre-training first, as the later ones build on the earlier ones' models."""
    data = datasets["flare" if "flare" in bundle else "btcv"]
    run(tiny(command, data, clone / "store"), clone / bundle)


def test_every_bundle_prints_commands_for_every_config() -> None:
    for bundle in BUNDLES:
        text = " ".join(printed_commands(*DOCUMENTS[bundle]))
        for file in (ROOT / bundle / "configs").glob("*.json"):
            if file.name not in ("metadata.json", "inference_trt.json"):  # TensorRT needs a GPU; see test_exports.py
                assert f"configs/{file.name}" in text, f"{bundle} never runs {file.name}"


def test_root_readme_prints_only_commands_that_a_bundle_prints() -> None:
    """So that running the bundles' commands runs the root README's too, file names aside."""

    def shape(command: str) -> str:
        return re.sub(r"\S*\.(pth|pt)\b", "FILE", " ".join(shlex.split(command)))

    printed = {shape(c) for bundle in BUNDLES for c in printed_commands(*DOCUMENTS[bundle])}
    assert [c for c in printed_commands(ROOT / "README.md") if shape(c) not in printed] == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_left_a_flat_model_and_curves(bundle: str, clone: Path) -> None:
    weights = torch.load(clone / bundle / "models" / "model.pt", weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) and not name.startswith("module.") for name, tensor in weights.items())
    assert [file.name for file in (clone / bundle / "models").glob("*.pt")] == ["model.pt"]
    assert list((clone / bundle / "models" / "state").glob("state_*.ckpt"))
    curves = EventAccumulator(str(clone / bundle / "outputs"))
    curves.Reload()
    assert any("loss" in tag or "mse" in tag or "dice" in tag for tag in curves.Tags()["scalars"]), curves.Tags()


@pytest.mark.parametrize(("bundle", "label_set"), [("hi_end_mae_btcv_seg", "btcv"), ("hi_end_mae_flare_seg", "flare")])
def test_segmentation_is_on_the_input_grid(bundle: str, label_set: str, clone: Path, datasets: dict[str, Path]) -> None:
    outputs = clone / bundle / "outputs"
    scans = sorted((datasets[label_set] / "imagesTs").iterdir())
    for scan in scans:
        source = nib.load(scan)
        result = nib.load(outputs / scan.name.replace("_0000.nii.gz", "_seg.nii.gz"))
        labels = np.asanyarray(result.dataobj)
        assert result.shape == source.shape
        np.testing.assert_allclose(result.affine, source.affine, atol=1e-3)
        assert labels.dtype == np.uint8
        assert labels.max() < 14
    with (outputs / "dice.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["case", *label_names(label_set)[1:], "mean"]
    assert [row[0] for row in rows[1:]] == ["test_000", "mean"]
    assert all(0 <= float(cell) <= 1 for row in rows[1:] for cell in row[1:] if cell)
    assert (outputs / "test_000_overlay.png").stat().st_size > 10_000


def test_reconstruction_is_on_the_input_grid(clone: Path, datasets: dict[str, Path]) -> None:
    outputs = clone / "hi_end_mae_pretrain" / "outputs"
    source = nib.load(datasets["btcv"] / "imagesTs" / "test_000_0000.nii.gz")
    result = nib.load(outputs / "test_000_0000_reconstruction.nii.gz")
    mask = np.asanyarray(nib.load(outputs / "test_000_0000_mask.nii.gz").dataobj)
    assert result.shape == mask.shape == source.shape
    np.testing.assert_allclose(result.affine, source.affine, atol=1e-3)
    assert 0.6 < mask.mean() < 0.9  # 75 % of the patches, some beyond the scan
    seen, truth = np.asanyarray(result.dataobj)[mask == 0], np.clip(np.asanyarray(source.dataobj), -175, 250)[mask == 0]
    assert np.corrcoef(seen, truth)[0, 1] > 0.9  # visible patches are the scan, but for resampling there and back
    assert (outputs / "test_000_reconstruction.png").stat().st_size > 10_000
    assert (outputs / "metrics.csv").is_file()


def test_features_attention_and_weights_were_written(clone: Path) -> None:
    outputs = clone / "hi_end_mae_pretrain" / "outputs"
    assert np.load(outputs / "test_000_features.npz")["block_3"].shape[-1] == 192
    names = {file.name for file in outputs.iterdir()}
    assert len([name for name in names if re.search(r"_(encoder|cross)_block_[369]\.nii\.gz$", name)]) >= 6
    assert any(name.endswith("_attention.png") for name in names)
    assert "vit.cls_token" not in torch.load(outputs / "encoder_monai_vit.pt", weights_only=True)
