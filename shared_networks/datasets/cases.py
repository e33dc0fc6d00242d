"""Find the labelled cases of a data set of any layout."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from shared_networks.datasets.lists import read_list
from shared_networks.datasets.pairs import (
    Image,
    UnpairedError,
    case_name,
    dataset_folder,
    find_labels,
    has_files,
    pair_cases,
)
from shared_networks.datasets.scans import find_scans, flag_other_channels
from shared_networks.errors import InputError

_DICOM = "a DICOM series; training reads NIfTI: convert it, or pre-train from a store that configs/prepare.json makes"

logger = logging.getLogger(__name__)


class Images(list[Image]):
    """Images that were found.

    Attributes:
        validating: the places of those that a list names for validation.
    """

    def __init__(self, images: Iterable[Image] = (), validating: Iterable[int] = ()) -> None:
        super().__init__(images)
        self.validating = frozenset(validating)


def find_images(dataset_dir: str | Path | None, folder: str = "imagesTr") -> Images:
    """Find the images of a data set, all NIfTI and of one number of channels.

    Args:
        dataset_dir: see :func:`shared_networks.datasets.scans.find_scans`.
        folder: see there.

    Returns:
        For each case, sorted by name, its file, or the files of its channels where it has several. Without the test
        cases of a list.

    Raises:
        InputError: there is no scan; a line for each case whose files are not its channels 0, 1, ..., that has another
            number of channels than most, or that is a DICOM series.
    """
    scans = find_scans(dataset_dir, folder)
    flag_other_channels(scans)
    problems = [f"{', '.join(scan.files)}: {scan.problem}" for scan in scans if scan.problem]
    problems += [f"{scan.files[0]}: {_DICOM}" for scan in scans if scan.series and not scan.problem]
    if problems:
        raise InputError("\n".join(problems))
    if scans.passed_over:
        file, reason = next(iter(scans.passed_over.items()))
        logger.warning("%s: %d passed over, such as %s: %s", dataset_dir, len(scans.passed_over), file, reason)
    return Images(
        (scan.files[0] if len(scan.files) == 1 else list(scan.files) for scan in scans),
        (place for place, scan in enumerate(scans) if scan.part == "validation"),
    )


def unlabelled_cases(images: Sequence[Image]) -> list[dict[str, Any]]:
    """Make cases of images without labels, for pre-training.

    Args:
        images: a file of each case, or the files of its channels; of :func:`find_images`, or a program's own.

    Returns:
        For each image `{"image": image}`, with a name as `case` where the file's is not unique, and `part` where a list
        says that it is for validation.

    Raises:
        InputError: several cases have one name.
    """
    validating = getattr(images, "validating", ())
    cases = [
        {"image": image, **({"part": "validation"} if place in validating else {})}
        for place, image in enumerate(images)
    ]
    return named_apart(cases, "images")


def find_cases(
    dataset_dir: str | Path | None,
    check: Callable[[list[dict[str, Any]]], Any] | None = None,
    images: Sequence[Image] | None = None,
    labels: Sequence[str] | None = None,
    trains: bool = True,
) -> list[dict[str, Any]]:
    """Find the labelled cases of a data set.

    Args:
        dataset_dir: an nnU-Net folder (`imagesTr`, `labelsTr`), or a `.json` list, see
            :func:`shared_networks.datasets.lists.read_list`. Where it is not set there is no case.
        check: raises an `InputError` of several lines, the first a heading, on bad cases. It is called here only
            where files are without partner, so that all problems are listed at once.
        images: files in place of those in `dataset_dir`, whatever their names.
        labels: the label of each, in the same order.
        trains: whether there must be cases to train on; a report can be of a data set that has `imagesTs` alone, or
            of a list without training cases.

    Returns:
        `{"image": image, "label": label}`, and `part` where a list says that it is for validation or test.

    Raises:
        InputError: as the function of the layout, or several cases have one name, after which results are named.
    """
    try:
        if images is not None or labels is not None:
            cases = _zip_lists(images or [], labels or [])
        elif not dataset_dir:
            return []
        elif Path(dataset_dir).suffix == ".json":
            cases = read_list(dataset_dir, trains)
        elif not trains and has_files(dataset_folder(dataset_dir) / "labelsTs") and not _has_training(dataset_dir):
            return []
        else:
            cases = pair_cases(find_images(dataset_folder(dataset_dir)), find_labels(dataset_dir))
    except UnpairedError as error:
        problems = [*error.problems, *_problems_of(error.pairs, check)]
        raise InputError("\n".join([f"{dataset_dir}: {len(problems)} problem(s):", *problems])) from None
    return named_apart(cases, dataset_dir)


def _has_training(dataset_dir: str | Path) -> bool:
    return any(has_files(dataset_folder(dataset_dir) / folder) for folder in ("imagesTr", "labelsTr"))


def named_apart(cases: list[dict[str, Any]], source: str | Path | None) -> list[dict[str, Any]]:
    """Give cases whose files have one name, as `case_00000/imaging.nii.gz`, the names of their folders.

    Args:
        cases: dicts with `image`.
        source: of the cases, for the message.

    Returns:
        `cases`, with a name as `case` where the file's is not unique.

    Raises:
        InputError: a file is listed several times, or folders do not tell them apart either.
    """
    if len({case_name(case["image"]) for case in cases}) == len(cases):
        return cases
    parts_of: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        key = tuple(os.path.abspath(file) for file in ensure_tuple(case["image"]))
        parts_of.setdefault(key, []).append(case.get("part", "training"))
    if twice := {files[0]: parts for files, parts in parts_of.items() if len(parts) > 1}:
        lines = [f"{file}: listed {_times(parts)}; list it once" for file, parts in twice.items()]
        raise InputError("\n".join([f"{source}: {len(lines)} problem(s):", *lines]))
    paths = [Path(ensure_tuple(case["image"])[0]) for case in cases]
    common = Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths]))
    folders = ["_".join(Path(os.path.abspath(path.parent)).relative_to(common).parts) for path in paths]
    files = [case_name(case["image"]) for case in cases]
    whole = ["_".join(filter(None, pair)) for pair in zip(folders, files, strict=True)]
    for names in (folders, whole):
        if all(names) and len({name.casefold() for name in names}) == len(names):
            return [{**case, "case": name} for case, name in zip(cases, names, strict=True)]
    files_of: dict[str, list[str]] = {}
    for name, path in zip(whole, paths, strict=True):
        files_of.setdefault(name, []).append(str(path))
    double = {name: files for name, files in files_of.items() if len(files) > 1}
    lines = [f"{', '.join(files)}: all are the case {name}; name each apart" for name, files in double.items()]
    raise InputError("\n".join([f"{source}: {len(lines)} problem(s):", *lines]))


def _times(parts: Sequence[str]) -> str:
    """How often a file is listed, in which parts."""
    unique = list(dict.fromkeys(parts))
    if len(unique) == 1:
        return f"{len(parts)} times in {unique[0]}"
    return f"{len(parts)} times, in {', '.join(unique[:-1])} and {unique[-1]}"


def _zip_lists(images: Sequence[Image], labels: Sequence[str]) -> list[dict[str, Any]]:
    if len(images) != len(labels) or not images:
        raise InputError(
            f"images: {len(images)} file(s), labels: {len(labels)}; give both lists, a label for each image in order"
        )
    return [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]


def _problems_of(cases: list[dict[str, Any]], check: Callable[[list[dict[str, Any]]], Any] | None) -> list[str]:
    try:
        if check is not None and cases:
            check(cases)
    except InputError as error:
        return str(error).splitlines()[1:]
    return []
