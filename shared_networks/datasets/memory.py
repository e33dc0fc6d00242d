"""Tell how much memory is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Of a control group, in version 1 and 2: its limit, what is taken, and what of that is files that can be dropped.
_GROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_GROUP_2 = ("memory.max", "memory.current", "inactive_file")


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process could still get: of the system, or of its control group where that has less.

    Files that are missing, unreadable or of another form limit nothing; no error is raised.

    Args:
        root: of the file system.

    Returns:
        `None` where the system does not say (not Linux).
    """
    available = _numbers(root / "proc/meminfo").get("MemAvailable:")
    return None if available is None else min([1024 * available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what is left of the limit of each control group that the process is in, however deep."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top, (limit, taken, files) = root / "sys/fs/cgroup", _GROUP_2
        if controllers:
            top, (limit, taken, files) = top / "memory", _GROUP_1
        group = top / path.strip("/")
        # In a container the path may be the host's, and the container's own group lies at the top.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (most := _number(_lines(folder / limit))) is not None:  # else "max"
                if (used := _number(_lines(folder / taken))) is None:
                    yield most  # at least there is no more
                else:
                    yield min(most, max(0, most - used + _numbers(folder / "memory.stat").get(files, 0)))


def _numbers(file: Path) -> dict[str, int]:
    """The second word of each line by its first, where that is a number."""
    found = {words[0]: _number(words[1:2]) for words in map(str.split, _lines(file)) if words}
    return {name: number for name, number in found.items() if number is not None}


def _number(words: list[str]) -> int | None:
    """The only word, if it is a number of bytes that can be."""
    try:
        [word] = words
        return int(word) if word.strip().isdecimal() else None
    except ValueError:  # no word or several; more digits than Python converts
        return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except (OSError, ValueError):  # no file, no permission; a name that cannot be
        return []
