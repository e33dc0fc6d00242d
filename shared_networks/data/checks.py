"""Checking scans before hours are spent on them: everything that is wrong is listed at once."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.data.utils import correct_nifti_header_if_necessary
from monai.utils import ensure_tuple
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from tqdm import tqdm

from shared_networks.data.free_memory import free_memory
from shared_networks.errors import InputError

_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)
_AFFINE_TOLERANCE = 1e-3  # of the smallest voxel size
_SHEAR_TOLERANCE = 0.1  # voxels over the whole scan, as in inference
_WORKERS = 4  # inflating gzip releases the GIL: two threads on two cores take 0.6 of the time of one
_FEW_FILES = 20  # checked before a progress bar is any use
_SIDE_MARGIN = 10  # mm: where organs are cut off by the scan's edge, centres tell no more than this
_COARSE = 64  # voxels an axis from which an organ's centre is estimated

logger = logging.getLogger(__name__)


class Nifti(NamedTuple):
    """What is in one NIfTI file, or why it is of no use.

    Attributes:
        problems: what is wrong, a sentence each.
        grid: shape and affine, `[4, 4]` in mm (RAS); `None` where the file has none that could be used.
        values: voxels of that shape as numbers; `None` where they were not asked for or could not be read.
    """

    problems: list[str]
    grid: tuple[tuple[int, ...], np.ndarray] | None
    values: np.ndarray | None = None


class Finding(NamedTuple):
    """What a file holds, as far as cases are compared with each other.

    Attributes:
        scan: without its voxels.
        digest: of the voxels of an image; empty where they were not read.
        values: that occur in a label.
        centres: of organs in a label, mm (RAS), by value.
    """

    scan: Nifti
    digest: bytes = b""
    values: frozenset[int] = frozenset()
    centres: Mapping[int, np.ndarray] = {}


def check_cases(
    cases: Sequence[dict[str, Any]],
    num_classes: int | None = None,
    voxels: bool = True,
    label_names: Sequence[str] = (),
    sides: bool = True,
    modality: str | None = None,
    intensity_range: Sequence[float] | None = None,
) -> Sequence[dict[str, Any]]:
    """Checks that scans can be read and make sense, each file once.

    Refused are: files that are missing, truncated, damaged or no NIfTI; images that are not 3D (a fourth axis of length
    1 is accepted, because MONAI's `EnsureChannelFirstd` makes it the channel; a longer one would silently become
    channels and a fifth axis a spatial one); spacings that are not positive and affines that are singular; headers
    whose two affines differ; channels or labels on another grid than the image; NaN and infinite voxels; images of one
    value, of another modality or all below the intensities that are told apart; label values that are not integers or
    not classes; labelled images that are one another's copy or whose axes are not at right angles; and labels whose
    left and right are swapped. A label that is all background, and an organ that is in no label, only give a
    warning.

    Args:
        cases: dicts with `image` (a file or a list of files, one a channel) and optionally `label`.
        num_classes: background included, so that labels are 0 to `num_classes - 1`; `None` accepts any integers.
        voxels: with `False` only headers are read, which is fast but finds neither truncated files nor bad values,
            copies or swapped sides.
        label_names: in order of value, background first; without them sides and absent organs are not checked.
        sides: whether the liver must lie to the right of the spleen, and a right organ to the right of the left one.
            Not so in situs inversus.
        modality: `"CT"`, whose values must be HU, or `"MR"`, whose values must not; `None` accepts either.
        intensity_range: values that become 0 and 1; `None` accepts any.

    Returns:
        `cases` themselves, so that a config can use the result in their place.

    Raises:
        InputError: all problems, a line each, or there is no case.
    """
    if not cases:
        raise InputError(
            "no case to check; look at dataset_dir: it must hold at least one image (pass --dataset_dir FOLDER)"
            ", and with val_fraction 0 none validates"
        )
    unique = dict.fromkeys((ensure_tuple(case["image"]), case.get("label")) for case in cases)
    images = dict.fromkeys(file for files, _ in unique for file in files)
    labels = dict.fromkeys(label for _, label in unique if label is not None)
    pairs = sided_pairs(label_names) if sides else []
    jobs = [(file, False) for file in images] + [(file, True) for file in labels]
    floor = intensity_range[0] if intensity_range else -math.inf

    def check(job: tuple[str, bool]) -> Finding:
        file, is_label = job
        if is_label:
            return _check_label(file, voxels, num_classes, label_names, pairs)
        return _check_image(file, voxels, modality, floor)

    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        scans = pool.map(check, jobs)
        hidden = True if len(jobs) < _FEW_FILES else None  # None: hidden unless stderr is a terminal
        found = dict(zip(jobs, tqdm(scans, "checking", len(jobs), unit="file", disable=hidden), strict=True))

    problems = [f"{file}: {problem}" for (file, _), finding in found.items() for problem in finding.scan.problems]
    for files, label in unique:
        others = [(file, False) for file in files[1:]] + ([(label, True)] if label is not None else [])
        for other in others:
            problems += grid_problems(files[0], found[files[0], False].scan, other[0], found[other].scan)
    labelled = [files[0] for files, label in unique if label is not None]
    problems += [f"{image}: {line}" for image in labelled for line in _shear_problems(found[image, False].scan)]
    problems += _copies(labelled, found)
    for label in labels:
        problems += [f"{label}: {line}" for line in side_problems(found[label, True].centres, pairs, label_names)]
    if problems:
        raise InputError("\n".join([f"{len(problems)} problem(s) in {len(jobs)} file(s):", *problems]))
    if voxels and labels and label_names:
        _warn_of_absent(label_names, frozenset().union(*(found[label, True].values for label in labels)))
    return cases


def sided_pairs(label_names: Sequence[str]) -> list[tuple[int, int]]:
    """Returns pairs of label values of which the first organ lies to the patient's right of the second.

    These are liver and spleen, and whatever is named `right X` and `left X`.
    """
    value_of = {" ".join(re.split(r"[\s_-]+", name.casefold())): value for value, name in enumerate(label_names)}
    wanted = [("liver", "spleen"), *((name, name.replace("right", "left", 1)) for name in value_of if "right" in name)]
    return [(value_of[right], value_of[left]) for right, left in wanted if right in value_of and left in value_of]


def side_problems(
    centres: Mapping[int, np.ndarray], pairs: Sequence[tuple[int, int]], label_names: Sequence[str]
) -> list[str]:
    """Returns a line if organs of a patient are on each other's side.

    Args:
        centres: `[3]` in mm (RAS), by label value; organs that are absent have none. Sides that are wrong by no more
            than 10 mm are passed over.
        pairs: as :func:`sided_pairs` returns them.
        label_names: in order of value.
    """
    wrong = [
        (right, left)
        for right, left in pairs
        if {right, left} <= centres.keys() and centres[left][0] - centres[right][0] > _SIDE_MARGIN
    ]
    if not wrong:
        return []
    listed = ", ".join(f"{label_names[right]} is to the left of {label_names[left]}" for right, left in wrong)
    return [
        f"left and right are swapped ({listed}); put the affine or the labels right, or pass --check_sides False if "
        "the patient has situs inversus"
    ]


def read_nifti(file: str, voxels: bool = True) -> Nifti:
    """Reads a file to its last byte, once; what is wrong with it is returned and not raised.

    Args:
        file: `.nii.gz` or `.nii`.
        voxels: with `False` only the header is read.
    """
    try:
        scan = nib.load(file)
        if not isinstance(scan, nib.Nifti1Image):
            raise ImageFileError(f"{type(scan).__name__} is not NIfTI")
        with scan.file_map["image"].get_prepare_fileobj() as stream:
            # unchecked: nibabel turns a spacing of 0 into 1 and a negative one into its absolute value
            pixdim = type(scan.header).from_fileobj(stream, check=False)["pixdim"][1:4].astype(float)
            if voxels and (problem := _memory_problem(scan)):
                return Nifti([problem], None)
            values = _read_voxels(scan, stream) if voxels else None
        shape, affine = scan.shape, scan.affine.copy()  # the next line writes into it
        used_affine = correct_nifti_header_if_necessary(scan).affine
    except FileNotFoundError:
        return Nifti(["no such file; correct the path or remove the case"], None)
    except _UNREADABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Nifti([f"cannot be read ({reason}); copy or download it again"], None)
    problems = _shape_problems(shape) + _header_problems(pixdim, affine, used_affine)
    return Nifti(problems, None if problems else (shape, affine), values)


def _check_image(file: str, voxels: bool, modality: str | None, floor: float) -> Finding:
    problems, grid, values = read_nifti(file, voxels)
    if values is None:
        return Finding(Nifti(problems, grid))
    digest = hashlib.sha1(values.ravel(order="K").data, usedforsecurity=False).digest()
    more = image_problems(values, modality)
    if not more and values.max() <= floor:
        more = [f"no voxel is above {floor:g}, where intensity_range begins; look at the scan's values, or set another"]
    return Finding(Nifti(problems + more, grid), digest)


def _check_label(
    file: str, voxels: bool, num_classes: int | None, label_names: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> Finding:
    problems, grid, values = read_nifti(file, voxels)
    if values is None:
        return Finding(Nifti(problems, grid))
    more = _label_problems(file, values, num_classes)
    if problems or more or grid is None:
        return Finding(Nifti(problems + more, grid))
    values = values.reshape(values.shape[:3])
    coarse, steps = _coarse(values)
    there = set(np.unique(coarse).tolist())  # the whole volume is searched for the few that this missed
    present = frozenset(v for v in range(len(label_names)) if v in there or (values == v).any())
    return Finding(Nifti([], grid), b"", present, _centres(coarse, steps, grid[1], {v for pair in pairs for v in pair}))


def _coarse(values: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Every so many voxels of a volume, and how many an axis."""
    steps = [max(1, size // _COARSE) for size in values.shape]
    return values[tuple(slice(None, None, step) for step in steps)], steps


def _centres(
    coarse: np.ndarray, steps: Sequence[int], affine: np.ndarray, wanted: Collection[int]
) -> dict[int, np.ndarray]:
    """Centres of organs in mm, by value, estimated from some of the voxels; organs too small to be hit have none."""
    voxels = {value: np.argwhere(coarse == value) for value in wanted}
    return {
        value: nib.affines.apply_affine(affine, found.mean(axis=0) * steps)
        for value, found in voxels.items()
        if len(found)
    }


def _copies(images: Sequence[str], found: Mapping[tuple[str, bool], Finding]) -> list[str]:
    """Lines for images whose voxels are those of an earlier one."""
    first: dict[bytes, str] = {}
    problems = []
    for image in images:
        digest = found[image, False].digest
        other = first.setdefault(digest, image) if digest else image
        if other != image:
            problems.append(f"{image}: the same voxels as {other}; remove one, or a scan may both train and test")
    return problems


def _warn_of_absent(label_names: Sequence[str], present: Collection[int]) -> None:
    if absent := [f"{value} {name}" for value, name in enumerate(label_names) if value not in present]:
        logger.warning("no label has a voxel of: %s", ", ".join(absent))


def _memory_problem(scan: nib.Nifti1Image) -> str:
    needed, free = math.prod(scan.shape) * scan.get_data_dtype().itemsize, free_memory()
    if free is None or needed <= free:
        return ""
    size = " x ".join(map(str, scan.shape))
    return f"{size} voxels take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; crop the scan or remove the case"


def _read_voxels(scan: nib.Nifti1Image, stream: ImageOpener) -> np.ndarray:
    """Reads voxels in the type they are stored in; nibabel makes float64, four times int16, of scaled ones."""
    stored: Any = scan.dataobj
    layout = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
    is_scaled = (stored.slope, stored.inter) != (1, 0)
    values = np.asanyarray(ArrayProxy(stream, layout, mmap=False), dtype=np.float32 if is_scaled else None)
    while stream.read(1 << 20):  # gzip's checksum comes last: nibabel alone reads damaged voxels without a word
        pass
    return values


def _shape_problems(shape: tuple[int, ...]) -> list[str]:
    if len(shape) == 3 or (len(shape) == 4 and shape[3] == 1):
        return []
    return [f"shape {shape} is not 3D; save each volume as a file of its own (channels as NAME_0000, NAME_0001, ...)"]


def _header_problems(pixdim: np.ndarray, affine: np.ndarray, used_affine: np.ndarray) -> list[str]:
    problems = []
    if not (pixdim > 0).all() or not np.isfinite(pixdim).all():
        spacing = tuple(round(value, 4) for value in pixdim.tolist())
        problems.append(f"spacing {spacing} mm in pixdim is not positive; write the true one into the header")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        problems.append(f"affine {_rows(affine)} is singular or not finite; write the true one into the header")
    if not problems and not _same(affine, used_affine):
        # MONAI's reader then takes the qform, even where its code says that there is none.
        problems.append(
            f"the header holds two affines, {_rows(affine)} and by its spacing and qform, which MONAI uses, "
            f"{_rows(used_affine)}; write the true one into both sform and qform"
        )
    return problems


def image_problems(values: np.ndarray, modality: str | None = None) -> list[str]:
    """Returns what is wrong with the voxels of an image of any shape: no numbers, not finite, all the same, or foreign.

    Args:
        values: of one channel.
        modality: `"CT"`, whose values must be HU, or `"MR"`, whose values must not; `None` accepts either.

    Raises:
        InputError: there is no such modality.
    """
    if modality not in ("CT", "MR", None):
        raise InputError(f"modality is {modality!r}; pass --modality CT, --modality MR or --modality None for either")
    if problems := _finite_problems(values):
        return problems
    low, high = values.min(), values.max()
    if low == high:
        return [f"all voxels are {low:g}, so it is no scan; export it again or remove the case"]
    if modality == "MR" and (share := np.count_nonzero(values < -500) / values.size) > 0.1:
        return [
            f"wrong modality: {share:.0%} of voxels are below -500, as in HU; pass --modality CT or remove the case"
        ]
    if modality == "CT" and np.count_nonzero(values < -50) <= 1e-3 * values.size:
        return [
            f"wrong modality: values from {low:g} to {high:g} are not HU, as hardly any is below -50; "
            "put the rescale intercept right, or pass --modality MR"
        ]
    return []


def _shear_problems(scan: Nifti) -> list[str]:
    """A line if labels could not be put back on the scan's grid."""
    if scan.grid is None:
        return []
    shape, affine = scan.grid
    spacing = nib.affines.voxel_sizes(affine)
    directions = affine[:3, :3] / spacing
    cosines = directions.T @ directions - np.eye(3)
    off = (np.abs(cosines) * spacing * shape[:3] / spacing[:, None]).max()  # voxels, from end to end
    if off <= _SHEAR_TOLERANCE:
        return []
    return [
        f"affine {_rows(affine)}: its axes are not at right angles, as of a CT with gantry tilt; resample the scan "
        "and its label with a tool that corrects tilt"
    ]


def _label_problems(file: str, values: np.ndarray, num_classes: int | None) -> list[str]:
    if problems := _finite_problems(values):
        return problems
    if values.dtype.kind == "f" and len(fractions := values[values != np.rint(values)]):
        return [f"label values {_listed(fractions)} are not integers; resample labels with nearest neighbour"]
    low, high = values.min(), values.max()
    if num_classes is not None and (low < 0 or high >= num_classes):
        outside = values[(values < 0) | (values >= num_classes)]
        return [
            f"label values {_listed(outside)} are not among the {num_classes} classes, 0 to {num_classes - 1}; "
            "map them to those or change the number of classes"
        ]
    if low == high == 0:
        logger.warning("%s: the label is all background", file)
    return []


def _finite_problems(values: np.ndarray) -> list[str]:
    if values.dtype.kind not in "iuf":
        return [f"voxels of type {values.dtype} are no numbers; save one number a voxel"]
    if np.isfinite(values.min()) and np.isfinite(values.max()):  # no mask of the volume's size: NaN passes through
        return []
    count = np.count_nonzero(~np.isfinite(values))
    return [f"{count} of {values.size} voxels are NaN or infinite; replace them or export the file again"]


def grid_problems(image: str, image_scan: Nifti, other: str, other_scan: Nifti) -> list[str]:
    """Returns how the grid of another file (a channel, a label) differs from the image's."""
    if image_scan.grid is None or other_scan.grid is None:
        return []
    (shape, affine), (other_shape, other_affine) = image_scan.grid, other_scan.grid
    problems = []
    if shape[:3] != other_shape[:3]:
        problems.append(f"{other}: shape {other_shape} is not {shape} as in {image}; resample it to the image's grid")
    if not _same(affine, other_affine):
        mirrored = np.linalg.det(affine[:3, :3]) * np.linalg.det(other_affine[:3, :3]) < 0
        problems.append(
            f"{other}: affine {_rows(other_affine)} is not {_rows(affine)} as in {image}"
            f"{' and mirrored to it, so that left and right may be swapped' if mirrored else ''}; "
            "resample it to the image's grid, or copy the affine if only the header is wrong"
        )
    return problems


def _same(affine: np.ndarray, other: np.ndarray) -> bool:
    spacing = nib.affines.voxel_sizes(affine)
    return bool(np.abs(affine - other).max() <= _AFFINE_TOLERANCE * spacing.min())


def _rows(affine: np.ndarray) -> str:
    return str((np.round(affine[:3], 4) + 0.0).tolist())  # + 0.0 turns -0.0 into 0.0


def _listed(values: np.ndarray, most: int = 10) -> str:
    unique = np.unique(values)
    return ", ".join(f"{value:g}" for value in unique[:most]) + (", ..." if len(unique) > most else "")
