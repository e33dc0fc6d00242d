"""DICOM as scanners and archives leave it: small CT series of one volume, whole and odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (1.5, 2.5, 4.0)  # mm along columns, rows and slices
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def ct(shape: tuple[int, int, int] = (24, 20, 16)) -> np.ndarray:
    """Noisy tissue in air, [X, Y, Z] in HU, different in every slice."""
    values = np.full(shape, -1000, np.int16)
    tissue = np.random.default_rng(5).normal(40, 30, shape).astype(np.int16)
    values[4:-5, 3:-4, 2:-3] = tissue[4:-5, 3:-4, 2:-3]
    return values


def dataset(pixels: np.ndarray, position: Any, series: str, **tags: Any) -> FileDataset:
    """A slice; pixels [X, Y] in HU, or with a third axis of colours."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    content = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    content.SOPClassUID, content.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    content.StudyInstanceUID, content.SeriesInstanceUID, content.Modality = "1.2.3", series, "CT"
    content.ImagePositionPatient, content.ImageOrientationPatient = list(position), [1, 0, 0, 0, 1, 0]
    content.PixelSpacing, content.SliceThickness = [SPACING[1], SPACING[0]], 9.0  # between rows first
    content.SamplesPerPixel, content.PhotometricInterpretation = 1, "MONOCHROME2"
    content.BitsAllocated, content.BitsStored, content.HighBit, content.PixelRepresentation = 16, 16, 15, 0
    content.RescaleSlope, content.RescaleIntercept = 1, -1024
    content.Columns, content.Rows = pixels.shape[:2]
    content.PixelData = (pixels.swapaxes(0, 1).astype(np.int32) + 1024).astype(np.uint16).tobytes()
    for tag, value in tags.items():
        setattr(content, tag, value) if value is not None else delattr(content, tag)
    meta.MediaStorageSOPClassUID = content.SOPClassUID
    return content


def write(content: FileDataset, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content.save_as(file, enforce_file_format=True)
    return file


def write_series(folder: Path, values: np.ndarray | None = None, series: str = "1.2.3.4", **tags: Any) -> list[Path]:
    """One file a slice, named in no order."""
    volume = ct() if values is None else values
    order = np.random.default_rng(1).permutation(volume.shape[2])
    return [
        write(dataset(volume[:, :, k], (-20, -30, 7 + k * SPACING[2]), series, **tags), folder / f"IM{order[k]:03d}")
        for k in range(volume.shape[2])
    ]


def items(**tags: Any) -> list[Dataset]:
    """A sequence of one item."""
    item = Dataset()
    for tag, value in tags.items():
        setattr(item, tag, value)
    return [item]


def write_enhanced(
    file: Path, frames: list[int] | None = None, values: np.ndarray | None = None, stacks: int = 1, spacing: bool = True
) -> Path:
    """An enhanced CT: all slices in one file, as frames in the order given, every second one with its own slope."""
    volume = ct() if values is None else values // 2 * 2
    order = list(range(volume.shape[2])) if frames is None else frames
    content = dataset(volume[:, :, 0], (0, 0, 0), generate_uid(), SOPClassUID=EnhancedCTImageStorage)
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(content, tag)
    del content.RescaleSlope, content.RescaleIntercept
    shared = Dataset()
    shared.PlaneOrientationSequence = items(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    if spacing:
        shared.PixelMeasuresSequence = items(PixelSpacing=[SPACING[1], SPACING[0]], SliceThickness=9.0)
    content.SharedFunctionalGroupsSequence = [shared]
    groups, stored = [], []
    for stack in range(stacks):
        for k in order:
            frame, slope = Dataset(), 2 - k % 2
            frame.PlanePositionSequence = items(ImagePositionPatient=[-20, -30, 7 + k * SPACING[2]])
            frame.FrameContentSequence = items(StackID=str(stack + 1), InStackPositionNumber=k + 1)
            frame.PixelValueTransformationSequence = items(RescaleSlope=slope, RescaleIntercept=-1024, RescaleType="HU")
            groups.append(frame)
            stored.append(((volume[:, :, k].T.astype(np.int32) + 1024) // slope).astype(np.uint16))
    content.PerFrameFunctionalGroupsSequence, content.NumberOfFrames = groups, len(groups)
    content.PixelData = np.stack(stored).tobytes()
    return write(content, file)


def write_report(file: Path) -> Path:
    """A structured report, which has no image."""
    content = FileDataset("x", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    content.SOPClassUID = content.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.67"
    content.SOPInstanceUID = content.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    content.StudyInstanceUID, content.SeriesInstanceUID, content.Modality = "1.2.3", generate_uid(), "SR"
    return write(content, file)


def write_study(folder: Path) -> None:
    """A CT with what archives put beside it: a scout, a dose sheet, colour pictures, a report and other files."""
    write_series(folder)
    scout = ct()[:, 8, :]
    write(dataset(scout, (0, 0, 0), "1.2.3.5", ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), folder / "SCOUT")
    sheet = dataset(scout, (0, 0, 0), "1.2.3.6", SOPClassUID=SECONDARY_CAPTURE, ImagePositionPatient=None)
    write(sheet, folder / "DOSE")
    for k in range(5):
        colours = np.zeros((*scout.shape, 3), np.uint8)
        picture = dataset(scout, (0, 0, k), "1.2.3.7", SamplesPerPixel=3, PhotometricInterpretation="RGB")
        picture.PlanarConfiguration, picture.BitsAllocated, picture.BitsStored, picture.HighBit = 0, 8, 8, 7
        picture.PixelData = colours.tobytes()
        write(picture, folder / f"VR{k}")
    write_report(folder / "SR1")
    (folder / "VERSION.txt").write_text("x")
    (folder / "Thumbs.db").write_bytes(b"\0" * 600)


def spread(files: list[Path], folders: list[Path]) -> None:
    """Move the slices of a series into folders in turn."""
    for index, file in enumerate(files):
        target = folders[index * len(folders) // len(files)]
        target.mkdir(parents=True, exist_ok=True)
        file.rename(target / file.name)


def read(file: Path) -> FileDataset:
    return pydicom.dcmread(file)
