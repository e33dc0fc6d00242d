"""Know which results are there already, and of what they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_networks.datasets.record import file_digest
from shared_networks.files import atomic_write


def made_with(stamp: str, checkpoints: Sequence[str | Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that results depend on, as JSON reads it back.

    Args:
        stamp: of the scan, see :func:`shared_networks.inference.predict.scan_stamp`.
        checkpoints: files of the weights.
        settings: all else, by name.
    """
    weights = [f"{file}: {file_digest(file)}" for file in checkpoints]
    return dict(json.loads(json.dumps({"scan": stamp, "weights": weights, **settings}, default=str)))


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
        content = {"made_with": made_with(data["stamp"], self.checkpoints, self.settings)}
        with atomic_write(self.output_dir / f"{data['name']}_{self.kind}.json") as part:
            part.write_text(json.dumps(content, indent=1) + "\n")
        return data

    def is_done(self, name: str, stamp: str) -> bool:
        """Return whether results exist of a name, this scan, these weights and settings."""
        try:
            content = json.loads((self.output_dir / f"{name}_{self.kind}.json").read_text())
        except (OSError, ValueError):
            return False
        return content.get("made_with") == made_with(stamp, self.checkpoints, self.settings) and all(
            (self.output_dir / f"{name}{ending}").is_file() for ending in self.endings
        )
