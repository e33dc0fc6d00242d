"""Read and compare the names of label values."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from shared_networks.datasets.organs import canonical_name
from shared_networks.datasets.record import read_record, record_file, trained_labels
from shared_networks.errors import InputError
from shared_networks.files import read_json

# Okabe and Ito's seven colours (https://jfly.uni-koeln.de/color/), then one by one, of colours that show on grey,
# the farthest in CIELAB from all before it in the worst of normal, protanopic and deuteranopic sight.
LABEL_COLOURS = (
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#005af0"),
    *("#00ff96", "#4bffff", "#d2003c", "#6996ff", "#f0965a", "#87e1b4", "#96ff78", "#d200b4"),
)

_OWN = "--label_names @dataset_labels"
_LISTED = 3

logger = logging.getLogger(__name__)


def label_colour(value: int) -> str:
    """Return the colour of a label value from 1 up, the same in all figures."""
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS)]


def sided_pairs(label_names: Sequence[str]) -> list[tuple[int, int]]:
    """Return pairs of label values of which the first organ lies to the patient's right of the second.

    These are liver and spleen, and whatever is named `right X` and `left X`, in any spelling.
    """
    value_of = {canonical_name(name): value for value, name in enumerate(label_names)}
    right = [name.removeprefix("right ") for name in value_of if name.startswith("right ")]
    wanted = [("liver", "spleen"), *((f"right {name}", f"left {name}") for name in right)]
    return [(value_of[one], value_of[other]) for one, other in wanted if {one, other} <= value_of.keys()]


def read_labels(file: str | Path) -> list[str]:
    """Read label names from the `labels` of a JSON file.

    Both of nnU-Net's forms are read: `{"0": "background", "1": "liver"}` (v1, and the Decathlon's) and
    `{"background": 0, "liver": 1}` (v2).

    Args:
        file: `dataset.json` of a data set.

    Returns:
        The names in order of value, background first.

    Raises:
        InputError: the file cannot be read; has regions, an ignored label, a name twice or no organ; or its values are
            not 0, 1, ... without a gap.
    """
    try:
        labels = json.loads(Path(file).read_text(encoding="utf-8-sig"))["labels"]
        pairs = [(str(name), value) for name, value in labels.items()]
    except FileNotFoundError:
        raise InputError(
            f'{file}: no such file; write one, {{"labels": {{"background": 0, "liver": 1}}}}, or name the labels: '
            "--label_names \"['background','liver']\""
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f'{file}: no label names in it ({reason}); it needs {{"labels": {{"background": 0, "liver": 1}}}}'
        ) from None
    if all(name.isdigit() for name, _ in pairs):
        pairs = [(str(name), int(value)) for value, name in pairs]
    for name, value in pairs:
        if isinstance(value, (list, tuple)):
            raise InputError(f"{file}: label {name!r} is a region, {list(value)}; give one integer a label")
        if name.casefold() == "ignore":
            raise InputError(f"{file}: the label 'ignore' is not supported; map it to background and remove it")
        if type(value) is not int:
            raise InputError(f"{file}: the value of label {name!r} is {value!r}; give an integer")
    values = sorted(value for _, value in pairs)
    if values != list(range(len(values))):
        raise InputError(
            f"{file}: label values are {', '.join(map(str, values))}; map labels and names to 0 to {len(values) - 1}, "
            "none left out and none twice"
        )
    return checked_names([name for name, _ in sorted(pairs, key=lambda pair: pair[1])], file)


def dataset_labels(dataset_dir: str | Path | None) -> list[str]:
    """Read the names of a data set's labels.

    Args:
        dataset_dir: a folder with `dataset.json`, or a `.json` list of cases with `labels`.

    Returns:
        As :func:`read_labels`.

    Raises:
        InputError: as :func:`read_labels`, or `dataset_dir` is not set.
    """
    if not dataset_dir:
        raise InputError("dataset_dir is not set; pass --dataset_dir FOLDER, the folder that holds dataset.json")
    return read_labels(_labels_file(dataset_dir))


def checked_names(label_names: Sequence[str] | None, source: str | Path = "label_names") -> list[str]:
    """Return label names as they are given.

    Raises:
        InputError: it is no list of at least two different names; `None` comes of `@dataset_labels` without a data set.
    """
    if label_names is None or isinstance(label_names, str) or not all(isinstance(name, str) for name in label_names):
        raise InputError(
            f"{source} is {label_names!r}; give a list of names, \"['background','liver']\", or {_OWN.split()[1]} for "
            "those of the data set in --dataset_dir"
        )
    if len(label_names) < 2:
        raise InputError(f"{source}: {list(label_names)} names no organ; give the background and at least one organ")
    if twice := sorted({name for name in label_names if list(label_names).count(name) > 1}):
        raise InputError(f"{source}: {', '.join(twice)} stand(s) for several values; give each value its own name")
    return list(label_names)


def check_dataset_labels(label_names: Sequence[str], dataset_dir: str | Path) -> None:
    """Compare the names that a network is trained on with the data set's, where it has a `dataset.json`.

    Spelling does not matter, see :func:`shared_networks.datasets.organs.canonical_name`. Names that are none of
    `label_names` (abbreviations) are only warned of, as long as another organ agrees and none is at another value.

    Args:
        label_names: in order of value, background first.
        dataset_dir: as for :func:`dataset_labels`.

    Raises:
        InputError: `label_names` are none, or the data set has another number of labels or another order.
    """
    checked_names(label_names)
    file = _labels_file(dataset_dir)
    if not file.is_file() or "labels" not in read_json(file):
        logger.info("%s names no labels, so that their order cannot be checked", file)
        return
    theirs = read_labels(file)
    ours, compared = [canonical_name(name) for name in label_names], [canonical_name(name) for name in theirs]
    differing = [value for value, name in enumerate(compared) if value >= len(ours) or name != ours[value]]
    misplaced = [value for value in differing if compared[value] in ours]
    agreeing = set(range(1, len(compared))).difference(differing)
    listed = "; ".join(
        f"{value} is {theirs[value]!r} there and {label_names[value]!r} here"
        if value < len(label_names)
        else f"{value} is {theirs[value]!r} there and nothing here"
        for value in (misplaced or differing)[:_LISTED]
    )
    listed += f"; ... ({len(differing)} differ)" if len(differing) > _LISTED else ""
    if len(theirs) != len(ours):
        counts = f"{len(theirs)} labels there, {len(ours)} here"
        listed = f"{counts}; {listed}" if listed else counts
    if len(theirs) != len(ours) or misplaced or not agreeing:
        raise InputError(
            f"{file}: its labels are not label_names: {listed}. "
            f"Pass {_OWN} for the data set's, or put {file.name} right"
        )
    if differing:
        logger.warning(
            "%s: some labels have other names, taken for the same organs: %s. If they are others, pass %s",
            file, listed, _OWN,
        )  # fmt: skip


def count_classes(
    label_names: Sequence[str], dataset_dir: str | Path | None = None, checkpoints: Sequence[str | Path] = ()
) -> int:
    """Count classes, background included, and checks that the data set and the trained models mean the same by them.

    Args:
        label_names: in order of value, background first.
        dataset_dir: see :func:`check_dataset_labels`; without one nothing is compared.
        checkpoints: `model.pt` files; see :func:`check_model_labels`.

    Raises:
        InputError: `label_names` are none, or those of the data set or of a model differ.
    """
    if dataset_dir:
        check_dataset_labels(label_names, dataset_dir)
    for checkpoint in checkpoints:
        check_model_labels(label_names, checkpoint)
    return len(checked_names(label_names))


def check_model_labels(label_names: Sequence[str], checkpoint: str | Path) -> None:
    """Compare label names with those that a model was trained on.

    Args:
        label_names: in order of value, background first.
        checkpoint: `model.pt`; without a record beside it there is nothing to compare.

    Raises:
        InputError: they differ, `label_names` are none, or the record is of other weights.
    """
    names, record = checked_names(label_names), read_record(checkpoint)
    if record is None or (trained := trained_labels(record)) == names:
        return
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(trained, names, strict=False)))
    there, here = (repr(these[same]) if same < len(these) else "nothing" for these in (trained, names))
    raise InputError(
        f"{record_file(checkpoint)}: the model was trained on other labels than label_names ({len(trained)} there, "
        f"{len(names)} here; {same} is {there} there and {here} here). Pass --label_names @model_labels"
    )


def model_labels(checkpoint: str | Path) -> list[str]:
    """Read the label names that a model was trained on, in order of value, background first.

    Raises:
        InputError: the model has no record, or one of other weights or without labels.
    """
    record = read_record(checkpoint)
    if record is None or not record["labels"]:
        raise InputError(
            f"{record_file(checkpoint)}: does not name the labels of {checkpoint}; copy the file that training wrote "
            "beside the model, or name them: --label_names \"['background','liver']\""
        )
    return trained_labels(record)


def _labels_file(dataset_dir: str | Path) -> Path:
    path = Path(dataset_dir)
    return path if path.suffix == ".json" else path / "dataset.json"
