from __future__ import annotations

from pathlib import Path

import pytest

from shared_networks.datasets.memory import free_memory

MEMORY = "MemTotal:       16000 kB\nMemFree:         100 kB\nMemAvailable:    9000 kB\nHugePages_Total:       0\n"
KB = 1024


def system(root: Path, **files: str) -> Path:
    """What Linux says of itself, below a folder; `__` stands for `/`."""
    for name, text in {"proc__meminfo": MEMORY, **files}.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def group(folder: str, limit: str, taken: str, files: int, version: int = 2) -> dict[str, str]:
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    stat = f"anon 5\n{'total_' if version == 1 else ''}inactive_file {files}\n"
    top = "sys__fs__cgroup" + folder
    return {f"{top}__{names[0]}": limit, f"{top}__{names[1]}": taken, f"{top}__memory.stat": stat}


def test_free_memory_is_that_of_the_system_or_of_the_control_group(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None  # no Linux
    assert free_memory(system(tmp_path / "none")) == 9000 * KB
    own = {"proc__self__cgroup": "0::/job/7\n"}
    unlimited = group("__job__7", "max\n", "4000000\n", 0)
    assert free_memory(system(tmp_path / "max", **own, **unlimited)) == 9000 * KB
    limited = group("__job__7", "5000000\n", "3000000\n", 1_000_000)
    assert free_memory(system(tmp_path / "own", **own, **limited)) == 3_000_000
    outer = group("__job", "5000000\n", "4900000\n", 0)
    assert free_memory(system(tmp_path / "outer", **own, **limited, **outer)) == 100_000
    full = group("__job__7", "5000000\n", "5000001\n", 0)
    assert free_memory(system(tmp_path / "full", **own, **full)) == 0
    loose = group("__job__7", "50000000\n", "3000000\n", 0)
    assert free_memory(system(tmp_path / "loose", **own, **loose)) == 9000 * KB


def test_containers_and_the_first_version_of_control_groups(tmp_path: Path) -> None:
    own = {"proc__self__cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/docker/abc\n"}
    limited = group("__memory", "4000000\n", "3000000\n", 500_000, version=1)  # at the top, not where the host has it
    assert free_memory(system(tmp_path / "docker", **own, **limited)) == 1_500_000
    within = group("__memory__docker__abc", "3500000\n", "3000000\n", 500_000, version=1)
    assert free_memory(system(tmp_path / "host", **own, **limited, **within)) == 1_000_000
    elsewhere = group("__memory__other", "10\n", "0\n", 0, version=1)
    assert free_memory(system(tmp_path / "other", **own, **elsewhere)) == 9000 * KB


def test_this_system_says_how_much_is_free() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("not Linux")
    free = free_memory()
    assert free is not None
    assert 0 < free < 2**50


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["limit", "taken", "stat"])
@pytest.mark.parametrize(
    "content", ["", "\n", "max\n", "garbage\n", "12 34\n", "-1\n", "²\n", b"\xff\xfe\n", "9" * 5000, None]
)
def test_files_of_a_control_group_that_cannot_be_used_raise_nothing(
    tmp_path: Path, version: int, name: str, content: str | bytes | None
) -> None:
    own = {"proc__self__cgroup": ("4:memory:/job\n", "0::/job\n")[version - 1]}
    folder = ("__memory__job", "__job")[version - 1]
    root = system(tmp_path, **own, **group(folder, "5000000\n", "3000000\n", 1_000_000, version))
    assert free_memory(root) == 3_000_000
    files = {"limit": ("memory.limit_in_bytes", "memory.max"), "taken": ("memory.usage_in_bytes", "memory.current")}
    file = (
        root / "sys/fs/cgroup" / ("memory/job", "job")[version - 1] / files.get(name, ["memory.stat"] * 2)[version - 1]
    )
    file.unlink()
    if content is None:
        file.mkdir()  # there, but not to be read, not even by root
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert free_memory(root) == {"limit": 9000 * KB, "taken": 5_000_000, "stat": 2_000_000}[name]


@pytest.mark.parametrize(
    "content", ["", "garbage\n", "0:\n", "0::/../..\n", "1:name=systemd:/x\n\n0::", "0::/a\0b\n", None]
)
def test_a_process_whose_control_group_cannot_be_told_has_what_the_system_has(
    tmp_path: Path, content: str | None
) -> None:
    root = system(tmp_path)
    file = root / "proc/self/cgroup"
    if content is None:
        file.mkdir(parents=True)
    else:
        file.parent.mkdir(parents=True)
        file.write_text(content)
    assert free_memory(root) == 9000 * KB


@pytest.mark.parametrize("content", ["", "MemAvailable:\n", "MemAvailable: many kB\n", "MemTotal: 5 kB\n", None])
def test_a_system_that_does_not_say_is_none(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "proc" / "meminfo"
    file.parent.mkdir()
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    assert free_memory(tmp_path) is None
