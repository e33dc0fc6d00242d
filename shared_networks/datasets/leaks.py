"""Refuse to report on, or to choose a model by, cases that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_networks.datasets.pairs import name_of
from shared_networks.datasets.record import (
    PARTS,
    Case,
    Record,
    case_digests,
    check_network,
    common_cases,
    dataset_name,
    different_settings,
    listed_differences,
    options,
    read_record,
    record_file,
    seen_cases,
    trained_labels,
)
from shared_networks.errors import InputError

_FEW = ("num_train_cases",)
_DRAWS_VALIDATION = ("val_cases", "val_fraction")


def check_evaluation(checkpoints: Sequence[str | Path], now: Record, reported: Sequence[Case]) -> None:
    """Refuse a report on cases that trained a model or chose it, or one that names other settings than its training's.

    Args:
        checkpoints: `model.pt` files; without a record nothing is compared.
        now: of :func:`shared_networks.datasets.record.training_record`, with the settings given for the report.
        reported: the cases to report on. The validation cases may be reported on where nothing was held out.

    Raises:
        InputError: a model has seen such a case, was trained with another split of this data set, or has a record that
            is of other weights. Unlabelled scans are compared by name alone, and their split's settings not at all.
    """
    tested = case_digests(reported)
    of_split = tested.keys() & {
        name for part in PARTS for name, digest in now[part].items() if digest == tested.get(name)
    }
    is_validation = bool(of_split) and tested.keys() <= now["validation"].keys()
    for checkpoint in checkpoints:
        record = read_record(checkpoint)
        if record is None or bool(record["labels"]) != bool(now["labels"]):
            continue
        file, same = record_file(checkpoint), record["dataset"] == now["dataset"]
        # Scans beside the split (imagesTs) are any model's; only a few-shot report must be of that model.
        few = {key: n for key in _FEW if (n := now["split"].get(key)) is not None}
        differing = different_splits(record, now) if of_split else different_settings(record["split"], few)
        if same and differing and now["labels"]:
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
        advice = _advice(record, now, "report on cases that the model has not seen")
        refuse_leaks(file, leaks, advice if of_split else "Leave these cases out of the report")


def unseen_cases(
    checkpoints: Sequence[str | Path], dataset_dir: str | Path | None, split: Mapping[str, Sequence[Case]]
) -> list[Case]:
    """Return all cases of a data set that is new to models, so that a report need not leave any out.

    Args:
        checkpoints: `model.pt` files.
        dataset_dir: of the cases, named in records by its last part.
        split: of :func:`shared_networks.datasets.splits.split_dataset`.

    Returns:
        The cases that would train and validate; none if somebody chose these, if a model has no record, or if one has
        seen a case.

    Raises:
        InputError: a record is of other weights or cannot be read.
    """
    if not getattr(split, "by_default", False):
        return []
    cases = [*split["train"], *(case for case in split["validation"] if case not in split["train"])]
    digests = case_digests(cases)
    for checkpoint in checkpoints:
        record = read_record(checkpoint)
        if record is None or not record["labels"]:
            return []
        same = record["dataset"] == dataset_name(dataset_dir)
        if any(common_cases(digests, seen_cases(record, part), same) for part in ("train", "validation")):
            return []
    return sorted(cases, key=name_of)


def check_start(record: Record, before: Record, source: str | Path) -> None:
    """Refuse to go on with a training whose labels, scans or split are others now.

    Args:
        record: of the training now.
        before: of the training that is gone on with.
        source: the file that holds `before`.

    Raises:
        InputError: label names, preparation, network, drawing of CTs or split differ, or a case would validate or test
            that trained.
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
    check_network(source, before, record["network"], ", or another --ckpt_dir")
    _check_drawing(record, before, source)
    same = before["dataset"] == record["dataset"]
    if same and (differing := different_splits(before, record)):
        raise InputError(
            f"{source}: trained with another split: {listed_differences(differing)}. "
            f"Give the settings of training, {split_options(before)}, or another --ckpt_dir"
        )
    check_unseen(record, {part: seen_cases(before, part) for part in ("train", "validation")}, source, same, before)


def _check_drawing(record: Record, before: Record, source: str | Path) -> None:
    """Refuse CTs drawn otherwise: scores of one training must be of the same validation CTs."""
    now, then = record["drawing"], before.get("drawing", record["drawing"])  # earlier versions recorded none
    if bool(now) != bool(then):
        was, use = ("CTs drawn from tissue maps", "give") if then else ("scans", "leave out")
        raise InputError(f"{source}: trained on {was}; {use} configs/synthetic.json, or give another --ckpt_dir")
    texts = {"tissue_table": "another tissue table", "ranges": "other ranges"}
    if differing := different_settings(then, now):
        raise InputError(
            f"{source}: trained on CTs drawn with {' and '.join(map(texts.__getitem__, differing))}; give the "
            "--tissue_table and the configs/synthetic.json of that training, or another --ckpt_dir"
        )


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
    elsewhere = "Start from weights that have not seen these cases, or split the cases as they were split there"
    refuse_leaks(source, leaks, _advice(before, record, "start anew in another --ckpt_dir") if before else elsewhere)


def different_splits(there: Record, here: Record) -> dict[str, tuple[Any, Any]]:
    """Return settings of two splits that differ; how validation cases were chosen is none if they are the same."""
    same_cases = there["validation"].keys() == here["validation"].keys()
    asked = {key: n for key, n in here["split"].items() if not (same_cases and key in _DRAWS_VALIDATION)}
    return different_settings(there["split"], asked)


def refuse_leaks(source: str | Path, leaks: Mapping[str, Sequence[str]], advice: str) -> None:
    """Raise an `InputError` that lists cases by what they would do twice, if there are any."""
    lines = [f"{', '.join(sorted(cases)[:5])} ({len(cases)} in all) {what}" for what, cases in leaks.items() if cases]
    if lines:
        raise InputError(f"{source}: {'; '.join(lines)}. {advice}")


def _advice(before: Record, now: Record, otherwise: str) -> str:
    """What makes the split of a training again, or else what can be done without."""
    if different_settings(before["split"], now["split"]):
        return f"Give the settings of training: {split_options(before)}"
    changed = "The settings are those of training, so the data set has changed"
    lost = sorted(before["validation"].keys() - {name for part in PARTS for name in now[part]})
    if lost and now["split"].get("num_train_cases") is None:  # else they may be among those that do not train
        listed = f"{', '.join(lost[:5])} ({len(lost)} in all)"
        return f"{changed}: it lacks the validation cases {listed}. Put them back, or {otherwise}"
    if now["test"] or not before["validation"]:
        return f"{changed}: give that of training, or {otherwise}"
    kept = options({"split#val_cases": list(before["validation"])})
    return f"{changed}: keep its validation cases, {kept}, or {otherwise}"


def split_options(record: Record) -> str:
    """Return the command-line options that make a recorded split again."""
    split = record["split"]
    chosen = ("fold", "num_folds") if split.get("fold") is not None else ("test_fraction", "val_cases")
    named = "val_cases" in chosen and record["validation"].keys() & split.get("val_cases", [])
    keys = ("seed", *(() if named else ("val_fraction",)), "num_train_cases", *chosen)
    settings = {key: split[key] for key in keys if split.get(key) is not None and split[key] != []}
    own = {"seed"} if record["labels"] else {"seed", "val_fraction"}  # which pre-training names at its top
    return options({key if key in own else f"split#{key}": value for key, value in settings.items()})
