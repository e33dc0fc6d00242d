"""Check images and labels before training, and list all problems at once."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from monai.utils import ensure_tuple
from tqdm import tqdm

from shared_networks.datasets.grid import SHEAR_TOLERANCE, affine_rows, shear
from shared_networks.datasets.labels import sided_pairs
from shared_networks.datasets.nifti import Nifti, grid_problems, read_nifti
from shared_networks.datasets.pairs import channels_note
from shared_networks.datasets.tissue_maps import refuse_tissue_maps, tissue_problems
from shared_networks.errors import InputError

_WORKERS = 4  # inflating gzip releases the GIL: two threads on two cores take 0.6 of the time of one
_FEW_FILES = 20  # checked before a progress bar is any use
_SIDE_MARGIN = 10  # mm: where organs are cut off by the scan's edge, centres tell no more than this
_COARSE = 64  # voxels an axis from which an organ's centre is estimated
_MOST_DEEP = 0.05  # of the voxels, below air; a value that more of them have is padding
_MOST_RAMPS = 0.1  # of labelled voxels: at most 0.02 in label maps at 1.5 to 12 mm, 0.3 and more in interpolated ones
_MIDDLE = 96  # voxels to either side of a label map's middle
_NOISE = 0.01  # by which labels may miss integers to be told from interpolated ones
_SAMPLE = 1 << 20  # voxels from which it is told whether values are HU
_MOST_LABELS = 512  # different values from which integers are no longer taken for labels

logger = logging.getLogger(__name__)


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
    label_names: Sequence[str] = (),
    sides: bool = True,
    modality: str | None = None,
    intensity_range: Sequence[float] | None = None,
    in_channels: int | None = None,
    num_tissues: int | None = None,
) -> Sequence[dict[str, Any]]:
    """Check that scans can be read and make sense, each file once.

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
        label_names: in order of value, background first; without them sides and absent organs are not checked.
        sides: whether the liver must lie to the right of the spleen, and a right organ to the right of the left one.
            Not so in situs inversus.
        modality: `"CT"`, whose values must be HU, or `"MR"`, whose values must not; `None` accepts either.
        intensity_range: values that become 0 and 1; `None` accepts any.
        in_channels: files that the network takes of each case; `None` accepts any number.
        num_tissues: the images are tissue maps, with indices below it, of which CTs are drawn: no other modality is
            accepted, and intensities do not matter. `None` refuses tissue maps.

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
    if num_tissues is not None and modality != "CT":
        raise InputError(
            f"modality is {modality!r}, but what is drawn from tissue maps are CTs; pass --modality CT, or leave out "
            "configs/synthetic.json to train on scans"
        )
    if num_tissues is not None and (most := max(num_tissues, num_classes or 0)) > 256:
        raise InputError(f"{most} tissues or classes: maps and labels are read as bytes; give at most 256 of each")
    unique = dict.fromkeys((ensure_tuple(case["image"]), case.get("label")) for case in cases)
    images = dict.fromkeys(file for files, _ in unique for file in files)
    labels = dict.fromkeys(label for _, label in unique if label is not None)
    if num_tissues is None:
        refuse_tissue_maps(images)
    pairs = sided_pairs(label_names) if sides else []
    jobs = [(file, False) for file in images] + [(file, True) for file in labels]
    floor = intensity_range[0] if intensity_range and modality != "MR" else -math.inf

    def check(job: tuple[str, bool]) -> Finding:
        file, is_label = job
        if is_label:
            return _check_label(file, num_classes, label_names, pairs)
        return _check_image(file, modality, floor, num_tissues)

    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        scans = pool.map(check, jobs)
        hidden = True if len(jobs) < _FEW_FILES else None  # None: hidden unless stderr is a terminal
        found = dict(zip(jobs, tqdm(scans, "checking", len(jobs), unit="file", disable=hidden), strict=True))

    problems = [f"{file}: {problem}" for (file, _), finding in found.items() for problem in finding.scan.problems]
    if in_channels is not None:
        foreign = [files for files, _ in unique if len(files) != in_channels]
        problems += [f"{files[0]}: {channel_problem(len(files), in_channels, files)}" for files in foreign]
    for files, label in unique:
        first = found[files[0], False].scan
        for file in files[1:]:
            lines = grid_problems(files[0], first, file, found[file, False].scan)
            problems += [f"{line}{channels_note(files)}" for line in lines]
        if label is not None:
            problems += grid_problems(files[0], first, label, found[label, True].scan)
    labelled = [files[0] for files, label in unique if label is not None]
    problems += [f"{image}: {line}" for image in labelled for line in _shear_problems(found[image, False].scan)]
    problems += _copies(labelled, found)
    for label in labels:
        problems += [f"{label}: {line}" for line in side_problems(found[label, True].centres, pairs, label_names)]
    if problems:
        raise InputError("\n".join([f"{len(problems)} problem(s) in {len(jobs)} file(s):", *problems]))
    if labels and label_names:
        _warn_of_absent(label_names, frozenset().union(*(found[label, True].values for label in labels)))
    return cases


def side_problems(
    centres: Mapping[int, np.ndarray], pairs: Sequence[tuple[int, int]], label_names: Sequence[str]
) -> list[str]:
    """Return a line if organs of a patient are on each other's side.

    Args:
        centres: `[3]` in mm (RAS), by label value; organs that are absent have none. Sides that are wrong by no more
            than 10 mm are passed over.
        pairs: as :func:`shared_networks.datasets.labels.sided_pairs` returns them.
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
        f"left and right are swapped ({listed}); put the affine or the labels right, pass "
        "--label_names @dataset_labels if the data set has its labels in another order, or pass "
        "--datalist#check#sides False if the patient has situs inversus"
    ]


def _check_image(file: str, modality: str | None, floor: float, num_tissues: int | None) -> Finding:
    problems, grid, values = read_nifti(file)
    if values is None:
        return Finding(Nifti(problems, grid))
    digest = hashlib.sha1(values.ravel(order="K").data, usedforsecurity=False).digest()
    if num_tissues is not None:
        return Finding(Nifti(problems + tissue_problems(values, num_tissues), grid), digest)
    more = image_problems(values, modality)
    if not more and values.max() <= floor:
        more = [f"no voxel is above {floor:g}, where intensity_range begins; look at the scan's values, or set another"]
    return Finding(Nifti(problems + more, grid), digest)


def _check_label(
    file: str, num_classes: int | None, label_names: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> Finding:
    problems, grid, values = read_nifti(file, is_label=True)
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
    """Return lines for images that repeat the voxels of an earlier one."""
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


def channel_problem(channels: int, in_channels: int, files: Sequence[str] = ()) -> str:
    """Return what is wrong with a case of another number of channels than the network takes.

    Args:
        channels: that it has.
        in_channels: that the network takes.
        files: of the case; those of a series, or none, are no channels.
    """
    return (
        f"has {channels} channel(s), one a file, and the network takes {in_channels}; pass "
        f"--network_def#in_channels {channels}, or leave the other files out"
        f"{channels_note(files) if len(files) == channels else ''}"
    )


def image_problems(values: np.ndarray, modality: str | None = None, declared: bool = False) -> list[str]:
    """Return what is wrong with the voxels of an image of any shape: no numbers, not finite, all the same, or foreign.

    Args:
        values: of one channel.
        modality: `"CT"`, whose values must be HU, or `"MR"`, whose values must not; `None` accepts either.
        declared: whether the scan itself says that it is of this modality, so that no other is advised.

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
        advice = "" if declared else "pass --modality CT or "
        return [f"wrong modality: {share:.0%} of voxels are below -500, as in HU; {advice}remove the case"]
    if (count := _label_count(values)) and modality is not None:
        return [
            f"looks like a label map, as it holds {count} whole numbers from {low:g} to {high:g}; remove it from the "
            "images, or name a folder that holds images alone"
        ]
    if modality == "CT" and np.count_nonzero(values < -50) <= 1e-3 * values.size:
        line = f"values from {low:g} to {high:g} are not HU, as hardly any is below -50"
        if _is_shifted(_sample(values).astype(np.float32)):
            return [f"{line}, and look as if about 1000 were added; put the rescale intercept right"]
        advice = "" if declared else ", or if this is an MR, and the network one for MR, pass --modality MR"
        return [f"wrong modality: {line}; put the rescale intercept right{advice}"]
    return _scale_problems(values) if modality == "CT" else []


def _label_count(values: np.ndarray) -> int:
    """How many labels an image holds that is a label map; 0 if it is none."""
    if values.min() < 0 or values.max() > _MOST_LABELS:
        return 0
    found = np.unique(_sample(values))
    return len(found) if (found == np.rint(found)).all() and _is_patchy(values) else 0


def _is_patchy(values: np.ndarray) -> bool:
    """Return whether most neighbours are equal, as in label maps; scans are noisy where they are not 0."""
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


def _is_shifted(sample: np.ndarray) -> bool:
    """Return whether values are HU but for an offset of about 1000, and none of an MR, as far as values can tell.

    By what :func:`_scale_problems` says of real CTs; and few of their voxels lie between lung and fat, where an MR has
    no gap.
    """
    values = sample - 1024
    dense, between = values[values > -500], np.count_nonzero((values > -650) & (values < -250))
    usual = np.count_nonzero((dense >= -200) & (dense <= 300))
    return bool(usual > 0.5 * dense.size and between < 0.2 * dense.size) and not _scale_problems(values)


def otsu_threshold(values: np.ndarray) -> float:
    """Return the value that parts two classes best (Otsu, IEEE Transactions on Systems, Man, and Cybernetics 1979).

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
    if shear(affine, shape) <= SHEAR_TOLERANCE:
        return []
    return [
        f"affine {affine_rows(affine)}: its axes are not at right angles, as of a CT with gantry tilt; resample the "
        "scan and its label with a tool that corrects tilt"
    ]


def _label_problems(file: str, values: np.ndarray, num_classes: int | None) -> list[str]:
    if problems := _finite_problems(values):
        return problems
    if values.dtype.kind == "f" and len(fractions := values[values != np.rint(values)]):
        if np.abs(fractions - np.rint(fractions)).max() < _NOISE:
            return [f"label values {_listed(fractions)} are not integers, but for noise; round them"]
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


def _listed(values: np.ndarray, most: int = 10) -> str:
    unique = np.unique(values)
    # Few digits where they tell a value from all others.
    texts = [short if values.dtype.type(short := f"{value:g}") == value else str(value) for value in unique[:most]]
    return ", ".join(texts) + (", ..." if len(unique) > most else "")
