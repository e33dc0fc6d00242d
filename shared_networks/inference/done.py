"""Know which results are there already, of what they were made, and which files are no results at all."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_networks.datasets.pairs import source_file
from shared_networks.datasets.record import file_digest
from shared_networks.datasets.scans import Source
from shared_networks.errors import InputError
from shared_networks.files import OTHER_FOLDER, UNFINISHED, read_json, write_json


def read_note(file: Path) -> dict[str, Any]:
    """Return what a file says of the results of a scan; nothing if it is missing or cannot be read."""
    try:
        content = read_json(file)
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


class Results:
    """Results of scans in a folder, where a record beside them, `NAME_KIND.json`, says whose they are.

    The record is written last: with it, a scan is done. Until then an unfinished one claims the files, so that a job
    that was killed knows them again.

    Attributes:
        kind: of results.
        output_dir: their folder.
        checkpoints: files of the weights.
        settings: all else that results depend on, by name.
    """

    kind: str
    output_dir: Path
    checkpoints: Sequence[str | Path]
    settings: Mapping[str, Any]

    def targets(self, name: str) -> list[str]:
        """Return the names of all files that may be written of a scan, the main one first, without the record."""
        raise NotImplementedError

    def file(self, name: str) -> Path:
        """Return the record of a scan."""
        return self.output_dir / f"{name}_{self.kind}.json"

    def made_with(self, stamp: str) -> dict[str, Any]:
        """Return all that results depend on, as JSON reads it back: the scan, the weights and the settings.

        Args:
            stamp: of the scan, see :func:`shared_networks.inference.predict.scan_stamp`.
        """
        weights = [f"{file}: {file_digest(file)}" for file in self.checkpoints]
        return dict(json.loads(json.dumps({"scan": stamp, "weights": weights, **self.settings}, default=str)))

    def check(self, name: str, source: Source, inputs: Collection[str]) -> None:
        """Refuse to replace what is no earlier result of the same scan.

        A result is of the scan that its record names. Where that scan is gone, the data set has moved.

        Args:
            name: of the results.
            source: the scan.
            inputs: files of all scans that are read, none of which may be written.

        Raises:
            InputError: such a file is there.
        """
        record = self.file(name)
        note = read_note(record) or read_note(_unfinished(record))
        files = note.get("files") if "made_with" in note else None
        recorded = {record.name, *map(str, files)} if isinstance(files, list) else set()
        folder = self.output_dir.resolve()
        for path in (self.output_dir / file for file in (*self.targets(name), record.name)):
            if not os.path.lexists(path):
                continue
            scan = str(note.get("scan", "")) if path.name in recorded else ""
            if str(folder / path.name) in inputs:
                what = "is a scan of this run"
            elif not scan:
                what = "is no result of this scan, as far as records say"
            elif os.path.exists(scan) and scan not in source.files and not os.path.samefile(scan, source.files[0]):
                what = f"is a result of another scan, {scan}"
            else:
                continue
            raise InputError(f"{path}: {what}, and would be lost; give another --output_dir, or rename one of them")

    def claim(self, name: str, scan: str) -> None:
        """Note whose the results of a scan will be, and remove its earlier ones, which are of other settings.

        The main result stays until it is replaced. Files that no record names stay, too.

        Args:
            name: of the results.
            scan: file of the scan.

        Raises:
            InputError: one cannot be removed, or nothing can be written.
        """
        record, files = self.file(name), self.targets(name)
        note = read_note(record)
        claim = {**note, "scan": scan, "files": files, "made_with": "being made"}
        write_json(record if note else _unfinished(record), claim)
        for file in map(str, note.get("files", ())):
            if file != files[0] and file == Path(file).name and file.startswith(f"{name}_"):
                try:
                    (self.output_dir / file).unlink(missing_ok=True)
                except OSError as error:
                    raise InputError(
                        f"{self.output_dir / file}: cannot be replaced ({error.strerror}); {OTHER_FOLDER}"
                    ) from error


def _unfinished(record: Path) -> Path:
    return record.with_name(f"{UNFINISHED}{record.name}")


class NoteDone(Results):
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

    def targets(self, name: str) -> list[str]:
        """Return the names of the files of a scan, without the note."""
        return [f"{name}{ending}" for ending in self.endings]

    def begin(self, data: dict[str, Any]) -> dict[str, Any]:
        """Claim the files of a case of :class:`shared_networks.inference.predict.Scans`, before any is written."""
        self.claim(data["name"], source_file(data["scan"]))
        return data

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Note that a case is complete."""
        name = data["name"]
        content = {"scan": source_file(data["scan"]), "files": self.targets(name)}
        write_json(self.file(name), {**content, "made_with": self.made_with(data["stamp"])})
        return data

    def is_done(self, name: str, stamp: str) -> bool:
        """Return whether results exist of a name, this scan, these weights and settings."""
        same = read_note(self.file(name)).get("made_with") == self.made_with(stamp)
        return same and all((self.output_dir / file).is_file() for file in self.targets(name))
