"""Find scans in a folder of any layout, and read them: NIfTI, DICOM series, lists.

MONAI's own reader of DICOM sorts by instance number and takes the spacing between slices from two of them, so it is
read by :mod:`shared_networks.datasets.dicom`.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from monai.utils import ensure_tuple
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from tqdm import tqdm

from shared_networks.datasets.dicom import (
    FEWEST_SLICES,
    NO_IMAGES,
    BadScanError,
    is_dicom,
    kind_without_image,
    read_header,
    read_series,
    series_of_folder,
)
from shared_networks.datasets.lists import case_lists, listed_part
from shared_networks.datasets.nifti import grid_problems, is_nifti, read_nifti
from shared_networks.datasets.pairs import (
    Image,
    case_name,
    channel_groups,
    channels_note,
    has_files,
    listed_paths,
    numbering_problem,
)
from shared_networks.datasets.unread import unread_content, unread_name
from shared_networks.datasets.validate import image_problems
from shared_networks.errors import InputError

_DAMAGED = "not readable as DICOM; copy it again"
_NO_SCAN = "no scan found; read are NIfTI (.nii.gz or .nii), DICOM series and .json lists of cases"


class Source(NamedTuple):
    """Where a case comes from.

    Attributes:
        case: its id, the path below the data set with the data set's own name before it: `BTCV/imagesTr/img0001`.
        files: its NIfTI files, one a channel, or the files of its DICOM series in any order.
        series: the series' UID, or nothing for NIfTI.
        problem: why it cannot be read, nothing where it can.
        part: `"validation"` or `"test"` for a NIfTI file that a list names so, else nothing.
    """

    case: str
    files: tuple[str, ...]
    series: str = ""
    problem: str = ""
    part: str = ""

    @property
    def channels(self) -> int:
        """Return the number of channels: one file each, one of a series."""
        return 1 if self.series else len(self.files)


class Sources(list[Source]):
    """Scans that were found.

    Attributes:
        passed_over: by path, why something is no scan.
    """

    def __init__(self, sources: Iterable[Source] = ()) -> None:
        super().__init__(sources)
        self.passed_over: dict[str, str] = {}


class Scan(NamedTuple):
    """A scan in memory.

    Attributes:
        image: `[C, H, W, D]` in the values of its source.
        affine: `[4, 4]` from voxels to mm, RAS.
    """

    image: NDArray[Any]
    affine: NDArray[np.float64]


def find_scans(dataset_dir: str | Path | Sequence[str | Path] | None, folder: str = "imagesTr") -> Sources:
    """Find all scans, for training, preprocessing and inference alike.

    Args:
        dataset_dir: a NIfTI file; a folder with scans at any depth; or a `.json` file with lists of cases (`training`,
            `validation`, `test`, ...), whose `image` is a path, or a path a channel, relative to the file. Folders with
            `label`, `seg` or `mask` as a word of their name are passed over, and so are results of this package.
            Several such paths are read as if one folder held all that they name.
        folder: the only one that is read of an nnU-Net data set, `imagesTr` or `imagesTs`; where `imagesTs` is missing
            or empty, `imagesTr`. With `imagesTr` the test cases of a list are passed over, too.

    Returns:
        Sorted by case, with what was passed over. A case that cannot be read has its `problem`.

    Raises:
        InputError: there is no scan; two files are one case; a list cannot be read; or DICOM without SimpleITK.
    """
    if not dataset_dir:
        raise InputError("dataset_dir is not set; pass --dataset_dir FOLDER, the folder that holds the scans")
    roots = {}
    for path in [dataset_dir] if isinstance(dataset_dir, (str, Path)) else dataset_dir:
        # A link to a file keeps its name and place: data stores link to files that are named by their content.
        root = Path(path).resolve() if Path(path).is_dir() else Path(path).parent.resolve() / Path(path).name
        if not root.exists():
            raise InputError(f"{path}: no such file or folder; give a scan, or a folder or list of scans")
        roots[root / folder if folder != "imagesTr" and has_files(root / folder) else root] = path
    walk = _Walk(Path(os.path.commonpath([root if root.is_dir() else root.parent for root in roots])), folder)
    found = walk.read(roots)
    folders = _folders_with(found)
    for root, path in roots.items():
        if not found or (root.is_dir() and root not in folders):
            passed_over = "".join(f"\n{other}: passed over: {reason}" for other, reason in found.passed_over.items())
            raise InputError(f"{path}: {_NO_SCAN}{passed_over}")
    sources: dict[str, Source] = {}
    for source in found:
        other = sources.setdefault(source.case, source)
        if other is not source and other._replace(part=source.part) != source:
            raise InputError(f"{source.files[0]}, {other.files[0]}: both are the case {source.case}; rename one")
    ordered = Sources(sources[case] for case in sorted(sources))
    ordered.passed_over = found.passed_over
    return ordered


def flag_other_channels(sources: Sources) -> None:
    """Give each case a `problem` that has another number of channels than most, as training takes one number."""
    counts = Counter(source.channels for source in sources if not source.problem)
    usual = max(counts, key=lambda count: (counts[count], count), default=1)
    for index, source in enumerate(sources):
        if not source.problem and source.channels != usual:
            problem = f"{source.channels} channel(s), where most cases have {usual}; add what lacks or remove the case"
            # Where most have more, it is they that may have been misread.
            several = source if source.channels > usual else next(other for other in sources if other.channels == usual)
            sources[index] = source._replace(problem=problem + ("" if several.series else channels_note(several.files)))


def file_source(image: Image) -> Source:
    """Return the scan of a NIfTI file, or of a file a channel; its case is its whole path, so that no two are one."""
    return _nifti_source(image, Path(os.sep))


def read_scan(source: Source, modality: str | None) -> Scan:
    """Read and checks a scan.

    Args:
        source: of :func:`find_scans`.
        modality: `"CT"` or `"MR"`; `None` accepts either.

    Raises:
        BadScanError: the file is damaged, the scan is not 3D or has no sound geometry, or its values are none of that
            modality.
    """
    if source.problem:
        raise BadScanError(source.problem)
    scan = Scan(*read_series(source.files, modality)) if source.series else _read_files(source.files)
    declared = bool(source.series)  # DICOM says of what modality it is, and has been refused if of another
    if problems := [problem for channel in scan.image for problem in image_problems(channel, modality, declared)]:
        raise BadScanError("; ".join(problems))
    return scan


def read_grid(source: Source) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Return shape and spacing in mm from one header, for estimates; `None` where that says nothing."""
    if source.series:
        header = read_header(source.files[0])
        slices = len(source.files) * header.frames
        return ((*header.size, slices), tuple(header.spacing.tolist())) if header.size else None
    grid = read_nifti(source.files[0], voxels=False).grid
    return (grid[0][:3], tuple(voxel_sizes(grid[1]).tolist())) if grid else None


Part = tuple[Path, tuple[str, ...]]
"""A folder and the files of a series in it."""


class _Walk:
    """A walk through a folder that collects scans and what is passed over."""

    def __init__(self, root: Path, part: str) -> None:
        self.root, self.part = root, part
        self.sources = Sources()
        self.series: dict[str, list[Part]] = {}
        self.visited: set[str] = set()
        self.listed: list[Path] = []

    def pass_over(self, path: str | Path, reason: str) -> None:
        """Note what is no scan."""
        self.sources.passed_over[str(path)] = reason

    def pass_over_all(self, reasons: Mapping[str, str]) -> None:
        """Note files of a folder that are no scans, one of each kind with the number of the others."""
        alike: dict[str, list[str]] = {}
        for file, reason in sorted(reasons.items()):
            alike.setdefault(reason, []).append(file)
        for reason, files in alike.items():
            others = f", with {len(files) - 1} more of its folder" if len(files) > 1 else ""
            self.pass_over(files[0], f"{reason}{others}")

    def read(self, paths: Iterable[Path]) -> Sources:
        """Collect all that files, lists and folders hold."""
        with tqdm(desc="finding scans", unit="case", disable=None) as bar:
            for path in paths:
                if path.is_dir():
                    self.enter(path, bar)
                else:
                    self.add_file(path, bar)
        return self.finish()

    def add_file(self, file: Path, bar: Any) -> None:
        """Add the scan that a file is, or those that it lists."""
        if is_nifti(file.name):
            self.sources.append(_nifti_source(str(file), self.root))
        elif _begins_as_dicom(str(file)):
            self.add_multi_frame(file)
        elif reason := unread_name(str(file)) or unread_content(str(file)):
            raise InputError(f"{file}: {reason}")
        else:
            self.add_listed(file, bar)

    def add_multi_frame(self, file: Path) -> None:
        """Add a DICOM file that holds a whole scan."""
        if read_header(str(file)).frames < FEWEST_SLICES:
            raise InputError(f"{file}: one slice of a DICOM series; give the folder of all, {file.parent}")
        case = PurePosixPath(self.root.name, *_below(file.parent, self.root), file.stem)
        self.sources.append(Source(str(case), (str(file),), "multi-frame"))

    def add_listed(self, file: Path, bar: Any) -> None:
        """Add the scans that a `.json` file lists, paths relative to it."""
        try:
            lists = case_lists(json.loads(file.read_text(encoding="utf-8-sig")))
            cases = [(listed_part(key), case) for key, part in lists.items() for case in part]
        except (ValueError, OSError) as error:
            raise InputError(f"{file}: not readable as a list of cases ({error}); give a JSON file") from None
        if not cases:
            raise InputError(f"{file}: {_NO_SCAN}")
        left_out = []
        for part, case in cases:
            if not (image := listed_paths(case, "image")):
                raise InputError(f'{file}: {case!r} names no image; list a path, or {{"image": path}}')
            paths = [os.path.normpath(file.parent / path) for path in image]
            if part == "test" and self.part == "imagesTr":
                left_out.append(paths[0])
            elif Path(paths[0]).is_dir():
                self.listed.append(Path(paths[0]))
                self.enter(Path(paths[0]), bar)
            elif len(paths) == 1 and _begins_as_dicom(paths[0]):
                self.add_multi_frame(Path(paths[0]))
            else:
                self.sources.append(_nifti_source(paths, self.root)._replace(part=part))
        if left_out:
            others = f", with {len(left_out) - 1} more of its list" if len(left_out) > 1 else ""
            self.pass_over(left_out[0], f"a test case, which trains nothing{others}")

    def enter(self, folder: Path, bar: Any) -> None:
        """Collect what is in a folder and in those below."""
        if self.part != "imagesTr" and has_files(folder / self.part):
            folder = folder / self.part
        elif (folder / "imagesTr").is_dir():
            folder = folder / "imagesTr"
        real = os.path.realpath(folder)
        if real in self.visited:
            self.pass_over(folder, "a folder that is read already")
            return
        self.visited.add(real)
        try:
            entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            self.pass_over(folder, f"cannot be read ({error.strerror})")
            return
        files = [e for e in entries if e.is_file()]
        for entry in entries:
            if entry.is_symlink() and not os.path.exists(entry.path) and is_nifti(entry.name):
                self.sources.append(_nifti_source(entry.path, self.root))  # reading it says what is wrong
        self.add_nifti(folder, [e.path for e in files if is_nifti(e.name)])
        others = [e.path for e in files if not is_nifti(e.name)]
        dicom = {file for file in others if _begins_as_dicom(file)}
        reasons = {}
        for file in (file for file in others if file not in dicom):
            if reason := unread_name(file):
                self.pass_over(file, reason)
            elif reason := unread_content(file):
                reasons[file] = reason
        self.pass_over_all(reasons)
        self.add_dicom(folder, dicom)
        bar.update(len(self.sources) - bar.n)
        for entry in entries:
            if entry.is_dir() and names_labels(entry.name):
                self.pass_over(entry.path, "its name says that it holds labels")
            elif entry.is_dir():
                self.enter(Path(entry.path), bar)

    def add_nifti(self, folder: Path, files: list[str]) -> None:
        """Add NIfTI files as cases, the files of a case's channels together."""
        results = result_files(folder)
        for file in files:
            if os.path.basename(file) in results:
                self.pass_over(file, "a result of an earlier run")
        scans = [file for file in files if os.path.basename(file) not in results]
        for name, group in sorted(channel_groups(scans, folder.name.startswith("images")).items()):
            problem = numbering_problem(name, group)
            self.sources.append(_nifti_source(group, self.root)._replace(problem=problem))

    def add_dicom(self, folder: Path, files: set[str]) -> None:
        """Note the DICOM series of a folder."""
        if not files:
            return
        series = series_of_folder(folder)
        # A damaged file would just be gone from the end of its series; a DICOMDIR lists files and is none.
        lost = {file for file in files.difference(*series.values()) if Path(file).name.casefold() != "dicomdir"}
        kinds = {file: kind_without_image(file) for file in lost}
        self.pass_over_all({file: f"{kind}, no image" if kind else _DAMAGED for file, kind in kinds.items()})
        for uid, names in series.items():
            # Without a UID nothing says that slices in several folders are one series.
            self.series.setdefault(uid or f"of {folder}", []).append((folder, names))

    def finish(self) -> Sources:
        """Add the series, each whole though it lies in several folders, and leave out what is no scan."""
        in_folders = {file for parts in self.series.values() for _, files in parts for file in files}
        self.sources[:] = [scan for scan in self.sources if not (scan.series and in_folders.issuperset(scan.files))]
        found: list[Source] = []
        for uid, parts in self.series.items():
            for own in _by_patient(parts):
                whole = [_merged(own)] if len(own) > 1 and not _copies(own) else own
                found += [Source(self.case(folder), files, uid) for folder, files in whole]
        headers = {source: read_header(source.files[0]) for source in found}
        reasons = {source: header.no_scan for source, header in headers.items() if header.no_scan}
        for source in found:
            if source not in reasons and len(source.files) < FEWEST_SLICES and headers[source].frames == 1:
                reasons[source] = f"{len(source.files)} slice(s), such as a localiser"
        no_images = {source for source in reasons if not headers[source].size or headers[source].modality in NO_IMAGES}
        if not self.sources and len(reasons) == len(found):
            reasons = {source: reasons[source] for source in no_images}  # else nothing would be said of the rest
        for source, reason in reasons.items():
            self.pass_over(source.files[0], reason)
        scans = [source for source in found if source not in reasons]
        shared = Counter(source.case for source in scans)
        self.sources += [
            source if shared[source.case] == 1 else source._replace(case=f"{source.case}/{source.series}")
            for source in scans
        ]
        folders = _folders_with(self.sources) if self.listed else set()
        for folder in self.listed:
            if folder not in folders and str(folder) not in self.sources.passed_over:
                self.pass_over(folder, "a listed folder without a scan")
        return self.sources

    def case(self, folder: Path) -> str:
        """Return the id of a series that is alone in a folder."""
        if not folder.is_relative_to(self.root):  # of a list, whose ids must not lead out of the store
            return folder.name
        return str(PurePosixPath(self.root.name, *folder.relative_to(self.root).parts))


def _folders_with(sources: Iterable[Source]) -> set[Path]:
    """Return all folders that hold scans, at any depth."""
    nearest = {Path(file).parent for source in sources for file in source.files}
    return {above for folder in nearest for above in (folder, *folder.parents)}


def _merged(parts: Sequence[Part]) -> Part:
    folder = Path(os.path.commonpath([str(folder) for folder, _ in parts]))
    return folder, tuple(file for _, files in parts for file in files)


def _by_patient(parts: Sequence[Part]) -> list[list[Part]]:
    """Part folders of one series by patient and study, as some anonymisers give all the same UID.

    Where that would leave two scans in one place, they stay together, and reading them says what is wrong.
    """
    groups: dict[tuple[str, ...], list[Part]] = {}
    for folder, files in parts:
        owner = read_header(files[0]).owner[:2] if len(parts) > 1 else ()
        groups.setdefault(owner, []).append((folder, files))
    places = {_merged(group)[0] for group in groups.values()}
    return list(groups.values()) if len(places) == len(groups) else [list(parts)]


def _copies(parts: Sequence[Part]) -> bool:
    """Return whether folders hold the same slices of a series, and not some each."""
    instances = [{read_header(file).instance for file in files} for _, files in parts]
    return all(instances[0] == other for other in instances[1:])


def _begins_as_dicom(file: str) -> bool:
    try:
        return is_dicom(file)
    except OSError:
        return False


def names_labels(folder: str) -> bool:
    """Return whether a folder's name says that it holds labels: a word of it is one, and not the start of one."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder)
    found = {word.casefold() for word in re.split(r"[^a-zA-Z]+", words)}
    return bool(found & {"label", "labels", "seg", "segs", "segmentation", "segmentations", "mask", "masks"})


def result_files(folder: Path) -> set[str]:
    """Return the names of files in a folder that this package has written, by the records beside them."""
    found: set[str] = set()
    for record in folder.glob("*.json"):
        if record.stem.endswith(("_seg", "_uncertainty")):
            try:
                content = json.loads(record.read_text(encoding="utf-8"))
                if isinstance(content, dict) and "made_with" in content:
                    found |= {f"{record.stem}.nii.gz", *content.get("files", ())}
            except (OSError, ValueError):
                continue
    for figure in folder.glob("*_reconstruction.png"):
        name = figure.name.removesuffix("_reconstruction.png")
        found |= {f"{name}{channel}_{kind}.nii.gz" for channel in ("", "_0000") for kind in ("reconstruction", "mask")}
    for figure in folder.glob("*_attention.png"):
        name = figure.name.removesuffix("_attention.png")
        found |= {file.name for file in folder.glob(f"{glob.escape(name)}_*_block_*.nii.gz")}
    return found


def _nifti_source(image: Image, root: Path) -> Source:
    files = ensure_tuple(image)
    return Source(str(PurePosixPath(root.name, *_below(Path(files[0]).parent, root), case_name(files))), files)


def _below(folder: Path, root: Path) -> list[str]:
    # Lists may name files that are not below the list: their ids must not lead out of the store.
    return [part for part in Path(os.path.relpath(folder, root)).parts if part not in ("..", ".")]


def _read_files(files: Sequence[str]) -> Scan:
    channels = [read_nifti(file) for file in files]
    problems = [
        f"{Path(file).name}: {problem}" if len(files) > 1 else problem
        for file, channel in zip(files, channels, strict=True)
        for problem in channel.problems
    ]
    for file, channel in zip(files[1:], channels[1:], strict=True):
        problems += [line + channels_note(files) for line in grid_problems(files[0], channels[0], file, channel)]
    first = channels[0]
    if problems or first.grid is None:
        raise BadScanError("; ".join(problems))
    values = [channel.values for channel in channels if channel.values is not None]
    return Scan(np.stack([value.reshape(first.grid[0][:3]) for value in values]), first.grid[1])
