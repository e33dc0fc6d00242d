"""Files that no name or preamble announces: DICOM is read, what could be a scan is told, and all else is passed by."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("SimpleITK")
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from shared_networks.datasets.scans import find_scans, read_scan
from shared_networks.errors import InputError
from tests.workflows.odd_dicom import ct, read, write_enhanced, write_series

AFFINE = np.diag([-3.0, 2.5, 4.0, 1.0])


def without_preamble(file: Path, implicit: bool, first: str) -> None:
    """Write a file as the first standards had it, from its element `first` on."""
    content = read(file)
    for element in list(content):
        if element.keyword != first and element.tag < content[first].tag:
            del content[element.tag]
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, implicit
    write_dataset(stream, content)
    file.write_bytes(stream.getvalue())


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("first", ["SpecificCharacterSet", "ImageType", "SOPClassUID"])
def test_dicom_without_preamble_is_read(implicit: bool, first: str, tmp_path: Path) -> None:
    more = {"ImageType": ["ORIGINAL", "PRIMARY"], "SpecificCharacterSet": "ISO_IR 100"}
    for file in write_series(tmp_path, **{first: more[first]} if first in more else {}):
        without_preamble(file, implicit, first)
    (source,) = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(source, "CT").image[0], ct())


def test_dicom_that_begins_with_its_meta_group_is_read(tmp_path: Path) -> None:
    for file in write_series(tmp_path):
        file.write_bytes(file.read_bytes()[132:])
    (source,) = find_scans(tmp_path)
    np.testing.assert_array_equal(read_scan(source, "CT").image[0], ct())


def test_frames_without_preamble_are_read(tmp_path: Path) -> None:
    file = write_enhanced(tmp_path / "ENH.dcm")
    file.write_bytes(file.read_bytes()[132:])
    for path in (tmp_path, file):
        (source,) = find_scans(path)
        assert read_scan(source, "CT").image.shape == (1, 24, 20, 16)


def nifti(ending: str, kind: type = nib.Nifti1Image) -> bytes:
    image = kind(ct(), AFFINE)
    return gzip.compress(image.to_bytes(), 1) if ending == "gz" else image.to_bytes()


def archive(folder: Path, kind: str) -> bytes:
    file = folder / f"x.{kind}"
    (folder / "note").write_text("x")
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as whole:
            whole.write(folder / "note", "note")
    else:
        with tarfile.open(file, "w") as whole:
            whole.add(folder / "note", "note")
    return file.read_bytes()


NOISE = bytes(np.random.default_rng(0).integers(0, 256, 900, np.uint8))
NEITHER = "neither NIfTI nor DICOM by its content; convert it if it is a scan"
BY_CONTENT = "NIfTI by its content and not by its name; let that end with "
ARCHIVE = "an archive, which is not read; unpack it"
UNREAD: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "P1.zip": (lambda folder: archive(folder, "zip"), ARCHIVE),
    "P1.tar": (lambda folder: archive(folder, "tar"), ARCHIVE),
    "P1.tar.gz": (lambda folder: gzip.compress(archive(folder, "tar")), ARCHIVE),
    "P1.7Z": (lambda folder: b"x", ARCHIVE),
    "packed": (lambda folder: archive(folder, "zip"), ARCHIVE),
    "packed.gz": (lambda folder: gzip.compress(archive(folder, "tar")), ARCHIVE),
    "ct2.gz": (lambda folder: nifti("gz"), f"{BY_CONTENT}.nii.gz"),
    "ct3": (lambda folder: nifti(""), f"{BY_CONTENT}.nii"),
    "ct4": (lambda folder: nifti("gz", nib.Nifti2Image), f"{BY_CONTENT}.nii.gz"),
    "ct5.nii_": (lambda folder: nifti(""), f"{BY_CONTENT}.nii"),
    "noise": (lambda folder: NOISE, NEITHER),
    "1.2.840.113": (lambda folder: NOISE, NEITHER),
    "noise.gz": (lambda folder: gzip.compress(NOISE), NEITHER),
    "broken.gz": (lambda folder: gzip.compress(NOISE)[:20], NEITHER),
    "IM1.dcm": (lambda folder: NOISE, "DICOM by its name and not by its content; copy it again"),
    "IM1.IMA": (lambda folder: b"", "DICOM by its name and not by its content; copy it again"),
    "IM1.gz": (
        lambda folder: gzip.compress(write_series(folder)[0].read_bytes()),
        "gzipped DICOM, which is not read; unpack it",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_could_be_a_scan_is_told(name: str, tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    data.mkdir(), other.mkdir()
    content, reason = UNREAD[name]
    (data / name).write_bytes(content(other))
    with pytest.raises(InputError) as caught:
        find_scans(data)
    assert str(caught.value).splitlines()[1:] == [f"{data / name}: passed over: {reason}"]
    with pytest.raises(InputError) as caught:
        find_scans(data / name)
    assert str(caught.value) == f"{data / name}: {reason}"
    nib.save(nib.Nifti1Image(ct(), AFFINE), data / "good.nii.gz")
    assert find_scans(data).passed_over == {str(data / name): reason}


def test_what_is_no_scan_is_passed_by(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(ct(), AFFINE), tmp_path / "good.nii.gz")
    for name in ("readme.md", "a.json", "a.csv", "a.txt", "LICENSE", "VERSION"):
        (tmp_path / name).write_text("Straße\n" * 200)
    for name in ("a.png", "a.pkl", "Thumbs.db", "a.pt", "a.b2nd"):
        (tmp_path / name).write_bytes(NOISE)
    (tmp_path / "picture").write_bytes(b"\x89PNG" + NOISE)
    (tmp_path / "DONE").touch()
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"a,b\n" * 200))
    sources = find_scans(tmp_path)
    assert len(sources) == 1 and sources.passed_over == {}


def test_many_of_a_kind_are_told_in_one_line(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(ct(), AFFINE), tmp_path / "good.nii.gz")
    for k in range(30):
        (tmp_path / f"IM{k:02d}").write_bytes(NOISE)
    assert find_scans(tmp_path).passed_over == {f"{tmp_path}/IM00": f"{NEITHER}, with 29 more of its folder"}


def test_sound_dicom_without_an_image_is_said_to_be_that(tmp_path: Path) -> None:
    files = write_series(tmp_path)
    kinds = {
        "1.2.840.10008.5.1.4.1.1.481.3": "RT Structure Set Storage",
        "1.2.840.10008.5.1.4.1.1.11.1": "Grayscale Softcopy Presentation State Storage",
        "1.2.840.10008.5.1.4.1.1.104.1": "Encapsulated PDF Storage",
    }
    for number, kind in enumerate(kinds):
        content = read(files[0])
        del content.PixelData, content.Rows, content.Columns
        content.SOPClassUID = content.file_meta.MediaStorageSOPClassUID = kind
        content.SeriesInstanceUID = f"1.2.9.{number}"
        content.save_as(tmp_path / f"X{number}")
    sources = find_scans(tmp_path)
    assert [len(source.files) for source in sources] == [16]
    assert sources.passed_over == {
        f"{tmp_path}/X{number}": f"{kind}, no image" for number, kind in enumerate(kinds.values())
    }
