from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from shared_networks.datasets.names import find_excluded, read_names
from shared_networks.datasets.scans import BadScanError, Source, find_scans, read_grid, read_scan
from shared_networks.errors import InputError

SHAPE = (10, 8, 6)
SPACING = (0.8, 1.2, 2.5)
STRAIGHT, ORIGIN = np.eye(3), np.array([-40.0, 30.0, -120.0])
OBLIQUE = np.array([[np.cos(0.1), 0, np.sin(0.1)], [0, 1, 0], [-np.sin(0.1), 0, np.cos(0.1)]])


def hounsfield(shape=SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def save(file: Path, values: np.ndarray | None = None, affine: np.ndarray | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = hounsfield() if values is None else values
    nib.save(nib.Nifti1Image(values, np.diag([*SPACING, 1.0]) if affine is None else affine), file)
    return file


def write_series(
    folder: Path,
    values: np.ndarray,
    axes: np.ndarray = STRAIGHT,
    origin: np.ndarray = ORIGIN,
    uid: str | None = None,
    shift: float = 0.0,
    **tags: object,
) -> np.ndarray:
    """Write `[columns, rows, slices]` of HU as a DICOM series, files in no order, and return its LPS affine."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or pydicom.uid.generate_uid()
    step = axes[:, 2] * SPACING[2] + shift * axes[:, 1]
    names = np.random.default_rng(1).permutation(values.shape[2])
    for k in range(values.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        dataset.Modality, dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "CT", uid, "1.2.3"
        dataset.Rows, dataset.Columns = values.shape[1], values.shape[0]
        dataset.PixelSpacing = [SPACING[1], SPACING[0]]  # between rows first
        dataset.SliceThickness = 9.0  # not the gap: nobody may rely on it
        dataset.ImageOrientationPatient = [*axes[:, 0].round(8), *axes[:, 1].round(8)]
        dataset.ImagePositionPatient = [*(origin + k * step).round(6)]
        dataset.InstanceNumber = int(names[k]) + 1  # in no order either
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        slope = 2.0 if k == 1 else 1.0  # each slice has its own
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -1024
        stored = np.rint((values[:, :, k].T.astype(float) + 1024) / slope).astype(np.uint16)
        dataset.PixelData = stored.tobytes()
        for tag, value in tags.items():
            setattr(dataset, tag, value(k) if callable(value) else value)
        dataset.save_as(folder / f"{uid}.{names[k]}", enforce_file_format=True)
    return nib.affines.from_matvec(np.column_stack([axes[:, :2] * SPACING[:2], step]), origin)


def even(values: np.ndarray) -> np.ndarray:
    return values // 2 * 2  # so that a slope of 2 loses nothing


def names(folder: Path) -> list[str]:
    return [source.case for source in find_scans(folder)]


def test_nnunet_groups_channels_and_leaves_labels_out(tmp_path):
    root = tmp_path / "BTCV"
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz"):
        save(root / "imagesTr" / name)
    save(root / "labelsTr" / "a.nii.gz")
    save(root / "imagesTs" / "t_0000.nii.gz")
    a, b = find_scans(root)
    assert (a.case, b.case) == ("BTCV/imagesTr/a", "BTCV/imagesTr/b")
    assert b.files == (str(root / "imagesTr" / "b_0000.nii.gz"), str(root / "imagesTr" / "b_0001.nii.gz"))


def test_flat_nested_and_data_sets_within(tmp_path):
    root = tmp_path / "all"
    save(root / "x.nii")
    save(root / "p1" / "day_2" / "ct.nii.gz")
    save(root / "p1" / "segmentations" / "liver.nii.gz")
    save(root / "FLARE" / "imagesTr" / "FLARE22_Tr_0001_0000.nii.gz")
    save(root / "FLARE" / "labelsTr" / "FLARE22_Tr_0001.nii.gz")
    (root / "._x.nii").write_bytes(b"macOS")
    (root / "notes.txt").write_text("no scan")
    assert names(root) == ["all/FLARE/imagesTr/FLARE22_Tr_0001", "all/p1/day_2/ct", "all/x"]
    assert find_scans(root).passed_over == {f"{root}/p1/segmentations": "its name says that it holds labels"}


def test_a_list_of_cases_as_decathlon_has_it(tmp_path):
    root = tmp_path / "Task09"
    for name in ("imagesTr/a.nii.gz", "imagesTs/b.nii.gz"):
        save(root / name)
    save(tmp_path / "elsewhere" / "c.nii.gz")
    training = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}, {"image": "../elsewhere/c.nii.gz"}]
    content = {"name": "spleen", "labels": {"0": "background"}, "training": training, "test": ["./imagesTs/b.nii.gz"]}
    (root / "dataset.json").write_text(json.dumps(content))
    found = find_scans(root / "dataset.json", "imagesTs")
    assert [s.case for s in found] == ["Task09/elsewhere/c", "Task09/imagesTr/a", "Task09/imagesTs/b"]
    assert [s.case for s in find_scans(root / "dataset.json")] == ["Task09/elsewhere/c", "Task09/imagesTr/a"]
    assert all(Path(s.files[0]).is_file() for s in found)
    (root / "dataset.json").write_text("{")
    with pytest.raises(InputError, match=r"dataset\.json: not readable as a list of cases"):
        find_scans(root / "dataset.json")


def test_what_cannot_be_found_is_said(tmp_path):
    with pytest.raises(InputError, match="dataset_dir is not set"):
        find_scans("")
    with pytest.raises(InputError, match="no such file or folder"):
        find_scans(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no scan found; read are NIfTI"):
        find_scans(tmp_path)
    save(tmp_path / "a.nii")
    save(tmp_path / "a_0000.nii.gz")
    save(tmp_path / "b.nii")
    odd, good = find_scans(tmp_path)  # one odd name costs its case alone
    assert (odd.case, good.case, good.problem) == (f"{tmp_path.name}/a", f"{tmp_path.name}/b", "")
    with pytest.raises(BadScanError, match="one case needs one file a channel, named a_0000, a_0001"):
        read_scan(odd, "CT")
    assert read_scan(good, "CT").image.shape == (1, *SHAPE)


def test_two_files_of_one_case_are_refused(tmp_path):
    for folder in ("x", "y"):
        save(tmp_path / folder / "a.nii")
    listed = ["x/a.nii", "y/../y/a.nii", "x/a.nii"]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    assert len(find_scans(tmp_path / "list.json")) == 2  # named twice is no harm
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "list.json").write_text(json.dumps(["../x/a.nii", "x/a.nii"]))
    with pytest.raises(InputError, match=r"both are the case in/x/a; rename one"):
        find_scans(tmp_path / "in" / "list.json")


def test_several_paths_are_one_set_of_scans(tmp_path):
    for name in ("a/ct.nii.gz", "b/day_1/ct.nii.gz", "b/day_2/mr.nii", "c/d.nii.gz", "c/not_named.nii.gz"):
        save(tmp_path / name)
    (tmp_path / "c" / "list.json").write_text('["./d.nii.gz"]')
    found = find_scans([tmp_path / "c" / "list.json", str(tmp_path / "b"), tmp_path / "a" / "ct.nii.gz"])
    root = tmp_path.name
    assert [s.case for s in found] == [f"{root}/{name}" for name in ("a/ct", "b/day_1/ct", "b/day_2/mr", "c/d")]
    assert [s.case for s in find_scans([tmp_path / "b" / "day_2"])] == ["day_2/mr"]  # one is as alone
    twice = find_scans([tmp_path / "b" / "day_1", tmp_path / "b", tmp_path / "b" / "day_1" / "ct.nii.gz"])
    assert [s.case for s in twice] == ["b/day_1/ct", "b/day_2/mr"]


def test_a_path_without_scans_is_refused_beside_others(tmp_path):
    save(tmp_path / "a.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"/empty: no scan found"):
        find_scans([tmp_path / "a.nii.gz", tmp_path / "empty"])
    for listed in ("[]", '["./empty"]'):
        (tmp_path / "list.json").write_text(listed)
        with pytest.raises(InputError, match=r"list\.json: no scan found"):
            find_scans(tmp_path / "list.json")
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        find_scans([tmp_path / "a.nii.gz", tmp_path / "nowhere"])


def test_a_list_names_every_case_or_is_refused(tmp_path):
    pytest.importorskip("SimpleITK")
    write_series(tmp_path / "pat", even(hounsfield((10, 8, 12))), uid="1.2.5")
    for name in "ab":
        save(tmp_path / f"{name}.nii.gz")
    about = {"labels": ["background", "liver"], "reference": ["https://example.org/x", "Tang et al."]}
    (tmp_path / "list.json").write_text(json.dumps({"training": ["a.nii.gz", "pat"], "test": ["b.nii.gz"], **about}))
    assert [len(scan.files) for scan in find_scans(tmp_path / "list.json", "imagesTs")] == [1, 1, 12]
    for odd in (
        {"Image": "b.nii.gz"},
        {"image": ""},
        {"image": 5},
        {"image": ["b.nii.gz", None]},
        {"image": []},
        5,
        "",
    ):
        (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz"}, odd]}))
        with pytest.raises(InputError, match=rf"list\.json: {re.escape(repr(odd))} names no image; list a path, or"):
            find_scans(tmp_path / "list.json")
    (tmp_path / "list.json").write_text(json.dumps(["a.nii.gz", "b.dcm"]))
    _, lost = find_scans(tmp_path / "list.json")
    assert lost.files == (f"{tmp_path}/b.dcm",)
    with pytest.raises(BadScanError, match="no such file"):
        read_scan(lost, "CT")


def test_test_scans_of_data_sets_within_are_read_where_those_are_asked_for(tmp_path):
    for name in ("a/imagesTr/x.nii.gz", "a/imagesTs/y.nii.gz", "b/imagesTr/z.nii.gz", "c/v.nii.gz"):
        save(tmp_path / name)
    (tmp_path / "b" / "imagesTs").mkdir()
    for part, found in (("imagesTr", "xzv"), ("imagesTs", "yzv")):
        assert [Path(scan.case).name for scan in find_scans(tmp_path, part)] == [*found]


def test_a_link_to_a_file_keeps_its_name(tmp_path):
    """As caches and git-annex link to files that are named by their content."""
    save(tmp_path / "blobs" / "x.nii.gz").rename(tmp_path / "blobs" / "0a1b2c3d")
    (tmp_path / "snap").mkdir()
    for link in ("ct.nii.gz", "list.json"):
        (tmp_path / "blobs" / "4e5f").write_text('["ct.nii.gz"]')
        (tmp_path / "snap" / link).symlink_to(tmp_path / "blobs" / ("4e5f" if "json" in link else "0a1b2c3d"))
    for path in ("snap/ct.nii.gz", "snap/list.json", "snap"):
        (scan,) = find_scans(tmp_path / path)
        assert scan.case == "snap/ct" and read_scan(scan, "CT").image.shape == (1, *SHAPE)
    (scan,) = find_scans([tmp_path / "snap", tmp_path / "snap" / "ct.nii.gz"])


@pytest.mark.parametrize("listed", [False, True])
def test_a_series_in_two_of_the_folders_is_one_scan(tmp_path, listed):
    pytest.importorskip("SimpleITK")
    write_series(tmp_path / "all", even(hounsfield((10, 8, 12))), uid="1.2.5")
    paths = []
    for part in ("first", "second"):
        (tmp_path / part).mkdir()
        paths.append(f"{tmp_path}/{part}")
    for number, file in enumerate(sorted((tmp_path / "all").iterdir())):
        file.rename(Path(paths[number % 2]) / file.name)
    if listed:
        (tmp_path / "list.json").write_text(json.dumps(paths))
    (scan,) = find_scans(tmp_path / "list.json" if listed else paths)
    assert len(scan.files) == 12
    np.testing.assert_array_equal(read_scan(scan, "CT").image[0], even(hounsfield((10, 8, 12))))


@pytest.mark.parametrize("axes", [np.eye(3), OBLIQUE, np.eye(3)[:, [0, 2, 1]] * [1, -1, -1]])
def test_dicom_equals_nifti(tmp_path, axes):
    pytest.importorskip("SimpleITK")
    values = even(hounsfield())
    affine = np.diag([-1, -1, 1, 1]) @ write_series(tmp_path / "study" / "series", values, axes)
    [source] = find_scans(tmp_path / "study")
    assert source.case == "study/series"
    assert len(source.files) == SHAPE[2]
    scan = read_scan(source, "CT")
    nifti = read_scan(Source("a", (str(save(tmp_path / "a.nii.gz", values, affine)),)), "CT")
    order = slice(None) if np.linalg.det(axes) > 0 else slice(None, None, -1)
    np.testing.assert_array_equal(scan.image[..., order], nifti.image)
    corner = [0, 0, 0 if np.linalg.det(axes) > 0 else SHAPE[2] - 1]
    np.testing.assert_allclose(nib.affines.apply_affine(scan.affine, corner), affine[:3, 3], atol=1e-4)
    np.testing.assert_allclose(nib.affines.voxel_sizes(scan.affine), SPACING, rtol=1e-5)
    assert read_grid(source)[0] == SHAPE


def test_several_series_in_a_folder_are_several_cases(tmp_path):
    pytest.importorskip("SimpleITK")
    write_series(tmp_path / "d", even(hounsfield()), uid="1.2.5")
    write_series(tmp_path / "d", even(hounsfield(seed=3)), uid="1.2.6")
    write_series(tmp_path / "d", even(hounsfield((4, 4, 2))), uid="1.2.7", Modality="SR")
    assert names(tmp_path / "d") == ["d/1.2.5", "d/1.2.6"]
    np.testing.assert_array_equal(read_scan(find_scans(tmp_path / "d")[1], "CT").image[0], even(hounsfield(seed=3)))


BAD_SERIES = {
    "too small: a series of 3 slice": {"values": hounsfield((10, 8, 3))},
    "slices are missing: a gap of 5 mm where others have 2.5 mm": {"values": hounsfield((10, 8, 8)), "drop": 4},
    "irregular spacing": {"ImagePositionPatient": lambda k: [0, 0, 2.5 * k + (0.4 if k == 2 else 0)]},
    "two slices at one position": {"ImagePositionPatient": lambda k: [0, 0, 2.5 * max(k, 1)]},
    "gantry tilt: each slice is shifted by 0.5 mm": {"shift": 0.5},
    "slices of several orientations": {
        "ImageOrientationPatient": lambda k: [1, 0, 0, 0, 1, 0] if k else [0, 1, 0, 0, 0, 1]
    },
    "slices of several pixel sizes": {"PixelSpacing": lambda k: [1.2, 0.8 + (k == 3)]},
    "slices of several sizes": {"Rows": lambda k: 8 - (k == 2), "PixelData": lambda k: b"\0" * (160 - 20 * (k == 2))},
    "wrong modality: DICOM says PT, not CT": {"Modality": "PT"},
}


@pytest.mark.parametrize("reason", BAD_SERIES)
def test_bad_series(tmp_path, reason):
    pytest.importorskip("SimpleITK")
    settings = {"values": hounsfield(), **BAD_SERIES[reason]}
    drop = settings.pop("drop", None)
    write_series(tmp_path / "d", even(settings.pop("values")), uid="1.2.5", **settings)
    if drop is not None:
        order = np.random.default_rng(1).permutation(8)
        (tmp_path / "d" / f"1.2.5.{order[drop]}").unlink()
    [source] = find_scans(tmp_path / "d")
    with pytest.raises(BadScanError, match=reason):
        read_scan(source, "CT")


def test_truncated_slice(tmp_path):
    pytest.importorskip("SimpleITK")
    write_series(tmp_path / "d", even(hounsfield()), uid="1.2.5")
    file = tmp_path / "d" / "1.2.5.2"
    file.write_bytes(file.read_bytes()[:-60])
    sources = find_scans(tmp_path / "d")
    with pytest.raises(BadScanError, match="slices are missing"):
        read_scan(sources[0], "CT")
    assert sources.passed_over == {str(file): "not readable as DICOM; copy it again"}


def test_dicom_without_simpleitk_says_what_to_install(tmp_path, monkeypatch):
    write_series(tmp_path / "d", even(hounsfield()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; pip install SimpleITK"):
        find_scans(tmp_path / "d")


@pytest.mark.parametrize(
    ("values", "modality", "reason"),
    [
        (np.abs(hounsfield()), "CT", "wrong modality: values from .* are not HU"),
        (
            hounsfield() / np.float32(2000) + np.float32(0.5),
            "CT",
            "wrong modality: values from 0.0025 to 0.997 are not HU",
        ),
        (hounsfield(), "MR", "wrong modality: .* of voxels are below -500, as in HU; pass --modality CT"),
        (np.zeros(SHAPE, np.int16), "CT", "all voxels are 0"),
        (hounsfield((*SHAPE, 2)), "CT", "is not 3D"),
    ],
)
def test_bad_nifti(tmp_path, values, modality, reason):
    source = Source("a", (str(save(tmp_path / "a.nii.gz", values)),))
    with pytest.raises(BadScanError, match=reason):
        read_scan(source, modality)


def test_channels_must_share_a_grid(tmp_path):
    files = (str(save(tmp_path / "a_0000.nii.gz")), str(save(tmp_path / "a_0001.nii.gz", hounsfield((10, 8, 7)))))
    with pytest.raises(BadScanError, match=r"s grid; a_0000\.nii\.gz, a_0001\.nii\.gz were read"):
        read_scan(Source("a", files), "CT")
    good = read_scan(Source("a", files[:1] * 2), "CT")
    assert good.image.shape == (2, *SHAPE)


CASES = {
    "BTCV/imagesTr/img0035": ["/data/BTCV/imagesTr/img0035_0000.nii.gz"],
    "flat/img0035": ["/data/flat/IMG0035.nii"],
    "imagesTr/a1": ["/data/AMOS/imagesTr/a1_0000.nii.gz"],
    "BTCV/imagesTr/a1": ["/data/BTCV/imagesTr/a1_0000.nii.gz"],
    "BTCV/imagesTr/img0036": ["/data/BTCV/imagesTr/img0036_0000.nii.gz", "/data/BTCV/imagesTr/img0036_0001.nii.gz"],
    "nested/s0001/ct": ["/data/nested/s0001/ct.nii.gz"],
    "nested/s0002/ct": ["/data/nested/s0002/ct.nii.gz"],
    "FLARE/FLARE22_Tr_0001": ["/data/FLARE/FLARE22_Tr_0001.nii.gz"],
    "FLARE/FLARE22_Tr_0002": ["/data/FLARE/FLARE22_Tr_0002.nii.gz"],
    "dicom/p1/1.2.5": ["1.2.5"],
}


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("img0035", ["BTCV/imagesTr/img0035", "flat/img0035"]),
        ("img0035_0000", ["BTCV/imagesTr/img0035", "flat/img0035"]),
        ("IMG0035.nii.gz", ["BTCV/imagesTr/img0035", "flat/img0035"]),
        ("BTCV/imagesTr/img0035", ["BTCV/imagesTr/img0035"]),
        ("imagesTr/img0035_0000.nii.gz", ["BTCV/imagesTr/img0035"]),
        ("./somewhere/BTCV/imagesTr/img0035.nii.gz", ["BTCV/imagesTr/img0035"]),
        ("BTCV/imagesTr/a1", ["BTCV/imagesTr/a1"]),
        ("AMOS/imagesTr/a1", ["imagesTr/a1"]),
        ("imagesTr/a1", ["imagesTr/a1", "BTCV/imagesTr/a1"]),
        ("somewhere/BTCV/imagesTr/a1", ["imagesTr/a1", "BTCV/imagesTr/a1"]),
        ("other/folder/img0035", ["BTCV/imagesTr/img0035", "flat/img0035"]),
        ("img0036_0001", ["BTCV/imagesTr/img0036"]),
        ("s0001", ["nested/s0001/ct"]),
        ("s0001/ct.nii.gz", ["nested/s0001/ct"]),
        ("FLARE22_Tr_0001", ["FLARE/FLARE22_Tr_0001"]),
        ("1.2.5", ["dicom/p1/1.2.5"]),
        ("p1", ["dicom/p1/1.2.5"]),
        ("img003", []),
        ("img0037", []),
    ],
)
def test_names_of_excluded_cases(name, cases):
    assert find_excluded(CASES, [name]) == {name: cases}


def test_lists_of_names(tmp_path):
    file = tmp_path / "exclude.txt"
    file.write_text("\ufeff# test cases\nimg0035  # validation\n\n  a#b \n")
    assert read_names(file) == ["img0035", "a#b"]
    with pytest.raises(InputError, match="not readable as a list of cases"):
        read_names(tmp_path / "none.txt")


def test_a_case_in_a_missing_folder_has_no_grid(tmp_path):
    file = save(tmp_path / "a.nii.gz")
    source = Source("a", (str(file),))
    assert read_grid(source) == (SHAPE, pytest.approx(SPACING))
    shutil.rmtree(tmp_path)
    assert read_grid(source) is None
