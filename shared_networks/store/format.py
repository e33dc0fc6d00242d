"""The prepared store: scans as training needs them, laid out so that a random crop costs little to read.

    STORE/manifest.jsonl                  a line a case: where it came from, what was done, what is in it
    STORE/failed.txt                      cases of the last run that were refused, with the reasons
    STORE/cases/ID.npy                    voxels, `[C, H / 8, W / 8, D / 32, 8, 8, 32]` uint16
    STORE/cases/ID.centres.npy            `[2, N, 3]` int16: voxels on which to centre crops, foreground then background

A voxel is 65535 times the scaled intensity, so a step is 0.0065 HU for a window of 425 HU. Only the bounding box of the
body is stored, padded with zeros to whole blocks; its shape is in the manifest. A block of 8 x 8 x 32 voxels is one
page of 4096 bytes, and so is the header in front of them.

Chosen by measurement, on one core of a cloud server with AVX-512, 233 x 167 x 267 voxels a volume, 96^3 crops, all in
the page cache; `python -m tests.benchmarks.loader` measures the first two rows, and `docs/results/speed.md` has them:

| | times as fast | MB read a crop: 8, 1 a volume | size |
|---|---|---|---|
| this, augmented, 8 or 1 a volume | 12, 12 | 1.6, 2.5 | 1 |
| torch.load of float32 and MONAI, augmented, 8 a volume | 1 | 5.2 | 2 |
| this, mapped and not read, augmented, 8 or 1 a volume | 11, 6 | 1.6, 2.5 | 1 |
| memory map in the order of the voxels, not augmented | 39 | 2.2, 5.3 | 1 |
| blosc2, 32^3 zstd or 16^3 LZ4, not augmented | 5 or 10 | | 1/1.8 or 1/1.6 |

In the order of the voxels a crop drags in the rows beside it, which costs more than it saves as soon as a store is
larger than the memory; compression costs a dependency, and time once crops are augmented too.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared_networks.datasets.pairs import channels_note
from shared_networks.datasets.validate import channel_problem
from shared_networks.errors import InputError
from shared_networks.files import atomic_write

LEVELS = 65535
_BLOCK = (8, 8, 32)
_PAGE = 4096
RUN_AGAIN = "make room and run again, which goes on"
_PREPARE = "python -m monai.bundle run --config_file configs/prepare.json --dataset_dir FOLDER --prepared_dir"


def write_volume(file: Path, image: NDArray[np.float32]) -> None:
    """Write a volume so that it is there as a whole or not at all.

    Args:
        file: `NAME.npy`; its folder must exist.
        image: `[C, H, W, D]` in [0, 1].
    """
    grid = _grid(image.shape)
    padded = np.zeros((len(image), *np.multiply(grid, _BLOCK)), np.uint16)
    padded[:, : image.shape[1], : image.shape[2], : image.shape[3]] = np.rint(image * np.float32(LEVELS))
    (h, w, d), (bh, bw, bd) = grid, _BLOCK
    write_array(file, padded.reshape(-1, h, bh, w, bw, d, bd).transpose(0, 1, 3, 5, 2, 4, 6))


def write_array(file: Path, array: NDArray[Any]) -> None:
    """Write an array as `.npy` whose values begin at its second page; it is there as a whole or not at all."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    room = _PAGE - 10
    with atomic_write(file, RUN_AGAIN) as unfinished, unfinished.open("wb") as stream:
        stream.write(np.lib.format.magic(1, 0) + struct.pack("<H", room) + f"{header!r:<{room - 1}}\n".encode())
        stream.write(np.ascontiguousarray(array).data)


def read_volume(file: str | Path, shape: Sequence[int]) -> NDArray[np.float32]:
    """Read a whole volume.

    Args:
        file: `NAME.npy` of the store.
        shape: `[C, H, W, D]`, from the manifest.

    Returns:
        `[C, H, W, D]` in [0, 1].

    Raises:
        InputError: the file is missing, unreadable or not of this shape.
    """
    with open_volume(file, shape) as volume:
        return read_box(volume, (0, 0, 0), shape[1:]) * np.float32(1 / LEVELS)


def volume_bytes(shape: Sequence[int]) -> int:
    """Return the size of the file of a volume `[C, H, W, D]`."""
    return _PAGE + 2 * shape[0] * int(np.prod(_grid(shape)) * np.prod(_BLOCK))


def centres_file(file: str | Path) -> Path:
    """Return where the crop centres of a volume are: `NAME.centres.npy` beside `NAME.npy`."""
    return Path(file).with_suffix(".centres.npy")


def volume_file(prepared_dir: str | Path, case: str) -> Path:
    """Return the file of a case's voxels."""
    return Path(prepared_dir) / "cases" / f"{case}.npy"


def manifest_file(prepared_dir: str | Path) -> Path:
    """Return the file of a store's manifest."""
    return Path(prepared_dir) / "manifest.jsonl"


def manifest_entries(prepared_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Read the manifest of a store.

    A last line without end, which a crash may leave, is ignored; of several lines of a case the last one counts, and
    a line with `removed` says that the case has none.

    Returns:
        For each case id its entry; nothing where there is no manifest.

    Raises:
        InputError: a line is no JSON object with an `id`, or the id leads out of the store, where files of it would be
            read and, by `exclude`, removed.
    """
    file = manifest_file(prepared_dir)
    entries: dict[str, dict[str, Any]] = {}
    if file.is_file():
        add_entries(entries, file, file.read_bytes())
    return entries


def add_entries(entries: dict[str, dict[str, Any]], file: Path, content: bytes) -> None:
    """Bring entries up to date by further lines of a manifest; see :func:`manifest_entries`."""
    *lines, _ = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entries[entry["id"]] = entry
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}: line {number} is no entry; delete the line and prepare again") from None
        path = PurePath(str(entry["id"]))
        if not isinstance(entry["id"], str) or path.is_absolute() or path.drive or not path.parts or ".." in path.parts:
            raise InputError(
                f"{file}: line {number}: the id {entry['id']!r} leads out of the store; delete the line, and use "
                "stores of people whom you trust"
            )
        if entry.get("removed"):
            del entries[entry["id"]]


def append_entry(prepared_dir: str | Path, entry: Mapping[str, Any]) -> None:
    """Add a line to the manifest; it is on the disk when this returns."""
    line = json.dumps(entry).encode() + b"\n"
    with manifest_file(prepared_dir).open("a+b") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":  # what a crash left of a line must not spoil this one
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def write_manifest(prepared_dir: str | Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a manifest anew, sorted by id; it is there as a whole or the old one stays."""
    file = manifest_file(prepared_dir)
    with atomic_write(file, RUN_AGAIN) as unfinished, unfinished.open("w") as stream:
        stream.writelines(json.dumps(entries[case]) + "\n" for case in sorted(entries))


def read_manifest(prepared_dir: str | Path | None) -> list[dict[str, Any]]:
    """List the cases of a store for a MONAI data set.

    Returns:
        Sorted by id: `{"image": file, "case": id, "shape": [C, H, W, D], "sha256": digest}`, of the scan's own files.

    Raises:
        InputError: there is no store, no case in it, or files of it are missing or cut short.
    """
    if not prepared_dir:
        raise InputError(f"prepared_dir is not set; pass --prepared_dir FOLDER, made by {_PREPARE} FOLDER")
    entries = manifest_entries(prepared_dir)
    if not entries:
        raise InputError(f"{manifest_file(prepared_dir)}: no prepared case; make some: {_PREPARE} {prepared_dir}")
    if lost := [case for case, entry in entries.items() if not is_complete(prepared_dir, entry)]:
        listed = ", ".join(sorted(lost)[:10]) + (", ..." if len(lost) > 10 else "")
        raise InputError(
            f"{prepared_dir}: files of {len(lost)} of {len(entries)} cases are missing or cut short ({listed}); "
            "prepare again, which makes only those"
        )
    return [
        {
            "image": str(volume_file(prepared_dir, case)),
            "case": case,
            "shape": entry["shape"],
            "sha256": entry.get("sha256", ""),
        }
        for case, entry in sorted(entries.items())
    ]


def is_complete(prepared_dir: str | Path, entry: Mapping[str, Any]) -> bool:
    """Return whether an entry is whole, and its files are there at their full size."""
    file = volume_file(prepared_dir, entry["id"])
    try:
        sizes = {file: volume_bytes(entry["shape"]), centres_file(file): _PAGE + 12 * entry["centres"]}
        return all(path.stat().st_size == size for path, size in sizes.items())
    except (OSError, LookupError, TypeError, ValueError):  # no such file; an entry without shape or centres
        return False


def check_prepared(
    prepared_dir: str | Path,
    spacing: Sequence[float],
    intensity_range: Sequence[float] | None = None,
    modality: str | None = None,
    in_channels: int | None = None,
    cases: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Check that a store was prepared as training expects its images.

    Args:
        prepared_dir: the store.
        spacing: voxel size in mm.
        intensity_range: HU that become 0 and 1; not compared for MR, whose scans are scaled by their percentiles.
        modality: that scans are scaled by.
        in_channels: channels that the network takes.
        cases: not used; what overlays give to the check of scans that are not prepared.

    Raises:
        InputError: a case has other settings, or another number of channels.
    """
    entries = manifest_entries(prepared_dir)
    examples = {entry["shape"][0]: case for case, entry in entries.items()}
    if len(examples) > 1:
        listed = ", ".join(f"{case} has {channels}" for channels, case in sorted(examples.items()))
        raise InputError(
            f"{prepared_dir}: cases of several numbers of channels, {listed}; prepare a store for each number"
            f"{channels_note(entries[examples[max(examples)]].get('source', ()))}"
        )
    for case, entry in entries.items():
        if in_channels is not None and entry["shape"][0] != in_channels:
            problem = channel_problem(entry["shape"][0], in_channels, entry.get("source", ()))
            raise InputError(f"{prepared_dir}: {case} {problem}")
        settings = entry["settings"]
        if modality is not None and settings["modality"] != modality:
            raise InputError(
                f"{prepared_dir}: {case} was prepared as {settings['modality']}, training has modality {modality}; "
                f"prepare another store, or train with --modality {settings['modality']}"
            )
        wanted = {"spacing": spacing, "intensity_range": intensity_range}
        for name in ("spacing", "intensity_range") if settings["modality"] == "CT" else ("spacing",):
            expected = wanted[name]
            if expected is not None and list(map(float, settings[name])) != list(map(float, expected)):
                raise InputError(
                    f"{prepared_dir}: {case} was prepared with {name} {list(settings[name])}, training has "
                    f"{list(expected)}; prepare another store with --{name} '{list(expected)}', or train with "
                    f"--{name} '{list(settings[name])}'"
                )


class Volume(NamedTuple):
    """An open file of `[channels, *grid]` blocks."""

    file: str | Path
    descriptor: int
    channels: int
    grid: tuple[int, ...]


def _grid(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // block) for n, block in zip(shape[1:], _BLOCK, strict=True))


@contextmanager
def open_volume(file: str | Path, shape: Sequence[int]) -> Iterator[Volume]:
    """Open the file of a volume.

    Args:
        file: `NAME.npy` of the store.
        shape: `[C, H, W, D]`, from the manifest.

    Raises:
        InputError: the file is missing, unreadable or not of this shape; also if that shows only inside the block.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # else Windows changes line ends
        try:
            if (size := os.fstat(descriptor).st_size) != volume_bytes(shape):
                raise InputError(f"{file}: {size} bytes are not {volume_bytes(shape)}; prepare again")
            yield Volume(file, descriptor, shape[0], _grid(shape))
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        lost = error.filename or file
        raise InputError(f"{lost}: no such file; prepare again, which makes only what is missing") from None
    except OSError as error:
        raise InputError(
            f"{error.filename or file}: cannot be read ({error.strerror}); look at disk and permissions, or "
            "prepare again"
        ) from None


def _read_at(descriptor: int, buffer: Any, offset: int) -> int:
    """Read into a buffer from an offset; returns how many bytes the system gave."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows: no descriptor is shared by threads, so two calls do as well
    room = memoryview(buffer).cast("B")
    given = os.read(descriptor, len(room))
    room[: len(given)] = given
    return len(given)


def _read_on(volume: Volume, run: NDArray[np.uint16], offset: int, count: int) -> None:
    """Fill the rest of a run of blocks that begins at an offset, of which the system gave `count` bytes at first."""
    rest: Any = run.reshape(-1).view(np.uint8)
    while count < len(rest):
        if not (more := _read_at(volume.descriptor, rest[count:], offset + count)):
            end = f"{volume.file}: ends at byte {offset + count}"
            raise InputError(f"{end}, {len(rest) - count} short: it was cut while it was read; prepare again")
        count += more


def _block_range(start: Sequence[int], size: Sequence[int], grid: Sequence[int]) -> list[tuple[int, int]]:
    return [(s // b, min(-(-(s + n) // b), g)) for s, n, b, g in zip(start, size, _BLOCK, grid, strict=True)]


def _runs(volume: Volume, ranges: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Yield where in the file the blocks of a box begin, for each run of them along the last axis."""
    (h0, h1), (w0, w1), (d0, _) = ranges
    rows, columns, depth = volume.grid
    for channel in range(volume.channels):
        for h in range(h0, h1):
            for w in range(w0, w1):
                yield _PAGE * (1 + ((channel * rows + h) * columns + w) * depth + d0)


def prefetch(volume: Volume, start: Sequence[int], size: Sequence[int]) -> None:
    """Ask the disk for all of a crop at once; otherwise it would come run by run, and its neighbourhood with it."""
    if hasattr(os, "posix_fadvise"):
        ranges = _block_range(start, size, volume.grid)
        length = _PAGE * (ranges[2][1] - ranges[2][0])
        for offset in _runs(volume, ranges):
            os.posix_fadvise(volume.descriptor, offset, length, os.POSIX_FADV_WILLNEED)


def read_box(volume: Volume, start: Sequence[int], size: Sequence[int]) -> NDArray[np.uint16]:
    """Read a box, `[C, *size]`, which must lie inside the volume."""
    ranges = _block_range(start, size, volume.grid)
    (h0, h1), (w0, w1), (d0, d1) = ranges
    blocks = np.empty((volume.channels, h1 - h0, w1 - w0, d1 - d0, *_BLOCK), "<u2")
    # Read and not mapped: faults of mapped pages take longer, above all at one crop a volume.
    for run, offset in zip(blocks.reshape(-1, d1 - d0, *_BLOCK), _runs(volume, ranges), strict=True):
        if (count := _read_at(volume.descriptor, run, offset)) < run.nbytes:
            _read_on(volume, run, offset, count)
    # 32 voxels as one item of 64 bytes: half the time of copying them one by one.
    runs = blocks.view("V64")[..., 0].transpose(0, 1, 4, 2, 5, 3)
    bh, bw, bd = _BLOCK
    whole = np.ascontiguousarray(runs).view("<u2").reshape(len(runs), (h1 - h0) * bh, (w1 - w0) * bw, (d1 - d0) * bd)
    h, w, d = (s - first * b for s, (first, _), b in zip(start, ((h0, h1), (w0, w1), (d0, d1)), _BLOCK, strict=True))
    return whole[:, h : h + size[0], w : w + size[1], d : d + size[2]]
