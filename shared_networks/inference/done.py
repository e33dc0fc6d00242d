"""Know which results are there already, and of what they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_networks.datasets.record import file_digest
from shared_networks.errors import InputError
from shared_networks.files import read_json, write_json


def made_with(stamp: str, checkpoints: Sequence[str | Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that results depend on, as JSON reads it back.

    Args:
        stamp: of the scan, see :func:`shared_networks.inference.predict.scan_stamp`.
        checkpoints: files of the weights.
        settings: all else, by name.
    """
    weights = [f"{file}: {file_digest(file)}" for file in checkpoints]
    return dict(json.loads(json.dumps({"scan": stamp, "weights": weights, **settings}, default=str)))


def read_note(file: Path) -> dict[str, Any]:
    """Return what a file says of the results of a scan; nothing if it is missing or cannot be read."""
    try:
        content = read_json(file)
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


class NoteDone:
    """Write `NAME_KIND.json` once the results of a scan are there: it says of what they were made.

    Args:
        kind: of results.
        endings: of the files of a scan, after its name.
        output_dir: their folder.
        checkpoints: files of the weights.
        settings: all else that results depend on, by name.
    """

    def __init__(
        self,
        kind: str,
        endings: Sequence[str],
        output_dir: str | Path,
        checkpoints: Sequence[str | Path],
        settings: Mapping[str, Any],
    ) -> None:
        self.kind, self.endings, self.output_dir = kind, list(endings), Path(output_dir)
        self.checkpoints, self.settings = list(checkpoints), dict(settings)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Note that a case of :class:`shared_networks.inference.predict.Scans` is complete."""
        write_json(self.file(data["name"]), {"made_with": made_with(data["stamp"], self.checkpoints, self.settings)})
        return data

    def is_done(self, name: str, stamp: str) -> bool:
        """Return whether results exist of a name, this scan, these weights and settings."""
        same = read_note(self.file(name)).get("made_with") == made_with(stamp, self.checkpoints, self.settings)
        return same and all((self.output_dir / f"{name}{ending}").is_file() for ending in self.endings)

    def file(self, name: str) -> Path:
        """Return the file of the note of a case."""
        return self.output_dir / f"{name}_{self.kind}.json"
