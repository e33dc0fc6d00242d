"""Write other labels into a copy of a segmentation bundle, so that no command needs `--label_names`.

cp -r hi_end_mae_btcv_seg own_seg
python -m shared_networks.bundle.relabel --bundle own_seg --labels dataset.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_networks.bundle.config_format import format_config
from shared_networks.datasets.labels import dataset_labels
from shared_networks.errors import InputError, report_in_one_line
from shared_networks.files import atomic_write, read_json
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import PATH

RELABELLED = ("train", "inference", "metadata")
"""Configs that name labels."""


def relabelled(
    configs: Mapping[str, Any], label_names: Sequence[str], val_cases: Sequence[str], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configs of a segmentation bundle for other labels.

    Args:
        configs: content of :data:`RELABELLED`, by name; left unchanged.
        label_names: in order of value, background first.
        val_cases: names of the validation cases.
        metadata: entries of `metadata.json` to replace.
    """
    listed = ", ".join(f"{value} {name}" for value, name in enumerate(label_names))
    made = {
        **configs["metadata"],
        "label_classes": f"one channel of integers: {listed}",
        "pred_classes": f"{len(label_names)} channels of logits, one a label value, in order",
        **metadata,
    }
    data_format = made["network_data_format"]
    channels = {str(value): name for value, name in enumerate(label_names)}
    prediction = {**data_format["outputs"]["pred"], "num_channels": len(label_names), "channel_def": channels}
    made["network_data_format"] = {**data_format, "outputs": {**data_format["outputs"], "pred": prediction}}
    train = configs["train"]
    return {
        "train": {
            **train,
            "label_names": list(label_names),
            "split": {**train["split"], "val_cases": list(val_cases)},
        },
        "inference": {**configs["inference"], "label_names": list(label_names)},
        "metadata": made,
    }


def relabel(bundle: str | Path, labels: str | Path) -> None:
    """Write other labels into a copy of a bundle, so that no command needs `--label_names` and MONAI Label has them.

    Changed are `label_names` in `configs/train.json` and `configs/inference.json`, `val_cases`, which are another data
    set's, and channels and classes in `configs/metadata.json`.

    Args:
        bundle: a copy of a segmentation bundle.
        labels: `dataset.json` with the labels, or a folder that has it.

    Raises:
        InputError: as :func:`shared_networks.datasets.labels.read_labels`, or `bundle` is no segmentation bundle.
    """
    names = dataset_labels(labels)
    files = {name: Path(bundle) / "configs" / f"{name}.json" for name in RELABELLED}
    if missing := [file for file in files.values() if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such file; give --bundle a copy of a segmentation bundle")
    configs = {name: read_json(file) for name, file in files.items()}
    if "label_names" not in configs["train"]:
        raise InputError(f"{files['train']}: has no label_names; give --bundle a copy of a segmentation bundle")
    metadata = {
        "task": f"Segmentation of {len(names) - 1} organ(s) in CT",
        "data_source": "the maker's own; see the data set",
    }
    for name, content in relabelled(configs, names, [], metadata).items():
        with atomic_write(files[name], "give --bundle a copy that can be written") as unfinished:
            unfinished.write_text(format_config(content), encoding="utf-8")
    print(f"{bundle}: {', '.join(f'{value} {name}' for value, name in enumerate(names))}")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(relabel, {"bundle": PATH, "labels": PATH}, sys.argv[1:])
