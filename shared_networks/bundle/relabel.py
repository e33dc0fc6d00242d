"""Make a copy of a segmentation bundle one of other labels, so that no command needs `--label_names`.

cp -r hi_end_mae_btcv_seg own_seg
python -m shared_networks.bundle.relabel --bundle own_seg --labels dataset.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_networks.bundle.card import card_section, general_card, relative_links
from shared_networks.bundle.config_format import format_config
from shared_networks.bundle.description import described_card, described_metadata, scans_of
from shared_networks.datasets.labels import dataset_labels
from shared_networks.datasets.record import read_record, record_file, trained_labels
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
    train, scans = configs["train"], scans_of(configs["inference"])
    return {
        "train": {
            **train,
            "label_names": list(label_names),
            "split": {**train["split"], "val_cases": list(val_cases)},
        },
        "inference": {**configs["inference"], "label_names": list(label_names)},
        "metadata": described_metadata(made, scans),
    }


def relabel(bundle: str | Path, labels: str | Path) -> None:
    """Make a copy of a bundle one of other labels, so that no command needs `--label_names` and MONAI Label has them.

    Changed are `label_names` in `configs/train.json` and `configs/inference.json`, `val_cases`, which are another data
    set's, and what `configs/metadata.json` says. The card is made anew. Removed are files in `docs` that the card
    before showed, and weights of other labels in `weights`. Overlays that take these by default take those of the new
    labels, once they are written there.

    Args:
        bundle: a copy of a segmentation bundle.
        labels: `dataset.json` with the labels, or a folder that has it.

    Raises:
        InputError: as :func:`shared_networks.datasets.labels.read_labels`, or `bundle` is no segmentation bundle, or a
            record in `weights` is of no use.
    """
    names = dataset_labels(labels)
    files = {name: Path(bundle) / "configs" / f"{name}.json" for name in RELABELLED}
    if missing := [file for file in files.values() if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such file; give --bundle a copy of a segmentation bundle")
    configs = {name: read_json(file) for name, file in files.items()}
    if "label_names" not in configs["train"]:
        raise InputError(f"{files['train']}: has no label_names; give --bundle a copy of a segmentation bundle")
    before, folder = configs["metadata"], Path(bundle).resolve()
    own = f"the labels of {folder.name}"
    metadata = {
        "name": f"Hi-End-MAE segmentation, {folder.name}",
        "changelog": {before["version"]: f"first version with {own}"},
        "task": f"Segmentation of {len(names) - 1} organ(s) in CT",
        "description": f"A UNETR whose vision transformer was pre-trained by Hi-End-MAE, for {own}.",
        "data_source": "the maker's own; see the data set",
        "eval_metrics": {},
        "references": before["references"][:2],  # the others are of the data
    }
    leftover = other_weights(folder, names)
    written = {files[name]: format_config(new) for name, new in relabelled(configs, names, [], metadata).items()}
    card = folder / "docs" / "README.md"
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    recipe = card_section(old, "Network and recipe")
    made = general_card(metadata["name"], names, metadata["references"], recipe)
    written[card] = described_card(made, scans_of(configs["inference"]))
    shown = {folder / "docs" / link for link in set(relative_links(old)) - set(relative_links(written[card]))}
    leftover += sorted(file for file in shown if file.parent == folder / "docs" and file.is_file())
    for file, text in written.items():
        with atomic_write(file, "give --bundle a copy that can be written") as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    for file in leftover:
        file.unlink()
        print(f"{bundle}: removed {file.relative_to(folder)}, of the bundle before")
    print(f"{bundle}: {', '.join(f'{value} {name}' for value, name in enumerate(names))}")


def other_weights(bundle: Path, label_names: Sequence[str]) -> list[Path]:
    """Return the files in `weights` of a bundle that were trained on other labels, with their records."""
    files = []
    for file in sorted((bundle / "weights").glob("*")):
        if file.suffix != ".json" and (record := read_record(file)) and trained_labels(record) != list(label_names):
            files += [file, record_file(file)]
    return files


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(relabel, {"bundle": PATH, "labels": PATH}, sys.argv[1:])
