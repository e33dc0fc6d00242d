"""Whole scans become the same labels on the device as on the CPU, through the whole pipeline of the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor

from shared_networks.networks.unetr import HiEndUNETR
from tests.benchmarks.window import mean_dice
from tests.conftest import ROOT

BUNDLE = ROOT / "hi_end_mae_btcv_seg"
SMALL: dict[str, Any] = {
    "spacing": [4.0, 4.0, 4.0],
    "img_size": [48, 48, 48],
    "sw_batch_size": 4,
    "network_def#feature_size": 8,
    "network_def#hidden_size": 192,
    "network_def#num_heads": 6,
}
ORGANS = 4  # of random weights; more labels than these are seen


def segment(scans: Path, weights: Path, out: Path, device: torch.device, amp: bool) -> list[np.ndarray]:
    """Label maps of a folder's scans, in the order of their names."""
    flow = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / "inference.json"),
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(scans),
        checkpoint=str(weights),
        output_dir=str(out),
        device=str(device),
        amp=amp,
        overlay=False,
        **SMALL,
    )
    flow.initialize()
    flow.run()
    return [np.asanyarray(nib.load(file).dataobj) for file in sorted(out.glob("*_seg.nii.gz"))]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network that tells many labels apart, though it has learned none: its last layer is without its bias."""
    sizes = {name.removeprefix("network_def#"): value for name, value in SMALL.items() if "#" in name}
    torch.manual_seed(0)
    network = HiEndUNETR(img_size=SMALL["img_size"], **sizes)
    torch.nn.init.zeros_(network.out.conv.conv.bias)
    file = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), file)
    return file


def share(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Share of equal voxels of all scans."""
    return float(np.mean([np.mean(a == b) for a, b in zip(first, second, strict=True)]))


def tensor(maps: list[np.ndarray]) -> Tensor:
    """Labels of all scans in a row."""
    return torch.from_numpy(np.concatenate([m.ravel() for m in maps]).astype(np.int64))


def test_labels_are_those_of_the_cpu(
    datasets: dict[str, Path], weights: Path, tmp_path: Path, device: torch.device
) -> None:
    scans = next((datasets["btcv"] / "imagesTs").glob("*.nii.gz"))
    truth = segment(scans, weights, tmp_path / "cpu", torch.device("cpu"), amp=False)
    found = segment(scans, weights, tmp_path / "device", device, amp=False)
    assert len(truth) == len(found) == 1
    assert len(np.unique(np.concatenate([m.ravel() for m in truth]))) > ORGANS
    dice = mean_dice(tensor(found), tensor(truth))
    print(f"mean Dice {dice:.5f}, equal voxels {share(found, truth):.6f}")
    assert share(found, truth) >= 0.999
    assert dice >= 0.99
    reduced = segment(scans, weights, tmp_path / "amp", device, amp=True)
    print(f"in mixed precision: equal voxels {share(reduced, truth):.4f}")
    assert share(reduced, truth) >= 0.9
