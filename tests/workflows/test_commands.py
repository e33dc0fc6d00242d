"""Every command that a README, a card or a guide prints, run as a user runs it, small, on small synthetic CTs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared_networks.synthetic.tissues import label_names
from tests.conftest import BUNDLES, ROOT

# Coarse voxels make few windows. Reconstructions are compared with the scans, so theirs are finer.
SPACING = {"segmentation": "[6.0,6.0,6.0]", "pre-training": "[4.0,4.0,4.0]"}
# No --val_interval: the epoch is fewer than it, and a model must come out all the same.
QUICK = "--epochs 1 --warmup_epochs 1 --num_samples 1 --batch_size 1"


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / b / "docs" / "README.md" for b in BUNDLES),
]
GUIDES = {"pretraining": "hi_end_mae_pretrain", "data": "hi_end_mae_btcv_seg", "training": "hi_end_mae_btcv_seg",
          "inference": "hi_end_mae_btcv_seg"}  # fmt: skip
"""The bundle in whose folder the commands of a guide run."""
ELSEWHERE = {
    "weights/small.pt": "tests/workflows/test_shipped_weights.py",
    "hi_end_mae_10k": "tests/networks/test_checkpoints.py",  # on files of its true shapes
    "_export network_def": "tests/bundle/test_exports.py",
    "download_large_files": "tests/networks/test_checkpoints.py",
    "pip install": "",
    "nnUNet": "tests/nnunet/test_trainers.py",  # in an environment that has nnU-Net
    "HI_END_MAE_ENCODER": "tests/nnunet/test_trainers.py",
    "shared_networks.synthetic.phantom": "tests/synthetic/test_phantom.py",
    "./quickstart.sh": "tests/workflows/test_quickstart.py",
    "hi-end-mae segment": "tests/doors/test_wheel.py",
    "hi-end-mae info": "tests/doors/test_wheel.py",
}
"""Commands that other tests run, or that need the network."""


def fenced_commands(page: Path) -> list[str]:
    """Commands of the bash fences of a page, continuation lines joined."""
    fences = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(fences).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def printed_commands(page: Path) -> list[str]:
    """Those that run a bundle."""
    return [line for line in fenced_commands(page) if "-m monai.bundle run" in line]


def shape(command: str) -> str:
    """A command without names of weights, in words that a shell would see."""
    return re.sub(r"\S*\.(pth|pt)\b", "FILE", " ".join(shlex.split(command)))


def commands_in_order() -> list[tuple[str, str]]:
    """Each command once, with its bundle: a card's, then its guides', which need the models that those made."""
    found = {}
    for bundle in BUNDLES:
        guides = [ROOT / "docs" / f"{guide}.md" for guide, where in GUIDES.items() if where == bundle]
        for page in (ROOT / bundle / "docs" / "README.md", *guides):
            for command in printed_commands(page):
                found[bundle, shape(command)] = command
    return [(bundle, command) for (bundle, _), command in found.items()]


def tiny(bundle: str, command: str, data: Path, store: Path) -> list[str]:
    """The words of a printed command, made small: tiny overlay last, small data, one epoch, few windows validated."""
    words = shlex.split(command)
    at = words.index("--config_file") + 1
    files = re.findall(r"[\w/]+\.json", words[at])
    words[at] = repr([*(f for f in files if not f.endswith(("small.json", "tiny.json"))), "configs/tiny.json"])
    more = ["--min_size", "8", "--num_workers", "0"] if "configs/prepare.json" in files else []
    if "configs/train.json" in files and "configs/evaluate.json" not in files:
        more = QUICK.split()
        if "seg" in bundle:
            more += ["--validate#inferer#inferer#overlap", "0.0"]
        if "--resume" not in words:  # a card prints several ways to train, of which a user takes one
            more += ["--overwrite", "True"]
    words = [str(store) if word.startswith("/data/store") else word for word in words]
    words = [re.sub(r"^/data/\w+(/imagesTs)?$", lambda m: f"{data}{m[1] or ''}", word) for word in words]
    python = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    spacing = SPACING["segmentation" if "seg" in bundle else "pre-training"]
    return [*python, *words[1:], "--spacing", spacing, *more]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


COMMANDS = [
    pytest.param(bundle, command, id=f"{bundle.removeprefix('hi_end_mae_')}-{index}")
    for index, (bundle, command) in enumerate(commands_in_order())
    if not any(text in command for text in ELSEWHERE)
]


@pytest.mark.slow
@pytest.mark.parametrize(("bundle", "command"), COMMANDS)
def test_printed_command_runs(
    bundle: str, command: str, clone: Path, datasets: dict[str, Path], tissue_maps: dict[str, Path]
) -> None:
    """In the order printed, pre-training first, as the later ones build on the earlier ones' models."""
    of_kind = tissue_maps if "synthetic.json" in command else datasets
    data = of_kind["flare" if "flare" in bundle else "btcv"]
    run(tiny(bundle, command, data, clone / "store"), clone / bundle)


def test_every_bundle_prints_commands_for_every_config() -> None:
    """On its card, or in a guide; the guides of segmentation run in BTCV's folder and hold for FLARE22's too."""
    for bundle in BUNDLES:
        guides = "hi_end_mae_btcv_seg" if "seg" in bundle else bundle
        text = " ".join(command for where, command in commands_in_order() if where in (bundle, guides))
        for file in (ROOT / bundle / "configs").glob("*.json"):
            if file.name not in ("metadata.json", "inference_trt.json"):  # TensorRT needs a GPU; see test_exports.py
                assert f"configs/{file.name}" in text, f"{bundle} never runs {file.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_printed_command_is_run(page: Path) -> None:
    """By the test above, file names aside, by the test of lists below, or by a test that is named."""
    run_here = {shape(command) for _, command in commands_in_order()}
    left = [c for c in fenced_commands(page) if shape(c) not in run_here and "shared_networks.datasets.lists" not in c]
    assert [command for command in left if not any(text in command for text in ELSEWHERE)] == []


@pytest.mark.parametrize(("text", "test"), ELSEWHERE.items())
def test_commands_run_elsewhere_are_printed_and_tested(text: str, test: str) -> None:
    assert any(text in command for page in PAGES for command in fenced_commands(page))
    assert not test or (ROOT / test).is_file()


@pytest.mark.slow
def test_printed_list_of_another_layout_trains(clone: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    (command,) = [c for c in fenced_commands(ROOT / "docs" / "data.md") if "shared_networks.datasets.lists" in c]
    kits = tmp_path / "KITS19"
    for number in range(3):
        case = kits / f"case_{number:05d}"
        case.mkdir(parents=True)
        shutil.copy(datasets["btcv"] / f"imagesTr/train_{number:03d}_0000.nii.gz", case / "imaging.nii.gz")
        shutil.copy(datasets["btcv"] / f"labelsTr/train_{number:03d}.nii.gz", case / "segmentation.nii.gz")
    words = [str(kits) if word == "/data/KITS19" else word for word in shlex.split(command)]
    words = [str(tmp_path / word) if word == "kits.json" else word for word in words]
    run([sys.executable, *words[1:]], clone)
    train = (
        "python -m monai.bundle run --config_file configs/train.json --pretrained_encoder '' --dataset_dir kits.json"
    )
    words = [str(tmp_path / word) if word == "kits.json" else word for word in tiny(BUNDLES[1], train, kits, tmp_path)]
    run([*words, "--ckpt_dir", str(tmp_path / "models"), "--output_dir", str(tmp_path)], clone / BUNDLES[1])
    record = json.loads((tmp_path / "models" / "model.json").read_text())
    assert sorted([*record["train"], *record["validation"]]) == [f"case_{number:05d}" for number in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_left_a_flat_model_and_curves(bundle: str, clone: Path) -> None:
    weights = torch.load(clone / bundle / "models" / "model.pt", weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) and not name.startswith("module.") for name, tensor in weights.items())
    assert [file.name for file in (clone / bundle / "models").glob("*.pt")] == ["model.pt"]
    assert list((clone / bundle / "models" / "state").glob("state_*.ckpt"))
    curves = EventAccumulator(str(clone / bundle / "outputs"))
    curves.Reload()
    assert any("loss" in tag or "mse" in tag or "dice" in tag for tag in curves.Tags()["scalars"]), curves.Tags()


@pytest.mark.slow
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
    for picture in ("overlay", "evaluation"):
        assert (outputs / f"test_000_{picture}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_reconstruction_is_on_the_input_grid(clone: Path, datasets: dict[str, Path]) -> None:
    outputs = clone / "hi_end_mae_pretrain" / "outputs"
    source = nib.load(datasets["btcv"] / "imagesTs" / "test_000_0000.nii.gz")
    result = nib.load(outputs / "test_000_reconstruction.nii.gz")
    mask = np.asanyarray(nib.load(outputs / "test_000_mask.nii.gz").dataobj)
    assert result.shape == mask.shape == source.shape
    np.testing.assert_allclose(result.affine, source.affine, atol=1e-3)
    assert 0.6 < mask.mean() < 0.9  # 75 % of the patches, some beyond the scan
    seen, truth = np.asanyarray(result.dataobj)[mask == 0], np.clip(np.asanyarray(source.dataobj), -175, 250)[mask == 0]
    assert np.corrcoef(seen, truth)[0, 1] > 0.9  # visible patches are the scan, but for resampling there and back
    assert (outputs / "test_000_reconstruction.png").stat().st_size > 10_000
    assert (outputs / "metrics.csv").is_file()


@pytest.mark.slow
def test_features_attention_and_weights_were_written(clone: Path) -> None:
    outputs = clone / "hi_end_mae_pretrain" / "outputs"
    assert np.load(outputs / "test_000_features.npz")["block_3"].shape[-1] == 192
    names = {file.name for file in outputs.iterdir()}
    assert len([name for name in names if re.search(r"_(encoder|cross)_block_[369]\.nii\.gz$", name)]) >= 6
    assert any(name.endswith("_attention.png") for name in names)
    assert "vit.cls_token" not in torch.load(outputs / "encoder_monai_vit.pt", weights_only=True)
