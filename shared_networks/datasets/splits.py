"""Split cases into training, validation and test cases."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import ensure_tuple

from shared_networks.datasets.cases import find_images
from shared_networks.datasets.pairs import (
    dataset_folder,
    find_labels,
    has_files,
    name_of,
    pair_cases,
)
from shared_networks.datasets.record import (
    Case,
)
from shared_networks.errors import InputError

logger = logging.getLogger(__name__)
VAL_FRACTION = 0.2


class Split(UserDict[str, list[Case]]):
    """Cases by part: `train`, `validation` and `test`.

    No dict: MONAI's configs would copy that, without its attributes.

    Args:
        parts: the cases.
        settings: that made the split, for the record of a training.
        by_default: whether nobody chose the parts: no setting, no list and no name of a case.
    """

    def __init__(
        self, parts: Mapping[str, Sequence[Case]], settings: Mapping[str, Any], by_default: bool = False
    ) -> None:
        super().__init__({part: list(cases) for part, cases in parts.items()})
        self.settings = settings
        self.by_default = by_default


def split_cases(
    cases: Sequence[Mapping[str, Any]],
    val_cases: str | Sequence[str] = (),
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
) -> dict[str, list[Mapping[str, Any]]]:
    """Split cases into training and validation, whatever their order.

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
        logger.warning("%s is the only case: it trains and validates, so validation measures memorisation", names[0])
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
    unseen: Sequence[Mapping[str, Any]] = (),
) -> Sequence[Mapping[str, Any]]:
    """Return the cases to report results on, if possible none that had a part in choosing the model.

    Args:
        dataset_dir: as for :func:`find_cases`.
        validation: the cases that chose the model.
        test: cases that were held out, of a fold or a share.
        unseen: all cases of another data set than the model's, of :func:`shared_networks.datasets.leaks.unseen_cases`.

    Returns:
        The test cases; without any, `imagesTs` with `labelsTs`; without these, or where these folders are empty, the
        unseen cases; without these, with a warning, the validation cases.

    Raises:
        InputError: there is neither a data set nor a case to report on, or `imagesTs` and `labelsTs` do not pair.
    """
    if test:
        return test
    if Path(dataset_dir or "").suffix != ".json" and has_files(dataset_folder(dataset_dir) / "labelsTs"):
        return pair_cases(find_images(dataset_dir, "imagesTs"), find_labels(dataset_dir, "labelsTs"))
    if unseen:
        logger.info("%s: the model has seen none of its cases: reporting on all %d", dataset_dir, len(unseen))
        return unseen
    if not validation:
        raise InputError(
            f"{dataset_dir}: no case to report on: it has no labelsTs, and no case was held out or validates "
            "(val_fraction is 0); give the test cases as imagesTs and labelsTs"
        )
    logger.warning(
        "%s has no labels in labelsTs: reporting on the validation cases, which chose the model: the figures are too "
        "good; hold cases out, in training and here, with "
        "--split#fold 0 --split#num_folds 5 or --split#test_fraction 0.2",
        dataset_dir,
    )
    return validation


def split_dataset(
    cases: Sequence[Case],
    val_cases: str | Sequence[str] = (),
    val_fraction: float | None = None,
    fold: int | None = None,
    num_folds: int = 5,
    test_fraction: float = 0.0,
    num_train_cases: int | None = None,
    seed: int = 0,
) -> Split:
    """Split cases into training, validation (which chooses the model) and test (which is reported on).

    All draws depend on the cases' names and the seed, not on their order. First the test cases are set aside, then the
    validation cases, then training is cut to `num_train_cases`; so these two stay the same for any number, and the
    training cases for a small number are among those for a larger one.

    Args:
        cases: dicts with `image` and `label`, and `part` where a list of cases says `"validation"` or `"test"`: such
            a case is that, unless there is a fold.
        val_cases: names of the validation cases, see :func:`shared_networks.datasets.splits.split_cases`; not used with
            a fold, which draws its own.
        val_fraction: share of the cases without the test cases to draw for validation; `None` for 0.2. Not to be given
            where `val_cases` or the list chooses them.
        fold: the fold to test on, 0 to `num_folds - 1`; `None` for no folds.
        num_folds: number of folds; each case is in one.
        test_fraction: share of the cases, `val_cases` left out, to draw for test; 0 for none.
        num_train_cases: how many cases train; `None` for all that are left.
        seed: of all draws.

    Returns:
        The cases of each part, sorted by case name and without `part`; all empty where there is no case. Where a list
        gives each case a part, none trains and nothing is drawn.

    Raises:
        InputError: a setting is out of its range, is given though another one decides, or leaves too few cases.
    """
    share = VAL_FRACTION if val_fraction is None else val_fraction
    if fold is not None and test_fraction:
        raise InputError(f"fold is {fold} and test_fraction {test_fraction}; give one of them, both choose test cases")
    if not 0 <= test_fraction < 1:
        raise InputError(f"test_fraction is {test_fraction}; give a share of the cases from 0 to below 1")
    settings = {
        "seed": seed,
        "val_cases": list(ensure_tuple(val_cases)),
        "val_fraction": share,
        "fold": fold,
        "num_folds": num_folds,
        "test_fraction": test_fraction,
        "num_train_cases": num_train_cases,
    }
    if not cases:
        return Split({"train": [], "validation": [], "test": []}, settings)
    ordered = sorted(cases, key=lambda case: (name_of(case), str(case["image"])))
    listed = {part: [case for case in ordered if case.get("part") == part] for part in ("validation", "test")}
    if all("part" in case for case in ordered):  # a list to report on
        parts = {part: [_without_part(case) for case in found] for part, found in listed.items()}
        return Split({"train": [], **parts}, settings)
    if fold is not None:
        tested = _fold(ordered, fold, num_folds, seed)
        val_cases = ()
    else:
        if listed["validation"]:
            val_cases = [name_of(case) for case in listed["validation"]]
        tested = listed["test"] or _share(_without(ordered, val_cases), test_fraction, seed)
    names = {name_of(case) for case in tested}
    bare = [_without_part(case) for case in ordered]
    parts = split_cases([case for case in bare if name_of(case) not in names], val_cases, share, seed)
    named = [name for case in parts["validation"] if (name := name_of(case)) in ensure_tuple(val_cases)]
    if named and val_fraction is not None:
        raise InputError(
            f"val_fraction is {val_fraction}, but {', '.join(named[:3])} ({len(named)} in all) validate by name, of "
            "val_cases or of the list; leave --split#val_fraction out, or draw with --split#val_cases [] from cases "
            "without a part"
        )
    train = _few(parts["train"], num_train_cases, seed)
    test = [case for case in bare if name_of(case) in names]
    by_default = not (test or named) and val_fraction is None and num_train_cases is None
    return Split({"train": train, "validation": parts["validation"], "test": test}, settings, by_default)


def _without_part(case: Case) -> Case:
    return {key: value for key, value in case.items() if key != "part"}


def _fold(ordered: Sequence[Case], fold: int, num_folds: int, seed: int) -> list[Case]:
    if not 2 <= num_folds <= len(ordered):
        raise InputError(f"num_folds is {num_folds}; give from 2 to the number of cases, {len(ordered)}")
    if fold not in range(num_folds):
        raise InputError(f"fold is {fold}; give one from 0 to {num_folds - 1}, as num_folds is {num_folds}")
    return [ordered[index] for index in _order(ordered, seed)[fold::num_folds]]


def _share(ordered: Sequence[Case], fraction: float, seed: int) -> list[Case]:
    if not fraction:
        return []
    count = max(1, round(fraction * len(ordered)))
    if count >= len(ordered):
        raise InputError(f"test_fraction is {fraction}, which leaves no case of {len(ordered)} for training; lower it")
    return [ordered[index] for index in _order(ordered, seed)[:count]]


def _few(ordered: Sequence[Case], count: int | None, seed: int) -> list[Case]:
    if count is None:
        return list(ordered)
    if not 1 <= count <= len(ordered):
        raise InputError(f"num_train_cases is {count}; give from 1 to the number of training cases, {len(ordered)}")
    chosen = set(_order(ordered, seed)[:count])
    return [case for index, case in enumerate(ordered) if index in chosen]


def _order(ordered: Sequence[Case], seed: int) -> list[int]:
    # RandomState and not default_rng or random: only its stream is promised never to change.
    return np.random.RandomState(seed).permutation(len(ordered)).tolist()  # type: ignore[no-any-return]


def _without(ordered: Sequence[Case], names: str | Sequence[str]) -> list[Case]:
    left_out = {names} if isinstance(names, str) else set(names)
    return [case for case in ordered if name_of(case) not in left_out]
