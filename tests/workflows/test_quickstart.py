"""The README's first command, whole: minutes, so it is marked slow."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.integration

OUT = ROOT / "outputs" / "quickstart"


def dice_by_case() -> dict[str, dict[str, float]]:
    with (OUT / "dice.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {row.pop("case"): {organ: float(value) for organ, value in row.items() if value} for row in rows}


def assert_labels_on_grid(scans: Path, pattern: str) -> None:
    found = sorted(scans.glob(pattern))
    assert found
    for scan in found:
        source, result = nib.load(scan), nib.load(OUT / scan.name.replace("_0000.nii.gz", "_seg.nii.gz"))
        assert result.shape == source.shape
        np.testing.assert_allclose(result.affine, source.affine, atol=1e-3)
        assert result.get_data_dtype() == np.uint8


@pytest.mark.slow
def test_quickstart_on_synthetic_scans() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    subprocess.run(["./quickstart.sh"], cwd=ROOT, check=True)
    assert (OUT / "hi_end_mae_pretrain" / "model.pt").is_file()
    assert (OUT / "hi_end_mae_btcv_seg" / "model.pt").is_file()
    assert_labels_on_grid(OUT / "data" / "imagesTs", "*.nii.gz")
    for case in ("test_000", "test_001"):
        assert (OUT / f"{case}_evaluation.png").is_file()
        assert (OUT / f"{case}_reconstruction.png").is_file()
    assert len(list((OUT / "shipped").glob("*_seg.nii.gz"))) == 1
    dice = dice_by_case()
    assert set(dice) == {"test_000", "test_001", "mean"}
    assert dice["mean"]["liver"] > 0.8, dice["mean"]  # cases never seen; a chain that breaks anywhere stays near 0
    assert dice["mean"]["mean"] > 0.6, dice["mean"]


@pytest.mark.slow
def test_quickstart_on_ones_own_folder(datasets: dict[str, Path], tmp_path: Path) -> None:
    """FLARE's order and a folder without imagesTs: the scans to segment are then the training scans."""
    data = shutil.copytree(datasets["flare"], tmp_path / "data", ignore=shutil.ignore_patterns("*Ts"))
    shutil.rmtree(OUT, ignore_errors=True)
    options = ["--data", str(data), "--bundle", "hi_end_mae_flare_seg", "--epochs", "2"]
    subprocess.run(["./quickstart.sh", *options], cwd=ROOT, check=True)
    assert (OUT / "hi_end_mae_flare_seg" / "model.pt").is_file()
    assert_labels_on_grid(data / "imagesTr", "*.nii.gz")
    assert (OUT / "dice.csv").read_text().startswith("case,liver,right kidney,spleen,")


@pytest.mark.slow
def test_one_ct_is_segmented_with_the_weights_that_ship(datasets: dict[str, Path], tmp_path: Path) -> None:
    """From the folder in which it lies."""
    scan = Path(shutil.copy(datasets["btcv"] / "imagesTs" / "test_000_0000.nii.gz", tmp_path / "ct.nii.gz"))
    subprocess.run([str(ROOT / "quickstart.sh"), "--segment", scan.name], cwd=tmp_path, check=True)
    names = {"ct_seg.nii.gz", "ct_seg.json", "ct_overlay.png", "ct_preview.png", "statistics.csv", "report.json"}
    assert {file.name for file in (OUT / "shipped").iterdir()} == names
    result = nib.load(OUT / "shipped" / "ct_seg.nii.gz")
    assert result.shape == nib.load(scan).shape
    rows = list(csv.DictReader((OUT / "shipped" / "statistics.csv").open()))
    assert {row["case"] for row in rows} == {"ct"} and sum(float(row["volume_ml"]) for row in rows) > 0
