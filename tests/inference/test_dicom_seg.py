"""DICOM SEG: every voxel at its place, references to the very files, codes, colours, and what cannot be an object."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from monai.data import MetaTensor, decollate_batch

from shared_networks.datasets.labels import label_colour
from shared_networks.datasets.scans import Scan, find_scans
from shared_networks.errors import InputError, input_error_in
from shared_networks.inference.dicom_seg import (
    OWN_SCHEME,
    check_source,
    coded_label,
    mean_probabilities,
    unknown_labels,
    write_dicom_seg,
)
from shared_networks.inference.predict import Scans, one_case
from shared_networks.inference.save import SaveImageLabelsd
from shared_networks.version import __version__
from tests.conftest import BUNDLES, ROOT, full_disk
from tests.datasets.test_scans import OBLIQUE, ORIGIN, SPACING, STRAIGHT, even, hounsfield, write_series
from tests.inference.test_predict import PREPARE, write
from tests.workflows.odd_dicom import write_enhanced
from tests.workflows.test_odd_scans import workflow

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")
sitk = pytest.importorskip("SimpleITK")

SHAPE = (24, 20, 9)
NAMES = ["background", "liver", "spleen", "left kidney", "portal vein and splenic vein", "tumour 腫"]
FRAME = "1.2.3.9"
ROTATED = OBLIQUE @ np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
CORONAL = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
SERIES = {
    "head first": (STRAIGHT, {"PatientPosition": "HFS", "InstanceNumber": lambda k: k + 1}),
    "head first, from the top": (STRAIGHT, {"PatientPosition": "HFS", "InstanceNumber": lambda k: 9 - k}),
    "feet first": (np.diag([-1.0, 1, -1]), {"PatientPosition": "FFS"}),
    "prone": (np.diag([-1.0, -1, 1]), {"PatientPosition": "HFP"}),
    "coronal": (CORONAL, {}),
    "oblique": (ROTATED, {}),
}


def labelled(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Labels without any symmetry and without spleen; the first two slices and the last are empty."""
    labels = np.zeros(shape, np.uint8)
    box = labels[3:-4, 5:-1, 2:-1]
    box[:] = np.random.default_rng(3).choice([0, 1, 3, 4, 5], box.shape, p=[0.3, 0.3, 0.2, 0.1, 0.1])
    return labels


def series(folder: Path, axes: np.ndarray = STRAIGHT, shape: tuple[int, ...] = SHAPE, **tags: Any) -> list[Path]:
    """A series whose slices have a frame of reference; its files."""
    write_series(folder, even(hounsfield(shape)), axes, ORIGIN, FrameOfReferenceUID=FRAME, **tags)
    return sorted(folder.iterdir())


def saved(folder: Path, out: Path, labels: np.ndarray | None = None, **settings: Any) -> Scans:
    """A run over a folder, whose scans all get these labels, at a probability of 0.75 and of 0.5 for the kidney."""
    weights = out.parent / "model.pt"
    if not weights.exists():
        weights.write_bytes(b"weights")
    settings = {"label_names": NAMES, "dicom_seg": True, "overlay": False, "checkpoints": [weights], **settings}
    saver = SaveImageLabelsd(output_dir=out, **settings)
    more = check_source if settings["dicom_seg"] else None
    data = Scans(find_scans(folder), PREPARE, (2.0, 2.0, 2.0), 3, skip=saver.is_done, more=more)
    for item in data:
        (case,) = decollate_batch(one_case([item]))
        found = torch.from_numpy(labelled(case["scan"].shape[1:]) if labels is None else labels)
        probability = torch.where(found == 3, 0.5, 0.75).half()
        pred = MetaTensor(found[None], meta=case["scan"].meta)
        saver({**case, "pred": pred, "label_probability": probability, "source": data.current})
    return data


def codes(sequence: Any) -> list[tuple[str, str, str]]:
    return [(item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning) for item in sequence]


def value_of(segment: Any) -> int:
    """The value of a segment's label, as its description has it."""
    return int(segment.SegmentDescription.split(",")[0].removeprefix("label value "))


def put(found: np.ndarray, affine: np.ndarray, points: np.ndarray, values: np.ndarray | int) -> None:
    """Put values at points [N, 3] in LPS mm into an array with an affine to RAS mm."""
    places = nib.affines.apply_affine(np.linalg.inv(affine), points * [-1, -1, 1])
    np.testing.assert_allclose(places, places.round(), atol=1e-3)
    found[tuple(places.round().astype(int).T)] = values


def read_by_pydicom(file: Path, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The labels on a grid, from each frame's own position."""
    content, found = pydicom.dcmread(file), np.zeros(shape, np.uint8)
    shared = content.SharedFunctionalGroupsSequence[0]
    across, down = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    values = {int(segment.SegmentNumber): value_of(segment) for segment in content.SegmentSequence}
    pixels = content.pixel_array.reshape(-1, content.Rows, content.Columns)
    for frame, group in zip(pixels, content.PerFrameFunctionalGroupsSequence, strict=True):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        rows, columns = frame.nonzero()
        points = position + rows[:, None] * between_rows * down + columns[:, None] * between_columns * across
        item = group if "SegmentIdentificationSequence" in group else shared
        put(found, affine, points, values[item.SegmentIdentificationSequence[0].ReferencedSegmentNumber])
    return found


def read_by_highdicom(file: Path, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The labels on a grid, from the volume that highdicom makes of the frames."""
    content, found = highdicom.seg.segread(file), np.zeros(shape, np.uint8)
    volume = content.get_volume(combine_segments=True)
    values = np.array([0, *(value_of(segment) for segment in content.SegmentSequence)])
    places = np.stack(volume.array.nonzero(), axis=1)
    put(found, affine, nib.affines.apply_affine(volume.affine, places), values[volume.array[volume.array > 0]])
    return found


def check(file: Path, sources: list[Path]) -> Any:
    """Compare an object with the labels beside it, its references with the files; return it."""
    image: Any = nib.load(file.with_suffix(".nii.gz"))
    labels = np.asanyarray(image.dataobj)
    assert labels.any()
    for read in (read_by_pydicom, read_by_highdicom):
        np.testing.assert_array_equal(read(file, image.affine, labels.shape), labels)
    content = pydicom.dcmread(file)
    # ITK reads frames, not where they lie.
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    np.testing.assert_array_equal(frames > 0, content.pixel_array > 0)
    instances = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, sources)}
    for group in content.PerFrameFunctionalGroupsSequence:
        reference = group.DerivationImageSequence[0].SourceImageSequence[0]
        instance = instances[reference.ReferencedSOPInstanceUID]
        assert reference.ReferencedSOPClassUID == instance.SOPClassUID
        if "NumberOfFrames" in instance:
            instance = instance.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
            instance = instance.PlanePositionSequence[0]
        assert instance.ImagePositionPatient == group.PlanePositionSequence[0].ImagePositionPatient
    (referenced,) = content.ReferencedSeriesSequence
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == set(instances)
    assert {header.SeriesInstanceUID for header in instances.values()} == {referenced.SeriesInstanceUID}
    return content


# Codes


@pytest.mark.parametrize("bundle", [bundle for bundle in BUNDLES if bundle.endswith("_seg")])
def test_every_organ_of_the_bundles_has_a_code_of_snomed_ct(bundle: str) -> None:
    from pydicom.sr._concepts_dict import concepts

    names = json.loads((ROOT / bundle / "configs" / "inference.json").read_text())["label_names"]
    assert unknown_labels(names) == []
    listed = {(code, text[0].casefold()) for items in concepts["SCT"].values() for code, text in items.items()}
    properties = [coded_label(name) for name in names[1:]]
    used = [concept for kind, modifiers in properties for concept in (kind, *modifiers)]
    assert [concept for concept in used if (concept.value, concept.meaning.casefold()) not in listed] == []
    assert len(set(properties)) == len(names) - 1
    for name, (kind, modifiers) in zip(names[1:], properties, strict=True):
        side = [word.capitalize() for word in name.split() if word in ("left", "right")]
        assert [modifier.meaning for modifier in modifiers if modifier.meaning in ("Left", "Right")] == side
        assert kind.meaning.casefold() in name


@pytest.mark.parametrize(
    ("name", "same"),
    [
        *[("kidney_left", "left kidney"), ("Left-Kidney", "left kidney"), ("LIVER ", "liver")],
        *[("adrenal_gland_right", "right adrenal gland"), ("Inferior vena-cava", "inferior vena cava")],
        *[("oesophagus", "esophagus"), ("postcava", "inferior vena cava"), ("AdrenalLeft", "left adrenal gland")],
    ],
)
def test_spelling_does_not_matter(name: str, same: str) -> None:
    assert coded_label(name) == coded_label(same)
    assert coded_label(name).kind.scheme == "SCT"


def test_a_name_of_the_user_s_own_has_a_code_of_the_package_s_own() -> None:
    names = ["left liver", "tumour", "tumour 2", "a\\b\n" + "x" * 100, "kidney"]
    kinds = [coded_label(name).kind for name in names]
    assert [kind.scheme for kind in kinds] == [OWN_SCHEME] * 4 + ["SCT"]
    assert len({kind.value for kind in kinds}) == 5
    assert all(len(kind.value) <= 16 for kind in kinds)
    assert [kind.meaning for kind in kinds[:4]] == [*names[:3], "a/b " + "x" * 60]
    assert coded_label("kidney").modifiers == ()


# Geometry and references


@pytest.mark.parametrize("kind", SERIES)
def test_labels_lie_at_the_patient_s_place_they_have_in_the_nifti(kind: str, tmp_path: Path) -> None:
    axes, tags = SERIES[kind]
    files = series(tmp_path / "in" / "ct", axes, **tags)
    assert saved(tmp_path / "in", tmp_path / "out").failed == {}
    content = check(tmp_path / "out" / "ct_seg.dcm", files)
    spacing = content.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    np.testing.assert_allclose(float(spacing), SPACING[2], rtol=1e-5)
    order = [item.ReferencedSOPInstanceUID for item in content.SourceImageSequence]
    heights = {
        header.SOPInstanceUID: header.ImagePositionPatient @ axes[:, 2] for header in map(pydicom.dcmread, files)
    }
    assert order == sorted(heights, key=heights.__getitem__)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless"])
def test_compressed_slices(syntax: str, tmp_path: Path) -> None:
    files = series(tmp_path / "in" / "ct")
    for file in files:
        content = pydicom.dcmread(file)
        content.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False)
        content.save_as(file)
    assert saved(tmp_path / "in", tmp_path / "out").failed == {}
    check(tmp_path / "out" / "ct_seg.dcm", files)


def test_a_series_in_two_folders_and_without_slice_thickness(tmp_path: Path) -> None:
    files = series(tmp_path / "in" / "a")
    for file in files:
        content = pydicom.dcmread(file)
        del content.SliceThickness
        content.save_as(file)
    (tmp_path / "in" / "b").mkdir()
    moved = [file.rename(tmp_path / "in" / "b" / file.name) if k % 2 else file for k, file in enumerate(files)]
    assert saved(tmp_path / "in", tmp_path / "out").failed == {}
    content = check(tmp_path / "out" / "in_seg.dcm", moved)
    measures = content.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SliceThickness) == pytest.approx(SPACING[2])


def test_old_files_without_preamble(tmp_path: Path) -> None:
    files = series(tmp_path / "in" / "ct", SpecificCharacterSet="ISO_IR 100")
    for file in files:
        content = pydicom.dcmread(file)
        content.preamble, content.file_meta = None, pydicom.dataset.FileMetaDataset()
        content.save_as(file, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert file.read_bytes()[:2] == b"\x08\x00"
    assert saved(tmp_path / "in", tmp_path / "out").failed == {}
    affine = nib.load(tmp_path / "out" / "ct_seg.nii.gz").affine
    np.testing.assert_array_equal(read_by_pydicom(tmp_path / "out" / "ct_seg.dcm", affine, SHAPE), labelled())


def enhanced(file: Path, order: list[int], frame_by_frame: bool = False) -> Path:
    """An enhanced CT with a frame of reference, and with orientation and pixel size in each frame, if wished."""
    write_enhanced(file, order)
    content = pydicom.dcmread(file)
    content.FrameOfReferenceUID = FRAME
    if frame_by_frame:
        for group in content.PerFrameFunctionalGroupsSequence:
            group.update(content.SharedFunctionalGroupsSequence[0])
        del content.SharedFunctionalGroupsSequence
    content.save_as(file)
    return file


@pytest.mark.parametrize("frame_by_frame", [False, True])
@pytest.mark.parametrize("order", [[*range(16)], [*range(15, -1, -1)], [5, 3, 9, *range(10, 16), 0, 1, 2, 4, 6, 7, 8]])
def test_a_multi_frame_ct_in_any_order(order: list[int], frame_by_frame: bool, tmp_path: Path) -> None:
    file = enhanced(tmp_path / "in" / "ct" / "ENH.dcm", order, frame_by_frame)
    assert saved(tmp_path / "in", tmp_path / "out").failed == {}
    content = check(tmp_path / "out" / "ct_seg.dcm", [file])
    assert float(content.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness) == 9


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy; apt-get install dicom3tools")
@pytest.mark.parametrize("kind", ["oblique", "multi-frame"])
def test_dicom3tools_finds_no_error(kind: str, tmp_path: Path) -> None:
    if kind == "oblique":
        series(tmp_path / "in" / "ct", ROTATED, PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 100")
    else:
        enhanced(tmp_path / "in" / "ct" / "ENH.dcm", [*range(15, -1, -1)], frame_by_frame=True)
    saved(tmp_path / "in", tmp_path / "out")
    command = ["dciodvfy", tmp_path / "out" / "ct_seg.dcm"]
    lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    assert "Segmentation" in lines
    assert [line for line in lines if line.startswith("Error")] == []


# What an object says


def test_patient_study_model_organs_and_probabilities(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = {"PatientID": "P7", "PatientBirthDate": "19500102", "PatientSex": "F", "AccessionNumber": "A1"}
    said |= {"StudyID": "S1", "StudyDate": "20200304", "StudyTime": "112233", "StudyDescription": "Abdomen"}
    files = series(
        tmp_path / "in" / "ct", SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg", SeriesNumber=4, **said
    )
    with caplog.at_level(logging.WARNING):
        saved(tmp_path / "in", tmp_path / "out")
    assert caplog.messages == ["dicom_seg: no SNOMED CT code is known of tumour 腫; coded as 99HIENDMAE by name"]
    file = tmp_path / "out" / "ct_seg.dcm"
    content, source = pydicom.dcmread(file), pydicom.dcmread(files[0])
    assert {name: content[name].value for name in said} == said
    assert content.PatientName == "Müller^Jörg"
    assert (content.StudyInstanceUID, content.FrameOfReferenceUID) == (source.StudyInstanceUID, FRAME)
    assert content.SeriesInstanceUID != source.SeriesInstanceUID and content.SeriesNumber == 1004
    assert (content.Modality, content.SegmentationType, content.SoftwareVersions) == ("SEG", "BINARY", __version__)

    assert [segment.SegmentNumber for segment in content.SegmentSequence] == [1, 2, 3, 4]  # no spleen was found
    assert [segment.SegmentLabel for segment in content.SegmentSequence] == [NAMES[value] for value in (1, 3, 4, 5)]
    assert [segment.SegmentDescription for segment in content.SegmentSequence] == [
        f"label value {value}, mean probability {mean}"
        for value, mean in ((1, "0.75"), (3, "0.50"), (4, "0.75"), (5, "0.75"))
    ]
    digest = hashlib.sha256(b"weights").hexdigest()
    for segment in content.SegmentSequence:
        assert (segment.SegmentAlgorithmType, segment.SegmentAlgorithmName) == ("AUTOMATIC", "Hi-End-MAE")
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("Hi-End-MAE", __version__)
        assert algorithm.AlgorithmParameters == f"weights model.pt sha256={digest}"
        expected = [("123037004", "SCT", "Anatomical Structure")]
        assert codes(segment.SegmentedPropertyCategoryCodeSequence) == expected
        rgb = highdicom.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue).to_rgb(clip=True)
        np.testing.assert_allclose(rgb, 255 * np.array(to_rgb(label_colour(value_of(segment)))), atol=2)
    kinds = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in content.SegmentSequence]
    assert codes(kinds[:3]) == [
        ("10200004", "SCT", "Liver"),
        ("64033007", "SCT", "Kidney"),
        ("32764006", "SCT", "Portal vein"),
    ]
    assert codes(kinds[3:])[0][1:] == ("99HIENDMAE", "tumour 腫")
    modifiers = [codes(kind.get("SegmentedPropertyTypeModifierCodeSequence", [])) for kind in kinds]
    assert modifiers == [[], [("7771000", "SCT", "Left")], [("35819009", "SCT", "Splenic vein")], []]


def test_an_ensemble_is_known_by_all_its_weights_and_no_probability_is_made_up(tmp_path: Path) -> None:
    series(tmp_path / "in")
    (source,) = find_scans(tmp_path / "in")
    files = [tmp_path / f"fold_{fold}.pt" for fold in range(2)]
    for file in files:
        file.write_text(file.name)
    assert write_dicom_seg(tmp_path / "x.dcm", labelled(), source, NAMES, files)
    for segment in pydicom.dcmread(tmp_path / "x.dcm").SegmentSequence:
        parameters = segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters.split(",")
        assert [part[:22] for part in parameters] == ["weights fold_0.pt sha2", "weights fold_1.pt sha2"]
        assert segment.SegmentDescription == f"label value {value_of(segment)}"


@pytest.mark.parametrize(
    ("name", "value"), [("PatientSex", "U"), ("PatientBirthDate", "1950"), ("StudyDate", "2020"), ("StudyTime", "noon")]
)
def test_odd_patient_data_are_copied_as_the_series_has_them(name: str, value: str, tmp_path: Path) -> None:
    with pydicom.config.disable_value_validation():
        series(tmp_path / "in", **{name: value})
    (source,) = find_scans(tmp_path / "in")
    assert write_dicom_seg(tmp_path / "x.dcm", labelled(), source, NAMES)
    assert pydicom.dcmread(tmp_path / "x.dcm")[name].value == value


def test_more_labels_than_a_byte_holds(tmp_path: Path) -> None:
    series(tmp_path / "in")
    (source,) = find_scans(tmp_path / "in")
    labels = np.zeros(SHAPE, np.int16)
    labels[:, :, 3] = np.arange(480).reshape(24, 20) % 301
    assert write_dicom_seg(tmp_path / "x.dcm", labels, source, ["background", *map(str, range(1, 301))])
    content = pydicom.dcmread(tmp_path / "x.dcm")
    assert [value_of(segment) for segment in content.SegmentSequence] == [*range(1, 301)]
    sizes = np.zeros(300, int)
    for frame, group in zip(content.pixel_array, content.PerFrameFunctionalGroupsSequence, strict=True):
        sizes[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1] += frame.sum()
    np.testing.assert_array_equal(sizes, np.bincount(labels.ravel())[1:])


def test_mean_probabilities() -> None:
    labels = np.array([[[0, 1], [1, 3]]], np.uint8)
    means = mean_probabilities(labels, np.array([[[0.9, 0.5], [1.0, 0.25]]], np.float16), 4)
    np.testing.assert_allclose(means, [0.9, 0.75, np.nan, 0.25], atol=1e-3)


# What no object is made of


def test_without_any_organ_none_is_written_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series(tmp_path / "in" / "ct")
    nothing = np.zeros(SHAPE, np.uint8)
    with caplog.at_level(logging.WARNING):
        assert saved(tmp_path / "in", tmp_path / "out", nothing, label_names=NAMES[:5]).done == ["in/ct"]
    assert caplog.messages == ["ct: no DICOM SEG, as no organ was found"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "ct_seg.json",
        "ct_seg.nii.gz",
    ]
    assert saved(tmp_path / "in", tmp_path / "out", nothing, label_names=NAMES[:5]).skipped == ["in/ct"]


def test_highdicom_that_is_missing_is_said_before_any_scan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    match = r"highdicom 0\.28 or later, which is not installed; pip install 'hi-end-mae-bundles\[dicom-seg\]' or 'highd"
    with pytest.raises(InputError, match=match):
        SaveImageLabelsd(label_names=NAMES, output_dir=tmp_path, dicom_seg=True)
    SaveImageLabelsd(label_names=NAMES, output_dir=tmp_path)


def test_a_highdicom_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "highdicom-0.9.1.dist-info").mkdir()
    (tmp_path / "highdicom-0.9.1.dist-info" / "METADATA").write_text("Name: highdicom\nVersion: 0.9.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"highdicom 0\.28 or later, and 0\.9\.1 is installed; pip install"):
        SaveImageLabelsd(label_names=NAMES, output_dir=tmp_path, dicom_seg=True)


def tag(files: list[Path], which: slice, **tags: Any) -> None:
    """Set tags of some files, or remove them."""
    for file in files[which]:
        content = pydicom.dcmread(file)
        for name, value in tags.items():
            setattr(content, name, value) if value is not None else delattr(content, name)
        content.save_as(file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda files: sorted(files, key=height)[4].unlink(), "slices are missing: a gap of 5 mm"),
        (
            lambda files: tag(files, slice(2, 3), FrameOfReferenceUID=None),
            "has no FrameOfReferenceUID; export it again",
        ),
        (lambda files: tag(files, slice(2, 3), FrameOfReferenceUID="1.5"), "several FrameOfReferenceUID in one series"),
        (lambda files: tag(files, slice(None), SOPInstanceUID="1.5"), "several slices have one SOPInstanceUID"),
    ],
)
def test_a_series_that_cannot_be_referred_to_costs_itself_alone(change: Any, reason: str, tmp_path: Path) -> None:
    change(series(tmp_path / "in" / "bad"))
    series(tmp_path / "in" / "good")
    data = saved(tmp_path / "in", tmp_path / "out")
    ((_, found),) = data.failed.items()
    assert reason in found and "\n" not in found
    assert data.done == ["in/good"]
    assert not list((tmp_path / "out").glob("bad*"))


def height(file: Path) -> float:
    return float(pydicom.dcmread(file).ImagePositionPatient[2])


def test_nifti_has_nothing_to_refer_to(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.nii.gz")
    series(tmp_path / "in" / "ct")
    data = saved(tmp_path / "in", tmp_path / "out")
    expected = "NIfTI, and a DICOM SEG can only refer to a DICOM series; leave out --dicom_seg, or give the series"
    assert data.failed == {str(tmp_path / "in" / "a.nii.gz"): expected}
    assert data.done == ["in/ct"]
    with pytest.raises(InputError, match=rf"a\.nii\.gz: {expected}"):
        data.report()


def test_two_multi_frame_files_are_not_one_source(tmp_path: Path) -> None:
    files = [enhanced(tmp_path / "in" / f"{part}.dcm", [*range(8 * part, 8 * part + 8)]) for part in (0, 1)]
    tag(files, slice(None), SeriesInstanceUID="1.2.3.4")
    data = saved(tmp_path / "in", tmp_path / "out")
    assert [*data.failed.values()] == ["no DICOM SEG can refer to 2 multi-frame files at once; leave out --dicom_seg"]


def test_labels_on_another_grid_than_the_slices_are_refused(tmp_path: Path) -> None:
    series(tmp_path / "in")
    (source,) = find_scans(tmp_path / "in")
    with pytest.raises(
        InputError, match=r"labels of 24 x 20 x 18 voxels do not lie on the series' slices, 24 x 20 x 9"
    ):
        write_dicom_seg(tmp_path / "x.dcm", labelled((24, 20, 18)), source, NAMES)
    with pytest.raises(InputError, match="labels of 12 x 20 x 9 voxels"):
        check_source(source, Scan(np.zeros((1, 12, 20, 9)), np.eye(4)))
    assert not (tmp_path / "x.dcm").exists()


def test_headers_that_highdicom_refuses_are_said_in_one_line(tmp_path: Path) -> None:
    series(tmp_path / "in", SOPClassUID="1.2.840.10008.5.1.4.1.1.5")  # nuclear medicine of before 1998
    (source,) = find_scans(tmp_path / "in")
    match = (
        r"^no DICOM SEG can be made of its headers \(KeyError: .*; export the series again or leave out --dicom_seg$"
    )
    with pytest.raises(InputError, match=match):
        write_dicom_seg(tmp_path / "x.dcm", labelled(), source, NAMES)


def test_a_full_disk_leaves_no_half_object(tmp_path: Path) -> None:
    series(tmp_path / "in")
    (source,) = find_scans(tmp_path / "in")
    with full_disk(), pytest.raises(InputError, match=r"x\.dcm: cannot be written \(File too large\); make room"):
        write_dicom_seg(tmp_path / "x.dcm", labelled(), source, NAMES)
    assert not list(tmp_path.glob("*x.dcm"))


# What is there already


def test_an_object_is_of_the_labels_beside_it(tmp_path: Path) -> None:
    files, out = series(tmp_path / "in" / "ct"), tmp_path / "out"
    assert saved(tmp_path / "in", out, dicom_seg=False).done == ["in/ct"]
    assert not (out / "ct_seg.dcm").exists()
    assert saved(tmp_path / "in", out).done == ["in/ct"]  # labels are there, the object is not
    first = check(out / "ct_seg.dcm", files).SOPInstanceUID
    assert saved(tmp_path / "in", out).skipped == ["in/ct"]
    assert saved(tmp_path / "in", out, dicom_seg=False).skipped == ["in/ct"]
    assert pydicom.dcmread(out / "ct_seg.dcm").SOPInstanceUID == first
    (out / "ct_seg.dcm").unlink()
    assert saved(tmp_path / "in", out).done == ["in/ct"]
    labels = labelled()[::-1].copy()
    assert saved(tmp_path / "in", out, labels, settings={"overlap": 0.7}).done == ["in/ct"]
    check(out / "ct_seg.dcm", files)
    assert saved(tmp_path / "in", out, settings={"overlap": 0.6}, dicom_seg=False).done == ["in/ct"]
    assert not (out / "ct_seg.dcm").exists()  # it was of other labels
    assert saved(tmp_path / "in", out).done == ["in/ct"]
    renamed = [*NAMES[:4], "portal vein", NAMES[5]]
    assert saved(tmp_path / "in", out, label_names=renamed).done == ["in/ct"]
    assert [s.SegmentLabel for s in check(out / "ct_seg.dcm", files).SegmentSequence][2] == "portal vein"
    assert saved(tmp_path / "in", out, 0 * labels, settings={"overlap": 0.7}).done == ["in/ct"]
    assert not (out / "ct_seg.dcm").exists()


def test_an_object_that_cannot_be_replaced_is_said(tmp_path: Path) -> None:
    series(tmp_path / "in" / "ct")
    saved(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "ct_seg.dcm").unlink()
    (tmp_path / "out" / "ct_seg.dcm").mkdir()
    before = (tmp_path / "out" / "ct_seg.nii.gz").read_bytes()
    with pytest.raises(InputError, match=r"ct_seg\.dcm: cannot be replaced \(.*\); make room there or give another"):
        saved(tmp_path / "in", tmp_path / "out", 0 * labelled())
    assert (tmp_path / "out" / "ct_seg.nii.gz").read_bytes() == before


def test_a_file_of_someone_else_stays_where_no_object_is_asked_for(tmp_path: Path) -> None:
    series(tmp_path / "in" / "ct")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ct_seg.dcm").write_text("mine")
    saved(tmp_path / "in", tmp_path / "out", dicom_seg=False)
    assert (tmp_path / "out" / "ct_seg.dcm").read_text() == "mine"


def test_an_object_beside_its_series_is_no_scan(tmp_path: Path) -> None:
    series(tmp_path / "ct")
    for _ in range(2):
        data = saved(tmp_path / "ct", tmp_path / "ct", settings={"again": _})
        assert data.done == ["ct"]
    assert data.passed_over == {str(tmp_path / "ct" / "ct_seg.dcm"): "SEG, no image"} | {
        str(tmp_path / "ct" / "ct_seg.nii.gz"): "a result of an earlier run"
    }


@pytest.mark.integration
def test_the_bundle_writes_objects_with_the_network_s_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With windows mirrored, and of the largest pieces alone: the mean is of the voxels that are left."""
    files, out = series(tmp_path / "data" / "ct", ROTATED, PatientID="P7"), tmp_path / "out"
    write(tmp_path / "data" / "a.nii.gz")
    settings = {"dicom_seg": True, "overlay": False, "largest_component": True, "tta_flip_axes": [1]}
    names = json.loads((ROOT / "hi_end_mae_btcv_seg" / "configs" / "inference.json").read_text())["label_names"]
    for again in (0, 1):
        flow = workflow(tmp_path / "data", out, **settings)
        with pytest.raises(RuntimeError) as caught:
            flow.run()
        assert "a.nii.gz: NIfTI, and a DICOM SEG can only refer" in str(input_error_in(caught.value))
        assert f"{1 - again} segmented, {again} there already, 1 failed" in capsys.readouterr().out
    content = check(out / "ct_seg.dcm", files)
    assert content.PatientID == "P7"
    labels = np.asanyarray(nib.load(out / "ct_seg.nii.gz").dataobj)
    segment = max(content.SegmentSequence, key=lambda segment: (labels == value_of(segment)).sum())
    assert segment.SegmentLabel == names[value_of(segment)]
    (tmp_path / "data" / "a.nii.gz").unlink()
    workflow(tmp_path / "data", out, **settings, organ_probability=segment.SegmentLabel).run()
    chances = nib.load(out / f"ct_{segment.SegmentLabel.replace(' ', '_')}.nii.gz").get_fdata()
    mean = float(segment.SegmentDescription.rpartition(" ")[2])
    assert mean == pytest.approx(chances[labels == value_of(segment)].mean(), abs=0.006)
