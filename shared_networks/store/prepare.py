"""Preprocess scans into a store, in parallel and resumable."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import monai
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from tqdm import tqdm

from shared_networks.datasets.names import find_excluded, read_names
from shared_networks.datasets.scans import (
    BadScanError,
    Scan,
    Source,
    find_scans,
    flag_other_channels,
    read_grid,
    read_scan,
)
from shared_networks.errors import InputError, in_one_line
from shared_networks.files import atomic_write, files_state
from shared_networks.processes import process_pool
from shared_networks.store.format import (
    RUN_AGAIN,
    centres_file,
    is_complete,
    volume_bytes,
    volume_file,
    write_array,
    write_volume,
)
from shared_networks.store.runs import Entry, Queue, SharedManifest
from shared_networks.version import __version__

_FORMAT = 1  # to be raised with every change of what is stored, so that old cases are made again
_CENTRES = 4096
_POLL = 0.5  # s between two looks for cases that other runs let go of
_SAMPLE = 1_000_000  # voxels for percentiles
# Measured on a core of a cloud server, for CTs of 1 to 26 million voxels: 0.7 to 1.7 s each.
_SECONDS_A_SOURCE_VOXEL = 4e-8
_SECONDS_A_STORED_VOXEL = 7e-8

logger = logging.getLogger(__name__)

Transform = Callable[[dict[str, Any]], Mapping[Any, Any]]


class Task(NamedTuple):
    """What is the same for all cases: how they are prepared, and where they go."""

    prepared_dir: Path
    preprocessing: Transform
    settings: dict[str, Any]
    min_size: int
    seed: int


def prepare(
    dataset_dir: str,
    prepared_dir: str,
    preprocessing: Transform,
    modality: str,
    spacing: Sequence[float],
    intensity_range: Sequence[float],
    exclude: str = "",
    num_workers: int = 1,
    max_failed: float = 0.05,
    min_size: int = 24,
    seed: int = 0,
) -> None:
    """Preprocess what is missing or has changed, and lists what cannot be prepared.

    A case that fails stays in the store as it was prepared before, unless its source has changed since.

    Args:
        dataset_dir: as :func:`find_scans` takes it.
        prepared_dir: the store; it may hold cases of other data sets, which stay.
        preprocessing: from `{"image": [C, H, W, D]}` in source values to RAS, `spacing` and [0, 1].
        modality: `"CT"` or `"MR"`.
        spacing: in mm, as `preprocessing` makes it.
        intensity_range: HU that become 0 and 1 (CT).
        exclude: a file with names of cases to leave out, and to remove if they are in the store.
        num_workers: processes; 0 prepares in this one.
        max_failed: the share of the cases that may fail.
        min_size: voxels on each axis, resampled, below which a scan is too small.
        seed: of the crop centres.

    Raises:
        InputError: a setting makes no sense, there is no scan, the disk has not the room, a process was killed, or more
            than `max_failed` of the cases failed (the others are prepared all the same).
    """
    if not prepared_dir:
        raise InputError("prepared_dir is not set; pass --prepared_dir FOLDER, the folder to write the store to")
    if modality not in ("CT", "MR"):
        raise InputError(f"modality is {modality!r}; pass --modality CT or --modality MR")
    # How MR is scaled is part of the format, as it has no unit and no window.
    window = {} if modality == "MR" else {"intensity_range": [float(value) for value in intensity_range]}
    settings = {
        "modality": modality,
        "spacing": [float(size) for size in spacing],
        **window,
        "seed": seed,
        "centres": _CENTRES,
        "format": _FORMAT,
    }
    names = read_names(exclude) if exclude else []
    sources = find_scans(dataset_dir)
    flag_other_channels(sources)
    task = Task(Path(prepared_dir).resolve(), preprocessing, settings, min_size, seed)
    task.prepared_dir.mkdir(parents=True, exist_ok=True)
    manifest = SharedManifest(task.prepared_dir)
    with manifest.locked() as entries:
        left_out = _excluded_cases(sources, entries, names)
    wanted = [source for source in sources if source.case not in left_out]
    if not wanted:
        raise InputError(f"{exclude}: leaves out all {len(sources)} cases of {dataset_dir}; name fewer")
    if gone := manifest.remove(left_out):
        print(f"{len(gone)} of the excluded cases removed from the store: {', '.join(sorted(gone))}")
    manifest.remove_leftovers()
    before = set(manifest.entries)
    todo = [source for source in wanted if not _is_current(task, source, manifest.entries.get(source.case))]
    print(f"{len(todo)} cases to prepare, {len(wanted) - len(todo)} already done, {len(left_out)} excluded")
    _report_replaced(task, todo, manifest.entries)
    _check_room(task, todo, manifest.entries, max(num_workers, 1))
    try:
        failed = _prepare_all(task, todo, manifest, num_workers)
    except KeyboardInterrupt:
        raise SystemExit("stopped; run again to go on from here") from None
    manifest.remove_leftovers()
    for path, reason in sources.passed_over.items():
        logger.warning("%s: passed over: %s", path, reason)
    with manifest.locked() as entries:
        manifest.write()
        _report(task.prepared_dir, entries, wanted, failed, len(sources.passed_over), before)
    if len(failed) > max_failed * len(wanted):
        raise InputError(
            f"{len(failed)} of {len(wanted)} cases failed, more than the share of {max_failed:g} that may "
            f"(max_failed); {task.prepared_dir / 'failed.txt'} lists them, the others are prepared"
        )


def prepare_case(task: Task, source: Source, known: Entry | None = None) -> Entry:
    """Preprocess one case and writes its files.

    Args:
        task: how and where.
        source: the scan.
        known: its entry in the manifest, if it has one. Where the bytes of the source and the settings are the same,
            only what the file system says of the source is renewed.

    Returns:
        The entry of the case for the manifest.

    Raises:
        BadScanError: the scan is of no use.
    """
    if source.problem:
        raise BadScanError(source.problem)
    origin: Entry = {
        "source": _origin(source),
        "series": source.series,
        "bytes": sum(map(os.path.getsize, source.files)),
        "state": files_state(source.files),
        "files": len(source.files),
        "sha256": _sha256(source.files),
    }
    if known and known["sha256"] == origin["sha256"] and _fits(task, known):
        return {**known, **origin}
    if known and known["sha256"] != origin["sha256"] and known["source"] != origin["source"]:
        _check_moved(known, origin["source"])
    scan = read_scan(source, task.settings["modality"])
    tensor = MetaTensor(torch.as_tensor(scan.image.astype(np.float32, copy=False)), affine=torch.as_tensor(scan.affine))
    resampled = task.preprocessing({"image": tensor})["image"]
    image, affine = resampled.numpy(), resampled.affine.numpy().astype(float)
    if min(image.shape[1:]) < task.min_size:
        raise BadScanError(f"too small: {image.shape[1:]} voxels resampled, {task.min_size} are needed on each axis")
    foreground = (image > 0).any(0)
    if not foreground.any():
        raise BadScanError("empty: no voxel is above the floor of the intensity window")
    box, resampled_shape = _bounding_box(foreground), list(image.shape)
    image, foreground = image[(slice(None), *box)], foreground[box]
    file = volume_file(task.prepared_dir, source.case)
    file.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState([task.seed, zlib.crc32(source.case.encode())])
    if known:  # if this ends before the new entry is there, the old one must not speak for the new files
        SharedManifest(task.prepared_dir).retract(source.case)
    write_array(centres_file(file), draw_centres(foreground, random))
    write_volume(file, image)
    return {
        "id": source.case,
        "file": str(file.relative_to(task.prepared_dir)),
        **origin,
        **_source_grid(scan),
        "intensity": intensity_statistics(scan.image),
        "resampled_shape": resampled_shape,
        "shape": list(image.shape),
        "spacing": task.settings["spacing"],
        "affine": (affine @ nib.affines.from_matvec(np.eye(3), [axis.start for axis in box])).tolist(),
        "foreground": round(float(foreground.mean()), 4),
        "centres": _CENTRES,
        "settings": task.settings,
        "settings_hash": _settings_hash(task.settings),
        "versions": _versions(),
    }


def draw_centres(
    foreground: NDArray[np.bool_], random: np.random.RandomState, count: int = _CENTRES
) -> NDArray[np.int16]:
    """Draw voxels with replacement.

    Args:
        foreground: `[H, W, D]`, not all false.
        random: generator.
        count: of voxels of either kind.

    Returns:
        `[2, count, 3]`: in the foreground, and in the background (in the foreground too where there is none).
    """
    inside, outside = np.flatnonzero(foreground), np.flatnonzero(~foreground)
    drawn = [
        voxels[random.randint(len(voxels), size=count)] for voxels in (inside, outside if len(outside) else inside)
    ]
    return np.stack(np.unravel_index(np.stack(drawn), foreground.shape), -1).astype(np.int16)


def intensity_statistics(image: NDArray[Any]) -> dict[str, float]:
    """Return minimum, maximum, mean, standard deviation and percentiles (of a million voxels at even steps)."""
    sample = image.reshape(-1)[:: max(1, image.size // _SAMPLE)]
    shares = (0.5, 5, 50, 95, 99.5)
    found = {"min": image.min(), "max": image.max(), "mean": image.mean(dtype=float), "std": image.std(dtype=float)}
    found |= {f"p{share:g}": value for share, value in zip(shares, np.percentile(sample, shares), strict=True)}
    return {name: round(float(value), 4) for name, value in found.items()}


def _prepare_all(task: Task, todo: Sequence[Source], manifest: SharedManifest, num_workers: int) -> dict[str, str]:
    """Preprocess cases, add them to the manifest as they come, and return why others failed."""
    failed = {}
    seconds = 0.5 if sys.stderr.isatty() else 30
    queue = Queue(manifest, todo, lambda source, entry: _is_current(task, source, entry))
    with tqdm(total=len(todo), desc="preparing", unit="case", mininterval=seconds, disable=not todo) as bar:
        try:
            for source, result in _results(task, queue, num_workers):
                bar.update()
                if isinstance(result, dict):
                    manifest.append(result)
                elif result is not None:
                    failed[source.case] = result
                    known = manifest.entries.get(source.case)
                    if known and known["source"] == _origin(source) and _is_outdated(task, source, known):
                        manifest.remove([source.case])
                queue.give_back(source.case)
        finally:
            queue.close()
    return failed


def _results(task: Task, queue: Queue, num_workers: int) -> Iterator[tuple[Source, Entry | str | None]]:
    """Yield entries, the reasons why there is none, or None if another run made it, in the order they get ready."""
    if num_workers == 0 or not queue.waiting:
        while queue.waiting:
            if (taken := queue.take()) is None:
                time.sleep(_POLL)
                continue
            source, known, done = taken
            yield source, None if done else _entry_or_reason(task, source, known)
        return
    pending: dict[Future[Entry | str], Source] = {}
    pool = process_pool(min(num_workers, len(queue.waiting)), _start_worker, task)
    try:
        while queue.waiting or pending:
            # Few at a time, so that an interruption has little to take back, and other runs find enough.
            while len(pending) < 2 * num_workers and (taken := queue.take()):
                source, known, done = taken
                if done:
                    yield source, None
                else:
                    pending[pool.submit(_work, source, known)] = source
            if not pending:  # other runs are at all that is left: they finish it, or are killed and let go of it
                time.sleep(_POLL)
            for future in wait(pending, timeout=_POLL, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield pending.pop(future), result
    except BrokenProcessPool:
        cases = ", ".join(source.case for source in pending.values())
        raise InputError(
            f"a process was killed, mostly for want of memory, at one of {cases}; run again with fewer --num_workers, "
            "which goes on where this stopped, or leave the case out with --exclude"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_task: Task


def _start_worker(task: Task) -> None:
    global _task
    _task = task
    torch.set_num_threads(1)


def _work(source: Source, known: Entry | None) -> Entry | str:
    return _entry_or_reason(_task, source, known)


def _entry_or_reason(task: Task, source: Source, known: Entry | None) -> Entry | str:
    try:
        return prepare_case(task, source, known)
    except BadScanError as error:
        return str(error)
    except MemoryError:
        return "not enough memory for it; run again with fewer --num_workers"
    except InputError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return str(error)
    except OSError as error:
        return f"cannot be read or written ({error}); see to it that the file is there and may be read"
    except Exception as error:  # one odd scan must not end the run
        return f"cannot be prepared ({in_one_line(error)}); export it again or remove the case"


def _check_moved(known: Entry, source: Sequence[str]) -> None:
    """Refuse a case whose id another scan has; of a data set that was moved, the old place is empty."""
    if all(Path(file).exists() for file in known["source"]) and not set(known["source"]) & set(source):
        raise BadScanError(f"the store has another scan under this id, {known['source'][0]}; rename a folder")


def _excluded_cases(sources: Sequence[Source], entries: Mapping[str, Entry], names: Sequence[str]) -> set[str]:
    also = {case: [entry["series"]] if entry["series"] else entry["source"] for case, entry in entries.items()}
    also |= {source.case: [source.series] if source.series else source.files for source in sources}
    found = find_excluded(also, names)
    for name in (name for name, cases in found.items() if not cases):
        logger.warning("%s: to be excluded, but no case is named so", name)
    return {case for cases in found.values() for case in cases}


def _is_current(task: Task, source: Source, entry: Mapping[str, Any] | None) -> bool:
    if entry is None or source.problem or entry["source"] != _origin(source) or not _fits(task, entry):
        return False
    try:
        return bool(entry.get("state") == files_state(source.files))
    except FileNotFoundError:
        return False


def _fits(task: Task, entry: Mapping[str, Any]) -> bool:
    if entry["settings_hash"] != _settings_hash(task.settings) or not is_complete(task.prepared_dir, entry):
        return False
    return bool(min(entry.get("resampled_shape", entry["shape"])[1:]) >= task.min_size)


def _is_outdated(task: Task, source: Source, entry: Entry) -> bool:
    """Return whether a case that failed is gone: its files are not whole, or its source is known to hold other bytes.

    That other settings refuse it says nothing against what was prepared of the same bytes.
    """
    if not is_complete(task.prepared_dir, entry):
        return True
    try:
        return bool(entry.get("state") != files_state(source.files) and entry["sha256"] != _sha256(source.files))
    except OSError:
        return False


def _report_replaced(task: Task, todo: Sequence[Source], entries: Mapping[str, Entry]) -> None:
    """Print which cases will replace those that were prepared with other settings, by what differs."""
    cases_of: dict[str, list[str]] = {}
    for case in (source.case for source in todo if source.case in entries):
        before = entries[case]["settings"]
        changed = [name for name in {**before, **task.settings} if before.get(name) != task.settings.get(name)]
        if changed:
            values = [f"{name} {task.settings.get(name, 'none')}, was {before.get(name, 'none')}" for name in changed]
            cases_of.setdefault("; ".join(values), []).append(case)
    for difference, cases in cases_of.items():
        listed = ", ".join(cases[:10]) + (", ..." if len(cases) > 10 else "")
        print(f"{len(cases)} of them would replace cases prepared with other settings ({difference}): {listed}")


def _check_room(task: Task, todo: Sequence[Source], entries: Mapping[str, Entry], workers: int) -> None:
    """Print what the cases will take of disk and time, from their headers."""
    if not todo:
        return
    with ThreadPoolExecutor(4) as pool:
        grids = tqdm(pool.map(read_grid, todo), "reading headers", len(todo), unit="case", disable=None)
        costs = [_cost(source, grid, task.settings["spacing"]) for source, grid in zip(todo, grids, strict=True)]
    needed = sum(size for size, _ in costs)
    replaced = sum(volume_bytes(entries[source.case]["shape"]) for source in todo if source.case in entries)
    free = shutil.disk_usage(task.prepared_dir).free
    minutes = sum(seconds for _, seconds in costs) / min(workers, len(todo)) / 60
    disk = f"at most {_gigabytes(needed)} of disk (free: {_gigabytes(free)})"
    print(f"{disk}, about {minutes:.1f} min with {workers} process(es)", flush=True)
    if needed - replaced > free:
        raise InputError(
            f"{task.prepared_dir}: needs up to {_gigabytes(needed - replaced)}, but only {_gigabytes(free)} are free; "
            "make room, or pass --prepared_dir on another disk"
        )


def _cost(source: Source, grid: Any, spacing: Sequence[float]) -> tuple[int, float]:
    """Bytes and seconds, at most, for a case; none for one whose header cannot be read."""
    if grid is None:
        return 0, 0.0
    shape, source_spacing = grid
    stored = [int(np.ceil(n * old / new)) for n, old, new in zip(shape, source_spacing, spacing, strict=True)]
    seconds = float(np.prod(shape)) * _SECONDS_A_SOURCE_VOXEL + float(np.prod(stored)) * _SECONDS_A_STORED_VOXEL
    return volume_bytes((source.channels, *stored)), source.channels * seconds


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _report(
    prepared_dir: Path,
    entries: Mapping[str, Entry],
    wanted: Sequence[Source],
    failed: Mapping[str, str],
    passed_over: int,
    before: Collection[str],
) -> None:
    """Print how much is in the store, what is there twice and what failed, and note the latter in failed.txt.

    Of the cases that were there `before`, it is said which failed and stay, and which are gone. What other runs noted
    in failed.txt stays, unless this run tried it again or it has been prepared.
    """
    cases_of: dict[str, list[str]] = {}
    for case, entry in entries.items():
        cases_of.setdefault(entry["sha256"], []).append(case)
    for cases in cases_of.values():
        if len(cases) > 1:
            logger.warning("the same scan under several ids: %s; exclude all but one", ", ".join(sorted(cases)))
    lines = [f"{case}\t{failed[case]}" for case in sorted(failed)]
    note, own = prepared_dir / "failed.txt", {source.case for source in wanted}
    earlier = note.read_text().splitlines() if note.is_file() else []
    others = [line for line in earlier if (case := line.split("\t")[0]) not in own and case not in entries]
    with atomic_write(note, RUN_AGAIN) as file:
        file.write_text("".join(f"{line}\n" for line in sorted([*others, *lines])))
    size = sum(volume_bytes(entry["shape"]) for entry in entries.values())
    source = sum(entry["bytes"] for entry in entries.values())
    if lines:
        print("\n".join([f"{len(lines)} failed:", *(line.replace("\t", ": ") for line in lines)]))
    if kept := sorted(failed.keys() & entries.keys()):
        print(f"{len(kept)} of them stay in the store as they were: {', '.join(kept)}; --exclude FILE removes them")
    if lost := sorted(failed.keys() & set(before) - entries.keys()):
        print(f"{len(lost)} of them left the store, as their source or their files changed: {', '.join(lost)}")
    print(
        f"{len(entries)} cases in {prepared_dir}, {_gigabytes(size)} from {_gigabytes(source)} of scans; "
        f"{len(failed)} failed, {passed_over} passed over"
    )


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    ends = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3)]
    return tuple(slice(int(first), int(last) + 1) for first, last in ends)


def _origin(source: Source) -> list[str]:
    """The files of a case; of a series only their folder, as there are hundreds."""
    return [str(Path(source.files[0]).parent)] if source.series else list(source.files)


def _source_grid(scan: Scan) -> dict[str, Any]:
    return {
        "source_shape": list(scan.image.shape),
        "source_spacing": np.round(nib.affines.voxel_sizes(scan.affine), 6).tolist(),
        "source_axcodes": "".join(nib.aff2axcodes(scan.affine)),
    }


def _sha256(files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _settings_hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _versions() -> dict[str, str]:
    return {
        "hi-end-mae-bundles": __version__,
        "monai": monai.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
