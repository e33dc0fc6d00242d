"""What a user can get wrong, through the bundles' own configs: one clear line, and nothing written."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.transforms import CenterSpatialCrop

from shared_networks.errors import input_error_in
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

BTCV = ROOT / "hi_end_mae_btcv_seg" / "configs"


def images(data: Path) -> list[Path]:
    return sorted((data / "imagesTr").iterdir())


def labels(data: Path) -> list[Path]:
    return sorted((data / "labelsTr").iterdir())


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray], move_mm: float = 0.0) -> None:
    """Save a scan again with other voxels, or moved along its first world axis."""
    scan = nib.load(file)
    affine = scan.affine.copy()
    affine[0, 3] += move_mm
    nib.save(nib.Nifti1Image(change(np.asanyarray(scan.dataobj)), affine), file)


def with_nan(voxels: np.ndarray) -> np.ndarray:
    voxels = voxels.astype(np.float32)
    voxels[2, 3, 4] = np.nan
    voxels[0, 0, 0] = np.inf
    return voxels


def with_label_200(voxels: np.ndarray) -> np.ndarray:
    voxels = voxels.copy()
    voxels[5, 5, 5] = 200
    return voxels


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def enlarge(file: Path) -> None:
    """Have a file say that it holds 20000 voxels an axis, which are small enough for a body."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[42:48] = np.array([20000] * 3, np.int16).tobytes()
    for start, end in ((80, 92), *((row, row + 12) for row in (280, 296, 312))):  # pixdim, and the sform's rows
        content[start:end] = (np.frombuffer(content[start:end], "<f4") / 50).tobytes()
    file.write_bytes(gzip.compress(content))


def tilt(*files: Path) -> None:
    """Shift each slice in its plane, as a scanner with a tilted gantry does."""
    for file in files:
        scan = nib.load(file)
        affine = scan.affine.copy()
        affine[1, 2] += 1.0
        nib.save(nib.Nifti1Image(np.asanyarray(scan.dataobj), affine), file)


def flatten(file: Path) -> None:
    """Have a file say that its slices lie upon each other."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[88:92] = np.float32(0).tobytes()
    file.write_bytes(gzip.compress(content))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


# name: what is done to the data set, and what the one line must say, the file first
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (lambda d: shutil.rmtree(d), "{data}: no such folder; pass --dataset_dir"),
    "empty folder": (lambda d: empty(d / "imagesTr"), "{data}: no scan found"),
    "image without label": (lambda d: labels(d)[0].unlink(), "train_000_0000.nii.gz: no label; add the label"),
    "shapes disagree": (lambda d: rewrite(labels(d)[1], lambda v: v[1:]), "train_001.nii.gz: shape"),
    "affines disagree": (lambda d: rewrite(labels(d)[1], lambda v: v, move_mm=9.0), "train_001.nii.gz: affine"),
    "4D image": (lambda d: rewrite(images(d)[2], lambda v: np.stack([v, v], -1)), "train_002_0000.nii.gz: shape"),
    "foreign label": (lambda d: rewrite(labels(d)[0], with_label_200), "train_000.nii.gz: label values 200 are not"),
    "NaN and infinite": (lambda d: rewrite(images(d)[0], with_nan), "train_000_0000.nii.gz: 2 of "),
    "truncated": (lambda d: truncate(images(d)[1]), "train_001_0000.nii.gz: cannot be read"),
    "all zeros": (lambda d: rewrite(images(d)[2], np.zeros_like), "train_002_0000.nii.gz: all voxels are 0"),
    "no CT": (lambda d: rewrite(images(d)[0], lambda v: v % 500), "train_000_0000.nii.gz: wrong modality: values from"),
    "air": (
        lambda d: rewrite(images(d)[0], lambda v: v.clip(-1000, -300)),
        "000_0000.nii.gz: values are not HU: nothing lies above",
    ),
    "no spacing": (lambda d: flatten(images(d)[1]), "train_001_0000.nii.gz: spacing ("),
    "gantry tilt": (lambda d: tilt(images(d)[1], labels(d)[1]), "train_001_0000.nii.gz: affine [["),
    "enormous": (
        lambda d: enlarge(images(d)[0]),
        "train_000_0000.nii.gz: 20000 x 20000 x 20000 voxels take 16000.0 GB",
    ),
    "label without image": (lambda d: images(d)[0].unlink(), "train_000.nii.gz: no image; add the image"),
}


@pytest.fixture
def data(datasets: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(datasets["btcv"], tmp_path / "data")


def workflow(data: Path, out: Path, **override: object) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(BTCV / "train.json"), str(BTCV / "tiny.json")],
        logging_file=False,
        dataset_dir=str(data),
        bundle_root=str(BTCV.parent),
        **{"pretrained_encoder": "", "ckpt_dir": str(out), "output_dir": str(out), "epochs": 1, **override},
    )


@pytest.mark.parametrize("problem", BROKEN)
def test_bad_data_stops_before_anything_is_written(problem: str, data: Path, tmp_path: Path) -> None:
    spoil, line = BROKEN[problem]
    spoil(data)
    with pytest.raises(Exception) as caught:  # monai wraps it; the command line unwraps it, see test_errors.py
        workflow(data, tmp_path / "out").initialize()
    error = input_error_in(caught.value)
    assert error is not None, caught.value
    assert line.format(data=data) in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["output_dir", "ckpt_dir"])
def test_a_folder_that_cannot_be_written_stops_training(setting: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        workflow(data, tmp_path / "out", **{setting: "/dev/null/out"}).initialize()
    line = f"/dev/null/out: cannot be written, as /dev/null is not a folder; give another --{setting}"
    assert str(input_error_in(caught.value)) == line
    assert not (tmp_path / "out").exists()


def pretraining(data: Path, out: Path, *configs: str, **override: object) -> ConfigWorkflow:
    folder = ROOT / "hi_end_mae_pretrain" / "configs"
    return ConfigWorkflow(
        workflow_type="train",
        config_file=[str(folder / f"{name}.json") for name in ("train", *configs, "tiny")],
        logging_file=False,
        dataset_dir=str(data),
        bundle_root=str(folder.parent),
        **{"ckpt_dir": str(out), "output_dir": str(out), **override},
    )


@pytest.mark.parametrize("setting", ["output_dir", "ckpt_dir"])
def test_a_folder_that_cannot_be_written_stops_pre_training(setting: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        pretraining(data, tmp_path / "out", **{setting: "/dev/null/out"}).initialize()
    assert f"/dev/null is not a folder; give another --{setting}" in str(input_error_in(caught.value))
    assert not (tmp_path / "out").exists()


def test_evaluation_of_an_encoder_leaves_the_table_of_a_segmentation(data: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(content := "case,organ,dice\n")
    with pytest.raises(Exception) as caught:
        pretraining(data, tmp_path, "evaluate").initialize()
    assert f"{tmp_path}/metrics.csv: does not begin with val_masked_mse," in str(input_error_in(caught.value))
    assert (tmp_path / "metrics.csv").read_text() == content


def test_a_missing_encoder_names_the_three_choices(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        workflow(data, tmp_path / "out", pretrained_encoder="nowhere/model.pt").initialize()
    message = str(input_error_in(caught.value))
    assert message.startswith("nowhere/model.pt: no pre-trained encoder there.")
    assert all(choice in message for choice in ("hi_end_mae_pretrain", "hi_end_mae_10k.pth", "''"))
    assert "\n" not in message


def test_several_bad_files_come_as_lines_of_one_error(data: Path, tmp_path: Path) -> None:
    """As a user sees it: the process ends with 1, stderr ends with the lines, no traceback."""
    truncate(images(data)[0])
    rewrite(images(data)[2], np.zeros_like)
    out = tmp_path / "out"
    words = f"-W ignore -m monai.bundle run --config_file ['{BTCV}/train.json','{BTCV}/tiny.json'] --dataset_dir {data}"
    words += f" --bundle_root {BTCV.parent} --pretrained_encoder= --ckpt_dir {out} --output_dir {out}"
    done = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert lines[0] == "error: 2 problem(s) in 6 file(s):"
    assert lines[1].startswith(f"{images(data)[0]}: cannot be read")
    assert lines[2].startswith(f"{images(data)[2]}: all voxels are 0")
    assert not (tmp_path / "out").exists()


def test_a_volume_smaller_than_the_crop_trains(data: Path, tmp_path: Path) -> None:
    for file in (*images(data), *labels(data)):
        # 72 x 84 x 54 mm or so, of the middle; crops are 144
        rewrite(file, lambda v: np.asarray(CenterSpatialCrop((12, 14, 9))(v[None]))[0])
    flow = workflow(data, tmp_path / "out", num_samples=1, val_interval=1)
    flow.initialize()
    flow.run()
    assert (tmp_path / "out" / "model.pt").is_file()


def test_inference_without_weights_says_so(data: Path, tmp_path: Path) -> None:
    flow = ConfigWorkflow(
        config_file=[str(BTCV / "inference.json"), str(BTCV / "tiny.json")],
        workflow_type="infer",
        logging_file=False,
        dataset_dir=str(data),
        bundle_root=str(BTCV.parent),
        checkpoint="nowhere/model.pt",
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(Exception) as caught:
        flow.initialize()
    assert str(input_error_in(caught.value)).startswith("nowhere/model.pt: no trained weights there.")
    assert not (tmp_path / "out").exists()


QUICK = {"overlap": 0.0, "overlay": False}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Untrained weights of the tiny network."""
    parser = ConfigParser(ConfigParser.load_config_files([str(BTCV / "inference.json"), str(BTCV / "tiny.json")]))
    parser.update({"bundle_root": str(BTCV.parent), "num_classes": 14})
    network = parser.get_parsed_content("network_def")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def segmentation(data: Path, out: Path, weights: Path, **override: object) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[str(BTCV / "inference.json"), str(BTCV / "tiny.json")],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BTCV.parent),
        **{"dataset_dir": str(data), "checkpoint": str(weights), "output_dir": str(out), **QUICK, **override},
    )


SPOILT: dict[str, Callable[[Path], object]] = {
    "air": lambda file: rewrite(file, lambda v: v.clip(-1000, -300)),
    "enormous": enlarge,
    "flat": flatten,
    "four": lambda file: rewrite(file, lambda v: np.stack([v, v], -1)),
    "nan": lambda file: rewrite(file, with_nan),
    "no_ct": lambda file: rewrite(file, lambda v: v % 500),
    "text": lambda file: file.write_text("no scan"),
    "tilted": tilt,
    "tiny": lambda file: rewrite(file, lambda v: v[:, 20:23, 10:12]),
}
REASONS = {
    "air": "values are not HU: nothing lies above",
    "enormous": "20000 x 20000 x 20000 voxels need about ",
    "flat": "spacing (",
    "four": "shape (",
    "nan": "2 of ",
    "no_ct": "wrong modality: values from ",
    "text": "cannot be read",
    "tilted": "affine [[",
    "train_000": "cannot be read",
}


def test_inference_does_the_good_scans_and_lists_the_bad(data: Path, weights: Path, tmp_path: Path) -> None:
    """All in one folder; the exit code comes of the error that ends the run."""
    folder = data / "imagesTr"
    broken, good, _ = images(data)
    truncate(broken)
    for name, spoil in SPOILT.items():
        shutil.copy(good, folder / f"{name}_0000.nii.gz")
        spoil(folder / f"{name}_0000.nii.gz")
    flow = segmentation(folder, tmp_path / "out", weights, tta_flip_axes=[2], largest_component=True)
    flow.initialize()
    with pytest.raises(Exception) as caught:
        flow.run()
    error = input_error_in(caught.value)
    assert error is not None, caught.value
    first, *lines = str(error).splitlines()
    assert first == "9 of 12 scan(s) not segmented:"
    found = dict(line.split("_0000.nii.gz: ") for line in lines)
    assert found.keys() == {f"{folder}/{name}" for name in REASONS}
    assert [name for name, reason in REASONS.items() if not found[f"{folder}/{name}"].startswith(reason)] == []
    done = ["tiny", "train_001", "train_002"]
    results = [f"{name}_seg.{end}" for name in done for end in ("nii.gz", "json")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted([*results, "statistics.csv", "report.json"])
    for name in done:
        scan, labels = (nib.load(f) for f in (folder / f"{name}_0000.nii.gz", tmp_path / "out" / f"{name}_seg.nii.gz"))
        assert labels.shape == scan.shape
        np.testing.assert_array_equal(labels.affine, scan.affine)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ({"overlap": 1}, "overlap is 1; give --overlap a share from 0 to below 1"),
        ({"blending": "mean"}, "blending is 'mean'; give --blending constant"),
        ({"organ_probability": "heart"}, "organ_probability is 'heart'; give one of background, spleen"),
        ({"img_size": [24, 24, 24]}, "model.pt: "),
        ({"checkpoints": ["nowhere/fold_0.pt"]}, "nowhere/fold_0.pt: no trained weights there"),
        ({"output_dir": "/dev/null/out"}, "/dev/null/out: cannot be written, as /dev/null is not a folder"),
        ({"dataset_dir": "nowhere"}, "nowhere: no such file or folder"),
    ],
)
def test_inference_refuses_what_it_cannot_do_at_once(
    override: dict[str, object], line: str, data: Path, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:
        flow = segmentation(data, tmp_path / "out", weights, **override)
        flow.initialize()
        flow.run()
    error = input_error_in(caught.value)
    assert error is not None, caught.value
    assert line in str(error)
    assert not (tmp_path / "out").exists()
