"""Record what a model was trained on, beside its weights, and compare by digest.

The record is `model.json` beside `model.pt`: SHA-256 of the weights, label names, the cases that trained, chose and
test it, and the settings that its use depends on. Whoever copies a model takes both files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import struct
import zlib
from collections import UserDict
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from glob import escape
from pathlib import Path
from typing import Any

import torch
from monai.utils import ensure_tuple, optional_import
from torch import Tensor

from shared_networks.datasets.pairs import name_of
from shared_networks.errors import InputError
from shared_networks.files import GO_ON, atomic_write, write_json
from shared_networks.version import __version__

Record = Mapping[str, Any]
Case = Mapping[str, Any]

PARTS = ("train", "validation", "test")
_PIECE = 1 << 16  # bytes of a scan's start, which with its checksum tell it from others
_REPLACES = "replaces"
SAFETENSORS = ".safetensors"

logger = logging.getLogger(__name__)


def record_file(checkpoint: str | Path) -> Path:
    """Return where the record of a model is: `model.json` for `model.pt`."""
    return Path(checkpoint).with_suffix(".json")


class TrainingRecord(UserDict[str, Any]):
    """The record of a training that is about to start, and what follows from who starts it.

    No dict: MONAI's configs would copy that, without its attributes.

    Attributes:
        in_place: whether a program hands over the cases, as MONAI Label does. It trains on the model that the folder
            holds, and replaces it by a better one.
        model: `model.pt` of the folder, if it is trained on in place.
    """

    in_place: bool = False
    model: Path | None = None


def training_record(
    dataset_dir: str | Path | None,
    split: Mapping[str, Sequence[Case]],
    preparation: Mapping[str, Any],
    train: Sequence[Case] | None = None,
    validation: Sequence[Case] | None = None,
    label_names: Sequence[str] = (),
    start_weights: Sequence[str | Path] = (),
    ckpt_dir: str | Path | None = None,
    network: Mapping[str, Any] | None = None,
    drawing: Mapping[str, str] | None = None,
) -> TrainingRecord:
    """Collect what a training's `model.json` says.

    Args:
        dataset_dir: named by its last part.
        split: of :func:`shared_networks.datasets.splits.split_dataset`: cases of each of :data:`PARTS`, dicts with
            `image`, and `label` where they are labelled.
        preparation: of scans before the network: `modality`, `spacing`, `intensity_range`, `img_size`.
        train: the cases that train. By default from `split`; else a program hands them over.
        validation: the cases that choose the model, likewise.
        label_names: in order of value, background first; none for pre-training.
        start_weights: weights to start from, of which the first that is named counts. The labelled cases in its record
            count as seen, whatever the split is now.
        ckpt_dir: folder of the training.
        network: settings of the network that change what it computes but no tensor's shape, such as `num_heads`.
        drawing: digests of what CTs depend on that are drawn from tissue maps; none of scans.

    Returns:
        `labels` as nnU-Net v2 has them in `dataset.json`; `dataset`, `split`, `preparation`, `network` and `drawing`;
        for each part the names of its cases with a digest of each labelled scan; `validated_on`, a digest of what the
        validation cases hold, labelled or not; and `seen_before`, cases of earlier trainings.

    Raises:
        InputError: a record of the weights to start from is of other weights or cannot be read.
    """
    parts = {
        "train": split["train"] if train is None else train,
        "validation": split["validation"] if validation is None else validation,
        "test": split["test"],
    }
    in_place = parts["train"] is not split["train"]
    model = Path(ckpt_dir or "") / "model.pt"
    continued = model if ckpt_dir and in_place and model.is_file() else None
    start: str | Path = continued or next((file for file in start_weights if file), "")
    seen: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    if start and Path(start).is_file() and (earlier := read_record(start)) and earlier["labels"]:
        for part in seen:
            seen[part] |= seen_cases(earlier, part)
    content = {
        "version": __version__,
        "labels": {name: value for value, name in enumerate(label_names)},
        "dataset": dataset_name(dataset_dir),
        "split": dict(getattr(split, "settings", {})),
        "preparation": dict(preparation),
        "network": dict(network or {}),
        "drawing": dict(drawing or {}),
        **{part: case_digests(cases) for part, cases in parts.items()},
        "validated_on": _validation_digest(parts["validation"]),
        "seen_before": seen,
    }
    record = TrainingRecord(json.loads(json.dumps(content)))  # tuples are lists on file
    record.in_place, record.model = in_place, continued
    return record


def dataset_name(dataset_dir: str | Path | None) -> str:
    """Return the name of a data set: its folder's, or for a list the folder's and its own."""
    path = Path(dataset_dir or "").resolve()
    return "" if not dataset_dir else "/".join(path.parts[-2:]) if path.suffix == ".json" else path.name


def case_digests(cases: Sequence[Case]) -> dict[str, str]:
    """Return the names of cases, each with a digest of its scan, which is empty for a case without label."""
    return {name_of(case): _scan_digest(case) for case in cases}


def seen_cases(record: Record, part: str) -> dict[str, str]:
    """Return all cases that had a part in a model, `train` or `validation`, in earlier trainings too."""
    return {**record["seen_before"][part], **record[part]}


def scores_alike(there: Record, here: Record) -> bool:
    """Return whether two trainings validate on the same cases, with the same scans and labels.

    Args:
        there: of an earlier training; where it is of a version without `validated_on`, names and digests must do.
        here: of :func:`training_record`.
    """
    same_content = there.get("validated_on", here["validated_on"]) == here["validated_on"]
    return same_content and bool(there["validation"] == here["validation"])


def _validation_digest(cases: Sequence[Case]) -> str:
    """What scans and labels hold, of which a score is. Without names, as a released record must not tell them."""
    files = ((*ensure_tuple(case["image"]), *ensure_tuple(case.get("label", ()))) for case in cases)
    # A store knows its sources by digest, so that its volumes need not be read.
    found = [case.get("sha256") or _files_digest(named) for case, named in zip(cases, files, strict=True)]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


def _scan_digest(case: Case) -> str:
    """What a labelled scan is known by under any name. Empty for one without label, or if there is no file."""
    return _files_digest(ensure_tuple(case["image"])) if "label" in case else ""


def _files_digest(files: Sequence[str]) -> str:
    """What the content of files is known by, compressed or not. Empty if there is no file."""
    digest = hashlib.sha256()
    try:
        for file in files:
            stat = os.stat(file)
            digest.update(_content_key(str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except (OSError, EOFError, zlib.error):  # checks of the data say so
        return ""
    return digest.hexdigest()


@cache
def _content_key(file: str, *_version: int) -> bytes:
    """What tells the content of a file, decompressed: its size, CRC-32 and start. gzip files end with the first two."""
    crc = size = 0
    with open(file, "rb") as stream:
        if compressed := stream.read(2) == b"\x1f\x8b":
            stream.seek(-8, os.SEEK_END)
            crc, size = struct.unpack("<II", stream.read())
    with gzip.open(file) if compressed else open(file, "rb") as content:
        start = piece = content.read(_PIECE)
        if size < len(start):  # not compressed; or in parts, so that its end tells of the last one alone
            crc = size = 0
            while piece:
                crc, size = zlib.crc32(piece, crc), size + len(piece)
                piece = content.read(1 << 22)
    return hashlib.sha256(f"{size % (1 << 32)} {crc} ".encode() + start).digest()


def common_cases(cases: Mapping[str, str], others: Mapping[str, str], same_names: bool) -> list[str]:
    """Return the names of cases that are among others, by what is in their files.

    Args:
        cases: digests by name.
        others: digests by name.
        same_names: whether one name means one case, as within a data set.
    """
    digests = set(others.values()) - {""}
    return [name for name, digest in cases.items() if digest in digests or (same_names and name in others)]


def check_record_is_free(file: str | Path) -> None:
    """Refuse a file of weights whose record would replace the record of other weights, such as `model.pt`'s.

    Args:
        file: to be written, such as `model.safetensors`, whose record is `model.json` too.

    Raises:
        InputError: the file at the record's place is of other weights beside it, or is no record.
    """
    path, place = Path(file), record_file(file)
    if not place.is_file():
        return
    if not path.exists() and '"weights_sha256"' not in place.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{path}: its record would replace {place}, which is no record; give another name or folder")
    for other in sorted(path.parent.glob(f"{escape(path.stem)}.*")):
        if other not in (path, place) and record_file(other) == place and _stored(other):
            raise InputError(
                f"{path}: its record would replace {place}, the record of {other}; give another name or folder, or "
                f"move {other.name} and {place.name} away"
            )


def write_model(weights: Mapping[str, Tensor], file: str | Path, record: Record) -> str:
    """Write weights and their record in one act: whenever it is interrupted, what is there fits together.

    The new record is written first and holds the old one too. The weights then take their place by one rename, which
    decides which of the two is meant.

    Args:
        weights: flat state_dict.
        file: `model.pt`; its folder is made.
        record: of :func:`training_record` or :func:`read_record`, with whatever is to be added.

    Returns:
        The digest of the weights.

    Raises:
        InputError: a file cannot be written, or as :func:`check_record_is_free`; what was there is left as it was.
    """
    check_record_is_free(file)
    path = Path(file)
    with atomic_write(path, GO_ON) as unfinished:
        save_tensors(weights, unfinished)
        entry = {**record, "weights_sha256": file_digest(unfinished)}
        write_json(record_file(path), entry | {_REPLACES: _stored(path)}, GO_ON)
    write_json(record_file(path), entry, GO_ON)
    return str(entry["weights_sha256"])


def save_tensors(content: Mapping[str, Any], file: Path) -> None:
    """Write by :func:`torch.save`, or a flat state_dict by safetensors, for the block of an :func:`atomic_write`.

    Args:
        content: what to write.
        file: its ending decides: `.safetensors`, or any other for PyTorch's own form.

    Raises:
        OSError: the file cannot be written; torch raises a RuntimeError for a full disk.
    """
    try:
        with file.open("wb") as stream:
            if file.suffix == SAFETENSORS:
                form = safetensors_form(file)
                stream.write(form.save({name: tensor.contiguous() for name, tensor in content.items()}))
            else:
                torch.save(content, stream)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error


def safetensors_form(file: Path) -> Any:
    """Return the module `safetensors.torch`, which not every environment has.

    Raises:
        InputError: it is not installed.
    """
    form, found = optional_import("safetensors.torch")
    if not found:
        raise InputError(f"{file}: needs a package that is missing: pip install safetensors")
    return form


def read_record(checkpoint: str | Path) -> Record | None:
    """Read the record of a model.

    Args:
        checkpoint: `model.pt`.

    Returns:
        As :func:`training_record`, with `weights_sha256`; `None` where there is no record.

    Raises:
        InputError: the record cannot be read, or is of other weights.
    """
    path = Path(checkpoint)
    file = record_file(path)
    if not path.is_file() or not file.is_file():
        return None
    if (record := _stored(path)) is None:
        raise InputError(
            f"{path}: not the weights that {file} is the record of, so that labels and cases are unknown. Copy both "
            "files of one training, or remove the record to use the weights without"
        )
    return record


def _stored(path: Path) -> Record | None:
    """The record that is of the weights that are there; of the two that a broken-off writing leaves, the right one."""
    file = record_file(path)
    if not path.is_file() or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = [record for record in (content, content.pop(_REPLACES, None)) if record]
        digest = file_digest(path)
        known = next((record for record in found if record["weights_sha256"] == digest), None)
        if known is not None:
            needed = {"labels": dict, "split": dict, "preparation": dict, "seen_before": dict, "dataset": str}
            for key, kind in {**needed, **dict.fromkeys(PARTS, dict)}.items():
                if not isinstance(known[key], kind):
                    raise TypeError(f"{key} is {known[key]!r}")
        return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: no record of a model ({type(error).__name__}: {error}); remove it") from None


def file_digest(file: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; read again only when the file has changed."""
    stat = os.stat(file)
    return _digest(str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(file: str, *_version: int) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def model_facts(checkpoint: str | Path) -> dict[str, Any]:
    """Return what a report says of a model: its file, digest, data set, split and number of cases that trained it."""
    record = read_record(checkpoint)
    facts: dict[str, Any] = {"file": str(checkpoint), "weights_sha256": file_digest(checkpoint)}
    if record is not None:
        facts |= {key: record[key] for key in ("dataset", "split")}
        facts["trained_on"] = len(seen_cases(record, "train"))
    return facts


def trained_labels(record: Record) -> list[str]:
    """Return the label names of a record in order of value, background first; none for pre-training."""
    return sorted(record["labels"], key=record["labels"].__getitem__)


def check_start_preparation(checkpoint: str | Path, record: Record | None, preparation: Mapping[str, Any]) -> None:
    """Refuse weights to start from of another modality, and warn of another spacing or window.

    Args:
        checkpoint: that the weights are from.
        record: of the weights; without one nothing can be compared.
        preparation: as for :func:`training_record`.

    Raises:
        InputError: the modality differs.
    """
    names = (
        ("modality", "spacing") if preparation.get("modality") == "MR" else ("modality", "spacing", "intensity_range")
    )
    here = {name: preparation[name] for name in names if name in preparation}
    differing = different_settings((record or {}).get("preparation", {}), here)
    there = {name: before for name, (before, _) in differing.items()}
    if "modality" in there:
        raise InputError(
            f"{checkpoint}: trained on {there['modality']}, and modality is {here['modality']}; pass "
            f"{options({'modality': there['modality']})} if that is what the scans are, else start from other weights"
        )
    if there:
        logger.warning(
            "%s: trained on scans prepared otherwise: %s. Pass %s to go on with the same",
            checkpoint,
            listed_differences(differing),
            options(there),
        )


def check_network(checkpoint: str | Path, record: Record | None, network: Mapping[str, Any], advice: str = "") -> None:
    """Refuse weights of a network with other settings that no tensor's shape tells, such as heads of attention.

    Args:
        checkpoint: that the weights are from.
        record: of the weights; without one, or in one of an earlier version, nothing can be compared.
        network: the settings now, as for :func:`training_record`.
        advice: what else can be done, for the message.

    Raises:
        InputError: a setting differs.
    """
    if differing := different_settings((record or {}).get("network", {}), network):
        there = {f"network_def#{key}": before for key, (before, _) in differing.items()}
        raise InputError(
            f"{checkpoint}: of a network with other settings: {listed_differences(differing)}. "
            f"Pass {options(there)}{advice}"
        )


def different_settings(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return settings that are in both and differ, as pairs of values there and here."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(here)))
    return {key: (there[key], value) for key, value in plain.items() if key in there and there[key] != value}


def listed_differences(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Return settings that differ as text."""
    return ", ".join(f"{key} was {there} and is {here}" for key, (there, here) in differing.items())


def options(settings: Mapping[str, Any]) -> str:
    """Return the command-line options that set settings."""
    texts = {key: str(value).replace(", ", ",") for key, value in settings.items()}
    return " ".join(f'--{key} "{text}"' if "'" in text else f"--{key} {text}" for key, text in texts.items())
