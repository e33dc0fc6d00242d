from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.transforms import Invertd
from monai.transforms import Spacingd as MonaiSpacingd

from shared_networks.inference.scoring import ScorableLabels
from shared_networks.inference.sliding_window import SlidingWindowLabels
from tests.inference.test_sliding_window import ROI, SCANS, Net, preparation, prepared, write


def chances_by_monai(file: Path, network: Net) -> torch.Tensor:
    """[1, X, Y, Z]: the probability of any organ."""
    transform = preparation(MonaiSpacingd)
    batch = list_data_collate([transform({"image": str(file)})])
    with torch.no_grad():
        organs = SlidingWindowInferer(ROI, 2, 0.5)(batch["image"], lambda window: 1 - network(window).softmax(1)[:, :1])
    inverse = Invertd("pred", transform, "image", nearest_interp=False)
    return inverse(decollate_batch({**batch, "pred": organs})[0])["pred"].as_tensor()


@pytest.mark.parametrize("name", [name for name in SCANS if "smaller" not in name])  # padding counts, unlike MONAI's
def test_train_mode_gives_the_chance_of_an_organ_on_the_scans_grid(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "scan.nii.gz", *SCANS[name])
    network = Net()
    (chances,) = decollate_batch(ScorableLabels(ROI, 2)(prepared(file), network.train()))
    source = nib.load(file)
    assert chances.dtype == torch.float32
    assert chances.shape == (1, *source.shape)
    np.testing.assert_array_equal(chances.affine, source.affine)
    assert chances.max() > 0.9
    difference = (chances.as_tensor() - chances_by_monai(file, network)).abs()
    assert difference.mean() < 1e-4
    assert difference.max() < 0.05  # beyond the crop MONAI rounds


def test_evaluation_mode_gives_labels(tmp_path: Path) -> None:
    image = prepared(write(tmp_path / "scan.nii.gz", *SCANS["oblique"]))
    network = Net().eval()
    labels = ScorableLabels(ROI, 2)(image, network)
    assert labels.dtype == torch.uint8
    np.testing.assert_array_equal(labels, SlidingWindowLabels(ROI, 2)(image, network))
