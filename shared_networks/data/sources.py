"""Finding and reading scans of any layout: NIfTI in nnU-Net, flat or nested folders, DICOM series, datalists.

DICOM is read with SimpleITK, which sorts slices by position and rescales each of them; MONAI's own reader sorts by
instance number and takes the spacing between slices from two of them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from monai.utils import ensure_tuple
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from tqdm import tqdm

from shared_networks.data.checks import grid_problems, image_problems, read_nifti
from shared_networks.data.datalist import Image, case_name, find_images, find_matches
from shared_networks.errors import InputError

_NIFTI = (".nii.gz", ".nii")
_NOT_SCANS = ("label", "seg", "mask")  # beginnings of the names of folders that hold no scans
_NO_IMAGES = {"SR", "PR", "KO", "SEG", "REG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "DOC"}  # DICOM modalities
_FEWEST_SLICES = 4  # localisers have up to three
_GAP_TOLERANCE = 0.05  # of the gap between slices
_SHEAR_TOLERANCE = 0.05  # of the pixel size, from each slice to the next
_POSITION, _MODALITY = "0020|0032", "0008|0060"

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where a case comes from.

    Attributes:
        case: its id, the path below the data set with the data set's own name before it: `BTCV/imagesTr/img0001`.
        files: its NIfTI files, one a channel, or the files of its DICOM series in any order.
        series: the series' UID, or nothing for NIfTI.
    """

    case: str
    files: tuple[str, ...]
    series: str = ""


class Scan(NamedTuple):
    """A scan in memory.

    Attributes:
        image: `[C, H, W, D]` in the values of its source.
        affine: `[4, 4]` from voxels to mm, RAS.
    """

    image: NDArray[Any]
    affine: NDArray[np.float64]


class BadScanError(ValueError):
    """Why a scan is of no use, in one line."""


def find_sources(dataset_dir: str | Path | None, images_glob: str | None = None) -> list[Source]:
    """Finds all scans.

    Args:
        dataset_dir: a folder with scans at any depth, or a `.json` file with lists of cases (`training`, `validation`,
            `test`, ...), whose `image` is a path, or a path a channel, relative to the file. Of a folder that has
            `imagesTr` only that is read. Folders named label*, seg* or mask* are passed over.
        images_glob: of the folder read the NIfTI files that this pattern finds, and nothing else; see
            :func:`shared_networks.data.datalist.pair_patterns`.

    Returns:
        Sorted by case.

    Raises:
        InputError: there is no scan; two files are one case; a list cannot be read; or DICOM without SimpleITK.
    """
    if not dataset_dir:
        raise InputError("dataset_dir is not set; pass --dataset_dir FOLDER, the folder that holds the scans")
    root = Path(dataset_dir).resolve()
    if images_glob:
        found = [_nifti_source(file, root) for file, _ in find_matches(root, "images_glob", images_glob)]
    elif root.is_file():
        found = _listed(root)
    elif root.is_dir():
        found = list(tqdm(_in_folder(root, root), "finding scans", unit="case", disable=None))
    else:
        raise InputError(f"{dataset_dir}: no such file or folder; pass --dataset_dir FOLDER, which holds the scans")
    if not found:
        raise InputError(
            f"{dataset_dir}: no scan found; read are NIfTI (.nii.gz or .nii), DICOM series and .json lists of cases"
        )
    sources: dict[str, Source] = {}
    for source in found:
        other = sources.setdefault(source.case, source)
        if other is not source and other != source:
            raise InputError(f"{source.files[0]}, {other.files[0]}: both are the case {source.case}; rename one")
    return [sources[case] for case in sorted(sources)]


def file_source(image: Image) -> Source:
    """Returns the scan of a NIfTI file, or of a file a channel; its case is its whole path, so that no two are one."""
    return _nifti_source(image, Path(os.sep))


def find_excluded(cases: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[str]]:
    """Finds the cases that names mean; in doubt a name means too many and not too few.

    Small and capital letters, file suffixes and a last `_0000` do not matter. A name without folders means every case
    with such a part in its id or with such a file. A name with folders means the cases whose id or file it ends or
    lies within, part by part; where there are none, its last part is taken for a name without folders.

    Args:
        cases: by id, what else they go by: their NIfTI files, or the UID of their series.
        names: such as `img0035`, `imagesTr/img0035_0000.nii.gz` or `BTCV/imagesTr/img0035`.

    Returns:
        For each name the ids it means.
    """
    paths = {case: [_parts(name) for name in (case, *also)] for case, also in cases.items()}
    found = {}
    for name in names:
        parts = _parts(name)
        means = [case for case, known in paths.items() if len(parts) > 1 and any(_within(parts, k) for k in known)]
        last = parts[-1] if parts else ""
        found[name] = means or [c for c, (own, *also) in paths.items() if last in own or last in [k[-1] for k in also]]
    return found


def read_names(file: str | Path) -> list[str]:
    """Reads a list of cases: a name a line; what follows a # is a comment.

    Raises:
        InputError: there is no such file, or it is no text.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable as a list of cases ({error}); give a text file") from None
    return [name for line in lines if (name := re.sub(r"(^|\s)#.*", "", line).strip())]


def read_scan(source: Source, modality: str | None) -> Scan:
    """Reads and checks a scan.

    Args:
        source: as `find_sources` returns it.
        modality: `"CT"` or `"MR"`; `None` accepts either.

    Raises:
        BadScanError: the file is damaged, the scan is not 3D or has no sound geometry, or its values are none of that
            modality.
    """
    scan = _read_series(source, modality) if source.series else _read_files(source.files)
    if problems := [problem for channel in scan.image for problem in image_problems(channel, modality)]:
        raise BadScanError("; ".join(problems))
    return scan


def read_grid(source: Source) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Returns shape and spacing in mm from one header, for estimates; `None` where that says nothing."""
    if source.series:
        header = _header(source.files[0])
        frames = header.size[2] if len(header.size) == 3 else 1
        return ((*header.size[:2], len(source.files) * frames), tuple(header.spacing.tolist())) if header.size else None
    grid = read_nifti(source.files[0], voxels=False).grid
    return (grid[0][:3], tuple(voxel_sizes(grid[1]).tolist())) if grid else None


def _in_folder(folder: Path, root: Path) -> Iterator[Source]:
    if (folder / "imagesTr").is_dir():
        folder = folder / "imagesTr"
    entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
    files = [e for e in entries if e.is_file()]
    if any(e.name.endswith(_NIFTI) for e in files):
        # nnU-Net's channels are told by the folder's name alone
        top, name = (folder.parent, folder.name) if folder.name.startswith("images") else (folder, "")
        images: list[Image] = find_images(top, name) if name else find_images(folder, "imagesTr")
        yield from (_nifti_source(image, root) for image in images)
    if dicom := {e.path for e in files if not e.name.endswith(_NIFTI) and _is_dicom(e.path)}:
        yield from _series_in(folder, root, dicom)
    for entry in entries:
        if entry.is_dir() and entry.name.casefold().startswith(_NOT_SCANS):
            logger.warning("%s: passed over, as its name says that it holds no scans", entry.path)
        elif entry.is_dir():
            yield from _in_folder(Path(entry.path), root)


def _nifti_source(image: Image, root: Path) -> Source:
    files = ensure_tuple(image)
    return Source(str(PurePosixPath(root.name, *_below(Path(files[0]).parent, root), case_name(files))), files)


def _below(folder: Path, root: Path) -> list[str]:
    # Lists may name files that are not below the list: their ids must not lead out of the store.
    return [part for part in Path(os.path.relpath(folder, root)).parts if part not in ("..", ".")]


def _listed(file: Path) -> list[Source]:
    try:
        content = json.loads(file.read_text())
        lists = content.values() if isinstance(content, dict) else [content]
        cases = [case for cases in lists if isinstance(cases, list) for case in cases]
        images = [case["image"] if isinstance(case, dict) else case for case in cases if _names_image(case)]
    except (ValueError, OSError) as error:
        raise InputError(f"{file}: not readable as a list of cases ({error}); give a JSON file") from None
    sources: list[Source] = []
    for image in images:
        paths = [os.path.normpath(file.parent / path) for path in ensure_tuple(image)]
        if Path(paths[0]).is_dir():
            sources += _in_folder(Path(paths[0]), file.parent)
        else:
            sources.append(_nifti_source(paths, file.parent))
    return sources


def _names_image(case: Any) -> bool:
    if isinstance(case, dict):
        return bool(case.get("image"))
    return isinstance(case, str) and (case.endswith(_NIFTI) or "/" in case)


def _bare(name: str) -> str:
    """A file or case name in small letters, without suffix and without the mark of the first channel."""
    name = name.casefold()
    for suffix in (*_NIFTI, ".npy"):
        name = name.removesuffix(suffix)
    return name.removesuffix("_0000")


def _parts(path: str) -> list[str]:
    return [_bare(part) for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _within(parts: list[str], path: list[str]) -> bool:
    """Whether one path ends the other, or the first lies within the second."""
    ends = range(len(parts), len(path) + 1)
    return parts[-len(path) :] == path or any(path[end - len(parts) : end] == parts for end in ends)


def _is_dicom(file: str) -> bool:
    with open(file, "rb") as stream:
        start = stream.read(132)
    # Old files have no preamble; they begin with an element of group 8.
    return start[128:] == b"DICM" or (
        start[:2] == b"\x08\x00" and start[2:4] in (b"\x00\x00", b"\x05\x00", b"\x08\x00")
    )


def _simpleitk(path: str | Path) -> Any:
    if importlib.util.find_spec("SimpleITK") is None:
        raise InputError(f"{path}: DICOM is read with SimpleITK, which is not installed; pip install SimpleITK")
    import SimpleITK  # only here: an optional dependency

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _series_in(folder: Path, root: Path, files: set[str]) -> Iterator[Source]:
    reader = _simpleitk(folder).ImageSeriesReader
    case = (
        str(PurePosixPath(root.name, *folder.relative_to(root).parts)) if folder.is_relative_to(root) else folder.name
    )
    uids = reader.GetGDCMSeriesIDs(str(folder))
    series = {uid: tuple(sorted(reader.GetGDCMSeriesFileNames(str(folder), uid))) for uid in uids}
    if lost := files.difference(*series.values()):  # a damaged file would just be gone from the end of its series
        logger.warning("%s: not readable as DICOM, with %d others of its folder", min(lost), len(lost) - 1)
    series = {uid: names for uid, names in series.items() if _header(names[0]).modality not in _NO_IMAGES}
    for uid, names in series.items():
        yield Source(case if len(series) == 1 else f"{case}/{uid}", names, uid)


class _Slice(NamedTuple):
    """Header of one DICOM file, in DICOM's LPS coordinates; `size` is that of the image, `[columns, rows, slices]`."""

    file: str
    modality: str
    size: tuple[int, ...]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]
    axes: NDArray[np.float64]
    has_position: bool


def _header(file: str) -> _Slice:
    reader = _simpleitk(file).ImageFileReader()
    reader.SetFileName(file)
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # an RTSTRUCT or a report has no image to inform about
        return _Slice(file, "DOC", (), np.zeros(3), np.zeros(3), np.eye(3), False)
    modality = reader.GetMetaData(_MODALITY).strip() if reader.HasMetaDataKey(_MODALITY) else ""
    return _Slice(
        file,
        modality,
        tuple(reader.GetSize()),
        np.array(reader.GetSpacing()),
        np.array(reader.GetOrigin()),
        np.array(reader.GetDirection()).reshape(3, 3),
        reader.HasMetaDataKey(_POSITION),
    )


def _slices(source: Source) -> list[_Slice]:
    """Headers of a series in order of position."""
    slices = [_header(file) for file in source.files]
    normal = slices[0].axes[:, 2]
    return sorted(slices, key=lambda s: float(s.origin @ normal))


def _series_grid(slices: Sequence[_Slice]) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Shape and RAS affine of a series, from slices in order of position."""
    first = slices[0]
    if len(slices) == 1 and len(first.size) == 3 and first.size[2] >= _FEWEST_SLICES:  # one file of many frames
        return first.size, _ras(first.axes * first.spacing, first.origin)
    if len(slices) < _FEWEST_SLICES:
        raise BadScanError(f"too small: a series of {len(slices)} slice(s), such as a localiser")
    if not all(s.has_position for s in slices):
        raise BadScanError("no geometry: slices have no ImagePositionPatient; export the series again")
    if len(sizes := {s.size[:2] for s in slices}) > 1:
        raise BadScanError(f"slices of several sizes, {', '.join(map(str, sorted(sizes)))}; split the series")
    if any(not np.allclose(s.axes, first.axes, atol=1e-3) for s in slices):
        raise BadScanError("slices of several orientations; split the series")
    if any(not np.allclose(s.spacing[:2], first.spacing[:2], rtol=1e-3) for s in slices):
        raise BadScanError("slices of several pixel sizes; split the series")
    positions = np.array([s.origin for s in slices])
    gaps = np.diff(positions @ first.axes[:, 2])
    usual = float(np.median(gaps))
    if gaps.min() < 0.01:
        raise BadScanError("two slices at one position: several phases or a copy in one series; split it")
    if gaps.max() > 1.5 * usual:
        raise BadScanError(f"slices are missing: a gap of {gaps.max():.4g} mm where others have {usual:.4g} mm")
    if np.abs(gaps - usual).max() > _GAP_TOLERANCE * usual:
        raise BadScanError(f"irregular spacing: gaps between slices from {gaps.min():.4g} to {gaps.max():.4g} mm")
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    shear = float(np.linalg.norm(step - (step @ first.axes[:, 2]) * first.axes[:, 2]))
    if shear > _SHEAR_TOLERANCE * first.spacing[:2].min():
        raise BadScanError(
            f"gantry tilt: each slice is shifted by {shear:.3g} mm in its plane, which no affine without shear holds; "
            "convert it with a tool that corrects tilt"
        )
    axes = np.column_stack([first.axes[:, :2] * first.spacing[:2], step])
    return (*first.size[:2], len(slices)), _ras(axes, first.origin)


def _ras(axes: NDArray[np.float64], origin: NDArray[np.float64]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _read_series(source: Source, modality: str | None) -> Scan:
    try:
        slices = _slices(source)
    except OSError as error:
        raise BadScanError(f"cannot be read ({error}); copy it again") from None
    if modality and (found := slices[0].modality) and found != modality:
        raise BadScanError(f"wrong modality: DICOM says {found}, not {modality}")
    _, affine = _series_grid(slices)
    itk = _simpleitk(source.files[0])
    try:
        files = [s.file for s in slices]
        image = itk.ReadImage(files if len(files) > 1 else files[0], itk.sitkFloat32, "GDCMImageIO")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BadScanError(f"cannot be read ({reason}); copy or export it again") from None
    return Scan(itk.GetArrayFromImage(image).transpose(2, 1, 0)[None], affine)


def _read_files(files: Sequence[str]) -> Scan:
    channels = [read_nifti(file) for file in files]
    problems = [
        f"{Path(file).name}: {problem}" if len(files) > 1 else problem
        for file, channel in zip(files, channels, strict=True)
        for problem in channel.problems
    ]
    for file, channel in zip(files[1:], channels[1:], strict=True):
        problems += grid_problems(files[0], channels[0], file, channel)
    first = channels[0]
    if problems or first.grid is None:
        raise BadScanError("; ".join(problems))
    values = [channel.values for channel in channels if channel.values is not None]
    return Scan(np.stack([value.reshape(first.grid[0][:3]) for value in values]), first.grid[1])
