"""Series whose slices do not belong together: out of line, of two patients, or rescaled in part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_networks.datasets.dicom import BadScanError
from shared_networks.datasets.scans import find_scans, read_scan
from tests.workflows.odd_dicom import ct, read, write_enhanced, write_series

pytest.importorskip("SimpleITK")

GAP, SLICES = 4.0, 16
TURN = np.array([[0.96, 0.0, 0.28], [0.0, 1.0, 0.0], [-0.28, 0.0, 0.96]])  # columns, rows and slices of an oblique CT


def height(file: Path) -> float:
    return float(read(file).ImagePositionPatient[2])


def change(files: list[Path], edit: Callable[[Any, int], None]) -> list[Path]:
    """Edit headers of a series, each with its number from the feet up; return the files in that order."""
    ordered = sorted(files, key=height)
    for k, file in enumerate(ordered):
        content = read(file)
        edit(content, k)
        content.save_as(file)
    return ordered


def change_frames(file: Path, edit: Callable[[Any, int], None]) -> None:
    content = read(file)
    for k, frame in enumerate(content.PerFrameFunctionalGroupsSequence):
        edit(frame, k)
    content.save_as(file)


def reason(folder: Path) -> str:
    """Why the only scan of a folder is refused."""
    (source,) = find_scans(folder)
    with pytest.raises(BadScanError) as caught:
        read_scan(source, "CT")
    return str(caught.value)


def place(k: int, across: float = 0.0, up: float = 0.0) -> list[float]:
    """Where a slice lies that was moved along its columns, or off its place along the normal."""
    return (np.array([-20.0, -30.0, 7.0]) + TURN @ [across, 0.0, k * GAP + up]).round(6).tolist()


def move(across: Callable[[int], float], up: Callable[[int], float] = lambda k: 0.0) -> Callable[[Any, int], None]:
    def edit(content: Any, k: int) -> None:
        content.ImageOrientationPatient = TURN[:, :2].T.ravel().tolist()
        content.ImagePositionPatient = place(k, across(k), up(k))

    return edit


OUT_OF_LINE = {
    "one slice": (lambda k: 20.0 * (k == 9), (20, 8, 20)),
    "first slice": (lambda k: 20.0 * (k == 0), (20, 0, 18.7)),
    "half": (lambda k: 20.0 * (k > 7), (20, 7, 9.33)),
    "half of a tilted one": (lambda k: 0.5 * k + 20.0 * (k > 7), (20, 7, 9.33)),
    "bow": (lambda k: 40 * np.sin(np.pi * k / 15), (8.32, 0, 39.8)),
}


@pytest.mark.parametrize("kind", OUT_OF_LINE)
def test_slices_that_jump_in_their_plane_are_refused(kind: str, tmp_path: Path) -> None:
    across, (jump, k, beside) = OUT_OF_LINE[kind]
    files = change(write_series(tmp_path), move(across))
    found = reason(tmp_path)
    assert (
        f"the series jumps by {jump:g} mm between slices {k + 1} and {k + 2} "
        f"({files[k].name} and {files[k + 1].name}) and lies up to {beside:g} mm beside a straight line" in found
    )
    assert "tilt" not in found


def test_frames_that_jump_in_their_plane_are_refused(tmp_path: Path) -> None:
    def edit(frame: Any, k: int) -> None:
        frame.PlanePositionSequence[0].ImagePositionPatient = [-20, -30 + 15 * (k > 4), 7 + k * GAP]

    change_frames(write_enhanced(tmp_path / "ENH.dcm"), edit)
    assert "jumps by 15 mm between slices 5 and 6 (ENH.dcm, frame 5 and ENH.dcm, frame 6)" in reason(tmp_path)


def test_only_a_shift_from_slice_to_slice_is_called_tilt(tmp_path: Path) -> None:
    change(write_series(tmp_path), move(lambda k: 0.5 * k))
    assert reason(tmp_path).startswith("gantry tilt: each slice is shifted by 0.5 mm in its plane")


def test_gaps_that_drift_are_irregular(tmp_path: Path) -> None:
    """Each within a twentieth of the others, and a slice more than half a gap off its place after forty."""
    files = change(write_series(tmp_path, ct((24, 20, 40))), move(lambda k: 0.0, lambda k: 0.14 * min(k, 39 - k)))
    line = f"irregular spacing: slice 20 of 40 ({files[19].name}) lies 2.66 mm from where even gaps of 4 mm put it"
    assert reason(tmp_path).startswith(line)


def test_jitter_of_positions_is_forgiven(tmp_path: Path) -> None:
    off = np.random.default_rng(2).uniform(-1, 1, (2, SLICES))
    change(write_series(tmp_path), move(lambda k: 0.15 * off[0, k], lambda k: 0.08 * off[1, k]))
    (source,) = find_scans(tmp_path)
    scan = read_scan(source, "CT")
    np.testing.assert_array_equal(scan.image[0], ct())
    flip = np.diag([-1.0, -1.0, 1.0])
    for k in range(SLICES):
        assert np.abs(flip @ (scan.affine[:3] @ [0, 0, k, 1]) - place(k)).max() < 0.4


RESCALED_IN_PART: dict[str, tuple[Callable[[Any], None], str]] = {
    "both": (lambda content: content.__delattr__("RescaleSlope"), "RescaleSlope is missing in some slices"),
    "intercept": (lambda content: content.__delattr__("RescaleIntercept"), "RescaleIntercept is missing in some"),
    "type": (lambda content: setattr(content, "RescaleType", "US"), "RescaleType differs between slices"),
}


@pytest.mark.parametrize("kind", RESCALED_IN_PART)
def test_a_series_that_is_rescaled_in_part_is_refused(kind: str, tmp_path: Path) -> None:
    edit, line = RESCALED_IN_PART[kind]
    files = change(write_series(tmp_path), lambda content, k: edit(content) if k % 2 else None)
    assert reason(tmp_path).startswith(line)
    assert f"({files[0].name} and {files[1].name}); export the series again" in reason(tmp_path)


@pytest.mark.parametrize("kind", RESCALED_IN_PART)
def test_frames_that_are_rescaled_in_part_are_refused(kind: str, tmp_path: Path) -> None:
    edit, line = RESCALED_IN_PART[kind]
    change_frames(
        write_enhanced(tmp_path / "ENH.dcm"),
        lambda frame, k: edit(frame.PixelValueTransformationSequence[0]) if k == 3 else None,
    )
    assert reason(tmp_path).startswith(line)
    assert "(ENH.dcm, frame 1 and ENH.dcm, frame 4)" in reason(tmp_path)


def test_a_series_without_any_rescale_has_hu_in_its_files(tmp_path: Path) -> None:
    def edit(content: Any, k: int) -> None:
        del content.RescaleSlope, content.RescaleIntercept
        if k % 2:
            content.RescaleType = "HU"  # what a CT has where none is given
        stored = np.frombuffer(content.PixelData, np.uint16).astype(np.int16) - 1024
        content.PixelRepresentation, content.PixelData = 1, stored.astype(np.int16).tobytes()

    change(write_series(tmp_path), edit)
    (source,) = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(source, "CT").image[0], ct())


OWNERS = {
    "PatientID": "put the files of each into a folder of its own",
    "StudyInstanceUID": "put the files of each into a folder of its own",
    "FrameOfReferenceUID": "their positions cannot be compared; export each as its own series",
}


@pytest.mark.parametrize("name", OWNERS)
def test_slices_of_two_patients_are_no_scan(name: str, tmp_path: Path) -> None:
    """Stacked as if they were one; who they are of is not printed."""
    files = change(write_series(tmp_path), lambda content, k: setattr(content, name, f"1.98765.{k // 8}"))
    found = reason(tmp_path)
    assert found == f"slices of several {name} in one series ({files[0].name} and {files[8].name}); {OWNERS[name]}"


def test_multi_frame_files_of_two_patients_are_no_scan(tmp_path: Path) -> None:
    for name, frames in (("A", [*range(8)]), ("B", [*range(8, 16)])):
        content = read(write_enhanced(tmp_path / name, frames))
        content.SeriesInstanceUID, content.PatientID = "1.2.3.4", name
        content.save_as(tmp_path / name)
    assert "several PatientID in one series (A, frame 1 and B, frame 1)" in reason(tmp_path)


@pytest.mark.parametrize("name", ["PatientID", "StudyInstanceUID"])
def test_patients_in_folders_of_their_own_are_scans_though_they_share_a_uid(name: str, tmp_path: Path) -> None:
    for k, patient in enumerate("ab"):
        folder = tmp_path / patient
        tags = {"PatientID": "1", "StudyInstanceUID": "1.2.3", name: f"1.{k}"}
        files = write_series(folder / "first", ct() + np.int16(k), **tags)
        (folder / "second").mkdir()
        for file in files[::2]:  # a series in two folders stays one
            file.rename(folder / "second" / file.name)
    sources = find_scans(tmp_path)
    assert [source.case for source in sources] == [f"{tmp_path.name}/a", f"{tmp_path.name}/b"]
    for k, source in enumerate(sources):
        np.testing.assert_array_equal(read_scan(source, "CT").image[0], ct() + np.int16(k))


def test_patients_whose_folders_are_mixed_are_one_failure_that_names_both(tmp_path: Path) -> None:
    for patient in "ab":
        for file in write_series(tmp_path / patient, PatientID=patient):
            target = tmp_path / f"{patient}{int(file.name[2:]) % 2}" / file.name
            target.parent.mkdir(exist_ok=True)
            file.rename(target)
        (tmp_path / patient).rmdir()
    (source,) = find_scans(tmp_path)
    with pytest.raises(BadScanError) as caught:
        read_scan(source, "CT")
    for patient in "ab":
        assert f"{tmp_path}/{patient}" in str(caught.value)


def test_another_modality_is_not_advised_where_the_header_says_ct(tmp_path: Path) -> None:
    """`--modality MR` would only be the next failure."""
    write_series(tmp_path, np.random.default_rng(3).integers(0, 601, ct().shape))
    assert reason(tmp_path).startswith("wrong modality: values from 0 to 600 are not HU")
    assert reason(tmp_path).endswith("put the rescale intercept right")
