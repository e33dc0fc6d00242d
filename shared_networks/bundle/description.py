"""What metadata and card of a bundle say of the scans that it takes: it follows from the configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from monai.bundle import ConfigParser

PREPARATION = ("modality", "spacing", "intensity_range", "img_size")
"""Settings that say how a bundle prepares scans."""

_MODALITY = "(?:CT or MR|CT|MR)"


def scans_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of :data:`PREPARATION` that a config has, evaluated."""
    parser = ConfigParser(deepcopy(dict(config)))  # it writes references anew
    return {name: parser.get_parsed_content(name) for name in PREPARATION if name in config}


def modality_of(scans: Mapping[str, Any]) -> str:
    """Return the modality as text; without one, scans of either are taken."""
    return str(scans["modality"] or "CT or MR")


def input_text(scans: Mapping[str, Any]) -> str:
    """Say what the values of a network's input are.

    Args:
        scans: of :func:`scans_of`, an inference config's.
    """
    modality = modality_of(scans)
    if modality == "MR":
        return "MR, scaled to 0 to 1 by percentiles of the body and clipped"
    low, high = scans["intensity_range"]
    unit = "Hounsfield units" if modality == "CT" else "values"
    return f"{modality}, {unit} from {low:g} to {high:g} scaled to 0 to 1 and clipped"


def described_metadata(metadata: Mapping[str, Any], scans: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata that say of the scans what the configs do.

    Args:
        metadata: content of `configs/metadata.json`, left unchanged.
        scans: of :func:`scans_of`, the inference config's.
    """
    modality, data_format = modality_of(scans), metadata["network_data_format"]
    image, pred = data_format["inputs"]["image"], data_format["outputs"]["pred"]
    image = {
        **image,
        "format": "hounsfield" if modality == "CT" else "magnitude",
        "modality": modality,
        "spatial_shape": list(scans["img_size"]),
    }
    texts = {key: _with_modality(metadata[key], modality) for key in ("name", "task") if key in metadata}
    if "image_classes" in metadata:
        channels = metadata["image_classes"].partition(": ")[0]  # the rest follows
        texts["image_classes"] = f"{channels}: {input_text(scans)}"
    return {
        **metadata,
        **texts,
        "network_data_format": {
            **data_format,
            "inputs": {**data_format["inputs"], "image": image},
            "outputs": {**data_format["outputs"], "pred": {**pred, "spatial_shape": list(scans["img_size"])}},
        },
    }


def described_card(card: str, scans: Mapping[str, Any]) -> str:
    """Return a card whose title, first paragraph and table of inputs have the modality of the configs.

    Args:
        card: Markdown.
        scans: of :func:`scans_of`, the inference config's.
    """
    modality = modality_of(scans)
    title, line, rest = card.partition("\n")
    article = "an" if modality == "MR" else "a"
    rest = re.sub(rf"\ban? {_MODALITY}(?= scan in,)", f"{article} {modality}", rest)
    return _with_modality(title, modality) + line + re.sub(rf"(?<=\| ){_MODALITY}(?=, 0 to 1 \|)", modality, rest)


def _with_modality(text: str, modality: str) -> str:
    """Put another modality where a text says `in CT` or `on CT`."""
    return re.sub(rf"(?<=\b[io]n ){_MODALITY}\b", modality, text)
