"""Write files whole or not at all, and read JSON, with errors of one line."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared_networks.errors import InputError

UNFINISHED = ".unfinished_"
"""Prefix of a file that is being written; one that is left behind is of a job that was killed or has failed."""

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)

OTHER_FOLDER = "make room there or give another --output_dir"
GO_ON = "nothing saved before is lost. Make room or give another folder, then go on with --resume True"  # of a training


@contextmanager
def atomic_write(file: str | Path, advice: str = OTHER_FOLDER) -> Iterator[Path]:
    """Write beside a file and rename the result to it, so that readers see the old file or the new one.

    Args:
        file: to write; its folder is made.
        advice: what to do if it cannot be written.

    Yields:
        The path to write to, with the same ending, in the same folder.

    Raises:
        InputError: it cannot be written (disk full, no permission); an older file is left unchanged.
    """
    path = Path(file)
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("r+b") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror or error}); {advice}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def files_state(files: Iterable[str | Path]) -> str:
    """Return a digest of names, sizes and times of last change of files, in their order.

    It changes with any of them: of a hundred slices one may be replaced by an older one of the same size.

    Raises:
        OSError: a file cannot be found.
    """
    states = [(Path(file).name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [os.stat(file)]]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def is_unwritable(error: BaseException) -> bool:
    """Return whether an error is that results cannot be written, as none of the scans after it could."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _UNWRITABLE:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def write_csv(file: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; see :func:`atomic_write`."""
    with atomic_write(file) as path, path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def write_json(file: str | Path, content: Mapping[str, Any], advice: str = OTHER_FOLDER) -> None:
    """Write strict JSON (no NaN); see :func:`atomic_write`."""
    with atomic_write(file, advice) as path:
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(file: str | Path) -> Any:
    """Read JSON.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); write it again") from None


def check_output_folder(folder: str | Path, setting: str = "output_dir") -> None:
    """Refuse a folder that cannot be written to, before any work is done. Make nothing.

    Args:
        folder: of results.
        setting: that names it.

    Raises:
        InputError: the folder, or the one that it would be made in, is read-only or no folder.
    """
    path = Path(folder).absolute()
    existing = next(path for path in (path, *path.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "read-only" if existing.is_dir() else "not a folder"
        raise InputError(f"{folder}: cannot be written, as {existing} is {reason}; give another --{setting}")


def check_tables(record: Path, keys: Collection[str], tables: Iterable[str]) -> None:
    """Refuse to replace tables that are of no earlier run, as far as the record beside them says.

    Args:
        record: a JSON object, which every run writes before its tables.
        keys: that the records of such runs have.
        tables: names of the other files that a run writes, in the folder of the record.

    Raises:
        InputError: a table or a record of someone else is there.
    """
    there = [path for path in (record, *map(record.with_name, tables)) if os.path.lexists(path)]
    try:
        content = read_json(record) if there else None
    except InputError:
        content = None
    if there and not (isinstance(content, dict) and set(keys) <= content.keys()):
        raise InputError(
            f"{there[0]}: is of no earlier run, as far as {record.name} says, and would be lost; give another "
            "--output_dir, or rename it"
        )


def check_beginning(table: str | Path, first: str) -> None:
    """Refuse to replace a table of another program or user, where no record tells whose it is.

    Args:
        table: that is to be written.
        first: what such a table begins with.

    Raises:
        InputError: it is there and does not.
    """
    if not os.path.lexists(table):
        return
    if os.path.isfile(table):
        with open(table, "rb") as stream:
            if stream.read(len(first.encode())) == first.encode():
                return
    raise InputError(
        f"{table}: does not begin with {first}, so no earlier run wrote it, and it would be lost; "
        "give another --output_dir, or rename it"
    )
