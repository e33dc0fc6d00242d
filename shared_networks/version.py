"""The version of the package, what of a bundle is released, and the check that both are of one release."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_networks.errors import InputError

__version__ = "0.1.0"

RELEASED_FILES = ("LICENSE", "large_files.yml", "configs/[!.]*", "docs/[!.]*", "weights/[!.]*")
"""What of a bundle's folder is in zips and in the wheel, beside weights that are given."""


def released_content(file: Path) -> bytes:
    """Return what is published of a file of :data:`RELEASED_FILES`: all of it, but for names in a record of weights.

    Raises:
        InputError: a `.json` file beside the weights is no record.
    """
    content = file.read_bytes()
    if (file.parent.name, file.suffix) != ("weights", ".json"):
        return content
    try:
        return record_text(released_record(json.loads(content)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: no record of a model ({type(error).__name__}: {error}); remove it") from None


def record_text(record: Mapping[str, Any]) -> bytes:
    """Return a record as the content of its file."""
    return (json.dumps(record, indent=1) + "\n").encode()


def released_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's record without names of cases, as they may be names of people.

    Scans stay known by their digests, so that a report on those that trained the model is still refused.

    Args:
        record: of :func:`shared_networks.datasets.record.read_record`, or its file's whole content. That also holds
            the record of older weights where a writing was broken off.
    """

    def nameless(cases: Mapping[str, str]) -> dict[str, str]:
        return {digest or f"unknown {number}": digest for number, digest in enumerate(sorted(cases.values()))}

    released = dict(record)
    for part in ("train", "validation", "test"):
        released[part] = nameless(record[part])
    released["seen_before"] = {part: nameless(cases) for part, cases in record["seen_before"].items()}
    released["split"] = {key: value for key, value in record["split"].items() if key != "val_cases"}
    if record.get("replaces"):
        released["replaces"] = released_record(record["replaces"])
    return released


def bundle_names(root: Path) -> list[str]:
    """Return the names of the bundles in a folder, such as a source tree.

    Raises:
        InputError: it has none.
    """
    names = sorted(file.parts[-3] for file in root.glob("*/configs/metadata.json"))
    if not names:
        raise InputError(f"{root}: no bundles beside shared_networks; run in a clone of the repository")
    return names


def check_copy(bundle_root: str | Path) -> None:
    """Refuse a bundle whose own copy of this package is not the one that runs, byte for byte.

    A release has its copy in the bundle, a clone beside it. MONAI Label serves all its bundles from one process, in
    which the first one's copy is everyone's. In a clone, Python prefers a package that is installed.

    Args:
        bundle_root: the bundle's folder; without a copy in it or beside it there is nothing to compare.

    Raises:
        InputError: a file differs, or only one of the copies has it.
    """
    root, running = Path(os.path.abspath(str(bundle_root))), Path(__file__).parent
    folder = next((path for path in (root, root.parent) if (path / "shared_networks" / "version.py").is_file()), None)
    if folder is None or (own := folder / "shared_networks").samefile(running):
        return
    copies = [{file.relative_to(place): file.read_bytes() for file in place.rglob("*.py")} for place in (own, running)]
    differing = sorted(file for file in {**copies[0], **copies[1]} if copies[0].get(file) != copies[1].get(file))
    if differing:
        advice = (
            "give all Hi-End-MAE bundles of a server the same release"
            if folder == root
            else f"commands in this clone would not run its own code: pip install -e {folder}"
        )
        raise InputError(
            f"{own}: another version than {running}, which is loaded already: {len(differing)} file(s) differ, such as "
            f"{differing[0]}; {advice}"
        )
