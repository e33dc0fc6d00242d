"""Read a list of cases, and write one for a data set whose files follow two patterns.

    python -m shared_networks.datasets.lists --dataset_dir /data/KITS19 --images 'case_*/imaging.nii.gz' \
        --labels 'case_*/segmentation.nii.gz' --output kits.json
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from shared_networks.datasets.nifti import is_nifti
from shared_networks.datasets.pairs import Name, dataset_folder, listed_paths, pair_by_name
from shared_networks.errors import InputError, report_in_one_line
from shared_networks.files import write_json
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import ANY_TEXT, PATH

# What lists of cases are called (also by MONAI's Auto3DSeg and nnU-Net), and the part that their cases have.
_LISTS = {
    "training": "",
    "train": "",
    "validation": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
}
# A wildcard, and what it matches: `**/` folders, `*` within a name, `?` a character, `[ab]` one of some.
_WILDCARDS = {r"\*\*/": "((?:.*/)?)", r"\*": "([^/]*)", r"\?": "([^/])", r"\[[^]]+\]": ""}

logger = logging.getLogger(__name__)


def pair_patterns(dataset_dir: str | Path | None, images: str, labels: str) -> list[dict[str, Any]]:
    """Find images and labels by two patterns and pairs those in which the wildcards stand for the same.

    Args:
        dataset_dir: where the patterns begin, unless they are absolute.
        images: such as `volume-*.nii.gz`; `*`, `?`, `[...]` and `**/` for folders at any depth.
        labels: such as `labels-*.nii.gz`, with as many wildcards in the same order. Files that both patterns find are
            labels; they are images where the labels' pattern finds all images.

    Returns:
        Sorted by what the wildcards stand for: `{"image": image, "label": label}`.

    Raises:
        UnpairedError: as :func:`pair_cases`.
        InputError: a pattern is missing, has other wildcards, finds nothing or no NIfTI file, or both find the same.
    """
    patterns = {"images": images, "labels": labels}
    if missing := [setting for setting, pattern in patterns.items() if not pattern]:
        raise InputError(f"{missing[0]} is not set; give both, as in --images 'volume-*.nii.gz' "
                         "--labels 'labels-*.nii.gz'")  # fmt: skip
    counts = {setting: len(_wildcards(pattern)) for setting, pattern in patterns.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise InputError(
            f"images {images!r} has {counts['images']} wildcard(s) and labels {labels!r} {counts['labels']}; "
            "give both the same, at least one, as the parts that vary make the pairs"
        )
    root = dataset_folder(dataset_dir)
    of_images, of_labels = (find_matches(root, setting, pattern) for setting, pattern in patterns.items())
    # In one folder the wider pattern finds the other's files too: those are what the narrower pattern is for.
    both = {os.path.abspath(file) for file, _ in of_images} & {os.path.abspath(file) for file, _ in of_labels}
    if both and len(both) == len(of_images) == len(of_labels):
        raise InputError(
            f"images {images!r} and labels {labels!r} find the same {len(both)} file(s), such as {of_labels[0][0]}; "
            "give the labels a pattern of their own"
        )
    if len(both) == len(of_images):
        of_labels = [found for found in of_labels if os.path.abspath(found[0]) not in both]
    else:
        of_images = [found for found in of_images if os.path.abspath(found[0]) not in both]
    return pair_by_name(
        [(image, [name]) for image, name in of_images],
        of_labels,
        lambda name: _filled(images, name),
        lambda name: _filled(labels, name),
    )


def find_matches(root: Path, setting: str, pattern: str) -> list[tuple[str, Name]]:
    """Find NIfTI files by a pattern.

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


def case_lists(content: Any) -> dict[str, list[Any]]:
    """Return the lists of cases in the content of a JSON file by their keys, without those of labels or references.

    Args:
        content: as read; a list is that of the `training` cases.
    """
    lists = content if isinstance(content, dict) else {"training": content}
    return {key: cases for key, cases in lists.items() if _lists_cases(key, cases)}


def listed_part(key: str) -> str:
    """Return what the cases of a list are for by its key: `"validation"`, `"test"`, or nothing, which is training."""
    return _LISTS.get(key, "")


def read_list(file: str | Path, trains: bool = True) -> list[dict[str, Any]]:
    """Read a Decathlon list of cases: `{"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}], ...}`.

    Args:
        file: JSON; paths in it are relative to it. `validation` and `test` may be listed as well, of which test cases
            are only of use here with a label. `train`, `val` and `testing` mean the same.
        trains: whether there must be cases to train on; else any labelled case will do.

    Returns:
        In the order training, validation, test: `{"image": image, "label": label}`, for validation and test cases with
        their `part`. A `fold` of a case is not used, with a warning.

    Raises:
        InputError: it is no such list, training or validation cases have no label, or labelled cases are listed under
            another key, or there is no case.
    """
    try:
        lists = case_lists(json.loads(Path(file).read_text(encoding="utf-8-sig")))
        unread = {key: len(labelled) for key in lists.keys() - _LISTS if (labelled := _labelled(lists[key]))}
        read = {key: lists[key] for key in _LISTS if key in lists}
        if trains and not unread and not any(cases for key, cases in read.items() if not _LISTS[key]):
            raise ValueError("no 'training' cases")
        needed = [case for key, cases in read.items() if _LISTS[key] != "test" for case in cases]
        if wrong := [case for case in needed if not _is_labelled(case)]:
            raise ValueError(f"{len(wrong)} case(s) without an image and one label, first {wrong[0]!r}")
        if not unread and not any(_is_labelled(case) for cases in read.values() for case in cases):
            raise ValueError(f"no case with a label among {', '.join(map(repr, read)) or 'its lists'}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{file}: no list of labelled cases ({error}); it needs "
            '{"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}'
        ) from None
    if unread:
        listed = ", ".join(f"{count} under {key!r}" for key, count in sorted(unread.items()))
        raise InputError(
            f"{file}: labelled cases that are not read, {listed}; rename the key to training, validation or test, or "
            "remove it"
        )
    cases = []
    for key, part in _LISTS.items():
        for case in _labelled(read.get(key, [])):
            image, label = (
                [_relative_to(file, path) for path in listed_paths(case, key)] for key in ("image", "label")
            )
            cases.append({"image": image if len(image) > 1 else image[0], "label": label[0]})
            if part:
                cases[-1]["part"] = part
    if folded := sum(isinstance(case, dict) and "fold" in case for found in read.values() for case in found):
        logger.warning(
            "%s: the 'fold' of %d case(s) is not used, as --split#fold draws its own folds; list the cases of the fold "
            "that validates under 'validation' and not under 'training', or name them by --split#val_cases",
            file, folded,
        )  # fmt: skip
    return cases


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


def _lists_cases(key: str, content: Any) -> bool:
    """Return whether a list in a file is one of cases, and not of labels or references."""
    if not isinstance(content, list):
        return False
    return key in _LISTS or any(
        (isinstance(case, dict) and "image" in case)
        or (isinstance(case, str) and (is_nifti(case) or ("/" in case and "://" not in case)))
        for case in content
    )


def _labelled(cases: list[Any]) -> list[dict[str, Any]]:
    return [case for case in cases if _is_labelled(case)]


def _is_labelled(case: Any) -> bool:
    return isinstance(case, dict) and bool(listed_paths(case, "image")) and len(listed_paths(case, "label")) == 1


def _relative_to(file: str | Path, path: str) -> str:
    return os.path.normpath(Path(file).parent / path)


def write_list(dataset_dir: str, images: str, labels: str, output: str) -> None:
    """Write a list of labelled cases, see :func:`read_list`, from two patterns with wildcards.

    Wildcards are `*` and `?` within a name, `[ab]`, and `**/` for folders at any depth. Image and label are of one case
    where the wildcards stand for the same.

    Args:
        dataset_dir: folder in which the patterns begin.
        images: pattern of the images, such as `volume-*.nii.gz`.
        labels: pattern of the labels, such as `labels-*.nii.gz`, with as many wildcards in the same order.
        output: `.json` file to write; paths in it are relative to it.

    Raises:
        InputError: as :func:`pair_patterns`, or the file cannot be written.
    """
    cases = pair_patterns(dataset_dir, images, labels)
    folder = Path(output).resolve().parent
    training = [{key: os.path.relpath(os.path.abspath(file), folder) for key, file in case.items()} for case in cases]
    write_json(output, {"training": training}, "give another --output")
    print(f"{output}: {len(cases)} cases; give it as --dataset_dir")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(
        write_list, {"dataset_dir": PATH, "images": ANY_TEXT, "labels": ANY_TEXT, "output": PATH}, sys.argv[1:]
    )
