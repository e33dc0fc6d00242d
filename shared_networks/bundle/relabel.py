"""Write other labels into a copy of a segmentation bundle.

python -m shared_networks.bundle.relabel --bundle own_seg --labels dataset.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shared_networks.datasets.labels import dataset_labels
from shared_networks.errors import InputError, report_in_one_line
from shared_networks.files import read_json
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import PATH


def relabel(bundle: str | Path, labels: str | Path) -> None:
    """Writes other labels into a copy of a bundle, so that no command needs `--label_names` and MONAI Label has them.

    Changed are `label_names` in `configs/train.json` and `configs/inference.json`, `val_cases`, which are another data
    set's, and channels and classes in `configs/metadata.json`.

    Args:
        bundle: a copy of a segmentation bundle.
        labels: `dataset.json` with the labels, or a folder that has it.

    Raises:
        InputError: as :func:`read_labels`, or `bundle` is no segmentation bundle.
    """
    names = dataset_labels(labels)
    files = [Path(bundle) / "configs" / f"{name}.json" for name in ("train", "inference", "metadata")]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such file; give --bundle a copy of a segmentation bundle")
    train, inference, metadata = (read_json(file) for file in files)
    if "label_names" not in train:
        raise InputError(f"{files[0]}: has no label_names; give --bundle a copy of a segmentation bundle")
    train.update(label_names=names, val_cases=[])
    inference.update(label_names=names)
    listed = ", ".join(f"{value} {name}" for value, name in enumerate(names))
    metadata.update(
        task=f"Segmentation of {len(names) - 1} organ(s) in CT",
        label_classes=f"one channel of integers: {listed}",
        pred_classes=f"{len(names)} channels of logits, one a label value, in order",
        data_source="the maker's own; see the data set",
    )
    channels = {str(value): name for value, name in enumerate(names)}
    metadata["network_data_format"]["outputs"]["pred"].update(num_channels=len(names), channel_def=channels)
    for file, content in zip(files, (train, inference, metadata), strict=True):
        file.write_text(json.dumps(content, indent=4) + "\n")
    print(f"{bundle}: {listed}")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(relabel, {"bundle": PATH, "labels": PATH}, sys.argv[1:])
