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
from nibabel.fileholders import FileHolder
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from tqdm import tqdm

from shared_networks.data.free_memory import free_memory
from shared_networks.errors import InputError

_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)
_AFFINE_TOLERANCE = 1e-3  # of the smallest voxel size
_SHEAR_TOLERANCE = 0.1  # voxels over the whole scan, as in inference
_WORKERS = 4  # inflating gzip releases the GIL: two threads on two cores take 0.6 of the time of one
_FEW_FILES = 20  # checked before a progress bar is any use
_SIDE_MARGIN = 10  # mm: where organs are cut off by the scan's edge, centres tell no more than this
_COARSE = 64  # voxels an axis from which an organ's centre is estimated
_SAME_DIRECTION = 0.9  # cosine: halfway between two axes rounding decides what an axis is called
_MOST_DEEP = 0.05  # of the voxels, below air; a value that more of them have is padding
_MOST_RAMPS = 0.1  # of labelled voxels: at most 0.02 in label maps at 1.5 to 12 mm, 0.3 and more in interpolated ones
_MIDDLE = 96  # voxels to either side of a label map's middle
_SAMPLE = 1 << 20  # voxels from which it is told whether values are HU
_MM = {1: 1000.0, 3: 0.001}  # metre and micron in xyzt_units; all else is taken for mm, as it is in every tool
_MOST_LABELS = 512  # different values from which integers are no longer taken for labels

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
    in_channels: int | None = None,
) -> Sequence[dict[str, Any]]:
    """Checks that scans can be read and make sense, each file once.

    Refused are: files that are missing, truncated, damaged or no NIfTI; images that are not 3D (further axes of length
    1 are left out); spacings that are not positive, affines that are singular and headers without orientation; headers
    whose affines differ; channels or labels on another grid than the image; another number of channels than the
    network's; NaN and infinite voxels; images of one value, of another modality, of values that are no HU, or all below
    the intensities that are told apart; label values that are not integers or not classes; labelled images that are one
    another's copy or whose axes are not at right angles; and labels whose left and right are swapped. A label that is
    all background or looks interpolated, and an organ that is in no label, only give a warning.

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
        in_channels: files that the network takes of each case; `None` accepts any number.

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
    floor = intensity_range[0] if intensity_range and modality != "MR" else -math.inf

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
    if in_channels is not None:
        foreign = [files for files, _ in unique if len(files) != in_channels]
        problems += [f"{files[0]}: {channel_problem(len(files), in_channels)}" for files in foreign]
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


def read_nifti(file: str, voxels: bool = True, is_label: bool = False) -> Nifti:
    """Reads a file to its last byte, once; what is wrong with it is returned and not raised.

    Args:
        file: `.nii.gz` or `.nii`, in small or capital letters.
        voxels: with `False` only the header is read.
        is_label: whether it holds labels, for advice.

    Returns:
        The affine in mm, whatever the unit in the header; axes of length 1 beyond the third are left out.
    """
    try:
        if problem := _disguise(file):
            return Nifti([problem], None)
        scan = open_nifti(file)
        with scan.file_map["image"].get_prepare_fileobj() as stream:
            # unchecked: nibabel turns a spacing of 0 into 1 and a negative one into its absolute value
            pixdim = type(scan.header).from_fileobj(stream, check=False)["pixdim"][1:4].astype(float)
            if voxels and (problem := _memory_problem(scan)):
                return Nifti([problem], None)
            values = _read_voxels(scan, stream) if voxels else None
        header, shape, affine = scan.header.copy(), scan.shape, scan.affine.copy()  # the next line writes into it
        used_affine = correct_nifti_header_if_necessary(scan).affine
    except FileNotFoundError:
        return Nifti(["no such file; correct the path or remove the case"], None)
    except _UNREADABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        fix = "put its header right" if isinstance(error, HeaderDataError) else "copy or download it again"
        return Nifti([f"cannot be read ({reason}); {fix}"], None)
    problems = _shape_problems(shape, is_label) + _header_problems(pixdim, affine, used_affine, header)
    affine[:3] *= _MM.get(int(header["xyzt_units"]) % 8, 1.0)
    flat = None if problems or values is None else values.reshape(shape[:3])
    return Nifti(problems, None if problems else (shape[:3], affine), values if problems else flat)


def open_nifti(file: str) -> nib.Nifti1Image:
    """Opens a file by its content; nibabel goes by the name, in which it knows small letters or capitals alone."""
    with ImageOpener(file) as stream:
        size = stream.read(4)
    kinds = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
    kind = kinds.get(int.from_bytes(size, "little")) or kinds.get(int.from_bytes(size, "big"))
    scan = kind.from_file_map({"image": FileHolder(file)}) if kind else None
    if scan is None:
        raise ImageFileError("empty file" if not size else "its content is not NIfTI")
    if not scan.header["magic"].item().startswith(b"n+"):
        raise ImageFileError("half of a pair of .hdr and .img, which are not read; convert it to .nii.gz")
    return scan


def _disguise(file: str) -> str:
    """Why a file is not what its name says, if so."""
    if file.casefold().endswith((".hdr", ".img")):
        return f"is half of a pair of .hdr and .img; convert it to {os.path.basename(file)[:-4]}.nii.gz"
    with open(file, "rb") as stream:
        start = stream.read(352)
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS and no scan; get the file itself with git lfs pull"
    zipped, named = start[:2] == b"\x1f\x8b", file.casefold().endswith(".gz")
    if zipped and file.casefold().endswith(".nii"):
        return f"is gzipped, though its name says that it is not; rename it to {os.path.basename(file)}.gz"
    if start and named and not zipped and start[344:347] in (b"n+1", b"ni1"):
        return f"is not gzipped, though its name says so; rename it to {os.path.basename(file)[:-3]}"
    return ""


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
    problems, grid, values = read_nifti(file, voxels, is_label=True)
    if values is None:
        return Finding(Nifti(problems, grid))
    more = _label_problems(file, values, num_classes)
    if problems or more or grid is None:
        return Finding(Nifti(problems + more, grid))
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


def _shape_problems(shape: tuple[int, ...], is_label: bool) -> list[str]:
    if len(shape) >= 3 and set(shape[3:]) <= {1}:
        return []
    if is_label and len(shape) == 4:
        return [
            f"shape {shape} is not 3D; if its last axis has a volume for each class (one-hot), take the argmax over it "
            "and save that, one integer a voxel"
        ]
    return [f"shape {shape} is not 3D; save each volume as a file of its own (channels as NAME_0000, NAME_0001, ...)"]


def _header_problems(pixdim: np.ndarray, affine: np.ndarray, used_affine: np.ndarray, header: Any) -> list[str]:
    problems = []
    sform, qform = (int(header[code]) > 0 for code in ("sform_code", "qform_code"))
    if not sform and not qform:
        problems.append(
            "the header has no orientation (sform and qform codes are 0), so that left, right, head and feet are "
            "unknown; write the true affine into it, or export the scan again"
        )
    elif sform and qform and all(map(_regular, affines := (header.get_sform(), header.get_qform()))):
        ours, theirs = ("".join(nib.aff2axcodes(each)) for each in affines)
        cosines = np.prod([form[:3, :3] / nib.affines.voxel_sizes(form) for form in affines], axis=0).sum(axis=0)
        if ours != theirs and cosines.min() < _SAME_DIRECTION:
            problems.append(
                f"the header holds two orientations, {ours} in the sform and {theirs} in the qform, of which programs "
                "use one or the other; write the true one into both"
            )
    if not (pixdim > 0).all() or not np.isfinite(pixdim).all():
        spacing = tuple(round(value, 4) for value in pixdim.tolist())
        problems.append(f"spacing {spacing} mm in pixdim is not positive; write the true one into the header")
    if not _regular(affine):
        problems.append(f"affine {_rows(affine)} is singular or not finite; write the true one into the header")
    if not problems and not _same(affine, used_affine):
        # MONAI's reader then takes the qform, even where its code says that there is none.
        problems.append(
            f"the header holds two affines, {_rows(affine)} and by its spacing and qform, which MONAI uses, "
            f"{_rows(used_affine)}; write the true one into both sform and qform"
        )
    return problems


def _regular(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3)


def channel_problem(channels: int, in_channels: int) -> str:
    """Returns what is wrong with a case of another number of channels than the network takes."""
    return (
        f"has {channels} channel(s), one a file, and the network takes {in_channels}; pass "
        f"--network_def#in_channels {channels}, or leave the other files out"
    )


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
    if (count := _label_count(values)) and modality is not None:
        return [
            f"looks like a label map, as it holds {count} whole numbers from {low:g} to {high:g}; remove it from the "
            "images, or name a folder that holds images alone"
        ]
    if modality == "CT" and np.count_nonzero(values < -50) <= 1e-3 * values.size:
        return [
            f"wrong modality: values from {low:g} to {high:g} are not HU, as hardly any is below -50; "
            "put the rescale intercept right, or pass --modality MR"
        ]
    return _scale_problems(values) if modality == "CT" else []


def _label_count(values: np.ndarray) -> int:
    """How many labels an image holds that is a label map; 0 if it is none."""
    if values.min() < 0 or values.max() > _MOST_LABELS:
        return 0
    found = np.unique(_sample(values))
    return len(found) if (found == np.rint(found)).all() and _is_patchy(values) else 0


def _is_patchy(values: np.ndarray) -> bool:
    """Whether most neighbours are equal, as in label maps and not in scans, which are noisy where they are not 0."""
    along = np.moveaxis(values, int(np.argmax(values.shape)), 0)  # a single slice has neighbours within it alone
    one, next_one = along[:-1], along[1:]
    inside = (one != 0) & (next_one != 0)
    return bool((one == next_one)[inside].mean() > 0.5) if inside.any() else True


def _sample(values: np.ndarray) -> np.ndarray:
    """Some voxels, evenly spread in memory."""
    flat = values.ravel(order="K")
    return flat[:: max(1, flat.size // _SAMPLE)]


def _scale_problems(values: np.ndarray) -> list[str]:
    """A line for values that are HU but for a factor or an offset.

    Measured on nine real CTs (abdomen, chest, low dose) and on crops of them: of the voxels above -500, so of all but
    air and lung, at least 62 % lie from -200 to 300, at most 4 % above 500; of CTs in tenths of HU, shifted by 1024 or
    inverted 40 % and more lie above 500. Nothing but padding lies below -1100, where tenths of HU have 27 % and more.
    """
    sample = _sample(values)
    low, high = np.percentile(sample, [0.1, 99.9])
    if high <= -200:
        return [
            f"values are not HU: nothing lies above {high:g}, so neither fat nor soft tissue; put the rescale slope "
            "and intercept right, or export the scan again"
        ]
    dense = sample[sample > -500]
    bright = float((dense > 500).mean()) if dense.size else 0.0
    usual = float(((dense >= -200) & (dense <= 300)).mean()) if dense.size else 0.0
    inside = np.clip(sample[sample > sample.min()], -4000, 2000)  # without padding, and metal not so far off
    _, counts = np.unique(inside[inside < -1100], return_counts=True)
    deep = float(counts[counts <= _MOST_DEEP * sample.size].sum() / sample.size)
    threshold = otsu_threshold(inside)
    parts = (inside[inside <= threshold], inside[inside > threshold])
    air, tissue = (float(np.median(part)) if len(part) else 0.0 for part in parts)
    reason = ""
    if high - low < 250:
        reason = f"nearly all lie from {low:g} to {high:g}, closer together than fat, soft tissue and bone"
    elif bright > 0.38:
        reason = f"{bright:.0%} of what is not air lies above 500, where only bone and metal are"
    elif deep > _MOST_DEEP:
        reason = f"{deep:.0%} lies below -1100, where nothing but padding of one value is"
    elif usual < 0.3:
        reason = f"only {usual:.0%} of what is not air lies from -200 to 300, where fat and soft tissue are"
    elif tissue > 800 or air < -1500:
        reason = f"tissue lies at about {tissue:.0f} and air at {air:.0f}, where 0 and -1000 are due"
    if not reason:
        return []
    return [f"values are not HU: {reason}; put the rescale slope and intercept right, or export the scan again"]


def otsu_threshold(values: np.ndarray) -> float:
    """Returns the value that parts two classes best (Otsu, IEEE Transactions on Systems, Man, and Cybernetics 1979).

    Args:
        values: of any shape.

    Returns:
        It; of values that are all the same, less than them.
    """
    if not values.size or values.min() == values.max():
        return -math.inf
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    weight, total = np.cumsum(counts), np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * weight / weight[-1] - total) ** 2 / (weight * (weight[-1] - weight))
    return float(edges[1 + int(np.nanargmax(between[:-1]))])


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
    elif (share := _ramp_share(values)) > _MOST_RAMPS:
        logger.warning(
            "%s: %.0f%% of the labelled voxels lie between a lower and a higher value, as after interpolation, which "
            "makes organs that are not there; resample labels with nearest neighbour",
            file,
            100 * share,
        )
    return []


def _ramp_share(labels: np.ndarray) -> float:
    """How many voxels of organs, in the middle of a label map, have a lower value on one side and a higher opposite."""
    middle = labels[tuple(slice(max(0, size // 2 - _MIDDLE), size // 2 + _MIDDLE) for size in labels.shape)]
    ramps = np.zeros(middle.shape, bool)
    for axis in range(middle.ndim):
        along, found = np.moveaxis(middle, axis, 0), np.moveaxis(ramps, axis, 0)
        before, here, after = along[:-2], along[1:-1], along[2:]
        found[1:-1] |= ((before < here) & (here < after)) | ((before > here) & (here > after))
    organs = int(np.count_nonzero(middle))
    return int(np.count_nonzero(ramps)) / max(1, organs)


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
