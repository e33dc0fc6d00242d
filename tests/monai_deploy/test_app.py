"""The application on NIfTI and DICOM: labels of `bundle run` on the scan's grid, and one line for what is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import nibabel as nib
import numpy as np
import pydicom
import pytest

from shared_networks.bundle.release import release
from shared_networks.synthetic.phantom import phantom_case
from tests.conftest import ROOT
from tests.workflows.odd_dicom import write_enhanced, write_series

PYTHON = ROOT / ".venv-deploy" / "bin" / "python"
BTCV = "hi_end_mae_btcv_seg"
APP = ROOT / "shared_networks" / "bundle" / "monai_deploy" / "app.py"
PATIENT = {
    "PatientID": "phantom", "PatientName": "phantom", "PatientBirthDate": "", "PatientSex": "", "AccessionNumber": "",
    "StudyID": "", "StudyDate": "", "StudyTime": "", "FrameOfReferenceUID": "1.2.3.5", "PixelSpacing": [6.0, 6.0],
}  # fmt: skip
AFFINE = np.array([[0, 0, -4.0, 30], [0, 6.0, 0, -20], [-7.0, 0, 0, 50], [0, 0, 0, 1]])  # IAL


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked release with the small weights that ship."""
    if not PYTHON.is_file():
        raise pytest.UsageError(f"{PYTHON}: no such file; run ./runtests.sh --deploy, which makes it")
    folder = tmp_path_factory.mktemp("release")
    (archive,) = release(folder, BTCV, overlay="small")
    ZipFile(archive).extractall(folder)
    return folder / BTCV


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    """A phantom in HU, [X, Y, Z]."""
    image, _, _ = phantom_case(np.random.default_rng(5), "btcv", 6.0)
    return np.asarray(image).astype(np.int16)


def process(words: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [str(word) for word in (PYTHON, *words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def app(bundle: Path, scans: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """The application, in a folder that is not the bundle's."""
    return process([APP, "--model", bundle, "--input", scans, "--output", output], output.parent)


def bundle_run(bundle: Path, scans: Path, output: Path) -> None:
    options = ["--dataset_dir", scans, "--output_dir", output, "--overlay", "False"]
    done = process(["-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *options], bundle)
    assert done.returncode == 0, done.stderr[-4000:]


def same(found: Path, expected: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine of labels, which are those expected, and some."""
    images: Any = nib.load(found), nib.load(expected)
    values, wanted = (np.asanyarray(image.dataobj) for image in images)
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_allclose(images[0].affine, images[1].affine, atol=1e-4)
    assert len(np.unique(values)) > 8
    return values, images[0].affine


def test_nifti_scans_get_the_labels_of_bundle_run(bundle: Path, volume: np.ndarray, tmp_path: Path) -> None:
    """A good scan beside a damaged one, relative to another folder, with axes in another order."""
    scans = tmp_path / "scans"
    scans.mkdir()
    turned = np.ascontiguousarray(volume.transpose(2, 1, 0)[::-1])
    nib.save(nib.Nifti1Image(turned, AFFINE), scans / "good.nii.gz")
    (scans / "damaged.nii.gz").write_bytes((scans / "good.nii.gz").read_bytes()[:-500])
    done = app(bundle, Path("scans"), tmp_path / "labels")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {scans / 'damaged.nii.gz'}: cannot be read")
    assert [file.name for file in (tmp_path / "labels").iterdir()] == ["good_seg.nii.gz"]

    (scans / "damaged.nii.gz").unlink()
    bundle_run(bundle, scans, tmp_path / "run")
    values, affine = same(tmp_path / "labels" / "good_seg.nii.gz", tmp_path / "run" / "good_seg.nii.gz")
    assert values.shape == turned.shape
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)


def test_dicom_gets_the_labels_of_bundle_run_and_a_dicom_seg(bundle: Path, volume: np.ndarray, tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", volume, **PATIENT)
    done = app(bundle, tmp_path / "ct", tmp_path / "labels")
    assert done.returncode == 0, done.stderr[-4000:]
    bundle_run(bundle, tmp_path / "ct", tmp_path / "run")
    values, affine = same(*(next((tmp_path / part).glob("*_seg.nii.gz")) for part in ("labels", "run")))
    assert values.shape == volume.shape
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), [6.0, 6.0, 4.0], atol=1e-5)

    (file,) = (tmp_path / "labels").glob("*.dcm")
    seg = pydicom.dcmread(file)
    assert seg.PatientID == "phantom"
    names = [str(part.SegmentLabel) for part in seg.SegmentSequence]
    assert (len(names), names[0], names[5]) == (13, "spleen", "liver")
    slices = {pydicom.dcmread(file).SOPInstanceUID: pydicom.dcmread(file).ImagePositionPatient for file in files}
    heights = sorted({float(position[2]) for position in slices.values()})
    found = np.zeros_like(values)
    for pixels, frame in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        value = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        height = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        plane = found[:, :, int(np.argmin(np.abs(np.subtract(heights, height))))]
        plane[pixels.T > 0] = value
    upwards = values if affine[2, 2] > 0 else values[:, :, ::-1]
    np.testing.assert_array_equal(found, upwards)


def damage(kind: str, bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a bundle and of scans, of which one is of no use."""
    scans, other = tmp_path / "ct", tmp_path / "other"
    tags = {**PATIENT, **({"PixelSpacing": [2.5, 1.5]} if kind == "pixels" else {})}
    if kind == "anonymous":
        del tags["PatientBirthDate"]
    if kind == "multi-frame":
        write_enhanced(scans / "all.dcm")
    elif kind != "empty":
        write_series(scans, **tags)
    else:
        scans.mkdir()
    if kind == "two":
        write_series(scans / "second", series="1.2.3.9", **tags)
    if kind == "weights":
        shutil.copytree(bundle, other, ignore=shutil.ignore_patterns("models"))
    elif kind == "partial":
        import torch

        shutil.copytree(bundle, other)
        (other / "models" / "model.json").unlink()
        content = torch.load(other / "models" / "model.pt", weights_only=True)
        torch.save(dict(list(content.items())[:-1]), other / "models" / "model.pt")
    elif kind == "script":
        shutil.copytree(bundle, other)
        (other / "models" / "model.ts").touch()
    elif kind == "bundle":
        other.mkdir()
    return (other if other.exists() else bundle), (tmp_path / "nowhere" if kind == "folder" else scans)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bundle", "no configs/metadata.json in it; give the folder of an unpacked release"),
        ("weights", "no models/model.pt in it; train it, or make the release with --weights"),
        ("partial", "tensors do not fit the network"),
        ("script", "MONAI Deploy takes models/model.ts before model.pt, unchecked; move it elsewhere"),
        ("folder", "no such file or folder; pass --input FOLDER"),
        ("empty", "no scan found"),
        ("two", "a second scan beside a DICOM series"),
        ("multi-frame", "holds many slices"),
        ("anonymous", "has no PatientBirthDate, which DICOM SEG takes over"),
        ("pixels", "pixels of 1.5 x 2.5 mm, of which MONAI Deploy swaps the sides"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(kind: str, said: str, bundle: Path, tmp_path: Path) -> None:
    done = app(*damage(kind, bundle, tmp_path), tmp_path / "labels")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert line.startswith("error: ") and said in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "labels").exists()
