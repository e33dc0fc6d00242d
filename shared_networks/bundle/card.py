"""The model card at the top of a released bundle, which Hugging Face shows: the bundle's own card with front matter."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any

import yaml

_GUIDE = "](../../docs/"
_RELATIVE_LINK = re.compile(r"(?<=\]\()(?!\w+:|[#/])[^)#]+")


def relative_links(card: str) -> list[str]:
    """Return the files that a card links to or shows, relative to its folder."""
    return _RELATIVE_LINK.findall(card)


def released_card(card: str) -> str:
    """Let a card's links lead to the guides beside it in a release, not in the repository.

    Args:
        card: text of `docs/README.md` in the repository.
    """
    return card.replace(_GUIDE, "](")


def note_on_release(card: str, note: str) -> str:
    """Put a paragraph below the title of a card."""
    title, rest = card.split("\n", 1)
    return f"{title}\n\n{note}\n{rest}"


def with_ckpt_dir(card: str) -> str:
    """Let the commands of a card train into a folder `trained`, where `models` holds the weights of a release.

    Args:
        card: Markdown; a command is in a `bash` fence, and may go over several lines that end in a backslash.
    """

    def trained(command: re.Match[str]) -> str:
        evaluates = "configs/train.json" not in command[0] or "configs/evaluate.json" in command[0]
        return command[0] if evaluates else f"{command[0]} --ckpt_dir trained"

    def fence(block: re.Match[str]) -> str:
        return re.sub(r"^(?:.*\\\n)*.*monai\.bundle run(?:.*\\\n)*.*$", trained, block[0], flags=re.MULTILINE)

    return re.sub(r"^```bash\n.*?^```", fence, card, flags=re.MULTILINE | re.DOTALL)


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
