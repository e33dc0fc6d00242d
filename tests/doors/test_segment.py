from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import shared_networks
from shared_networks import segment
from shared_networks.datasets.nifti import read_nifti
from shared_networks.doors.segment import as_nifti
from shared_networks.errors import InputError
from tests.conftest import BUNDLES, ROOT
from tests.workflows import odd_dicom

Labels = tuple[np.ndarray, np.ndarray]


@pytest.mark.integration
def test_organs_are_found_on_the_grid_of_a_file(ct: Path, labels: Labels) -> None:
    scan: Any = nib.load(ct)
    found, affine = labels
    assert found.shape == scan.shape and found.dtype == np.uint8
    np.testing.assert_array_equal(affine, scan.affine)
    assert np.isin([6, 8], found).all()  # liver and aorta
    liver = np.asanyarray(scan.dataobj)[found == 6]
    assert -50 < liver.mean() < 200


@pytest.mark.integration
def test_an_image_gives_the_labels_of_its_file(ct: Path, labels: Labels, capsys: pytest.CaptureFixture[str]) -> None:
    scan: Any = nib.load(ct)
    result = segment(scan)
    np.testing.assert_array_equal(np.asanyarray(result.dataobj), labels[0])
    np.testing.assert_array_equal(result.affine, scan.affine)
    for code in ("sform_code", "qform_code", "xyzt_units"):
        assert result.header[code] == scan.header[code]
    assert capsys.readouterr().out == ""


@pytest.mark.integration
def test_an_array_gives_the_labels_of_its_file_and_keeps_its_affine(ct: Path, labels: Labels) -> None:
    scan: Any = nib.load(ct)
    affine = scan.affine * (1 + 1e-12)  # which float32 does not hold
    affine[3] = scan.affine[3]
    values = np.asarray(scan.dataobj, dtype=np.float32)
    result = segment(values, affine)
    np.testing.assert_array_equal(np.asanyarray(result.dataobj), labels[0])
    np.testing.assert_array_equal(result.affine, affine)


@pytest.mark.parametrize(
    ("kind", "stored"), [("int16", "int16"), ("uint16", "uint16"), (">i4", "int32"), ("int64", "float32"),
                         ("float16", "float32"), ("float64", "float64")],
)  # fmt: skip
def test_arrays_are_stored_in_types_that_are_read_alike(kind: str, stored: str, tmp_path: Path) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(kind)
    nib.save(as_nifti(values, np.diag([1.0, 2, 3, 1])), tmp_path / "scan.nii")
    read = read_nifti(str(tmp_path / "scan.nii"))
    assert read.problems == [] and read.values is not None and read.values.dtype.name == stored
    np.testing.assert_array_equal(read.values, values)


def test_an_image_with_a_slope_is_stored_as_its_file_is_read(ct: Path, tmp_path: Path) -> None:
    nib.save(as_nifti(nib.load(ct)), tmp_path / "scan.nii")
    ours, theirs = read_nifti(str(tmp_path / "scan.nii")), read_nifti(str(ct))
    assert ours.values is not None and theirs.values is not None and theirs.grid is not None and ours.grid is not None
    assert ours.values.dtype == theirs.values.dtype == np.float32
    np.testing.assert_array_equal(ours.values, theirs.values)
    np.testing.assert_array_equal(ours.grid[1], theirs.grid[1])


@pytest.mark.integration
def test_a_folder_with_one_dicom_series_is_a_scan(tmp_path: Path) -> None:
    values = odd_dicom.ct()
    odd_dicom.write_series(tmp_path, values)
    result = segment(tmp_path)
    assert result.shape == values.shape
    np.testing.assert_allclose(nib.affines.voxel_sizes(result.affine), odd_dicom.SPACING)
    assert nib.aff2axcodes(result.affine) == ("L", "P", "S")


@pytest.mark.integration
def test_settings_and_weights_reach_the_bundle(ct: Path, labels: Labels, tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    for ending in (".pt", ".json"):
        shutil.copy(ROOT / BUNDLES[2] / "weights" / f"small{ending}", weights.with_suffix(ending))
    result = segment(ct, bundle="flare", weights=weights, device=torch.device("cpu"), largest_component=True, fast=True)
    found = np.asanyarray(result.dataobj)
    liver = (labels[0] == 6) & (found == 1)  # by either's order
    assert liver.sum() > 0.7 * (labels[0] == 6).sum()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_process_is_left_as_it_was(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not deterministic)
    path, hook = [*sys.path], sys.excepthook
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    with pytest.raises(InputError):
        segment(IMAGE)  # without any voxel of a body, which is found in the run
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert sys.path == path and sys.excepthook is hook
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic


SMALL = ROOT / BUNDLES[1] / "weights" / "small.pt"
VOLUME = np.zeros((8, 9, 10), np.int16)
IMAGE = nib.Nifti1Image(VOLUME, np.eye(4))


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        ("no/such.nii.gz", {}, "no/such.nii.gz: no such file or folder; give the path of a scan"),
        ("no/such.nii.gz", {"affine": np.eye(4)}, "no/such.nii.gz: has an affine of its own"),
        (IMAGE, {"affine": np.eye(4)}, "image: has an affine of its own"),
        (VOLUME, {}, "array: has no affine; give affine="),
        (VOLUME, {"affine": np.eye(3)}, r"affine of shape \(3, 3\): give \[4, 4\] finite numbers"),
        (VOLUME, {"affine": np.full((4, 4), np.nan)}, r"affine of shape \(4, 4\): give"),
        (VOLUME[0], {"affine": np.eye(4)}, r"array of shape \(9, 10\): give a volume"),
        (VOLUME > 0, {"affine": np.eye(4)}, "array of type bool: give numbers"),
        ([["a"]], {"affine": np.eye(4)}, "array of type <U1: give numbers"),
        (np.zeros((8, 9, 10, 2)), {"affine": np.eye(4)}, r"array: shape \(8, 9, 10, 2\) is not 3D"),
        (nib.Nifti1Image(np.zeros((8, 9, 10, 2)), np.eye(4)), {}, r"image: shape \(8, 9, 10, 2\) is not 3D"),
        (IMAGE, {"dataset_dir": "x"}, r"dataset_dir: segment\(\) takes one scan"),
        (IMAGE, {"organ_probability": "liver"}, r"organ_probability: segment\(\) returns labels alone; for files use"),
        (IMAGE, {"dicom_seg": True}, r"dicom_seg: segment\(\) returns labels alone; for files use hi-end-mae segment"),
        (IMAGE, {"overlay": True}, r"overlay: segment\(\) returns labels alone; for files use hi-end-mae segment"),
        (IMAGE, {"overlay": False, "dicom_seg": False, "organ_probability": None, "overlap": 2}, "overlap = 2 in"),
        (IMAGE, {"bundle": "amos"}, "--bundle amos: no bundle of segmentation"),
        (IMAGE, {"weights": "no/model.pt"}, "no/model.pt: no such checkpoint"),
        (IMAGE, {"weights": ["a.pt"]}, r"weights: \['a.pt'\] is no path; give one, or several models as checkpoints="),
        (
            IMAGE,
            {"weights": SMALL, "checkpoints": [SMALL]},
            "one model, .*small.pt, and several, .*small.pt'., are given",
        ),
        (IMAGE, {"weights": ROOT / BUNDLES[2] / "weights" / "small.pt"}, ".*weights of hi_end_mae_flare_seg, not of"),
        (IMAGE, {"device": "cuda:99"}, r"device = 'cuda:99' in segment\(\): give a device of this machine"),
        (IMAGE, {"overlap": 2}, r"overlap = 2 in segment\(\): give a number of at least 0 and below 1"),
        (IMAGE, {"overlp": 0.2}, "--overlp: there is no setting 'overlp'; did you mean --overlap"),
        (IMAGE, {"fast": True, "overlap": 0.2}, "--fast sets --overlap; give one"),
        (IMAGE, {"bundle_root": "."}, "--bundle_root: follows from --bundle"),
    ],
)
def test_bad_input_is_one_line(image: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=f"^{expected}") as caught:
        segment(image, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_of_several_scans_is_refused(ct: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(ct, tmp_path / f"{name}.nii.gz")
    with pytest.raises(InputError, match=f"^{tmp_path}: holds 2 scans; give one"):
        segment(tmp_path)


def test_the_package_is_light_until_a_name_is_used() -> None:
    code = "import sys, shared_networks as s; assert not {'torch', 'monai', 'numpy'} & {*sys.modules}; print(*dir(s))"
    names = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {*shared_networks.__all__} <= {*names.split()}
    assert all(getattr(shared_networks, name) for name in shared_networks.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'segmnt'"):
        _ = shared_networks.segmnt
