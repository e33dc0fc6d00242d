"""Finding scans in a folder, pairing them with their labels and splitting them.

Layouts that are read (`.nii.gz` or `.nii`): nnU-Net's, `imagesTr/NAME_0000.nii.gz` (further channels `_0001`, ...)
with `labelsTr/NAME.nii.gz` and optional `imagesTs` and `labelsTs`; and a flat folder of scans without labels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import ensure_tuple

from shared_networks.errors import InputError

Image = str | list[str]
"""A file, or for a case of several channels its files in channel order."""

_SUFFIXES = (".nii.gz", ".nii")

logger = logging.getLogger(__name__)


def case_name(image: str | Sequence[str]) -> str:
    """Returns the name of an image's case.

    Only the mark of the first channel is cut off: `FLARE22_Tr_0001.nii.gz` is a case of that name in a flat folder.

    Args:
        image: a file, or the files of its channels in order.

    Returns:
        `"img0001"` for `"imagesTr/img0001_0000.nii.gz"` and for `"img0001.nii"`.
    """
    return _stem(ensure_tuple(image)[0]).removesuffix("_0000")


def find_images(dataset_dir: str | Path | None, folder: str = "imagesTr") -> list[Image]:
    """Finds the images of a data set.

    Args:
        dataset_dir: an nnU-Net data set, or a flat folder in which each file is a case.
        folder: the folder of `dataset_dir` to read; where there is none, `dataset_dir` itself is read.

    Returns:
        For each case, sorted by name, its file, or the files of its channels where it has several.

    Raises:
        InputError: there is no such folder or no NIfTI file in it; the files of a case are not its channels 0, 1,
            ...; or cases have different numbers of channels.
    """
    root = _dataset_folder(dataset_dir)
    has_folder = (root / folder).is_dir()
    files = _nifti_files(root / folder if has_folder else root, f"{folder}/NAME_0000.nii.gz")
    stems = {_stem(file) for file in files}
    groups: dict[str, list[str]] = {}
    for file in files:
        base = re.sub(r"_\d{4}$", "", _stem(file))
        # Numbers of four digits also end the names of cases; they count channels where there is a channel 0.
        is_channel = has_folder and f"{base}_0000" in stems
        groups.setdefault(base if is_channel else case_name(file), []).append(file)

    most = max(map(len, groups.values()))
    problems = []
    for name, group in sorted(groups.items()):
        channels = [f"{name}_{channel:04d}" for channel in range(len(group))]
        if len(group) > 1 and [_stem(file) for file in group] != channels:
            problems.append(f"{', '.join(group)}: one case needs one file a channel, named {', '.join(channels)}")
        elif len(group) < most:
            problems.append(f"{group[0]}: {len(group)} of {most} channels; add the others or remove the case")
    if problems:
        raise InputError("\n".join(problems))
    return [group[0] if most == 1 else group for _, group in sorted(groups.items())]


def find_labels(dataset_dir: str | Path | None, folder: str = "labelsTr") -> list[str]:
    """Finds the label files of a data set, sorted by case name.

    Raises:
        InputError: there is no such folder, or no NIfTI file in it.
    """
    directory = _dataset_folder(dataset_dir) / folder
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; labels are read from {folder}/NAME.nii.gz in the data set")
    return _nifti_files(directory, f"{folder}/NAME.nii.gz")


def pair_cases(images: Sequence[Image], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs images with labels by case name, never by position.

    Args:
        images: as `find_images` returns them.
        labels: files named `NAME.nii.gz`.

    Returns:
        For each image, in order, `{"image": image, "label": label}`.

    Raises:
        InputError: a line for each image without label, label without image and name that is not unique.
    """
    labels_of: dict[str, list[str]] = {}
    for label in labels:
        labels_of.setdefault(_stem(label), []).append(label)
    images_of: dict[str, list[Image]] = {}
    problems = []
    for image in images:
        first = ensure_tuple(image)[0]
        # Both: an image may be named exactly as its label, and then a last "_0000" belongs to the name.
        name = next((name for name in (case_name(image), _stem(first)) if name in labels_of), None)
        if name is None:
            problems.append(f"{first}: no label; add the label {case_name(image)}.nii.gz or remove the image")
        else:
            images_of.setdefault(name, []).append(image)
    for name, files in labels_of.items():
        if name not in images_of:
            problems += [f"{file}: no image; add the image {name}_0000.nii.gz or remove the label" for file in files]
        elif len(files) > 1 or len(images_of[name]) > 1:
            paths = [ensure_tuple(image)[0] for image in images_of[name]] + files
            problems.append(f"{', '.join(paths)}: several files for the case {name}; give each case its own name")
    if problems:
        raise InputError("\n".join([f"images and labels do not pair, {len(problems)} problem(s):", *problems]))
    label_of = {str(image): labels_of[name][0] for name, group in images_of.items() for image in group}
    return [{"image": image, "label": label_of[str(image)]} for image in images]


def split_cases(
    cases: Sequence[Mapping[str, Any]],
    val_cases: str | Sequence[str] = (),
    val_fraction: float = 0.2,
    seed: int = 0,
) -> dict[str, list[Mapping[str, Any]]]:
    """Splits cases into training and validation, whatever their order.

    Args:
        cases: dicts with `image`.
        val_cases: names of the validation cases, such as BTCV's `img0035` to `img0040`. Where none of them occurs
            (it is another data set), they are drawn.
        val_fraction: the share to draw, of which there is at least one and never all.
        seed: of the draw.

    Returns:
        `{"train": cases, "validation": cases}`, each sorted by case name. A single case serves for both.

    Raises:
        InputError: there is no case, `val_cases` leaves none for training, or `val_fraction` is not in [0, 1).
    """
    if not cases:
        raise InputError("no case to split; look at dataset_dir: it must hold at least one image")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}; give a share of the cases from 0 to below 1")
    ordered = sorted(cases, key=lambda case: (case_name(case["image"]), str(case["image"])))
    names = [case_name(case["image"]) for case in ordered]
    if len(ordered) == 1:
        logger.warning("%s is the only case: it trains and validates, so Dice measures memorisation", names[0])
        return {"train": ordered, "validation": list(ordered)}

    wanted = ensure_tuple(val_cases)
    missing = [name for name in wanted if name not in names]
    if len(missing) < len(wanted):
        chosen = {index for index, name in enumerate(names) if name in wanted}
        if missing:
            logger.warning("validation cases that are not in the data set: %s", ", ".join(missing))
        if len(chosen) == len(ordered):
            raise InputError(f"val_cases names all {len(ordered)} cases, so none is left for training; name fewer")
    else:
        count = min(max(1, round(val_fraction * len(ordered))), len(ordered) - 1)
        # RandomState and not default_rng or random: only its stream is promised never to change.
        chosen = set(np.random.RandomState(seed).permutation(len(ordered))[:count].tolist())
        drawn = ", ".join(names[index] for index in sorted(chosen))
        if wanted:
            logger.warning("none of val_cases (%s) is in the data set", ", ".join(wanted))
        logger.info("validation cases, %d of %d drawn with seed %d: %s", count, len(ordered), seed, drawn)
    return {
        "train": [case for index, case in enumerate(ordered) if index not in chosen],
        "validation": [case for index, case in enumerate(ordered) if index in chosen],
    }


def report_cases(
    dataset_dir: str | Path | None, validation: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """Returns the cases to report results on: `imagesTs` with `labelsTs`, or without them the validation cases."""
    if (_dataset_folder(dataset_dir) / "labelsTs").is_dir():
        return pair_cases(find_images(dataset_dir, "imagesTs"), find_labels(dataset_dir, "labelsTs"))
    logger.warning("%s has no labelsTs: reporting on the validation cases, which chose the model", dataset_dir)
    return validation


def _stem(file: str) -> str:
    name = Path(file).name
    suffixes = (*_SUFFIXES, ".npy")  # the last is the prepared store's
    return next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)


def _dataset_folder(dataset_dir: str | Path | None) -> Path:
    if not dataset_dir:
        raise InputError("dataset_dir is not set; pass --dataset_dir FOLDER, the folder that holds the scans")
    if not Path(dataset_dir).is_dir():
        raise InputError(f"{dataset_dir}: no such folder; pass --dataset_dir FOLDER, the folder that holds the scans")
    return Path(dataset_dir)


def _nifti_files(directory: Path, layout: str) -> list[str]:
    # Names with a leading dot are what macOS leaves in archives beside each file.
    names = sorted(p.name for p in directory.iterdir() if p.name.endswith(_SUFFIXES) and not p.name.startswith("."))
    if not names:
        raise InputError(
            f"{directory}: no NIfTI file (.nii.gz or .nii); the layouts read are {layout} in the data set "
            "and, for images, a flat folder of scans"
        )
    return [str(directory / name) for name in sorted(names, key=lambda name: (_stem(name), name))]
