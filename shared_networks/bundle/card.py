"""The model card at the top of a released bundle, which Hugging Face shows: the bundle's own card with front matter."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any

import yaml

_GUIDE = "](../../docs/"
_RELATIVE_LINK = re.compile(r"(?<=\]\()(?!\w+:|[#/])[^)#]+")


def released_card(card: str) -> str:
    """Let a card's links lead to the guides beside it in a release, not in the repository.

    Args:
        card: text of `docs/README.md` in the repository.
    """
    return card.replace(_GUIDE, "](")


def model_card(card: str, metadata: Mapping[str, Any], folder: str = "docs") -> str:
    """Make `README.md` from a bundle's card and metadata.

    Args:
        card: text of `docs/README.md` of the release, see :func:`released_card`.
        metadata: of the bundle.
        folder: that the card's links are relative to.

    Returns:
        The card with YAML front matter before it, and with links that hold from the bundle's folder.
    """
    data_format = metadata["network_data_format"]
    segments = data_format["outputs"]["pred"]["format"] == "segmentation"
    front_matter = {
        "license": "apache-2.0",
        "library_name": "monai",
        "pipeline_tag": "image-segmentation" if segments else "image-feature-extraction",
        "tags": ["monai", "medical", data_format["inputs"]["image"]["modality"].lower(), "hi-end-mae"],
    }
    text = _RELATIVE_LINK.sub(lambda link: posixpath.normpath(posixpath.join(folder, link[0])), card)
    return f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n\n{text}"
