"""Split cases into those that train, choose the model and are reported on, and refuse what mixes them up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shared_networks.data.datalist import name_of, split_cases
from shared_networks.errors import InputError
from shared_networks.record import (
    PARTS,
    Case,
    Record,
    case_digests,
    common_cases,
    different_settings,
    listed_differences,
    options,
    read_record,
    record_file,
    seen_cases,
    trained_labels,
)

_FEW = ("num_train_cases",)

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
    ordered = sorted(cases, key=lambda case: (name_of(case), str(case["image"])))
    listed = {part: [case for case in ordered if case.get("part") == part] for part in ("validation", "test")}
    if fold is not None:
        tested = _fold(ordered, fold, num_folds, seed)
        val_cases = ()
    else:
        if listed["validation"]:
            val_cases = [name_of(case) for case in listed["validation"]]
        tested = listed["test"] or _share(_without(ordered, val_cases), test_fraction, seed)
    names = {name_of(case) for case in tested}
    bare: list[Case] = [{key: value for key, value in case.items() if key != "part"} for case in ordered]
    parts = split_cases([case for case in bare if name_of(case) not in names], val_cases, val_fraction, seed)
    train = _few(parts["train"], num_train_cases, seed)
    test = [case for case in bare if name_of(case) in names]
    return {"train": train, "validation": parts["validation"], "test": test}


def check_evaluation(checkpoints: Sequence[str | Path], now: Record, reported: Sequence[Case]) -> None:
    """Refuse a report on cases that trained a model or chose it, or one that names other settings than its training's.

    Args:
        checkpoints: `model.pt` files; without a record nothing is compared.
        now: of :func:`shared_networks.record.training_record`, with the settings given for the report.
        reported: the cases to report on. The validation cases may be reported on where nothing was held out.

    Raises:
        InputError: a model has seen such a case, was trained with another split of this data set, or has a record that
            is of other weights.
    """
    tested = case_digests(reported)
    of_split = tested.keys() & {
        name for part in PARTS for name, digest in now[part].items() if digest == tested.get(name)
    }
    is_validation = bool(of_split) and tested.keys() <= now["validation"].keys()
    for checkpoint in checkpoints:
        record = read_record(checkpoint)
        if record is None or not record["labels"]:
            continue
        file, same = record_file(checkpoint), record["dataset"] == now["dataset"]
        # Scans beside the split (imagesTs) are any model's; only a few-shot report must be of that model.
        asked = now["split"] if of_split else {key: n for key in _FEW if (n := now["split"].get(key)) is not None}
        differing = different_settings(record["split"], asked)
        if same and differing:
            raise InputError(
                f"{file}: the model was trained with another split: {listed_differences(differing)}. "
                f"Give the settings of training: {split_options(record)}"
            )
        by_name = same and bool(of_split)
        trained = common_cases(tested, seen_cases(record, "train"), by_name)
        memorised = record["train"].keys() & record["validation"].keys()  # the only case: it was said in training
        leaks = {"trained and would now test": [name for name in trained if name not in memorised]}
        if not is_validation:
            chose = common_cases(tested, seen_cases(record, "validation"), by_name)
            leaks["chose the model and would now test"] = [name for name in chose if name not in memorised]
        refuse_leaks(file, leaks, record)


def check_start(record: Record, before: Record, source: str | Path) -> None:
    """Refuse to go on with a training whose labels, scans or split are others now.

    Args:
        record: of the training now.
        before: of the training that is gone on with.
        source: the file that holds `before`.

    Raises:
        InputError: label names, preparation or split differ, or a case would validate or test that trained.
    """
    if trained_labels(before) != trained_labels(record):
        raise InputError(
            f"{source}: trained on other labels, {', '.join(trained_labels(before))}; here they are "
            f"{', '.join(trained_labels(record))}. Give the --label_names of that training, or another --ckpt_dir"
        )
    if differing := different_settings(before["preparation"], record["preparation"]):
        raise InputError(
            f"{source}: trained on scans prepared otherwise: {listed_differences(differing)}. "
            f"Pass {options({key: there for key, (there, _) in differing.items()})}, or another --ckpt_dir"
        )
    same = before["dataset"] == record["dataset"]
    if same and (differing := different_settings(before["split"], record["split"])):
        raise InputError(
            f"{source}: trained with another split: {listed_differences(differing)}. "
            f"Give the settings of training, {split_options(before)}, or another --ckpt_dir"
        )
    check_unseen(record, {part: seen_cases(before, part) for part in ("train", "validation")}, source, same, before)


def check_unseen(
    record: Record,
    seen: Mapping[str, Mapping[str, str]],
    source: str | Path,
    same_names: bool = False,
    before: Record | None = None,
) -> None:
    """Refuse a training in which cases validate or test that trained its first weights, or test that chose those.

    Args:
        record: of the training.
        seen: digests by name of the cases that trained and that chose the weights, `train` and `validation`.
        source: of the weights, for the message.
        same_names: whether a name means the same case in both.
        before: whose settings the message advises.

    Raises:
        InputError: there are such cases.
    """
    trained, chose = seen["train"], seen["validation"]
    chooses = {name: digest for name, digest in record["validation"].items() if name not in record["train"]}
    leaks = {
        "trained and would now test": common_cases(record["test"], trained, same_names),
        "trained and would now choose the model": common_cases(chooses, trained, same_names),
        "chose the model and would now test": common_cases(record["test"], chose, same_names),
    }
    refuse_leaks(source, leaks, before)


def refuse_leaks(source: str | Path, leaks: Mapping[str, Sequence[str]], record: Record | None) -> None:
    """Raise an `InputError` that lists cases by what they would do twice, if there are any."""
    lines = [f"{', '.join(sorted(cases)[:5])} ({len(cases)} in all) {what}" for what, cases in leaks.items() if cases]
    if lines:
        advice = (
            f"Give the settings of training: {split_options(record)}"
            if record
            else ("Start from weights that have not seen these cases, or split the cases as they were split there")
        )
        raise InputError(f"{source}: {'; '.join(lines)}. {advice}")


def split_options(record: Record) -> str:
    """Return the command-line options that make a recorded split again."""
    split = record["split"]
    chosen = ("fold", "num_folds") if split.get("fold") is not None else ("test_fraction", "val_cases")
    keys = ("seed", "val_fraction", "num_train_cases", *chosen)
    return options({key: split[key] for key in keys if split.get(key) is not None and split[key] != []})


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
