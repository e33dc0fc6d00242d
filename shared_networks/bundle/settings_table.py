"""Write the table of all settings, from the configs' own values and descriptions.

    python -m shared_networks.bundle.settings_table

Run in a clone of the repository; it writes `docs/settings.md`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

from monai.bundle import ConfigComponent

from shared_networks.bundle.derive import FACTS
from shared_networks.bundle.release import ROOT, bundle_names
from shared_networks.errors import report_in_one_line
from shared_networks.files import atomic_write, read_json
from shared_networks.settings.command_line import call_with_options
from shared_networks.settings.kinds import Kind
from shared_networks.settings.table import SETTINGS

INTRODUCTION = """# Settings

Made from the configs by `python -m shared_networks.bundle.settings_table`; do not edit.

`--NAME VALUE` sets a setting. Booleans may be written yes and no, on and off, 1 and 0. One number stands for three
equal ones. Paths are taken as typed. FLARE22's bundle has the settings of BTCV's."""


def settings_table(root: Path = ROOT) -> str:
    """Return Markdown: a section for each config, a row for each setting.

    Args:
        root: source tree. Bundles that are derived from another one are left out.

    Raises:
        InputError: `root` has no bundles.
    """
    sections = [INTRODUCTION]
    for bundle in bundle_names(root):
        if (root / bundle / FACTS).is_file():
            continue
        for file in sorted((root / bundle / "configs").glob("*.json")):
            config = read_json(file)
            rows = [_row(name, kind, config) for name, kind in SETTINGS.items() if _is_set(name, config)]
            if rows and file.stem != "tiny":
                head = ["| setting | default | takes | meaning |", "|---|---|---|---|"]
                sections.append(f"## {bundle}: {file.name}\n\n" + "\n".join([*head, *rows]))
    return "\n\n".join(sections) + "\n"


def _is_set(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a config has a setting; those of the network are listed where it is trained."""
    if name.startswith("network_def#") and "optimizer" not in config:
        return False
    return name in config or _part(name, config) is not None


def _part(name: str, config: Mapping[str, Any]) -> tuple[Any, str] | None:
    """Return the value of a component's argument, such as `split#fold`, and what the component says of it."""
    *path, argument = name.split("#")
    component: Any = config
    for key in path:
        component = component.get(key) if isinstance(component, dict) else None
    if not path or not isinstance(component, dict) or str(component.get(argument, "@"))[:1] == "@":
        return None  # a reference to a setting of its own
    return component[argument], _argument_text(component.get("_target_", ""), argument)


def _argument_text(target: str, argument: str) -> str:
    """Return what the docstring of a component says of an argument."""
    made: Any = locate(str(ConfigComponent({"_target_": target}).resolve_module_name()))
    document = inspect.getdoc(inspect.unwrap(made)) or ""
    found = re.search(rf"^    {argument}: (.+(?:\n {{8,}}.+)*)", document, re.MULTILINE)
    text = " ".join(found[1].split()) if found else ""
    return re.sub(r":\w+:`(?:\w+\.)*(\w+)`", r"`\1`", text)


def _row(name: str, kind: Kind, config: Mapping[str, Any]) -> str:
    part = None if name in config else _part(name, config)
    value, description = part or (config[name], config.get(f"_desc_{name}", ""))
    if isinstance(value, dict):
        description, value = value.get("_desc_", description), "computed"
    elif isinstance(value, str) and value[:1] in ("$", "@"):
        value = "computed"
    else:
        value = "none" if value in ("", None) else f"`{value}`"
    expected = kind.expected if isinstance(kind.expected, str) else "a device of the machine, such as cpu or cuda:0"
    cells = (f"`--{name}`", value, expected, description)
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def write_table() -> None:
    """Write `docs/settings.md` of the source tree.

    Raises:
        InputError: it cannot be written.
    """
    file = ROOT / "docs" / "settings.md"
    with atomic_write(file, "run in a clone that can be written") as unfinished:
        unfinished.write_text(settings_table(), encoding="utf-8")
    print(f"{file}: written")


if __name__ == "__main__":
    report_in_one_line()
    call_with_options(write_table, {}, sys.argv[1:])
