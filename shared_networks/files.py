"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
