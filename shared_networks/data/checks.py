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

from shared_networks.data.datalist import nifti_suffix
from shared_networks.data.free_memory import free_memory
from shared_networks.errors import InputError

_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)
_AFFINE_TOLERANCE = 1e-3  # of the smallest voxel size
_SHEAR_TOLERANCE = 0.1  # voxels over the whole scan, as in inference
_WORKERS = 4  # inflating gzip releases the GIL: two threads on two cores take 0.6 of the time of one
_FEW_FILES = 20  # checked before a progress bar is any use
_SIDE_MARGIN = 10  # mm: where organs are cut off by the scan's edge, centres tell no more than this
_COARSE = 64  # voxels an axis from which an organ's centre is estimated
_SAMPLED = 128  # voxels an axis from which the spread of intensities is estimated
# Shares in whole CTs of chest, abdomen and pelvis: below 0.03, 0 and above 40 HU; as far off as that is no CT in HU.
_MOST_DENSE = 0.3  # above 600 HU of all above -200
_SOME_DENSE = 0.1
_MOST_DEEP = 0.05  # below -1100 HU, but for constant padding
_LEAST_SPREAD = 25  # HU, between the quartiles of soft tissue
_LEAST_COSINE = 0.5  # between axes of sform and qform: oblique scans differ by less than 60 degrees
_FEW_VALUES = 128  # that an image has more of than a label map

logger = logging.getLogger(__name__)


class Nifti(NamedTuple):
    """What is in one NIfTI file, or why it is of no use.

    Attributes:
        problems: what is wrong, a sentence each.
        grid: shape and affine, `[4, 4]` in mm (RAS); `None` where the file has none that could be used.
        values: voxels of that shape as numbers; `None` where they were not asked for or could not be read.
        doubts: what is odd and might yet be right, a sentence each, for a warning.
    """

    problems: list[str]
    grid: tuple[tuple[int, ...], np.ndarray] | None
    values: np.ndarray | None = None
    doubts: Sequence[str] = ()


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
    in_channels: int | None = None,
) -> Sequence[dict[str, Any]]:
    """Checks that scans can be read and make sense, each file once.

    Refused are: files that are missing, truncated, damaged, no NIfTI or named as what they are not; images that are not
    3D (further axes of length 1 are accepted, a longer one would silently become channels); spacings that are not
    positive, not in mm, and affines that are singular; headers whose two affines have axes in other directions; channels or labels on another grid than the image; NaN and infinite voxels; images of one
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
        in_channels: files that an image has, as the network has such channels; `None` accepts any number.

    Returns:
        `cases` themselves, so that a config can use the result in their place.

    Raises:
        InputError: all problems, a line each, or there is no case.
    """
    if not cases:
        raise InputError(
            "no case to check; look at dataset_dir: it must hold at least one image (pass --dataset_dir FOLDER)"
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

    problems = _channel_problems([files for files, _ in unique], in_channels)
    problems += [f"{file}: {problem}" for (file, _), finding in found.items() for problem in finding.scan.problems]
    for files, label in unique:
        others = [(file, False) for file in files[1:]] + ([(label, True)] if label is not None else [])
        for other in others:
            problems += grid_problems(files[0], found[files[0], False].scan, other[0], found[other].scan)
    labelled = [files[0] for files, label in unique if label is not None]
    problems += [f"{image}: {line}" for image in labelled for line in _shear_problems(found[image, False].scan)]
    problems += _copies(labelled, found)
    for label in labels:
        problems += [f"{label}: {line}" for line in side_problems(found[label, True].centres, pairs, label_names)]
    _warn_of_doubts(found)
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

    What is refused here is what MONAI's `LoadImaged`, which reads the same files in training, would read otherwise.

    Args:
        file: `.nii.gz` or `.nii`.
        voxels: with `False` only the header is read.
    """
    if problem := _name_problem(file):
        return Nifti([problem], None)
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
        shape, affine = scan.shape, scan.affine.copy()  # the last line here writes into it
        doubts = _orientation_doubts(scan)
        problems = _shape_problems(shape) + _unit_problems(scan) + _qform_problems(scan)
        used_affine = correct_nifti_header_if_necessary(scan).affine
    except FileNotFoundError:
        return Nifti(["no such file; correct the path or remove the case"], None)
    except HeaderDataError as error:
        return Nifti([f"its header makes no sense ({_reason(error)}); write the true values into it"], None)
    except _UNREADABLE as error:
        return Nifti([f"cannot be read ({_reason(error)}); copy or download it again"], None)
    problems += _header_problems(pixdim, affine, used_affine)
    return Nifti(problems, None if problems else (shape, affine), values, doubts)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _name_problem(file: str) -> str:
    """Why the file's name does not tell what is in it, which keeps all readers from it."""
    name = os.path.basename(file)
    if name.lower().endswith((".hdr", ".img")):
        return f"a pair of .hdr and .img; convert it to {name[:-4]}.nii.gz"
    if not (suffix := nifti_suffix(name)) or not os.path.isfile(file):
        return ""
    stem = name.removesuffix(suffix)
    if suffix not in (suffix.lower(), suffix.upper()):  # nibabel looks for a file with a suffix in small letters
        return f"its suffix is of small and capital letters; rename it to {stem}{suffix.lower()}"
    with open(file, "rb") as stream:
        start = stream.read(348)
    is_gzip, is_nifti = start[:2] == b"\x1f\x8b", start[344:347] in (b"n+1", b"ni1") or start[4:7] == b"n+2"
    if suffix.lower() == ".nii" and is_gzip:
        return f"is compressed with gzip; rename it to {stem}.nii.gz"
    if suffix.lower() == ".nii.gz" and is_nifti:
        return f"is not compressed; rename it to {stem}.nii"
    return ""


def _unit_problems(scan: nib.Nifti1Image) -> list[str]:
    unit = scan.header.get_xyzt_units()[0]
    if unit not in ("meter", "micron"):
        return []
    factor = {"meter": "multiply spacing and affine by 1000", "micron": "divide spacing and affine by 1000"}[unit]
    return [f"its unit is {unit} (xyzt_units), and MONAI takes all numbers for mm; {factor} and set the unit to mm"]


def _qform_problems(scan: nib.Nifti1Image) -> list[str]:
    """A line if sform and qform, both valid, have axes in other directions: readers differ in which they take."""
    sform, qform = _coded_forms(scan)
    if sform is None or qform is None:
        return []
    cosines = (_directions(sform) * _directions(qform)).sum(axis=0)
    if cosines.min() >= _LEAST_COSINE:
        return []
    kind = "mirrored to" if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0 else "turned against"
    return [
        f"its qform {_rows(qform)} is {kind} its sform {_rows(sform)}, so that left and right may be swapped; write the "
        "true one into both"
    ]


def _orientation_doubts(scan: nib.Nifti1Image) -> list[str]:
    if not scan.header["sform_code"] and not scan.header["qform_code"]:
        return [
            "the header does not tell left from right (sform_code and qform_code are 0); the first axis is taken to "
            "run to the left. Write the true affine into it if that is wrong"
        ]
    sform, qform = _coded_forms(scan)
    if sform is None or qform is None:
        return []
    corners = np.array(list(np.ndindex(2, 2, 2))) * scan.shape[:3]
    moved = np.linalg.norm(
        nib.affines.apply_affine(sform, corners) - nib.affines.apply_affine(qform, corners), axis=1
    ).max()
    if not moved > nib.affines.voxel_sizes(sform).max():
        return []
    return ["sform and qform place the scan more than a voxel apart; the sform is taken"]


def _coded_forms(scan: nib.Nifti1Image) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Sform and qform, `None` where the header says that they are not set or they could not be used."""
    forms = scan.get_sform(coded=True)[0], scan.get_qform(coded=True)[0]
    return forms if all(f is None or not _is_singular(f) for f in forms) else (None, None)


def _is_singular(affine: np.ndarray) -> bool:
    return not np.isfinite(affine).all() or bool(np.linalg.matrix_rank(affine[:3, :3]) < 3)


def _directions(affine: np.ndarray) -> np.ndarray:
    directions: np.ndarray = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    return directions


def _check_image(file: str, voxels: bool, modality: str | None, floor: float) -> Finding:
    problems, grid, values, doubts = read_nifti(file, voxels)
    if values is None:
        return Finding(Nifti(problems, grid, None, doubts))
    digest = hashlib.sha1(values.ravel(order="K").data, usedforsecurity=False).digest()
    more = image_problems(values, modality)
    if not more and values.max() <= floor:
        more = [f"no voxel is above {floor:g}, where intensity_range begins; look at the scan's values, or set another"]
    doubts = [*doubts, *([] if problems or more else image_doubts(values, modality))]
    return Finding(Nifti(problems + more, grid, None, doubts), digest)


def _check_label(
    file: str, voxels: bool, num_classes: int | None, label_names: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> Finding:
    problems, grid, values, doubts = read_nifti(file, voxels)
    if values is not None and values.ndim == 4 and values.shape[3] > 1:
        classes = f"shape {values.shape} has a channel a class; save the argmax over the last axis as one volume"
        return Finding(Nifti([classes, *problems[1:]], grid))
    if values is None:
        return Finding(Nifti(problems, grid, None, doubts))
    more = _label_problems(file, values, num_classes)
    if problems or more or grid is None:
        return Finding(Nifti(problems + more, grid))
    values = values.reshape(values.shape[:3])
    coarse, steps = _coarse(values)
    there = set(np.unique(coarse).tolist())  # the whole volume is searched for the few that this missed
    present = frozenset(v for v in range(len(label_names)) if v in there or (values == v).any())
    return Finding(
        Nifti([], grid, None, doubts),
        b"",
        present,
        _centres(coarse, steps, grid[1], {v for pair in pairs for v in pair}),
    )


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


def _channel_problems(images: Sequence[Sequence[str]], in_channels: int | None) -> list[str]:
    wrong = [files for files in images if in_channels is not None and len(files) != in_channels]
    if not wrong:
        return []
    count = len(wrong[0])
    return [
        f"{', '.join(wrong[0])}: {count} channel(s), as {len(wrong)} of {len(images)} case(s), and the network takes "
        f"{in_channels}; pass --network_def#in_channels {count} or remove channels"
    ]


def _warn_of_doubts(found: Mapping[tuple[str, bool], Finding]) -> None:
    """A warning a kind of doubt and not a file, as all files of a data set often share it."""
    files: dict[str, list[str]] = {}
    for (file, _), finding in found.items():
        for doubt in finding.scan.doubts:
            files.setdefault(doubt, []).append(file)
    for doubt, odd in files.items():
        others = f" and {len(odd) - 1} other file(s)" if len(odd) > 1 else ""
        logger.warning("%s%s: %s", odd[0], others, doubt)


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
    if len(shape) >= 3 and set(shape[3:]) <= {1}:
        return []
    return [f"shape {shape} is not 3D; save each volume as a file of its own (channels as NAME_0000, NAME_0001, ...)"]


def _header_problems(pixdim: np.ndarray, affine: np.ndarray, used_affine: np.ndarray) -> list[str]:
    problems = []
    if not (pixdim > 0).all() or not np.isfinite(pixdim).all():
        spacing = tuple(round(value, 4) for value in pixdim.tolist())
        problems.append(f"spacing {spacing} mm in pixdim is not positive; write the true one into the header")
    if _is_singular(affine):
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
    if modality is None:
        return []
    if low >= 0 and (count := _count_labels(values)):
        return [
            f"looks like a label map: {count} whole numbers from {low:g} to {high:g}; take it out of the images, or "
            "pass --modality None if it is a scan"
        ]
    if modality == "MR" and (share := np.count_nonzero(values < -500) / values.size) > 0.1:
        return [
            f"wrong modality: {share:.0%} of voxels are below -500, as in HU; pass --modality CT or remove the case"
        ]
    return _hounsfield_problems(values) if modality == "CT" else []


def image_doubts(values: np.ndarray, modality: str | None = None) -> list[str]:
    """Returns what is odd about an image without problems, and might yet be right.

    Args:
        values: see :func:`image_problems`.
        modality: only `"CT"` is looked at.
    """
    if modality != "CT":
        return []
    sample = _sample(values)
    if (dense := _dense_share(sample)) > _SOME_DENSE:
        return [
            f"{dense:.0%} of what is above -200 HU is above 600 HU, more than bone takes; look at the scan's values"
        ]
    soft = sample[(sample > -50) & (sample < 150)]
    spread = float(np.subtract(*np.percentile(soft, [75, 25]))) if soft.size else math.inf
    if spread < _LEAST_SPREAD:
        return [f"soft tissue differs by {spread:.3g} HU only, as if values were divided; look at the scan's values"]
    return []


def _hounsfield_problems(values: np.ndarray) -> list[str]:
    """A line if values cannot be HU. Padding may have any value below -1000."""
    low, high = values.min(), values.max()
    fix = "put the rescale slope and intercept right, or pass --modality None if they are HU, or --modality MR"
    found = f"wrong modality: values from {low:g} to {high:g} are not HU, as"
    if np.count_nonzero(values < -50) <= 1e-3 * values.size:
        return [f"{found} hardly any is below -50; {fix}"]
    sample = _sample(values)
    if low < -500 and np.count_nonzero((sample < -100) & (sample > low)) <= 1e-3 * sample.size:
        return [f"{found} hardly any but the lowest, as of padding, is below -100; {fix}"]
    deep, counts = np.unique(sample[(sample < -1100) & (sample > low)], return_counts=True)
    if (share := counts[counts <= _MOST_DEEP * sample.size].sum() / sample.size) > _MOST_DEEP:
        return [f"{found} {share:.0%} are below -1100, which is less than air; {fix}"]
    dense = _dense_share(sample)
    if dense > _MOST_DENSE and np.count_nonzero(sample > 600) > np.count_nonzero(sample < -200):
        return [f"{found} {dense:.0%} of what is above -200 is above 600, as only bone is; {fix}"]
    return []


def _dense_share(values: np.ndarray) -> float:
    """How much of all but air is as dense as bone."""
    return np.count_nonzero(values > 600) / max(1, np.count_nonzero(values > -200))


def _count_labels(values: np.ndarray) -> int:
    """How many different values there are, or 0 if they are too many or too far apart for labels, or fractions."""
    found = np.unique(_sample(values))
    count = len(found)
    few = count <= 2 or (count <= _FEW_VALUES and found[-1] < 2 * count)
    return count if few and (found == np.rint(found)).all() else 0


def _sample(values: np.ndarray) -> np.ndarray:
    """Every so many voxels of a volume, one after the other."""
    return values[tuple(slice(None, None, max(1, size // _SAMPLED)) for size in values.shape)].ravel()


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
