"""Refuse to train into the folder of another training."""

from __future__ import annotations

import logging
from pathlib import Path

from shared_networks.datasets.leaks import check_start, check_unseen
from shared_networks.datasets.record import (
    Record,
    TrainingRecord,
    check_record_is_free,
    different_settings,
    listed_differences,
    read_record,
    trained_labels,
)
from shared_networks.errors import InputError
from shared_networks.files import check_output_folder

logger = logging.getLogger(__name__)


STATES = "state"
"""Folder of the states of a training, beside its `model.pt`."""


def check_run_folder(folder: str | Path, record: TrainingRecord, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse to train into a folder that holds a model or states of another training, before any work is done.

    Args:
        folder: `ckpt_dir`, of `model.pt` and of states in `state`.
        record: of this training; a model that is trained on in place must have the same labels and preparation.
        resume: whether to go on with the newest state. Without one training starts from the beginning, and a model of
            the same training is the one to beat.
        overwrite: whether an earlier training in the folder is to be removed when this one starts.

    Raises:
        InputError: no case trains; the folder cannot be written to, or holds a training and no setting says what to do
            with it; its `model.json` is of other weights than `model.pt`; or settings contradict each other.
    """
    if record["validation"] and not record["train"]:
        raise InputError(
            f"{record['dataset'] or 'dataset_dir'}: no case to train on, {len(record['validation'])} validate; list "
            "cases to train on under 'training'"
        )
    check_output_folder(folder, "ckpt_dir")
    if resume and overwrite:
        raise InputError(
            "resume and overwrite are both set; give --resume True to go on, or --overwrite True to start anew"
        )
    model, states = Path(folder) / "model.pt", sorted((Path(folder) / STATES).glob("state_*.ckpt"))
    check_record_is_free(model)
    if record.in_place and not overwrite:
        check_same_training(model, record)
    elif (model.is_file() or states) and not overwrite and not resume:
        raise InputError(
            f"{folder}: holds {'a trained model' if model.is_file() else 'an unfinished training'}; give --resume True "
            "to go on with it, --overwrite True to remove it and start anew, or another --ckpt_dir"
        )
    elif resume and model.is_file() and not states:
        if (before := read_record(model)) is None:
            raise InputError(
                f"{folder}: holds a model without record and no state to resume from; give --overwrite True in place "
                "of --resume True to remove it and start anew, or another --ckpt_dir"
            )
        check_start(record, before, model)
    if not (resume and states):
        try:
            check_unseen(record, record["seen_before"], record.model or "the weights to start from")
        except InputError as error:
            if not record.in_place:
                raise
            logger.warning("%s", error)  # an annotator's cases change their parts as more are labelled


def check_same_training(model: Path, record: Record) -> None:
    """Refuse a model to be trained on in place that is of other labels, or of scans prepared otherwise."""
    before = read_record(model)
    if before is None:
        return
    settings = (
        {"label_names": trained_labels(made), **made["preparation"], **made.get("network", {})}
        for made in (before, record)
    )
    if differing := different_settings(*settings):
        raise InputError(
            f"{model}: trained otherwise than it would be now: {listed_differences(differing)}. "
            "Give the settings of that training, or move the model away to start anew"
        )
