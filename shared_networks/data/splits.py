"""Which cases train, which choose the model and which are reported on, and the record of it beside the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_networks.data.datalist import case_name, split_cases
from shared_networks.data.labels import LABELS_FILE, checked_names
from shared_networks.errors import InputError
from shared_networks.files import replaced_when_whole

SPLIT_FILE = "split.json"
"""Beside `model.pt`: the cases that it was trained, chosen and is to be tested on."""

Case = Mapping[str, Any]

logger = logging.getLogger(__name__)


def split_dataset(
    cases: Sequence[Case],
    val_cases: str | Sequence[str] = (),
    val_fraction: float = 0.2,
    fold: int | None = None,
    num_folds: int = 5,
    test_fraction: float = 0.0,
    num_train_cases: int | None = None,
    seed: int = 0,
) -> dict[str, list[Case]]:
    """Splits cases into training, validation (which chooses the model) and test (which is reported on).

    All draws depend on the cases' names and the seed, not on their order. First the test cases are set aside, then the
    validation cases, then training is cut to `num_train_cases`; so these two stay the same for any number, and the
    training cases for a small number are among those for a larger one.

    Args:
        cases: dicts with `image` and `label`, and `part` where a list of cases says `"validation"` or `"test"`: such
            a case is that, unless there is a fold.
        val_cases: names of the validation cases, see :func:`shared_networks.data.datalist.split_cases`; not used with
            a fold, which draws its own.
        val_fraction: share of the cases without the test cases to draw for validation.
        fold: the fold to test on, 0 to `num_folds - 1`; `None` for no folds.
        num_folds: number of folds; each case is in one.
        test_fraction: share of the cases, `val_cases` left out, to draw for test; 0 for none.
        num_train_cases: how many cases train; `None` for all that are left.
        seed: of all draws.

    Returns:
        `{"train": cases, "validation": cases, "test": cases}`, each sorted by case name and without `part`; all empty
        where there is no case.

    Raises:
        InputError: a setting is out of its range, or leaves too few cases.
    """
    if fold is not None and test_fraction:
        raise InputError(f"fold is {fold} and test_fraction {test_fraction}; give one of them, both choose test cases")
    if not 0 <= test_fraction < 1:
        raise InputError(f"test_fraction is {test_fraction}; give a share of the cases from 0 to below 1")
    if not cases:
        return {"train": [], "validation": [], "test": []}
    ordered = sorted(cases, key=lambda case: (case_name(case["image"]), str(case["image"])))
    listed = {part: [case for case in ordered if case.get("part") == part] for part in ("validation", "test")}
    if fold is not None:
        tested = _fold(ordered, fold, num_folds, seed)
        val_cases = ()
    else:
        if listed["validation"]:
            val_cases = [case_name(case["image"]) for case in listed["validation"]]
        tested = listed["test"] or _share(_without(ordered, val_cases), test_fraction, seed)
    names = {case_name(case["image"]) for case in tested}
    bare: list[Case] = [{key: value for key, value in case.items() if key != "part"} for case in ordered]
    parts = split_cases([case for case in bare if case_name(case["image"]) not in names], val_cases, val_fraction, seed)
    train = _few(parts["train"], num_train_cases, seed)
    test = [case for case in bare if case_name(case["image"]) in names]
    return {"train": train, "validation": parts["validation"], "test": test}


def record_training(
    folder: str | Path,
    dataset_dir: str | Path | None,
    label_names: Sequence[str],
    split: Mapping[str, Sequence[Case]],
    settings: Mapping[str, Any],
    resume: bool = False,
) -> None:
    """Writes :data:`SPLIT_FILE` and :data:`LABELS_FILE` beside the model, whole or not at all.

    Args:
        folder: of `model.pt`.
        dataset_dir: named by its last part.
        label_names: in order of value, background first.
        split: the cases of each part, `train`, `validation` and `test`.
        settings: that made the split, `seed`, `fold` and so on.
        resume: whether the model there is trained on; then no case may test that trained before.

    Raises:
        InputError: see :func:`check_split`, or a file cannot be written.
    """
    if resume:
        check_split(folder, dataset_dir, split)
    names = {part: [case_name(case["image"]) for case in cases] for part, cases in split.items()}
    _write(Path(folder) / SPLIT_FILE, {"dataset": _dataset_name(dataset_dir), **settings, **names})
    labels = {name: value for value, name in enumerate(checked_names(label_names))}
    _write(Path(folder) / LABELS_FILE, {"labels": labels})


def check_split(
    folder: str | Path,
    dataset_dir: str | Path | None,
    split: Mapping[str, Sequence[Case]],
    reported: Sequence[Case] | None = None,
) -> None:
    """Refuses a split in which cases validate or test that trained the model, or test that chose it.

    Args:
        folder: of the model, with its :data:`SPLIT_FILE`; without that file nothing is compared.
        dataset_dir: a data set of another name than the record's is not compared.
        split: the cases of each part now.
        reported: the cases to report on; where they are not of the split (`imagesTs`), nothing is compared.

    Raises:
        InputError: there are such cases, or the record cannot be read.
    """
    files = {str(case["image"]) for cases in split.values() for case in cases}
    if reported is not None and not any(str(case["image"]) in files for case in reported):
        return
    file = Path(folder) / SPLIT_FILE
    if not file.is_file():
        return
    try:
        record = json.loads(file.read_text())
        before = {part: set(record[part]) for part in ("train", "validation")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no record of a split ({type(error).__name__}: {error}); remove it") from None
    if record.get("dataset") != _dataset_name(dataset_dir):
        return
    now = {part: {case_name(case["image"]) for case in cases} for part, cases in split.items()}
    leaks = {
        "trained and would now test": before["train"] & now["test"],
        "trained and would now choose the model": before["train"] & now["validation"],
        "chose the model and would now test": before["validation"] & now["test"],
    }
    lines = [f"{', '.join(sorted(cases)[:5])} ({len(cases)} in all) {what}" for what, cases in leaks.items() if cases]
    if lines:
        raise InputError(f"{file}: {'; '.join(lines)}. Give the settings of training: {_options(record)}")


def _options(record: Mapping[str, Any]) -> str:
    """The command-line options that make a recorded split again."""
    chosen = ("fold", "num_folds") if record.get("fold") is not None else ("val_cases", "test_fraction")
    given = {key: record.get(key) for key in ("seed", "val_fraction", *chosen)}
    texts = {key: str(value).replace(", ", ",") for key, value in given.items() if value is not None and value != []}
    return " ".join(f'--{key} "{text}"' if "'" in text else f"--{key} {text}" for key, text in texts.items())


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
    return [case for case in ordered if case_name(case["image"]) not in left_out]


def _dataset_name(dataset_dir: str | Path | None) -> str:
    """The folder's name, or for a list the folder's and its own."""
    path = Path(dataset_dir or "").resolve()
    return "" if not dataset_dir else "/".join(path.parts[-2:]) if path.suffix == ".json" else path.name


def _write(file: Path, content: Mapping[str, Any]) -> None:
    try:
        with replaced_when_whole(file, file.with_name(f"{file.name}.tmp")) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); give another --ckpt_dir") from error
