"""Read DICOM series: CT slice by slice, or frame by frame from multi-frame files.

Slices are sorted by position and rescaled each by its own slope and intercept. SimpleITK reads files of one slice,
pydicom the functional groups of enhanced multi-frame files, of which SimpleITK knows the first frame's alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_networks.datasets.grid import SHEAR_TOLERANCE, shear
from shared_networks.errors import InputError

NO_IMAGES = {"SR", "PR", "KO", "SEG", "REG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "DOC"}  # DICOM modalities
FEWEST_SLICES = 4  # localisers have up to three
_GAP_TOLERANCE = 0.05  # of the gap between slices
_BESIDE_TOLERANCE = 0.25  # pixels that a slice may lie beside the line through the first and the last
_DRIFT_TOLERANCE = 0.5  # gaps that a slice may lie above or below its place
_FIRST_VRS = (b"UI", b"CS", b"OB", b"DA", b"TM", b"DT", b"SH", b"LO", b"SQ")  # of elements that files may begin with
_LONGEST_FIRST = 1024  # bytes of such an element
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_CLASS, _INSTANCE, _MODALITY = "0008|0016", "0008|0018", "0008|0060"
_SAMPLES, _SPACING, _POSITION = "0028|0002", "0028|0030", "0020|0032"
_OWNER = {"PatientID": "0010|0020", "StudyInstanceUID": "0020|000d", "FrameOfReferenceUID": "0020|0052"}
_RESCALE = {"RescaleSlope": "0028|1053", "RescaleIntercept": "0028|1052", "RescaleType": "0028|1054"}


class BadScanError(ValueError):
    """Why a scan is of no use, in one line."""


class Slice(NamedTuple):
    """Header of a slice, in DICOM's LPS coordinates.

    Attributes:
        file: that holds it.
        frame: its number in a multi-frame file.
        modality: such as `CT`.
        size: `(columns, rows)`; empty of what is no image.
        spacing: mm along columns and rows of the array, then between slices as the file has it.
        origin: mm of the first voxel's centre.
        axes: `[3, 3]`, directions of columns, rows and slices.
        lacks: what of its geometry is missing, nothing where all is there.
        no_scan: why it cannot belong to a scan, nothing where it can.
        instance: its SOPInstanceUID.
        scale: slope and intercept of a frame; of other slices SimpleITK applies them.
        stack: what tells volumes of one file apart.
        frames: number of frames in the file.
        owner: its PatientID, StudyInstanceUID and FrameOfReferenceUID, each empty where the file has none.
        rescale: whether it has RescaleSlope and RescaleIntercept, and its RescaleType.
    """

    file: str
    frame: int
    modality: str
    size: tuple[int, ...]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]
    axes: NDArray[np.float64]
    lacks: str = ""
    no_scan: str = ""
    instance: str = ""
    scale: tuple[float, float] = (1.0, 0.0)
    stack: tuple[str, ...] = ()
    frames: int = 1
    owner: tuple[str, ...] = ()
    rescale: tuple[bool, bool, str] = (False, False, "")


def is_dicom(file: str) -> bool:
    """Return whether a file begins as DICOM does."""
    with open(file, "rb") as stream:
        return begins_as_dicom(stream.read(132))


def begins_as_dicom(start: bytes) -> bool:
    """Return whether bytes are the start of DICOM: a preamble, or as old files have it an element of group 2 or 8."""
    if start[128:132] == b"DICM":
        return True
    group, element = (int.from_bytes(start[k : k + 2], "little") for k in (0, 2))
    if group not in (2, 8) or len(start) < 8:
        return False
    length = int.from_bytes(start[4:8], "little")  # of implicit VR; explicit VR has two letters here
    if element == 0:
        return start[4:6] == b"UL" or length == 4
    return start[4:6] in _FIRST_VRS or (length % 2 == 0 and length <= _LONGEST_FIRST)


def series_of_folder(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the files of each DICOM series in a folder, not in those below, by SeriesInstanceUID.

    Raises:
        InputError: SimpleITK is not installed.
    """
    reader = _package("SimpleITK", folder).ImageSeriesReader
    uids = reader.GetGDCMSeriesIDs(str(folder))
    return {uid: tuple(sorted(reader.GetGDCMSeriesFileNames(str(folder), uid))) for uid in uids}


def _package(name: str, path: str | Path) -> Any:
    if importlib.util.find_spec(name) is None:
        raise InputError(f"{path}: DICOM is read with {name}, which is not installed; pip install SimpleITK pydicom")
    if name == "pydicom":
        import pydicom  # only here, as SimpleITK: an optional dependency

        return pydicom
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def read_header(file: str) -> Slice:
    """Read the header of a file, or of its first frame."""
    reader = _package("SimpleITK", file).ImageFileReader()
    reader.SetFileName(file)
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # an RTSTRUCT or a report has no image to inform about
        return Slice(file, 0, "DOC", (), np.zeros(3), np.zeros(3), np.eye(3), no_scan="no image")

    size = reader.GetSize()

    def tag(key: str) -> str:
        return str(reader.GetMetaData(key)).strip(" \0") if reader.HasMetaDataKey(key) else ""

    modality = tag(_MODALITY)
    no_scan = ""
    if modality in NO_IMAGES:
        no_scan = f"{modality}, no image"
    elif tag(_CLASS).startswith(_SECONDARY_CAPTURE):
        no_scan = "a secondary capture, such as a dose sheet"
    elif tag(_SAMPLES) not in ("", "1"):
        no_scan = "colour pictures"
    lacks = [word for key, word in ((_POSITION, "ImagePositionPatient"), (_SPACING, "PixelSpacing")) if not tag(key)]
    return Slice(
        file,
        0,
        modality,
        tuple(size[:2]),
        np.array(reader.GetSpacing()),
        np.array(reader.GetOrigin()),
        np.array(reader.GetDirection()).reshape(3, 3),
        " and ".join(lacks),
        no_scan,
        tag(_INSTANCE),
        frames=int(size[2]) if len(size) > 2 else 1,
        owner=tuple(tag(key) for key in _OWNER.values()),
        rescale=_rescale([tag(key) for key in _RESCALE.values()], modality),
    )


def _rescale(found: Sequence[Any], modality: str) -> tuple[bool, bool, str]:
    """What a slice has of its rescale; of CT, HU is meant where no type is given."""
    slope, intercept, kind = found
    return slope not in ("", None), intercept not in ("", None), str(kind or ("HU" if modality == "CT" else ""))


def kind_without_image(file: str) -> str:
    """Return what a DICOM file is that holds no image, such as `RT Structure Set Storage`.

    Returns:
        Nothing for an image, and for what cannot be read or is of no known class.
    """
    if importlib.util.find_spec("pydicom") is None:
        return ""
    try:
        content = _package("pydicom", file).dcmread(
            file, stop_before_pixels=True, force=True, specific_tags=["SOPClassUID"]
        )
        kind = str(content.SOPClassUID.name)
    except Exception:  # a damaged file may fail in any way
        return ""
    return kind if "Storage" in kind and " Image" not in kind else ""


def series_slices(files: Sequence[str]) -> list[Slice]:
    """Return the headers of all slices, or frames, of a series, by position.

    Raises:
        BadScanError: a multi-frame file holds several volumes.
    """
    headers = [read_header(file) for file in files]
    slices = [part for first in headers for part in ([first] if first.frames == 1 else _frames(first.file))]
    if len(stacks := {part.stack for part in slices}) > 1:
        raise BadScanError(f"{len(stacks)} volumes in one series, as of several phases; export each as its own series")
    normal = slices[0].axes[:, 2]
    return sorted(slices, key=lambda part: float(part.origin @ normal))


def _frames(file: str) -> list[Slice]:
    """The frames of a multi-frame file, each by its functional groups."""
    content = _package("pydicom", file).dcmread(file, stop_before_pixels=True, force=True)  # without a preamble, too
    shared = _group(content, "SharedFunctionalGroupsSequence", 0)
    count = int(content.NumberOfFrames)
    return [_frame(file, content, shared, index) for index in range(count)]


def _group(content: Any, name: str, index: int) -> Any:
    items = getattr(content, name, None) or []
    return items[index] if index < len(items) else None


def _frame(file: str, content: Any, shared: Any, index: int) -> Slice:
    own = _group(content, "PerFrameFunctionalGroupsSequence", index)

    def value(group: str, name: str) -> Any:
        for part in (own, shared):
            found = _group(part, group, 0) if part is not None else None
            if found is not None and getattr(found, name, None) is not None:
                return getattr(found, name)
        return None

    position = value("PlanePositionSequence", "ImagePositionPatient")
    orientation = value("PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = value("PixelMeasuresSequence", "PixelSpacing")
    given = {"ImagePositionPatient": position, "ImageOrientationPatient": orientation, "PixelSpacing": spacing}
    columns, rows = (
        (np.array(orientation[start : start + 3], float) for start in (0, 3)) if orientation else np.eye(3)[:2]
    )
    slope = value("PixelValueTransformationSequence", "RescaleSlope")
    intercept = value("PixelValueTransformationSequence", "RescaleIntercept")
    kind = value("PixelValueTransformationSequence", "RescaleType")
    modality = str(content.get("Modality", ""))
    between = value("PixelMeasuresSequence", "SpacingBetweenSlices") or value("PixelMeasuresSequence", "SliceThickness")
    return Slice(
        file,
        index,
        modality,
        (int(content.Columns), int(content.Rows)),
        np.array([spacing[1], spacing[0], between or 1.0] if spacing else [1.0, 1.0, 1.0], float),
        np.array(position if position else [0.0] * 3, float),
        np.column_stack([columns, rows, np.cross(columns, rows)]),
        " and ".join(name for name, found in given.items() if found is None),
        "colour pictures" if int(content.get("SamplesPerPixel", 1)) > 1 else "",
        str(content.get("SOPInstanceUID", "")),
        (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)),
        tuple(str(value("FrameContentSequence", name) or "") for name in ("StackID", "TemporalPositionIndex")),
        int(content.NumberOfFrames),
        tuple(str(content.get(name) or "") for name in _OWNER),
        _rescale([slope, intercept, kind], modality),
    )


def series_grid(slices: Sequence[Slice]) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Return shape and RAS affine of a series.

    Args:
        slices: in order of position.

    Raises:
        BadScanError: slices are missing, or do not lie on one grid.
    """
    first = slices[0]
    if first.no_scan:
        raise BadScanError(f"no scan: {first.no_scan}")
    if len(slices) < FEWEST_SLICES:
        raise BadScanError(f"too small: a series of {len(slices)} slice(s), such as a localiser")
    if lacking := next((part.lacks for part in slices if part.lacks), ""):
        raise BadScanError(f"no geometry: slices have no {lacking}; export the series again")
    _refuse_mixed(slices)
    if len(sizes := {part.size for part in slices}) > 1:
        raise BadScanError(f"slices of several sizes, {', '.join(map(str, sorted(sizes)))}; split the series")
    if any(not np.allclose(part.axes, first.axes, atol=1e-3) for part in slices):
        raise BadScanError("slices of several orientations; split the series")
    if any(not np.allclose(part.spacing[:2], first.spacing[:2], rtol=1e-3) for part in slices):
        raise BadScanError("slices of several pixel sizes; split the series")
    positions = np.array([part.origin for part in slices])
    gaps = np.diff(positions @ first.axes[:, 2])
    usual = float(np.median(gaps))
    if gaps.min() < 0.01:
        raise BadScanError("two slices at one position: several phases or a copy in one series; split it")
    if gaps.max() > 1.5 * usual:
        raise BadScanError(f"slices are missing: a gap of {gaps.max():.4g} mm where others have {usual:.4g} mm")
    if np.abs(gaps - usual).max() > _GAP_TOLERANCE * usual:
        raise BadScanError(f"irregular spacing: gaps between slices from {gaps.min():.4g} to {gaps.max():.4g} mm")
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    _refuse_bends(slices, positions, step)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([first.axes[:, :2] * first.spacing[:2], step])
    affine[:3, 3] = first.origin
    shape = (*first.size, len(slices))
    if shear(affine, shape) > SHEAR_TOLERANCE:
        shift = float(np.linalg.norm(step - (step @ first.axes[:, 2]) * first.axes[:, 2]))
        raise BadScanError(
            f"gantry tilt: each slice is shifted by {shift:.3g} mm in its plane, which no affine without shear holds; "
            "convert it with a tool that corrects tilt"
        )
    return shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _refuse_mixed(slices: Sequence[Slice]) -> None:
    """Refuse slices of several patients or studies, or of which only some are rescaled."""
    for index, name in enumerate(_OWNER):
        known = [part for part in slices if part.owner[index]]  # values are not quoted: they may name a patient
        if other := next((part for part in known if part.owner[index] != known[0].owner[index]), None):
            advice = "put the files of each into a folder of its own"
            if name == "FrameOfReferenceUID":
                advice = "their positions cannot be compared; export each as its own series"
            raise BadScanError(f"slices of several {name} in one series ({_names(known[0], other)}); {advice}")
    for index, name in enumerate(_RESCALE):
        if other := next((part for part in slices if part.rescale[index] != slices[0].rescale[index]), None):
            differs = (
                "differs between slices" if name == "RescaleType" else "is missing in some slices and not in others"
            )
            raise BadScanError(f"{name} {differs} ({_names(slices[0], other)}); export the series again")


def _refuse_bends(slices: Sequence[Slice], positions: NDArray[np.float64], step: NDArray[np.float64]) -> None:
    """Refuse slices that do not lie where the affine puts them, on a line with even steps."""
    first = slices[0]
    off = (positions - positions[0] - np.arange(len(slices))[:, None] * step) @ first.axes
    beside = np.linalg.norm(off[:, :2], axis=1)
    if beside.max() > _BESIDE_TOLERANCE * first.spacing[:2].min():
        shifts = np.diff(positions @ first.axes[:, :2], axis=0)
        jumps = np.linalg.norm(shifts - np.median(shifts, axis=0), axis=1)  # tilt moves all slices alike
        k = int(jumps.round(3).argmax())  # out of line and back again are one length
        raise BadScanError(
            f"slices are not in line: the series jumps by {jumps[k]:.3g} mm between slices {k + 1} and {k + 2} "
            f"({_names(slices[k], slices[k + 1])}) and lies up to {beside.max():.3g} mm beside a straight line; "
            "export it again, or each part as its own series"
        )
    usual = float(step @ first.axes[:, 2])
    if (drift := np.abs(off[:, 2])).max() > _DRIFT_TOLERANCE * usual:
        k = int(drift.argmax())
        raise BadScanError(
            f"irregular spacing: slice {k + 1} of {len(slices)} ({_names(slices[k])}) lies {drift[k]:.3g} mm from "
            f"where even gaps of {usual:.4g} mm put it; export the series again"
        )


def _names(*slices: Slice) -> str:
    """Where slices are: names of files, with their folders where these differ, and numbers of frames."""
    whole = len({Path(part.file).parent for part in slices}) > 1
    return " and ".join(
        (part.file if whole else Path(part.file).name) + (f", frame {part.frame + 1}" if part.frames > 1 else "")
        for part in slices
    )


def read_series(files: Sequence[str], modality: str | None) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read a series.

    Args:
        files: in any order.
        modality: `"CT"` or `"MR"`; `None` accepts any.

    Returns:
        `[1, X, Y, Z]` float32 in the modality's values, and the affine `[4, 4]` to RAS mm.

    Raises:
        BadScanError: it is damaged, incomplete, or of another modality.
    """
    try:
        slices = series_slices(files)
    except (OSError, AttributeError) as error:
        raise BadScanError(f"cannot be read ({error}); copy it again") from None
    _, affine = series_grid(slices)
    if modality and (found := slices[0].modality) and found != modality:
        raise BadScanError(f"wrong modality: DICOM says {found}, not {modality}")
    volume = _frame_voxels(slices) if slices[0].frames > 1 else _file_voxels([part.file for part in slices])
    return volume.transpose(2, 1, 0)[None], affine


def _file_voxels(files: Sequence[str]) -> NDArray[np.float32]:
    """Voxels [slices, rows, columns] of files of one slice each."""
    itk = _package("SimpleITK", files[0])
    try:
        return itk.GetArrayFromImage(itk.ReadImage(list(files), itk.sitkFloat32, "GDCMImageIO"))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BadScanError(f"cannot be read ({reason}); copy or export it again") from None


def _frame_voxels(slices: Sequence[Slice]) -> NDArray[np.float32]:
    """Voxels [slices, rows, columns] of frames, each rescaled by itself."""
    pydicom = _package("pydicom", slices[0].file)
    stored: dict[str, NDArray[Any]] = {}
    for file in {part.file for part in slices}:
        try:
            stored[file] = pydicom.dcmread(file, force=True).pixel_array
        except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise BadScanError(f"voxels cannot be read ({reason}); export it again, uncompressed") from None
    slope, intercept = (np.array([part.scale[k] for part in slices], np.float32)[:, None, None] for k in (0, 1))
    return np.stack([stored[part.file][part.frame] for part in slices]).astype(np.float32) * slope + intercept
