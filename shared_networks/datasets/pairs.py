"""Pair images with their labels by name.

Layouts that are read (`.nii.gz` or `.nii`): nnU-Net's, `imagesTr/NAME_0000.nii.gz` (further channels `_0001`, ...)
with `labelsTr/NAME.nii.gz` and optional `imagesTs` and `labelsTs`; a flat folder of scans without labels; the
Decathlon's `.json` lists; and any layout in which two patterns with wildcards tell images from labels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from monai.utils import ImageMetaKey, ensure_tuple

from shared_networks.datasets.nifti import SUFFIXES, is_nifti
from shared_networks.errors import InputError

Image = str | list[str]
"""A file, or for a case of several channels its files in channel order."""

Name = tuple[str, ...]
"""What a case is matched by: its name, or what stands for the wildcards of a pattern."""

_OTHER_SUFFIXES = (".mhd", ".mha", ".nrrd", ".hdr", ".img", ".dcm", ".mgz")
logger = logging.getLogger(__name__)


def source_file(image: MetaTensor) -> str:
    """Return the file that an image was loaded from.

    Raises:
        ValueError: if the image does not know.
    """
    meta = getattr(image, "meta", {})
    if not meta.get(ImageMetaKey.FILENAME_OR_OBJ):
        raise ValueError(
            f"the image's metadata (keys {sorted(meta)}) have no '{ImageMetaKey.FILENAME_OR_OBJ}' to name its case "
            "after: load it with LoadImaged and keep it a MetaTensor."
        )
    return str(meta[ImageMetaKey.FILENAME_OR_OBJ])


def named_case(data: Mapping[Hashable, Any], image_key: str = "image") -> str:
    """Return how results of loaded data are named: by `name` or `case`, where they have one, else by the image's file.

    Raises:
        ValueError: if the image does not know its file.
    """
    return str(data.get("name") or data.get("case") or case_name(source_file(data[image_key])))


class UnpairedError(InputError):
    """Images and labels do not pair.

    Attributes:
        problems: a line for each file without partner.
        pairs: the cases of which image and label were found.
    """

    def __init__(self, problems: list[str], pairs: list[dict[str, Any]]) -> None:
        super().__init__("\n".join([f"images and labels do not pair, {len(problems)} problem(s):", *problems]))
        self.problems, self.pairs = problems, pairs


def case_name(image: str | Sequence[str]) -> str:
    """Return the name of an image's case.

    Only the mark of the first channel is cut off: `FLARE22_Tr_0001.nii.gz` is a case of that name in a flat folder.

    Args:
        image: a file, or the files of its channels in order.

    Returns:
        `"img0001"` for `"imagesTr/img0001_0000.nii.gz"` and for `"img0001.nii"`.
    """
    return _stem(ensure_tuple(image)[0]).removesuffix("_0000")


def name_of(case: Mapping[str, Any]) -> str:
    """Return the name of a case: its own, where files alone do not tell cases apart, else :func:`case_name`."""
    return str(case["case"]) if "case" in case else case_name(case["image"])


def channel_groups(files: Sequence[str], numbered: bool) -> dict[str, list[str]]:
    """Group files by case.

    Args:
        files: of one folder.
        numbered: whether names end with the number of the channel, `_0000` and on, as in nnU-Net's folders.

    Returns:
        The files of each case by its name, in order of their names.
    """
    stems = {_stem(file) for file in files}
    groups: dict[str, list[str]] = {}
    for file in sorted(files, key=lambda file: (_stem(file), file)):
        base = re.sub(r"_\d{4}$", "", _stem(file))
        # Numbers of four digits also end the names of cases; they count channels where there is a channel 0.
        is_channel = numbered and f"{base}_0000" in stems
        groups.setdefault(base if is_channel else case_name(file), []).append(file)
    return groups


def numbering_problem(name: str, files: Sequence[str]) -> str:
    """Return what is wrong with the names of a case's files, nothing if they are its channels 0, 1, ..."""
    channels = [f"{name}_{channel:04d}" for channel in range(len(files))]
    if len(files) == 1 or [_stem(file) for file in files] == channels:
        return ""
    return f"one case needs one file a channel, named {', '.join(channels)}{channels_note(files)}"


def channels_note(files: Sequence[str]) -> str:
    """Return which files were read as channels of one case, and how to name them if they are cases.

    Args:
        files: of one case.

    Returns:
        The end of a sentence that begins with `;`, or nothing for one file.
    """
    if len(files) < 2:
        return ""
    names = [Path(file).name for file in files]
    listed = ", ".join(names if len(names) < 5 else [*names[:3], "...", names[-1]])
    note = f"; {listed} were read as channels of one case"
    stems = {_stem(file) for file in files}
    if len(stems) < len(files) or not all(re.search(r"_\d{4}$", stem) for stem in stems):
        return note
    return f"{note}: if each is a case, end all names with _0000, such as {_stem(files[1])}_0000.nii.gz"


def find_labels(dataset_dir: str | Path | None, folder: str = "labelsTr") -> list[str]:
    """Find the label files of a data set, sorted by case name.

    Raises:
        InputError: there is no such folder, or no NIfTI file in it.
    """
    directory = dataset_folder(dataset_dir) / folder
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; labels are read from {folder}/NAME.nii.gz in the data set")
    return _nifti_files(directory, f"{folder}/NAME.nii.gz")


def pair_cases(images: Sequence[Image], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Pair images with labels by case name, never by position.

    Args:
        images: a file of each case, or the files of its channels.
        labels: files named `NAME.nii.gz`.

    Returns:
        For each image, in order, `{"image": image, "label": label}`.

    Raises:
        UnpairedError: a line for each image without label, label without image and name that is not unique.
    """
    return pair_by_name(
        # Both: an image may be named exactly as its label, and then a last "_0000" belongs to the name.
        [(image, [(case_name(image),), (_stem(ensure_tuple(image)[0]),)]) for image in images],
        [(label, (_stem(label),)) for label in labels],
        lambda name: f"{name[0]}_0000.nii.gz",
        lambda name: f"{name[0]}.nii.gz",
    )


def listed_paths(case: Any, key: str) -> list[str]:
    """Return the paths that an entry of a list of cases has for a key; none if it has none, or something else.

    Args:
        case: a path, or a dict with a path or a list of paths, one a channel.
        key: `image` or `label`.
    """
    value = case.get(key) if isinstance(case, dict) else case
    paths: list[Any] = value if isinstance(value, list) else [value]
    return paths if all(isinstance(path, str) and path for path in paths) else []


def has_files(folder: Path) -> bool:
    """Return whether a folder exists and holds any file that is not hidden."""
    return folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir())


def pair_by_name(
    images: Sequence[tuple[Image, Sequence[Name]]],
    labels: Sequence[tuple[str, Name]],
    image_named: Callable[[Name], str],
    label_named: Callable[[Name], str],
) -> list[dict[str, Any]]:
    """Pair images, each with the names it may go by, with labels; see :func:`pair_cases`."""
    labels_of: dict[Name, list[str]] = {}
    for label, name in labels:
        labels_of.setdefault(name, []).append(label)
    images_of: dict[Name, list[Image]] = {}
    problems = []
    for image, names in images:
        found = next((name for name in names if name in labels_of), None)
        if found is None:
            first = ensure_tuple(image)[0]
            problems.append(f"{first}: no label; add the label {label_named(names[0])} or remove the image")
        else:
            images_of.setdefault(found, []).append(image)
    for name, files in labels_of.items():
        if name not in images_of:
            problems += [f"{file}: no image; add the image {image_named(name)} or remove the label" for file in files]
        elif len(files) > 1 or len(images_of[name]) > 1:
            paths = [ensure_tuple(image)[0] for image in images_of[name]] + files
            case = "/".join(name)
            problems.append(f"{', '.join(paths)}: several files for the case {case}; give each case its own name")
    label_of = {str(image): labels_of[name][0] for name, group in images_of.items() for image in group}
    pairs = [{"image": image, "label": label_of[str(image)]} for image, _ in images if str(image) in label_of]
    if problems:
        raise UnpairedError(problems, pairs)
    return pairs


def _stem(file: str) -> str:
    name = Path(file).name
    suffixes = (*SUFFIXES, ".npy")  # the last is the prepared store's
    return next((name[: -len(suffix)] for suffix in suffixes if name.casefold().endswith(suffix)), name)


def dataset_folder(dataset_dir: str | Path | None) -> Path:
    """Return the folder of a data set.

    Raises:
        InputError: it is not set, or does not exist.
    """
    if not dataset_dir:
        raise InputError("dataset_dir is not set; pass --dataset_dir FOLDER, the folder that holds the scans")
    if not Path(dataset_dir).is_dir():
        raise InputError(f"{dataset_dir}: no such folder; pass --dataset_dir FOLDER, the folder that holds the scans")
    return Path(dataset_dir)


def _nifti_files(directory: Path, layout: str) -> list[str]:
    # Names with a leading dot are what macOS leaves in archives beside each file.
    files = [p for p in directory.iterdir() if not p.name.startswith(".")]
    names = sorted(p.name for p in files if is_nifti(p.name))
    others = sorted(p.name for p in files if p.suffix.casefold() in _OTHER_SUFFIXES)
    if names and others:
        logger.warning(
            "%s: %d file(s) passed over, such as %s, as they are no NIfTI; convert them to .nii.gz if they are scans",
            directory, len(others), others[0],
        )  # fmt: skip
    if not names:
        suffixes = {Path(name).suffix for name in others}
        advice = f"; convert its {', '.join(sorted(suffixes))} files to .nii.gz" if suffixes else ""
        raise InputError(
            f"{directory}: no NIfTI file (.nii.gz or .nii); the layouts read are {layout} in the data set "
            f"and, for images, a flat folder of scans{advice}"
        )
    return [str(directory / name) for name in sorted(names, key=lambda name: (_stem(name), name))]
