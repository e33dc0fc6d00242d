"""Write a segmentation bundle that is another one with other labels: FLARE22's from BTCV's.

    python -m shared_networks.bundle.derive --bundle hi_end_mae_flare_seg

The bundle's `facts.yaml` names the bundle it is made from, its labels, validation cases and metadata, and holds the
sections of its card that differ.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shared_networks.bundle.card import labels_section, relative_links
from shared_networks.bundle.config_format import format_config
from shared_networks.bundle.relabel import RELABELLED, relabelled
from shared_networks.datasets.labels import checked_names
from shared_networks.errors import InputError, report_in_one_line
from shared_networks.files import atomic_write, read_json
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import PATH

FACTS = "facts.yaml"
_NEEDED = {"derived_from": str, "label_names": list, "val_cases": list, "metadata": dict, "words": dict, "card": dict}
_COPIED = ("LICENSE", "configs/logging.conf")


def derived_files(bundle: str | Path) -> dict[str, str]:
    """Make all files of a bundle that follow from its facts.

    Args:
        bundle: folder of the bundle, with `facts.yaml`; the bundle that it is made from lies beside it.

    Returns:
        Texts by path in the bundle.

    Raises:
        InputError: the facts cannot be read or lack an entry, the other bundle is missing, or the card links to a file
            that does not exist; and as :func:`check_texts`.
    """
    file = Path(bundle) / FACTS
    try:
        facts = yaml.safe_load(file.read_text(encoding="utf-8"))
        wrong = [name for name, kind in _NEEDED.items() if not isinstance(facts.get(name), kind)]
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{file}: not readable as facts of a bundle ({error}); see the one of FLARE22") from None
    if wrong:
        raise InputError(f"{file}: {', '.join(wrong)} missing or of another kind; see the one of FLARE22")
    check_texts(facts, file)
    source = Path(bundle).resolve().parent / facts["derived_from"]
    configs = {config.stem: read_json(config) for config in sorted((source / "configs").glob("*.json"))}
    if missing := [name for name in RELABELLED if name not in configs]:
        raise InputError(f"{source}: has no configs/{missing[0]}.json; give derived_from a segmentation bundle")
    configs |= relabelled(configs, facts["label_names"], facts["val_cases"], facts["metadata"])
    files = {f"configs/{name}.json": format_config(content) for name, content in configs.items()}
    files |= {name: (source / name).read_text(encoding="utf-8") for name in _COPIED}
    card = (source / "docs" / "README.md").read_text(encoding="utf-8")
    sections = {**facts["card"], "Labels": labels_section(facts["label_names"])}
    files["docs/README.md"] = derived_card(card, sections, facts["words"])
    folder = Path(bundle).resolve()
    linked = {link: Path(os.path.abspath(folder / "docs" / link)) for link in relative_links(files["docs/README.md"])}
    made = {folder / path for path in files}
    if missing := sorted(link for link, target in linked.items() if target not in made and not target.exists()):
        raise InputError(
            f"{folder / 'docs'}: {', '.join(missing)} not there, to which the card links; add them, or change the "
            f"section in {FACTS}"
        )
    return files


def check_texts(facts: Mapping[str, Any], file: Path) -> None:
    """Refuse facts in which YAML reads a name as something else, or labels that are no bundle's.

    Args:
        facts: content of `facts.yaml`, whose entries are of the right kind.
        file: for the message.

    Raises:
        InputError: a name or text is a number, a date or a truth value to YAML, such as 0035 and yes; the labels are
            fewer than two, alike, or do not begin with `background`.
    """
    texts = {name: facts[name] for name in ("label_names", "val_cases")}
    texts |= {name: [*facts[name], *facts[name].values()] for name in ("words", "card")}
    for name, values in texts.items():
        if other := [value for value in values if not isinstance(value, str)]:
            raise InputError(
                f"{file}: {name}: YAML reads {other[0]!r}, which is no text; quote it as it is meant, such as '0035'"
            )
    checked_names(facts["label_names"], f"{file}: label_names")
    if facts["label_names"][0] != "background":
        raise InputError(f"{file}: label_names: begin with {facts['label_names'][0]!r}; value 0 is background")


def derived_card(card: str, sections: Mapping[str, str], words: Mapping[str, str]) -> str:
    """Make a card from another bundle's.

    Args:
        card: Markdown, with sections under headings `## NAME`.
        sections: new texts of sections, by name.
        words: replaced in all other sections, such as `BTCV` by `FLARE22`.

    Raises:
        InputError: the card has no section of a name.
    """
    parts = re.split(r"^(## .+)$", card, flags=re.MULTILINE)
    names = [heading.removeprefix("## ") for heading in parts[1::2]]
    if unknown := [name for name in sections if name not in names]:
        raise InputError(f"{FACTS}: card: there is no section {unknown[0]!r}; there are {', '.join(names)}")

    def reworded(text: str) -> str:
        for old, new in words.items():
            text = text.replace(old, new)
        return text

    made = reworded(parts[0])
    for heading, name, text in zip(parts[1::2], names, parts[2::2], strict=True):
        body = f"\n\n{sections[name].strip()}\n\n" if name in sections else reworded(text)
        made += reworded(heading) + body
    return made.rstrip() + "\n"


def derive(bundle: str) -> None:
    """Write configs and card of a bundle from its `facts.yaml` and the bundle that it is made from.

    Args:
        bundle: folder of the bundle.

    Raises:
        InputError: as :func:`derived_files`, or a file cannot be written.
    """
    for path, text in derived_files(bundle).items():
        with atomic_write(Path(bundle) / path, "give --bundle a folder that can be written") as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    print(f"{bundle}: written")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(derive, {"bundle": PATH}, sys.argv[1:])
