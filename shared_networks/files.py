"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared_networks.errors import InputError


@contextmanager
def replaced_when_whole(file: Path, unfinished: Path) -> Iterator[Path]:
    """Write beside a file and put the result in its place when the block ends, on disk as a whole.

    Args:
        file: to write; its folder is made, an older file is left as it was if anything fails.
        unfinished: path in the same folder to write to meanwhile; only a killed process leaves it behind.

    Yields:
        `unfinished`.

    Raises:
        OSError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with unfinished.open("r+b") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextmanager
def explain_unwritable(file: str | Path) -> Iterator[None]:
    """Turn a failure to write a file into one line.

    Raises:
        InputError: in place of an `OSError`, or of the `RuntimeError` that torch raises for a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise InputError(
            f"{file}: cannot be written ({reason}); nothing saved before is lost. Make room or give another folder, "
            "then go on with --resume True"
        ) from error


def check_output_folder(folder: str | Path, setting: str = "output_dir") -> None:
    """Refuses a folder that cannot be written to, before any work is done. Makes nothing.

    Args:
        folder: of results.
        setting: that names it.

    Raises:
        InputError: it, or what it would be made in, is read-only or no folder.
    """
    path = Path(folder).absolute()
    there = next(path for path in (path, *path.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "read-only" if there.is_dir() else "not a folder"
        raise InputError(f"{folder}: cannot be written, as {there} is {reason}; give another --{setting}")
