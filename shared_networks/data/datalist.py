"""Finding scans in a folder, pairing them with their labels and drawing validation cases.

Layouts that are read (`.nii.gz` or `.nii`): nnU-Net's, `imagesTr/NAME_0000.nii.gz` (further channels `_0001`, ...)
with `labelsTr/NAME.nii.gz` and optional `imagesTs` and `labelsTs`; a flat folder of scans without labels; the
Decathlon's `.json` lists; and any layout in which two patterns with wildcards tell images from labels.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import ensure_tuple

from shared_networks.errors import InputError

Image = str | list[str]
"""A file, or for a case of several channels its files in channel order."""

Name = tuple[str, ...]
"""What a case is matched by: its name, or what stands for the wildcards of a pattern."""

_SUFFIXES = (".nii.gz", ".nii")
_OTHER_SUFFIXES = (".mhd", ".mha", ".nrrd", ".hdr", ".img", ".dcm", ".mgz")
_LISTS = {"training": "", "validation": "validation", "test": "test"}
# A wildcard, and what it matches: `**/` folders, `*` within a name, `?` a character, `[ab]` one of some.
_WILDCARDS = {r"\*\*/": "((?:.*/)?)", r"\*": "([^/]*)", r"\?": "([^/])", r"\[[^]]+\]": ""}

logger = logging.getLogger(__name__)


class UnpairedError(InputError):
    """Images and labels do not pair.

    Attributes:
        problems: a line for each file without partner.
        pairs: the cases of which image and label were found.
    """

    def __init__(self, problems: list[str], pairs: list[dict[str, Any]]) -> None:
        super().__init__("\n".join([f"images and labels do not pair, {len(problems)} problem(s):", *problems]))
        self.problems, self.pairs = problems, pairs


def is_nifti(file: str) -> bool:
    """Return whether a file is NIfTI by its name, in small or capital letters."""
    return file.casefold().endswith(_SUFFIXES)


def case_name(image: str | Sequence[str]) -> str:
    """Returns the name of an image's case.

    Only the mark of the first channel is cut off: `FLARE22_Tr_0001.nii.gz` is a case of that name in a flat folder.

    Args:
        image: a file, or the files of its channels in order.

    Returns:
        `"img0001"` for `"imagesTr/img0001_0000.nii.gz"` and for `"img0001.nii"`.
    """
    return _stem(ensure_tuple(image)[0]).removesuffix("_0000")


def name_of(case: Mapping[str, Any]) -> str:
    """Returns the name of a case: its own, where files alone do not tell cases apart, else :func:`case_name`."""
    return str(case["case"]) if "case" in case else case_name(case["image"])


def find_images(dataset_dir: str | Path | None, folder: str = "imagesTr") -> list[Image]:
    """Finds the images of a data set.

    Args:
        dataset_dir: an nnU-Net data set, or a flat folder in which each file is a case.
        folder: the folder of `dataset_dir` to read; without it or with nothing in it, `imagesTr`; where there is none
            either, `dataset_dir` itself is read.

    Returns:
        For each case, sorted by name, its file, or the files of its channels where it has several.

    Raises:
        InputError: there is no such folder or no NIfTI file in it; the files of a case are not its channels 0, 1,
            ...; or cases have different numbers of channels.
    """
    root = _dataset_folder(dataset_dir)
    if folder != "imagesTr" and not _has_files(root / folder) and _has_files(root / "imagesTr"):
        folder = "imagesTr"
    has_folder = (root / folder).is_dir()
    files = _nifti_files(root / folder if has_folder else root, f"{folder}/NAME_0000.nii.gz")
    groups = channel_groups(files, has_folder)
    counts = Counter(map(len, groups.values()))
    usual = max(counts, key=lambda count: (counts[count], count))
    problems = []
    for name, group in sorted(groups.items()):
        if problem := numbering_problem(name, group):
            problems.append(f"{', '.join(group)}: {problem}")
        elif len(group) != usual:
            problems.append(
                f"{group[0]}: {len(group)} channel(s), where most cases have {usual}; add what lacks or remove the case"
            )
    if problems:
        raise InputError("\n".join(problems))
    return [group[0] if usual == 1 else group for _, group in sorted(groups.items())]


def channel_groups(files: Sequence[str], numbered: bool) -> dict[str, list[str]]:
    """Groups files by case.

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
    """Returns what is wrong with the names of a case's files, nothing if they are its channels 0, 1, ..."""
    channels = [f"{name}_{channel:04d}" for channel in range(len(files))]
    if len(files) == 1 or [_stem(file) for file in files] == channels:
        return ""
    return f"one case needs one file a channel, named {', '.join(channels)}"


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
        UnpairedError: a line for each image without label, label without image and name that is not unique.
    """
    return _pairs(
        # Both: an image may be named exactly as its label, and then a last "_0000" belongs to the name.
        [(image, [(case_name(image),), (_stem(ensure_tuple(image)[0]),)]) for image in images],
        [(label, (_stem(label),)) for label in labels],
        lambda name: f"{name[0]}_0000.nii.gz",
        lambda name: f"{name[0]}.nii.gz",
    )


def pair_patterns(dataset_dir: str | Path | None, images_glob: str, labels_glob: str) -> list[dict[str, Any]]:
    """Finds images and labels by two patterns and pairs those in which the wildcards stand for the same.

    Args:
        dataset_dir: where the patterns begin, unless they are absolute.
        images_glob: such as `volume-*.nii.gz`; `*`, `?`, `[...]` and `**/` for folders at any depth.
        labels_glob: such as `labels-*.nii.gz`, with as many wildcards in the same order.

    Returns:
        Sorted by what the wildcards stand for: `{"image": image, "label": label}`.

    Raises:
        UnpairedError: as :func:`pair_cases`.
        InputError: a pattern is missing, has other wildcards, or finds nothing or no NIfTI file.
    """
    patterns = {"images_glob": images_glob, "labels_glob": labels_glob}
    if missing := [setting for setting, pattern in patterns.items() if not pattern]:
        raise InputError(f"{missing[0]} is not set; give both, as in --images_glob 'volume-*.nii.gz' "
                         "--labels_glob 'labels-*.nii.gz'")  # fmt: skip
    counts = {setting: len(_wildcards(pattern)) for setting, pattern in patterns.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise InputError(
            f"images_glob {images_glob!r} has {counts['images_glob']} wildcard(s) and labels_glob {labels_glob!r} "
            f"{counts['labels_glob']}; give both the same, at least one, as the parts that vary make the pairs"
        )
    root = _dataset_folder(dataset_dir)
    images = find_matches(root, "images_glob", images_glob)
    labels = find_matches(root, "labels_glob", labels_glob)
    return _pairs(
        [(image, [name]) for image, name in images],
        labels,
        lambda name: _filled(images_glob, name),
        lambda name: _filled(labels_glob, name),
    )


def find_matches(root: Path, setting: str, pattern: str) -> list[tuple[str, Name]]:
    """Finds NIfTI files by a pattern.

    Args:
        root: where the pattern begins, unless it is absolute.
        setting: that the pattern is given by, for errors.
        pattern: see :func:`pair_patterns`.

    Returns:
        Each file, and what the pattern's wildcards stand for in it, sorted by that.

    Raises:
        InputError: it finds nothing or other files, or does not tell what varies.
    """
    whole = pattern if os.path.isabs(pattern) else os.path.join(glob.escape(str(root)), pattern)
    files = [file for file in glob.glob(whole, recursive=True) if os.path.isfile(file)]
    if not files:
        raise InputError(f"{setting}: {pattern!r} finds no file in {root}; give a pattern such as 'volume-*.nii.gz'")
    if others := [file for file in files if not is_nifti(file)]:
        raise InputError(
            f"{setting}: {pattern!r} finds {len(others)} file(s) that are no NIfTI, such as {min(others)}; "
            "end the pattern with .nii.gz, and convert the files to .nii.gz first if they are scans"
        )
    parts = re.split("(" + "|".join(_WILDCARDS) + ")", pattern)
    start = "" if os.path.isabs(pattern) else re.escape(os.path.join(str(root), ""))
    matching = re.compile(start + "".join(_expression(p) if i % 2 else re.escape(p) for i, p in enumerate(parts)))
    found = [(file, match.groups()) for file in files if (match := matching.fullmatch(file))]
    if len(found) < len(files):
        raise InputError(f"{setting}: {pattern!r} is too intricate to tell what varies; use *, ?, [ab] and **/ only")
    return sorted(found, key=lambda item: (item[1], item[0]))


def read_list(file: str | Path) -> list[dict[str, Any]]:
    """Reads a Decathlon list of cases: `{"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}], ...}`.

    Args:
        file: JSON; paths in it are relative to it. `validation` and `test` may be listed as well, of which only cases
            with a label are of use here.

    Returns:
        In the file's order: `{"image": image, "label": label}`, for validation and test cases with their `part`.

    Raises:
        InputError: it is no such list, or training or validation cases have no label.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        lists = {key: content.get(key, []) for key in _LISTS}
        if not lists["training"]:
            raise ValueError("no 'training' cases")
        if wrong := [case for case in (*lists["training"], *lists["validation"]) if not _is_labelled(case)]:
            raise ValueError(f"{len(wrong)} case(s) without an image and one label, first {wrong[0]!r}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{file}: no list of labelled cases ({error}); it needs "
            '{"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}'
        ) from None
    cases = []
    for key, part in _LISTS.items():
        for case in filter(_is_labelled, lists[key]):
            image, label = ([_relative_to(file, path) for path in ensure_tuple(case[k])] for k in ("image", "label"))
            cases.append({"image": image if len(image) > 1 else image[0], "label": label[0]})
            if part:
                cases[-1]["part"] = part
    return cases


def find_cases(
    dataset_dir: str | Path | None,
    images_glob: str | None = None,
    labels_glob: str | None = None,
    check: Callable[[list[dict[str, Any]]], Any] | None = None,
    images: Sequence[Image] | None = None,
    labels: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Finds the labelled cases of a data set of any layout.

    Args:
        dataset_dir: an nnU-Net folder (`imagesTr`, `labelsTr`); a `.json` list, see :func:`read_list`; or the folder
            in which the patterns find files. Where it is not set there is no case.
        images_glob: see :func:`pair_patterns`.
        labels_glob: see :func:`pair_patterns`.
        check: raises an `InputError` of several lines, the first a heading, on bad cases. It is called here only
            where files are without partner, so that all that is wrong is listed at once.
        images: files in place of those in `dataset_dir`, whatever their names.
        labels: the label of each, in the same order.

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
        elif images_glob or labels_glob:
            cases = pair_patterns(dataset_dir, images_glob or "", labels_glob or "")
        elif Path(dataset_dir).suffix == ".json":
            cases = read_list(dataset_dir)
        else:
            cases = pair_cases(find_images(dataset_dir), find_labels(dataset_dir))
    except UnpairedError as error:
        problems = [*error.problems, *_problems_of(error.pairs, check)]
        raise InputError("\n".join([f"{dataset_dir}: {len(problems)} problem(s):", *problems])) from None
    return named_apart(cases, dataset_dir)


def named_apart(cases: list[dict[str, Any]], source: str | Path | None) -> list[dict[str, Any]]:
    """Gives cases whose files have one name, as `case_00000/imaging.nii.gz`, the names of their folders.

    Args:
        cases: dicts with `image`.
        source: of the cases, for the message.

    Returns:
        `cases`, with their name as `case` where that of the file is not unique.

    Raises:
        InputError: folders do not tell them apart either.
    """
    if len({case_name(case["image"]) for case in cases}) == len(cases):
        return cases
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
        val_fraction: the share to draw, of which there is at least one and never all; 0 for none.
        seed: of the draw.

    Returns:
        `{"train": cases, "validation": cases}`, each sorted by case name. A single case serves for both, unless
        `val_fraction` is 0.

    Raises:
        InputError: there is no case, `val_cases` leaves none for training, or `val_fraction` is not in [0, 1).
    """
    if not cases:
        raise InputError("no case to split; look at dataset_dir: it must hold at least one image")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}; give a share of the cases from 0 to below 1")
    ordered = sorted(cases, key=lambda case: (name_of(case), str(case["image"])))
    names = [name_of(case) for case in ordered]
    if len(ordered) == 1 and val_fraction:
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
        count = min(max(1, round(val_fraction * len(ordered))), len(ordered) - 1) if val_fraction else 0
        # RandomState and not default_rng or random: only its stream is promised never to change.
        chosen = set(np.random.RandomState(seed).permutation(len(ordered))[:count].tolist())
        drawn = ", ".join(names[index] for index in sorted(chosen))
        if wanted:
            logger.warning("none of val_cases (%s) is in the data set", ", ".join(wanted))
        if count:
            logger.info("validation cases, %d of %d drawn with seed %d: %s", count, len(ordered), seed, drawn)
        else:
            logger.warning("val_fraction is 0: no case validates, so the last weights become the model")
    return {
        "train": [case for index, case in enumerate(ordered) if index not in chosen],
        "validation": [case for index, case in enumerate(ordered) if index in chosen],
    }


def report_cases(
    dataset_dir: str | Path | None,
    validation: Sequence[Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]] = (),
) -> Sequence[Mapping[str, Any]]:
    """Returns the cases to report results on, if possible none that had a part in choosing the model.

    Args:
        dataset_dir: as for :func:`find_cases`.
        validation: the cases that chose the model.
        test: cases that were held out, of a fold or a share.

    Returns:
        The test cases; without any, `imagesTs` with `labelsTs`; without these, or where these folders are empty, with a
        warning, the validation cases.

    Raises:
        InputError: there is neither a data set nor a case to report on, or `imagesTs` and `labelsTs` do not pair.
    """
    if test:
        return test
    if Path(dataset_dir or "").suffix != ".json" and _has_files(_dataset_folder(dataset_dir) / "labelsTs"):
        return pair_cases(find_images(dataset_dir, "imagesTs"), find_labels(dataset_dir, "labelsTs"))
    if not validation:
        raise InputError(
            f"{dataset_dir}: no case to report on: it has no labelsTs, and no case was held out or validates "
            "(val_fraction is 0); give the test cases as imagesTs and labelsTs"
        )
    logger.warning(
        "%s has no labels in labelsTs: reporting on the validation cases, which chose the model: the figures are too "
        "good; hold cases out, in training and here, with --fold 0 --num_folds 5 or --test_fraction 0.2",
        dataset_dir,
    )
    return validation


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir())


def _pairs(
    images: Sequence[tuple[Image, Sequence[Name]]],
    labels: Sequence[tuple[str, Name]],
    image_named: Callable[[Name], str],
    label_named: Callable[[Name], str],
) -> list[dict[str, Any]]:
    """Pairs images, each with the names it may go by, with labels; see :func:`pair_cases`."""
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


def _wildcards(pattern: str) -> list[str]:
    return re.findall("|".join(_WILDCARDS), pattern)


def _filled(pattern: str, name: Name) -> str:
    """A pattern with values in place of its wildcards."""
    values = iter(name)
    return re.sub("|".join(_WILDCARDS), lambda _: next(values), pattern)


def _expression(wildcard: str) -> str:
    """The regular expression of a wildcard, as a group."""
    if wildcard.startswith("["):
        return f"({wildcard.replace('[!', '[^')})"
    return next(group for token, group in _WILDCARDS.items() if re.fullmatch(token, wildcard))


def _is_labelled(case: Any) -> bool:
    if not isinstance(case, dict) or not case.get("image"):
        return False
    return bool(case.get("label")) and len(ensure_tuple(case["label"])) == 1


def _relative_to(file: str | Path, path: str) -> str:
    return os.path.normpath(Path(file).parent / path)


def _stem(file: str) -> str:
    name = Path(file).name
    suffixes = (*_SUFFIXES, ".npy")  # the last is the prepared store's
    return next((name[: -len(suffix)] for suffix in suffixes if name.casefold().endswith(suffix)), name)


def _dataset_folder(dataset_dir: str | Path | None) -> Path:
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
