"""CT by its window and MR by its foreground: one scaling from the prepared store to labels."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from monai.transforms import ScaleIntensityRange
from scipy.ndimage import binary_fill_holes, gaussian_filter

from shared_networks.datasets.record import read_record
from shared_networks.errors import InputError, input_error_in
from shared_networks.evaluation.metrics import organ_measures
from shared_networks.store.format import manifest_entries
from shared_networks.synthetic.phantom import write_dataset
from shared_networks.transforms.intensity import ScaleByModalityd, body_mask
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

PRETRAIN, SEGMENTER = ROOT / "hi_end_mae_pretrain", ROOT / "hi_end_mae_btcv_seg"


def as_mr(ct: np.ndarray, seed: int, scale: float) -> np.ndarray:
    """An MR of a CT's anatomy: fat bright, muscle and bone dark, uneven coils, Rician noise, air inside and out."""
    random = np.random.default_rng(seed)
    tissue = np.interp(ct, [-1000, -500, -150, -60, 20, 80, 200, 400], [0, 0, 900, 850, 250, 420, 600, 40])
    coils = gaussian_filter(random.normal(size=ct.shape), 12)
    tissue = tissue * (1 + 0.3 * coils / np.abs(coils).max())
    noise = random.normal(0, 12, (2, *ct.shape))
    return (scale * np.hypot(tissue + noise[0], noise[1])).astype(np.float32)


@pytest.fixture(scope="module")
def mr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set: three cases to train on and one to report on, each on its own scale."""
    data = tmp_path_factory.mktemp("mr") / "data"
    write_dataset(data, train=3, test=1, seed=7, voxel_mm=6.0)
    for index, file in enumerate(sorted(data.glob("images*/*.nii.gz"))):
        ct = nib.load(file)
        nib.save(nib.Nifti1Image(as_mr(np.asanyarray(ct.dataobj), index, 10.0**index), ct.affine), file)
    return data


def test_ct_is_scaled_as_by_monai() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(0, 300, (1, 9, 8, 7)).astype(np.float32))
    image = MetaTensor(values, affine=np.diag([2.0, 2.0, 5.0, 1.0]))
    for modality in ("CT", None):
        scaled = ScaleByModalityd("image", modality, (-175, 250))({"image": image})["image"]
        assert torch.equal(scaled.as_tensor(), ScaleIntensityRange(-175, 250, 0.0, 1.0, clip=True)(values))
        assert torch.equal(scaled.affine, image.affine)


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_the_foreground_of_an_mr_is_the_body(scale: float, tmp_path: Path) -> None:
    """Dark bone and air within belong to it, noise around it does not; on any scale."""
    write_dataset(tmp_path, train=1, test=0, seed=3, voxel_mm=5.0)
    (file,) = tmp_path.glob("imagesTr/*")
    ct = np.asanyarray(nib.load(file).dataobj)
    codes = nib.aff2axcodes(nib.load(file).affine)
    axial = next(axis for axis, code in enumerate(codes) if code in "SI")
    in_plane = [axis for axis in range(3) if axis != axial]
    truth = np.stack([binary_fill_holes(plane) for plane in (ct > -300).transpose(axial, *in_plane)]).transpose(
        np.argsort([axial, *in_plane])
    )
    volume = as_mr(ct, 0, scale)
    found = body_mask(volume[None])
    assert abs(found.mean() - truth.mean()) < 0.06 and found.mean() < 0.9
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.95
    scaled = ScaleByModalityd("image", "MR", (0, 1))({"image": torch.from_numpy(volume[None])})["image"].numpy()
    np.testing.assert_array_equal(scaled[0] > 0, found)  # what crops, crop centres and windows of air go by
    low, high = np.percentile(volume[found], (0.5, 99.5))
    np.testing.assert_allclose(scaled[0][found], np.clip((volume[found] - low) / (high - low), 1 / 1024, 1), atol=2e-2)


def test_an_mr_without_foreground_is_refused() -> None:
    with pytest.raises(InputError, match="no foreground"):
        ScaleByModalityd("image", "MR", (0, 1))({"image": torch.full((1, 6, 6, 6), 3.0)})


def flow(bundle: Path, data: Path, *configs: str, **settings: Any) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(bundle / "configs" / f"{name}.json") for name in configs],
        workflow_type="infer" if "inference" in configs else "train",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(data),
        **settings,
    )


def run(bundle: Path, data: Path, *configs: str, **settings: Any) -> ConfigWorkflow:
    workflow = flow(bundle, data, *configs, **settings)
    workflow.initialize()
    workflow.run()
    return workflow


def test_mr_from_the_store_to_labels(mr: Path, tmp_path: Path) -> None:
    store, pretrained, tuned = tmp_path / "store", tmp_path / "pretrained", tmp_path / "tuned"
    prepare = {"prepared_dir": str(store), "spacing": [4.0, 4.0, 4.0], "num_workers": 0}
    run(PRETRAIN, mr, "prepare", modality="MR", **prepare)
    entries = manifest_entries(store)
    assert {entry["settings"]["modality"] for entry in entries.values()} == {"MR"}
    assert all(0.4 < entry["foreground"] < 0.95 for entry in entries.values())  # of the box around the body

    small: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "num_samples": 1, "batch_size": 1}
    more = {"prepared_dir": str(store), "ckpt_dir": str(pretrained), "output_dir": str(pretrained), **small}
    with pytest.raises(RuntimeError) as caught:
        run(PRETRAIN, mr, "train", "prepared", "tiny", **more)
    assert "was prepared as MR, training has modality CT" in str(input_error_in(caught.value))
    run(PRETRAIN, mr, "train", "prepared", "tiny", modality="MR", **more)

    fine: dict[str, Any] = {
        "modality": "MR",
        "ckpt_dir": str(tuned),
        "output_dir": str(tuned),
        "network_def#feature_size": 4,
    }
    encoder = {"pretrained_encoder": str(pretrained / "model.pt")}
    training = run(SEGMENTER, mr, "train", "tiny", **fine, **encoder, **{**small, "epochs": 2})
    record = read_record(tuned / "model.pt")
    assert record is not None and record["preparation"]["modality"] == "MR"

    used: dict[str, Any] = {"checkpoint": str(tuned / "model.pt"), "network_def#feature_size": 4}
    with pytest.raises(RuntimeError) as caught:
        flow(SEGMENTER, mr, "inference", "tiny", output_dir=str(tmp_path / "ct"), **used).initialize()
    assert "modality was MR and is CT. Pass --modality MR" in str(input_error_in(caught.value))
    out = tmp_path / "labels"
    inference = run(SEGMENTER, mr, "inference", "tiny", modality="MR", output_dir=str(out), **used)
    run(SEGMENTER, mr, "train", "evaluate", "tiny", **{**fine, **used, "output_dir": str(out)})
    assert_dice_of(out, mr)

    scan = next((mr / "imagesTs").iterdir())
    label = next((mr / "labelsTs").iterdir())
    prepared = inference.parser.get_parsed_content("preprocessing")({"image": str(scan)})["image"]
    trained = training.parser.get_parsed_content("validate#preprocessing")({"image": str(scan), "label": str(label)})
    assert torch.equal(prepared.as_tensor(), trained["image"].as_tensor())  # to the last bit


def assert_dice_of(out: Path, data: Path) -> None:
    """Evaluation's Dice is that of the labels which inference wrote."""
    labels, truth = (
        np.asanyarray(nib.load(file).dataobj)
        for file in (out / "test_000_seg.nii.gz", data / "labelsTs/test_000.nii.gz")
    )
    expected = organ_measures(labels, truth, (1, 1, 1), 14, None)[:, 0]
    with (out / "dice.csv").open() as stream:
        rows: Sequence[Sequence[str]] = list(csv.reader(stream))
    np.testing.assert_allclose([float(c) if c else np.nan for c in rows[1][1:14]], expected, atol=6e-5)
    assert json.loads((out / "metrics.json").read_text())["made_with"]["settings"]["modality"] == "MR"


def test_mr_is_not_taken_for_ct(mr: Path, tmp_path: Path) -> None:
    for bundle in (PRETRAIN, SEGMENTER):
        with pytest.raises(RuntimeError) as caught:
            flow(bundle, mr, "train", "tiny", ckpt_dir=str(tmp_path), output_dir=str(tmp_path)).initialize()
        assert "wrong modality: values from" in str(input_error_in(caught.value))
