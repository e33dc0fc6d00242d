"""Write `docs/settings.md`, the settings of all bundles, from their configs. Run in a clone of the repository:

python -m shared_networks.bundle.settings_table
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from shared_networks.bundle.release import ROOT
from shared_networks.errors import report_in_one_line
from shared_networks.files import atomic_write, read_json
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import PATH, Kind
from shared_networks.settings.table import SETTINGS
from shared_networks.version import bundle_names

Row = tuple[str, str, str, str]
"""Setting, default, what it takes and what it means, as Markdown."""

_FIRST = ("train", "evaluate", "inference")
_LEFT_OUT = ("metadata", "small", "tiny", "multi_gpu_train")
"""Facts of the bundle, and overlays without settings of their own."""
_REFERENCES = [f"@{name}" for name in SETTINGS]
_HEADER = "| setting | default | takes | meaning |\n|---|---|---|---|"
_INTRODUCTION = """# Settings

`--NAME VALUE` on the command line replaces a default. A name that does not exist is refused, and so is a value that a
setting cannot take.

- A default that begins with `$` or `@` is an expression of the config. `computed` marks the result of a component.
- A name with `#` is an argument of a component. Give it in full, such as `--split#fold 0`.
- Paths are taken as typed, also with `#` or `$` in them.
- True and False may also be written yes and no, on and off, 1 and 0. One number stands for three equal ones.

A program writes this page from the configs: `python -m shared_networks.bundle.settings_table`.
"""


def settings_page(root: Path = ROOT) -> str:
    """Return the page with the settings of each config of each bundle.

    A bundle whose configs have the same settings as an earlier bundle's lists only what differs.

    Args:
        root: source tree with the bundles.

    Raises:
        InputError: the tree has no bundles.
    """
    sections = [_INTRODUCTION]
    earlier: dict[str, tuple[dict[str, list[str]], dict[str, list[Row]]]] = {}
    for bundle in sorted(bundle_names(root), key=lambda name: ("pretrain" not in name, name)):
        configs = bundle_settings(root / bundle)
        names = {config: [row[0] for row in rows] for config, rows in configs.items()}
        like = next((other for other, (known, _) in earlier.items() if known == names), "")
        sections.append(f"## {bundle}\n")
        if like:
            same = {(config, row) for config, rows in earlier[like][1].items() for row in rows}
            rows = [row for config, own in configs.items() for row in own if (config, row) not in same]
            sections.append(f"As `{like}`, but for:\n\n{_table(list(dict.fromkeys(rows)))}")
        else:
            sections += [f"### {config}.json\n\n{_table(rows)}" for config, rows in configs.items()]
        earlier[bundle] = names, configs
    return "\n".join(sections)


def bundle_settings(bundle: Path) -> dict[str, list[Row]]:
    """Return the settings of a bundle, by the config that declares them, those of training first.

    Args:
        bundle: folder with `configs`.
    """
    files = {file.stem: file for file in (bundle / "configs").glob("*.json") if file.stem not in _LEFT_OUT}
    order = sorted(files, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    found = {name: _rows(read_json(files[name])) for name in order}
    return {name: rows for name, rows in found.items() if rows}


def _rows(config: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, kind in SETTINGS.items():
        path, _, argument = name.rpartition("#")
        part = config
        for key in path.split("#") if path else []:
            part = part.get(key, {}) if isinstance(part, dict) else {}
        if name in config:  # an overlay writes it so
            part, argument = config, name
        if not isinstance(part, dict) or argument not in part:
            continue
        value = part[argument]
        if value not in _REFERENCES:  # else another setting is handed on
            meaning = described(config, name, value, part)
            rows.append((f"`{name}`", _default(value), _cell(_taken(kind)), _cell(meaning)))
    return rows


def described(config: Mapping[str, Any], name: str, value: Any, part: Mapping[str, Any]) -> str:
    """Return what a setting means.

    Args:
        config: whole.
        name: of the setting.
        value: its default; a component says in `_desc_` what it makes.
        part: component or config with the setting. The docstring of a component's target describes its arguments.

    Returns:
        The first description out of `_desc_NAME` of the config, `_desc_` of the value and the docstring; else nothing.
    """
    if text := config.get(f"_desc_{name}", ""):
        return str(text)
    if isinstance(value, dict):
        return str(value.get("_desc_", ""))
    target = part.get("_target_", "")
    return argument_of(locate(target), name.rpartition("#")[2]) if target.startswith("shared_networks.") else ""


def argument_of(target: Any, name: str) -> str:
    """Return what a docstring says of an argument, or nothing.

    Args:
        target: class or function; of one that wraps another the other's docstring is read.
        name: of the argument.
    """
    text = inspect.getdoc(inspect.unwrap(target)) or ""
    section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    found = re.search(rf"^    {name}: (.*?)(?=\n    \w+:|\Z)", section[1] if section else "", re.MULTILINE | re.DOTALL)
    words = " ".join(found[1].split()) if found else ""
    return re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", words).replace("`", "`").rstrip(".")


def _taken(kind: Kind) -> str:
    """What a setting takes, the same on every machine."""
    return kind.expected if isinstance(kind.expected, str) else "a device, such as cpu or cuda:0"


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return "computed"
    if value in ("", None, []):
        return "none"
    return f"`{_cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _table(rows: Sequence[Row]) -> str:
    return "\n".join([_HEADER, *(f"| {' | '.join(row)} |" for row in rows), ""])


def write_settings_page(output: str = str(ROOT / "docs" / "settings.md")) -> None:
    """Write the page of settings.

    Args:
        output: file to write.

    Raises:
        InputError: the tree has no bundles, or the file cannot be written.
    """
    text = settings_page()
    with atomic_write(Path(output), "give another --output") as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    print(f"{output}: written")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(write_settings_page, {"output": PATH}, sys.argv[1:])
