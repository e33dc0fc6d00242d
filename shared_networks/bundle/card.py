"""The model card at the top of a released bundle, which Hugging Face shows: the bundle's own card with front matter."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_GUIDE = "](../../docs/"
_RELATIVE_LINK = re.compile(r"(?<=\]\()(?!\w+:|[#/])[^)#]+")


def relative_links(card: str) -> list[str]:
    """Return the files that a card links to or shows, relative to its folder."""
    return _RELATIVE_LINK.findall(card)


def labels_section(label_names: Sequence[str]) -> str:
    """Return the section of a card that lists label values and names, in two columns of a Markdown table."""
    names = [name.replace("|", r"\|") for name in label_names]
    half = -(-len(names) // 2)
    rows = []
    for value in range(half):
        other = value + half
        right = f"{other} | {names[other]}" if other < len(names) else " | "
        rows.append(f"| {value} | {names[value]} | {right} |")
    return "\n".join(["| value | organ | value | organ |", "|---|---|---|---|", *rows])


def card_labels(card: str) -> dict[int, str]:
    """Return the labels that the section of a card lists, by value; see :func:`labels_section`."""
    cells = re.findall(r"\| *(\d+) *\| *((?:\\\||[^|\n])+?) *(?=\|)", card_section(card, "Labels"))
    return {int(value): name.replace(r"\|", "|") for value, name in cells}


def card_section(card: str, name: str) -> str:
    """Return the text below the heading `## NAME` of a card; empty where it has none."""
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def general_card(name: str, label_names: Sequence[str], references: Sequence[str], recipe: str) -> str:
    """Make the card of a segmentation bundle of which nothing is known but its labels.

    Args:
        name: its title.
        label_names: in order of value, background first.
        references: of the method, and of the UNETR.
        recipe: section on the network and its training.
    """
    return f"""# {name}

This bundle fine-tunes a segmentation network: a CT scan in, the [labels](#labels) below out. The network is a UNETR [2]
whose vision transformer was pre-trained without labels by `hi_end_mae_pretrain`. The method is Hi-End-MAE by Tang et
al. [1]. This is an independent implementation of it as a MONAI Bundle.

## Intended use and limits

For research and teaching. Not a medical device: not for diagnosis or any other clinical use. Test a model on scans of
your own kind before you rely on it.

## Data

This bundle includes none. [Data](../../docs/data.md) describes layouts, checks, folds and few-shot splits, and MR.

## Network and recipe

{recipe}

## Inputs and outputs

| | shape | meaning |
|---|---|---|
| input | `[B, 1, H, W, D]`, sizes a multiple of the patch size | CT, 0 to 1 |
| output | `[B, {len(label_names)}, H, W, D]` | logits, a channel a label value; softmax gives probabilities |

## Labels

{labels_section(label_names)}

## Commands

Run them in this folder. Train, from the encoder of `../hi_end_mae_pretrain`; `--pretrained_encoder FILE` takes another
one, `--pretrained_encoder ''` starts from scratch:

```bash
python -m monai.bundle run --config_file configs/train.json --dataset_dir /data/OWN
```

Given last, `configs/tiny.json` and `configs/small.json` make the network of any command smaller.
[Training](../../docs/training.md) describes recipes for few labels, many GPUs and memory.

Dice, Hausdorff distance, surface Dice and volumes by case and organ, on the scans' own grids:

```bash
python -m monai.bundle run --config_file "['configs/train.json','configs/evaluate.json']" --dataset_dir /data/OWN
```

Segment `imagesTs`, or any folder of NIfTI files or DICOM series, to labels on each scan's own grid:

```bash
python -m monai.bundle run --config_file configs/inference.json --dataset_dir /data/OWN
```

[Inference](../../docs/inference.md) describes results, uncertainty, ensembles, memory and export.
[Settings](../../docs/settings.md) lists every setting with its default.

## Performance

None is reported.

## Changelog

`changelog` in [metadata.json](../configs/metadata.json).

## References

If you use this bundle, cite [1].

{chr(10).join(f"{number}. {reference}" for number, reference in enumerate(references, 1))}
"""


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
