"""Choose the labelled cases on which a frozen encoder is probed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import ensure_tuple

from shared_networks.datasets.cases import find_cases
from shared_networks.datasets.labels import dataset_labels
from shared_networks.datasets.tissue_maps import refuse_tissue_maps
from shared_networks.datasets.validate import check_cases
from shared_networks.errors import InputError

MOST_CASES = 8
"""That are probed: a probe must cost little beside the training that it watches."""

_LAYOUT = "give --probe_dir a folder with imagesTr and labelsTr, or a .json list of cases"


def probe_cases(
    probe_dir: str | Path,
    seed: int,
    modality: str | None = None,
    intensity_range: Sequence[float] | None = None,
    in_channels: int | None = None,
) -> list[dict[str, Any]]:
    """Choose cases of a labelled data set, the same for the same seed.

    Args:
        probe_dir: an nnU-Net folder, or a `.json` list of cases; empty for none.
        seed: of the choice.
        modality: see :func:`shared_networks.datasets.validate.check_cases`.
        intensity_range: see there.
        in_channels: see there.

    Returns:
        `{"image": image, "label": label}` of at most :data:`MOST_CASES` cases in random order, checked; none without
        a data set.

    Raises:
        InputError: there is no such folder, it has no labels, a single case or tissue maps, or its files have problems.
    """
    if not probe_dir:
        return []
    folder = Path(probe_dir)
    if not folder.exists():
        raise InputError(f"{probe_dir}: no such folder; {_LAYOUT}")
    if folder.is_dir() and not (folder / "labelsTr").is_dir():
        raise InputError(f"{probe_dir}: no labels in it, as it has no folder labelsTr; {_LAYOUT}")
    try:
        cases = find_cases(probe_dir)
    except InputError as error:  # advises on the setting by which it is usually given
        message = str(error).replace("dataset_dir", "probe_dir")
        told = "\n" in message or "--probe_dir" in message
        raise InputError(message if told else f"{message}; {_LAYOUT}") from None
    if len(cases) < 2:
        raise InputError(
            f"{probe_dir}: {len(cases)} labelled case, but a probe learns from some and is tested on others; "
            "give --probe_dir two cases or more"
        )
    # RandomState and not default_rng: only its stream is promised never to change.
    chosen = [cases[index] for index in np.random.RandomState(seed).permutation(len(cases))[:MOST_CASES]]
    images = [file for case in chosen for file in ensure_tuple(case["image"])]
    refuse_tissue_maps(images, "give --probe_dir labelled CTs, as a probe draws none")
    check_cases(chosen, modality=modality, intensity_range=intensity_range, in_channels=in_channels)
    return chosen


def probe_names(probe_dir: str | Path) -> list[str]:
    """Return the names of the labels of a data set in order of value, or none, where it does not tell."""
    try:
        return dataset_labels(probe_dir) if probe_dir else []
    except InputError:  # a curve can be named by its label's value too
        return []
