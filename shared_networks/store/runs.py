"""Let several runs fill one store at a time, on one machine or on several that share a file system."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from shared_networks.datasets.scans import Source
from shared_networks.files import UNFINISHED
from shared_networks.store.format import (
    add_entries,
    append_entry,
    centres_file,
    manifest_file,
    volume_file,
    write_manifest,
)

_END = 65536  # bytes by which a manifest is known again, more than a line has

Entry = dict[str, Any]


class SharedManifest:
    """The manifest of a store that other runs write too.

    All locks are the operating system's: a run that is killed lets go of them.

    Args:
        prepared_dir: the store; it exists.

    Attributes:
        entries: by case, as of the last look at the file.
    """

    def __init__(self, prepared_dir: Path) -> None:
        self.folder = prepared_dir
        self.entries: dict[str, Entry] = {}
        self._lock = FileLock(prepared_dir / ".lock")
        self._number, self._read, self._end = -1, 0, b""  # of the file, how much of it is in `entries`, and how it ends

    @contextmanager
    def locked(self) -> Iterator[dict[str, Entry]]:
        """Keep other runs from the manifest; yield the entries as they are now."""
        with self._lock:
            self._look()
            yield self.entries

    def append(self, entry: Entry) -> None:
        """Add or replace the entry of a case; it is on the disk when this returns."""
        with self.locked() as entries:
            append_entry(self.folder, entry)
            entries[entry["id"]] = entry
            self._mark()

    def retract(self, case: str) -> None:
        """Say that the files of a case are about to be replaced, so that its entry is none of theirs."""
        with self._lock:
            append_entry(self.folder, {"id": case, "removed": True})

    def remove(self, cases: Iterable[str]) -> list[str]:
        """Remove cases with their files and return them; those that are not there are passed over."""
        with self.locked() as entries:
            gone = [case for case in cases if entries.pop(case, None)]
            if gone:
                self.write()
            for case in gone:
                for path in case_files(self.folder, case):
                    path.unlink(missing_ok=True)
        return gone

    def write(self) -> None:
        """Write all entries anew, sorted, a line each; only while it is locked."""
        write_manifest(self.folder, self.entries)
        self._mark()

    def claim(self, case: str) -> FileLock | None:
        """Take a case, so that no other run prepares it; None if another has it. Give it back by :meth:`give_back`."""
        file = volume_file(self.folder, case)
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_name(f".{file.name}.lock"), blocking=False)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    @staticmethod
    def give_back(claim: FileLock) -> None:
        """Let other runs have a case again."""
        Path(claim.lock_file).unlink(missing_ok=True)
        claim.release()

    def remove_leftovers(self) -> None:
        """Remove files that belong to no entry, as a killed run leaves them, but for cases that a run is at."""
        root = self.folder / "cases"
        for path in sorted(root.rglob(".*.npy.lock")):
            case = (path.relative_to(root).parent / path.name[1 : -len(".npy.lock")]).as_posix()
            if claim := self.claim(case):
                self.give_back(claim)
        for path in sorted(root.rglob("*.npy")):
            name = path.name.removeprefix(UNFINISHED).removesuffix(".npy").removesuffix(".centres")
            case = (path.relative_to(root).parent / name).as_posix()
            if (path in case_files(self.folder, case) and case in self.entries) or not (claim := self.claim(case)):
                continue
            with self.locked() as entries:
                if case not in entries or path not in case_files(self.folder, case):
                    path.unlink(missing_ok=True)
            self.give_back(claim)

    def _look(self) -> None:
        """Read what other runs wrote since the last look."""
        file = manifest_file(self.folder)
        if not file.is_file():
            self.entries, self._number, self._read, self._end = {}, -1, 0, b""
            return
        with file.open("rb") as stream:
            stream.seek(self._read - len(self._end))
            same = stream.read(len(self._end)) == self._end and file.stat().st_ino == self._number
            if not same:  # it was written anew
                stream.seek(0)
                self.entries = {}
            add_entries(self.entries, file, stream.read())
        self._mark()

    def _mark(self) -> None:
        """Remember how far the manifest has been read: to its last whole line."""
        file = manifest_file(self.folder)
        self._number = file.stat().st_ino
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _END))
            end = stream.read()
        whole = end[: end.rfind(b"\n") + 1]  # what a crash left of a line will be cut off by the next one to write
        self._read, self._end = (size - len(end) + len(whole), whole) if whole else (0, b"")


def case_files(prepared_dir: Path, case: str) -> tuple[Path, Path]:
    """Return the files of a case: voxels and centres."""
    file = volume_file(prepared_dir, case)
    return file, centres_file(file)


class Queue:
    """The cases that a run has to prepare, less those that other runs are at or were quicker with.

    Args:
        manifest: of the store.
        sources: to prepare.
        is_done: tells of a source and its entry whether another run has prepared it by now.
    """

    def __init__(
        self,
        manifest: SharedManifest,
        sources: Iterable[Source],
        is_done: Callable[[Source, Mapping[str, Any] | None], bool],
    ) -> None:
        self.manifest, self.is_done = manifest, is_done
        self.waiting = deque(sources)
        self.claims: dict[str, FileLock] = {}

    def take(self) -> tuple[Source, Entry | None, bool] | None:
        """Take the next case that no other run is at.

        Returns:
            The source, its entry so far, and whether there is nothing left to do; None if other runs are at all that
            wait, or if none waits.
        """
        for _ in range(len(self.waiting)):
            source = self.waiting.popleft()
            if claim := self.manifest.claim(source.case):
                self.claims[source.case] = claim
                with self.manifest.locked() as entries:
                    entry = entries.get(source.case)
                return source, entry, self.is_done(source, entry)
            self.waiting.append(source)
        return None

    def give_back(self, case: str) -> None:
        """Say that a case is in the manifest, or cannot be."""
        self.manifest.give_back(self.claims.pop(case))

    def close(self) -> None:
        """Give back whatever is taken."""
        for case in list(self.claims):
            self.give_back(case)
