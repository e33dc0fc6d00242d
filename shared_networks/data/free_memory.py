"""How much main memory is left to a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Of a control group, in version 1 and 2: its limit, what is taken, and what of that is files that can be dropped.
_GROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_GROUP_2 = ("memory.max", "memory.current", "inactive_file")


def free_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes that this process could still get: of the system, or of its control group where that has less.

    Args:
        root: of the file system.

    Returns:
        `None` where the system does not say (not Linux).
    """
    available = _numbers(root / "proc/meminfo").get("MemAvailable:")
    return None if available is None else min([1024 * available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yields what is left of the limit of each control group that the process is in, however deep."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, (limit, taken, files) = root / "sys/fs/cgroup", _GROUP_2
        if controllers:
            top, (limit, taken, files) = top / "memory", _GROUP_1
        group = top / path.strip("/")
        # In a container the path may be the host's, and the container's own group lies at the top.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and "".join(_lines(folder / limit)).isdigit():  # else "max", or no such file
                left, used = (int(_lines(folder / name)[0]) for name in (limit, taken))
                yield max(0, left - used + _numbers(folder / "memory.stat").get(files, 0))


def _numbers(file: Path) -> dict[str, int]:
    """The second word of each line by its first."""
    return {words[0]: int(words[1]) for words in map(str.split, _lines(file))}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
